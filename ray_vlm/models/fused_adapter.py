"""LoRA layers of PEFT's that add their update in one operation.

For an adapted layer PEFT 0.21 copies the base's output (4 bit), multiplies the update by its scale and adds it to the
output: three passes over activations as wide as the layer's output, and one more in the backward pass. Here
`output + scale * (x A^T) B^T` is one `addmm` with the scale as its factor. A and B stay float32 weights, and autocast
casts them as it does for PEFT's linear layers; only the rounding of the sum differs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

_STOCK = (("peft.tuners.lora.layer", "Linear"), ("peft.tuners.lora.bnb", "Linear4bit"))


def fuse_adapters(model: "Module") -> int:
    """Let PEFT's linear LoRA layers, with a plain or a 4-bit base, add their update in one operation.

    A layer still runs PEFT's forward where it has more to do: dropout, DoRA, several adapters, a bias, mixed batches.
    Return the number of layers."""
    layers: list[Any] = [module for module in model.modules() if _has_stock_forward(type(module))]
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__ = _fused(kind)
    return len(layers)


@contextmanager
def separate_adapters(model: "Module") -> Iterator[None]:
    """Run PEFT's own forwards in the body."""
    layers: list[Any] = [module for module in model.modules() if hasattr(type(module), "stock_class")]
    for layer in layers:
        layer.__class__ = layer.stock_class
    try:
        yield
    finally:
        for layer in layers:
            kind: Any = type(layer)
            layer.__class__ = _fused(kind)


def _has_stock_forward(kind: type) -> bool:
    """Return whether it is PEFT's linear layer itself: on a plain base, or on bitsandbytes' 4-bit one."""
    return (kind.__module__, kind.__name__) in _STOCK


@cache
def _fused(kind: Any) -> Any:
    """Return the subclass of a LoRA layer of PEFT's that adds its update in one operation."""
    stock: Callable[..., Tensor] = kind.forward

    def forward(self: Any, x: "Tensor", *args: Any, **kwargs: Any) -> "Tensor":
        name = None if args or kwargs else _only_adapter(self)
        if name is None:
            return stock(self, x, *args, **kwargs)
        out = self.base_layer(x)
        return add_update(out, x, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])

    return type(kind.__name__, (kind,), {"forward": forward, "stock_class": kind, "__module__": __name__})


def _only_adapter(layer: Any) -> str | None:
    """Return the adapter of a layer that has nothing to do but to add its update; None for any other layer."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    if name not in layer.lora_A or layer.lora_bias.get(name) or name in layer.lora_variant:
        return None
    dropout = layer.lora_dropout[name]
    return name if type(dropout).__name__ == "Identity" or not layer.training else None


def add_update(out: "Tensor", x: "Tensor", a: "Tensor", b: "Tensor", scale: float) -> "Tensor":
    """Return `out + scale * (x a^T) b^T` in the dtype of `out`.

    `out`: `[..., outputs]`; `x`: `[..., inputs]`; `a`: `[rank, inputs]`; `b`: `[outputs, rank]`."""
    import torch
    from torch.nn.functional import linear

    kind = out.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a.dtype
    x = x if torch.is_autocast_enabled(kind) else x.to(a.dtype)
    inner = linear(x, a)  # [..., rank]
    if out.dtype != dtype:
        return (out + linear(inner, b) * scale).to(out.dtype)
    flat = torch.addmm(out.reshape(-1, out.shape[-1]), inner.reshape(-1, inner.shape[-1]), b.t(), alpha=scale)
    return flat.view(out.shape)
