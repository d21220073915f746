"""Cast an adapter once for many forwards: answers are generated token by token, and autocast would cast the float32
weights of every layer again for each token, where PEFT copies the layer's output too.

The numbers are those of PEFT under autocast, to the bit, and of `fused_adapter.py` for layers that it has changed. The
weights themselves are not touched.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from ray_vlm.models.backbone import base_of, replaced_forwards
from ray_vlm.models.fused_adapter import add_update

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module


def half_precision_of(model: "Module") -> "torch.dtype | None":
    """Return the dtype of a base in bfloat16 or float16; None for another, whose arithmetic needs no casts."""
    import torch

    dtype = base_of(model).dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


@contextmanager
def adapter_cast_once(model: "Module") -> Iterator[None]:
    """While the body runs, compute the adapter of a base in half precision by weights that are cast once.

    Layers stay as they are where PEFT does more than add B(A(x)): DoRA and its like, biases, dropout in training.
    For forwards without gradients."""
    dtype = half_precision_of(model)
    if dtype is None:
        yield
        return
    layers = [layer for layer in model.modules() if _is_simple(layer)]
    with replaced_forwards(layers, lambda layer: _forward(layer, dtype)):
        yield


def _is_simple(layer: Any) -> bool:
    """Return whether it is PEFT's linear layer, in use, with plain LoRA alone."""
    kind = getattr(type(layer), "stock_class", type(layer))  # PEFT's own, also of a fused layer
    if not kind.__module__.startswith("peft.tuners.lora") or kind.__name__ not in ("Linear", "Linear4bit"):
        return False
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return not (
        layer.disable_adapters
        or layer.merged
        or any(name in layer.lora_variant or layer.lora_bias.get(name) for name in names)
        or any(layer.lora_dropout[name].training and getattr(layer.lora_dropout[name], "p", 0) for name in names)
    )


def _forward(layer: Any, dtype: "torch.dtype") -> "Callable[[Tensor], Tensor]":
    """Return the forward of a layer of PEFT's, with its adapters in `dtype`."""
    from torch.nn.functional import linear

    fuses = hasattr(type(layer), "stock_class") and len(layer.active_adapters) == 1
    adapters = []
    for name in layer.active_adapters:
        if name in layer.lora_A:
            scaling = layer.scaling[name]
            first, second = (part[name].weight.detach().to(dtype) for part in (layer.lora_A, layer.lora_B))
            if fuses:
                return partial(_add_fused, layer, first, second, scaling)
            # A power of two, which the scaling mostly is, changes no bit but exponents: it multiplies the weights once.
            exact = scaling > 0 and math.frexp(scaling)[0] == 0.5
            adapters.append((first, second * scaling, None) if exact else (first, second, scaling))

    def forward(x: "Tensor", *args: Any, **kwargs: Any) -> "Tensor":
        result = layer.base_layer(x, *args, **kwargs)
        narrow = x.to(dtype)
        for first, second, scaling in adapters:
            added = linear(linear(narrow, first), second)
            result = result + (added if scaling is None else added * scaling)
        return result

    return forward


def _add_fused(
    layer: Any, first: "Tensor", second: "Tensor", scaling: float, x: "Tensor", *args: Any, **kwargs: Any
) -> "Tensor":
    """Return the output of a fused layer. `first`, `second`: A and B, cast."""
    return add_update(layer.base_layer(x, *args, **kwargs), x, first, second, scaling)
