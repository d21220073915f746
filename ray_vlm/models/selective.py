"""Activation checkpointing that keeps the outputs of matrix products and of attention, and recomputes the rest.

A checkpointed 4-bit layer dequantises its weights three times a step: forward, recomputed forward, backward. With its
products kept it does so twice, as one that keeps everything, and stores about a third of what that one stores. The
operations are the same in the same order, so gradients are those of `true` and `false`, on a CPU to the bit.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from ray_vlm.models.backbone import base_of, language_layers

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

_FACTORS = {"aten::mm": 0, "aten::addmm": 1, "aten::linear": 0}  # position of the factor whose last axis is summed over
_KEPT = (
    "bitsandbytes::gemm_4bit",
    "ray_vlm::expert_products",
    "flash_attention",
    "efficient_attention",
    "cudnn_attention",
    "varlen_attn",
)


def keep_products(model: "Module", kept: bool = True) -> None:
    """Let the language model's layers, wherever they recompute, keep their products; `kept=False`: recompute all.

    Products of an adapter's rank are recomputed: they take little time, and are as wide as those of the base.
    """
    from torch.utils.checkpoint import checkpoint

    run = partial(checkpoint, use_reentrant=False)
    if kept:
        run = partial(run, context_fn=partial(_contexts, _largest_rank(model)))
    for layer in language_layers(base_of(model)):
        layer._gradient_checkpointing_func = run


def _contexts(rank: int) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts of a layer's forward and of its recomputation, of one set of kept outputs."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    forward, again = create_selective_checkpoint_contexts(_policy(rank))
    return _cast_each_time(forward), _cast_each_time(again)


@contextmanager
def _cast_each_time(context: AbstractContextManager) -> Iterator[None]:
    """Enter the context without autocast's cache of weights that are cast already: torch numbers the operations, and a
    weight that an earlier forward has cast would make the forward shorter than the recomputation."""
    import torch

    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with context:
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _largest_rank(model: "Module") -> int:
    """Return the largest rank of an adapter of the model; 0 without one."""
    return max((p.shape[0] for name, p in model.named_parameters() if ".lora_A." in name), default=0)


def _policy(rank: int) -> "Callable[..., CheckpointPolicy]":
    """Return the policy that keeps attention and products that sum over more than `rank` numbers."""
    from torch.utils.checkpoint import CheckpointPolicy

    def choose(context: "SelectiveCheckpointContext", op: object, *args: "Tensor", **_: object) -> CheckpointPolicy:
        position = _factor_of(op)
        keeps = position is not None and (position < 0 or args[position].shape[-1] > rank)
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    return choose


@lru_cache(maxsize=1024)
def _factor_of(op: object) -> int | None:
    """Return the position of a product's first factor, -1 for what is always kept, None for what is recomputed."""
    name = str(getattr(getattr(op, "_schema", None), "name", op))
    return -1 if any(part in name for part in _KEPT) else _FACTORS.get(name)
