"""Float64 arithmetic for code that requests float32, and a check that no narrower number takes part.

Transformers, TRL and this package's trainers cast to float32 by name (RMSNorm, rotary embeddings, the log-probability
head, losses, the adapter). In float32 two correct implementations differ by rounding, and the difference depends on the
machine; in float64 they agree to about 1e-13, so a difference of 1e-9 is a fault. `arithmetic` replaces every request
for float32 in its block by float64, for all code alike.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

NARROW = {torch.float32, torch.float16, torch.bfloat16}
_run_backward = torch.autograd._engine_run_backward


class _Widen(TorchFunctionMode):
    """Calls of torch functions with float32 replaced by float64."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = [torch.float64 if value is torch.float32 else value for value in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*wide, **named)

    def run_backward(self, *args: Any, **options: Any) -> Any:
        """The autograd engine's pass with this mode on, so that the Python code of autograd functions sees it (on a CPU
        it runs in this thread). `Tensor.backward` itself is a call that the mode handles, and it is off meanwhile."""
        with self:
            return _run_backward(*args, **options)


class NarrowNumbers(TorchDispatchMode):
    """Count the operations that read or write a floating-point tensor narrower than float64, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = 0
        self.narrow: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_operations += 1
        if _has_narrow((result, *args, *(kwargs or {}).values())):
            self.narrow[str(func)] += 1
        return result


def _has_narrow(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.dtype in NARROW:
                return True
        elif isinstance(value, list | tuple) and _has_narrow(value):
            return True
    return False


@contextmanager
def arithmetic(dtype: torch.dtype) -> Iterator[None]:
    """Open a block in which requests for float32 give `dtype`: float32 (no change) or float64.

    Raise `ValueError` for any other. Tensors from before the block or from NumPy's float32 keep their dtype: convert
    models with `.to(dtype)`, and use `only` to detect the rest.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype={dtype}: only float32 and float64 are compared. Give one of them.")
    if dtype == torch.float32:
        yield
        return
    default = torch.get_default_dtype()
    _forget_image_constants()
    torch.set_default_dtype(dtype)
    try:
        widen = _Widen()
        with patch.object(torch.autograd, "_engine_run_backward", widen.run_backward), widen:
            yield
    finally:
        torch.set_default_dtype(default)
        _forget_image_constants()


def _forget_image_constants() -> None:
    """Image processors keep their mean and standard deviation as tensors, in the dtype of the first call."""
    from transformers.image_processing_backends import TorchvisionBackend

    TorchvisionBackend._fuse_mean_std_and_rescale_factor.cache_clear()


@contextmanager
def only(dtype: torch.dtype) -> Iterator[None]:
    """Open a block in which every operation must be in `dtype` if that is float64. Raise `AssertionError` at its end,
    with the names of the operations, if one read or wrote a narrower tensor."""
    if dtype != torch.float64:
        yield
        return
    with NarrowNumbers() as witness:
        yield
    assert witness.num_operations > 0, "the block ran no operation: nothing is known"
    assert not witness.narrow, f"not in float64: {dict(witness.narrow)}"
