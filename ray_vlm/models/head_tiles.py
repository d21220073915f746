"""TRL's log-probability head as it runs on CUDA, for a rehearsal on tensors of the CPU that have shapes and no memory.

TRL's `kernels/chunked_logprob.py` goes through the vocabulary in tiles. On CUDA one tile exists, in the dtype of the
arithmetic: Triton kernels read it, and overwrite it with its gradient, and matrix products of half precision are summed
in float32 without copies. On CPUs each tile has four or five float32 copies, and the weights of the tile one more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_KERNELS = ("_forward_tile", "_backward_tile")  # torch's form of the two Triton kernels


@contextmanager
def cuda_tiles() -> Iterator[None]:
    """Let TRL's head allocate in the body what it allocates on CUDA. Operations are counted as before; values are not
    computed, so it is for tensors without values only."""
    from trl.kernels import chunked_logprob

    names = (*_KERNELS, "_addmm_fp32")
    original = {name: getattr(chunked_logprob, name) for name in names}
    try:
        for name in _KERNELS:
            setattr(chunked_logprob, name, _in_place)
        chunked_logprob._addmm_fp32 = _add_product  # type: ignore[assignment]
        yield
    finally:
        for name, function in original.items():
            setattr(chunked_logprob, name, function)


def _in_place(*tensors: object, **options: object) -> None:
    """Stand for a kernel that writes into its arguments."""


def _add_product(total: "Tensor", left: "Tensor", right: "Tensor") -> None:
    """Stand for `total += left @ right` with a float32 `total`, from which nothing is copied: its operands here are one
    number each, in the shapes of the real ones."""
    number = total.new_empty(())
    total.addmm_(number.expand(left.shape), number.expand(right.shape))
