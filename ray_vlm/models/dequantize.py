"""Dequantise 4-bit weights once for many forwards: answers are generated token by token, and bitsandbytes would
dequantise every layer again for each token. On a CPU the results are bitwise the same, since bitsandbytes multiplies by
dequantised weights there too (`_gemm_4bit_default_impl` in `bitsandbytes/backends/default/ops.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ray_vlm.models.backbone import replaced_forwards

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module

MOST_BYTES = 2**30  # of weights that are dequantised on a CPU; a larger model stays in 4 bit
# bitsandbytes' kernels on GPUs read 4 bits for a few sequences, and dequantise a layer for each token of more.
_MANY_SEQUENCES = 8
_SHARE = 0.9  # of the free memory of a GPU that may be filled


@contextmanager
def dequantised(model: "Module", sequences: int = 1, needed_bytes: float = 0.0) -> Iterator[None]:
    """While the body runs, let 4-bit layers multiply by weights that are dequantised once, where there is room for them
    (`should_dequantise`).

    `sequences`: answers that are written at a time; `needed_bytes`: what they take beside the weights. For forwards
    without gradients.
    """
    layers = quantised_layers(model)
    devices = {layer.weight.device for layer in layers}
    if len(devices) == 1:
        (device,) = devices
        num_bytes = sum(_itemsize(layer) * layer.weight.quant_state.shape.numel() for layer in layers)
        free = _free_bytes(device) if device.type == "cuda" else None
        if not should_dequantise(num_bytes, free, sequences, needed_bytes):
            layers = []
    with multiply_dequantised(layers if len(devices) == 1 else []):
        yield


def should_dequantise(num_bytes: float, free_bytes: float | None, sequences: int, needed_bytes: float) -> bool:
    """Return whether 4-bit weights are dequantised once for many forwards.

    `num_bytes`: of the dequantised weights. `free_bytes`: of the GPU; None on a CPU, where small models always gain. On
    a GPU the copy must fit beside `needed_bytes`, and `sequences` must be so many that the kernels do not read 4 bits
    anyway."""
    if free_bytes is None:
        return num_bytes <= MOST_BYTES
    return sequences >= _MANY_SEQUENCES and num_bytes + needed_bytes <= _SHARE * free_bytes


def _free_bytes(device: "torch.device") -> int:
    """Return the bytes that this process can still allocate: those free on the GPU, and those that torch holds free."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _itemsize(layer: Any) -> int:
    """Return the bytes of one weight of a 4-bit layer in its compute dtype."""
    return layer.compute_dtype.itemsize if layer.compute_dtype else 4


def quantised_layers(model: "Module") -> list[Any]:
    """Return the 4-bit layers of a model."""
    return [module for module in model.modules() if _is_quantised(module)]


@contextmanager
def multiply_dequantised(layers: Sequence[Any]) -> Iterator[None]:
    """While the body runs, let these 4-bit layers multiply by weights in their compute dtype, dequantised once."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    def build(layer: Any) -> Callable[..., Any]:
        dtype = layer.compute_dtype or torch.float32
        return _forward(dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype), layer.bias)

    with replaced_forwards(layers, build):
        yield


def _is_quantised(module: "Module") -> bool:
    """Return whether it is bitsandbytes' layer with quantised weights (PEFT's wrapper has a class of the same name)."""
    kind = type(module)
    return (
        kind.__name__ == "Linear4bit"
        and kind.__module__.startswith("bitsandbytes")
        and getattr(module.weight, "quant_state", None) is not None
    )


def _forward(weight: "Tensor", bias: "Tensor | None") -> "Callable[[Tensor], Tensor]":
    from torch.nn.functional import linear

    def forward(x: "Tensor") -> "Tensor":
        return linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)

    return forward
