"""The arithmetic of answers: one rule for rollouts, validation, `evaluate`, `predict` and `pairs`.

Answers are computed as the trainer computes its loss: under autocast in the dtype of the base if that is bfloat16 or
float16, base and adapter alike, and in float32 otherwise. It does not matter whether accelerate has wrapped the model,
nor whether the package's loop or transformers' `generate` writes the tokens.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from ray_vlm.engines.cache import cache_bytes
from ray_vlm.models.backbone import base_of
from ray_vlm.models.cast_adapter import adapter_cast_once, half_precision_of
from ray_vlm.models.dequantize import dequantised

if TYPE_CHECKING:
    from torch.nn import Module

_LOGITS = 8 * 8  # bytes for each sequence and entry of the vocabulary: sampling sorts and sums in float64
_PREFILL = 2**30  # bytes for the activations of prompts


@contextmanager
def answering(model: "Module", device: str, sequences: int, tokens: int) -> Iterator[None]:
    """While the body runs, let the model compute answers: casts and, where there is room, dequantisation are done once.

    `sequences`: that are written at a time; `tokens`: of the longest prompt and its answer. For forwards without
    gradients; the weights are the same afterwards, to the bit."""
    import torch

    dtype = half_precision_of(model)
    with ExitStack() as stack:
        if dtype is not None:
            stack.enter_context(torch.autocast(torch.device(device).type, dtype))
        stack.enter_context(dequantised(model, sequences, _needed_bytes(model, sequences, tokens)))
        stack.enter_context(adapter_cast_once(model))
        yield


def _needed_bytes(model: "Module", sequences: int, tokens: int) -> int:
    """Return the bytes that answers take beside the weights: the cache twice while it is filled, logits, prompts."""
    base = base_of(model)
    text = base.config.get_text_config()
    return 2 * cache_bytes(text, base.dtype, sequences, tokens) + _LOGITS * sequences * text.vocab_size + _PREFILL
