"""Dequantise 4-bit weights once for many forwards: answers are generated token by token, and bitsandbytes would
dequantise every layer again for each token. On a CPU the results are bitwise the same, since bitsandbytes multiplies by
dequantised weights there too (`_gemm_4bit_default_impl` in `bitsandbytes/backends/default/ops.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

MOST_BYTES = 2**30  # of dequantised weights; a larger model stays in 4 bit


@contextmanager
def dequantised(model: "Module") -> Iterator[None]:
    """While the body runs, let a small model's 4-bit layers on a CPU multiply by weights that are dequantised once.

    Nothing changes on a GPU, whose kernels read 4-bit weights directly. For forwards without gradients.
    """
    layers = quantised_layers(model)
    size = sum(4 * layer.weight.quant_state.shape.numel() for layer in layers)
    if size > MOST_BYTES or any(layer.weight.device.type != "cpu" for layer in layers):
        layers = []
    with multiply_dequantised(layers):
        yield


def quantised_layers(model: "Module") -> list[Any]:
    """Return the 4-bit layers of a model."""
    return [module for module in model.modules() if _is_quantised(module)]


@contextmanager
def multiply_dequantised(layers: Sequence[Any]) -> Iterator[None]:
    """While the body runs, let these 4-bit layers multiply by weights in their compute dtype, dequantised once."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    own = {layer: layer.__dict__["forward"] for layer in layers if "forward" in layer.__dict__}  # accelerate's hooks
    try:
        for layer in layers:
            dtype = layer.compute_dtype or torch.float32
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
            layer.forward = _forward(weight, layer.bias)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
            if layer in own:
                layer.forward = own[layer]


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
