"""Stand-ins for layers that are held in 4 bit, for rehearsals with fake tensors (`rehearse.py`): they take the memory
that the real ones take, and compute nothing."""

from typing import Any

import torch
from torch import Tensor

from ray_vlm.models.quantised_experts import QuantisedExperts, experts_at_once, hold_experts


class _Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return torch.nn.functional.linear(values, torch.empty(weight.shape, dtype=values.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ torch.empty(ctx.weight.shape, dtype=gradient.dtype), None


class FourBit(torch.nn.Linear):
    """A linear layer that dequantises in every forward and backward, as bitsandbytes' `Linear4bit` does. `copied`: PEFT
    copies its output before it adds to it."""

    copied: bool

    def forward(self, values: Tensor) -> Tensor:
        """Return the output of the layer."""
        values = values.to(self.weight.dtype)
        out = _Dequantised.apply(values, self.weight)
        out = out if self.bias is None else out + self.bias
        return out.clone() if self.copied else out


class _ExpertProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, at_once: int, width: int) -> Tensor:
        ctx.weight, ctx.at_once, ctx.width = weight, at_once, rows.shape[1]
        torch.empty(at_once, *weight.shape[1:], dtype=rows.dtype)
        return rows.new_empty(len(rows), width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        torch.empty(ctx.at_once, *ctx.weight.shape[1:], dtype=gradient.dtype)
        return gradient.new_empty(len(gradient), ctx.width), None, None, None


class FourBitExperts(QuantisedExperts):
    """Experts that dequantise some at a time, as `QuantisedExperts` does. `device`: the type of the job's device."""

    device: str

    def count_rows(self, experts: Tensor) -> list[int]:
        """Return equal shares of the rows: fake tensors have no values."""
        each, more = divmod(len(experts), self.num_experts)
        return [each + (number < more) for number in range(self.num_experts)]

    def multiply(self, rows: Tensor, weight: Any, counts: list[int]) -> Tensor:
        """Return an empty product, after an empty dequantised weight."""
        rows = rows.to(weight.dtype)
        at_once = min(len(weight), experts_at_once(weight[0].numel() * weight.element_size(), self.device))
        return _ExpertProducts.apply(rows, weight, at_once, weight.shape[2 if self.layout.transposed else 1])


def rehearse_experts(base: Any, device: str) -> None:
    """Let the experts of a fake base take memory as those in 4 bit do."""
    hold_experts(base)
    for module in base.modules():
        if isinstance(module, QuantisedExperts):
            kind: Any = type(module)
            module.__class__ = type(kind.__name__, (FourBitExperts, kind), {"device": device})
