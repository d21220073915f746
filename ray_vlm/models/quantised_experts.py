"""Experts in 4 bit: the fused weights of a mixture of experts as NF4 blocks, dequantised for the routed experts alone.

transformers holds the experts of a layer as parameters `[experts, ...]`, and bitsandbytes quantises linear layers
only. Here such a parameter becomes bitsandbytes' `Params4bit` with double quantisation, to the bit what
`bitsandbytes.functional.quantize_4bit` makes of the whole parameter. A layer's forward sorts its tokens by expert and
dequantises a few experts at a time; the backward does so again, so that no dequantised weight is kept for it.
`docs/dev/LOG.md` compares this with one `Linear4bit` for each expert.

A layer is changed by giving it a subclass of its class, before its weights are read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit, quantize_blockwise
from bitsandbytes.nn import Params4bit
from torch import Tensor
from torch.nn import Module

from ray_vlm.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = ("gate_up_proj", "down_proj")  # of all experts of a layer
BLOCK, OUTER_BLOCK = 64, 256  # weights that share a scale, and scales that share one
_AT_ONCE = 64 * 2**20  # bytes of weights that are dequantised at a time on a GPU; on a CPU it is one expert's
_PIECE = 2**21  # weights that are quantised at a time: bitsandbytes takes several bytes for each meanwhile


@dataclass(frozen=True)
class Layout:
    """How a layer holds its experts. `transposed`: weights are `[experts, inputs, outputs]`, not `[experts, outputs,
    inputs]`. `weighs_inputs`: a router's weights multiply an expert's input, and not its output."""

    transposed: bool
    weighs_inputs: bool = False


_SORTED = "Llama4TextExperts"  # takes a copy of all tokens for every expert, multiplied by the router's weights
_MIXTURE = "Llama4TextMoe"  # makes these copies


def layout_of(module: Module) -> Layout | None:
    """Return the layout of a module's experts; None for a module whose experts are held in a way that is not known.

    transformers' `use_experts_implementation` marks modules that all compute alike. Known are those with a gate and
    without biases and norms of their own."""
    shapes = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)}
    if shapes != dict.fromkeys(WEIGHTS, 3):
        return None
    if any(parameter[0].numel() % BLOCK for parameter in module.parameters(recurse=False)):
        return None  # a block would hold weights of two experts
    if type(module).__name__ == _SORTED:
        return Layout(transposed=True, weighs_inputs=True)
    marks = [getattr(module, name, None) for name in ("has_gate", "has_bias", "has_post_expert_norm")]
    return Layout(bool(module.is_transposed)) if marks == [True, False, False] else None


def fused_weights(model: "PreTrainedModel") -> dict[str, Module]:
    """Return the modules of the language model that have weights of three dimensions, by name."""
    decoder = model.get_decoder()
    prefix = {id(module): name for name, module in model.named_modules()}[id(decoder)]
    return {
        f"{prefix}.{name}": module
        for name, module in decoder.named_modules()
        if not hasattr(module, "kernel_size")  # a convolution
        and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    }


def hold_experts(model: "PreTrainedModel") -> int:
    """Let every layer of experts hold and multiply weights in 4 bit, and return how many there are.

    Call it before the weights are read; `quantise_experts` makes them. Raise `ModelError`, without a change, if a layer
    is of a layout that is not known."""
    layers = fused_weights(model)
    layouts = {name: layout_of(module) for name, module in layers.items()}
    if unknown := [name for name, layout in layouts.items() if layout is None]:
        raise ModelError(_describe_unknown(unknown[0], layers[unknown[0]]))
    for name, module in layers.items():
        layout = layouts[name]
        assert layout is not None
        kind: Any = type(module)
        module.__class__ = _quantised(kind, layout)
        module.expert_shapes = {key: tuple(getattr(module, key).shape) for key in WEIGHTS}  # type: ignore[assignment]
        module.updates = {}  # type: ignore[assignment]
    for module in model.modules():
        if type(module).__name__ == _MIXTURE:
            kind = type(module)
            module.__class__ = _routed(kind)
    return len(layers)


def _describe_unknown(name: str, module: Module) -> str:
    own = ", ".join(f"{key} {tuple(parameter.shape)}" for key, parameter in module.named_parameters(recurse=False))
    return (
        f"its experts are of a layout that is not known here ({name} is a {type(module).__name__} with {own}), so they "
        "cannot be put in 4 bit. Known are experts with a gate and without biases, as transformers has them for "
        "Qwen3-VL-MoE, Qwen3.5-MoE, GLM-4V-MoE and Llama-4. Use such a base, or set model.load_in_4bit=false and use a "
        "card that holds the base in 16 bit."
    )


def quantise_experts(weight: Tensor) -> Params4bit:
    """Return the weights `[experts, ..., ...]` of a layer in NF4, with double quantisation. They are on the device of
    `weight`, and are dequantised to its dtype."""
    step = max(1, _PIECE // weight[0].numel())
    pieces = [quantize_4bit(piece.contiguous(), blocksize=BLOCK, quant_type="nf4") for piece in weight.split(step)]
    data = torch.cat([values for values, _ in pieces])
    scales = torch.cat([state.absmax for _, state in pieces])
    offset = scales.mean()
    codes, outer = quantize_blockwise(scales - offset, blocksize=OUTER_BLOCK)
    state = QuantState(
        absmax=codes,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=pieces[0][1].code,
        quant_type="nf4",
        offset=offset,
        state2=outer,
    )
    return Params4bit(data, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True)


def dequantise_experts(weight: Params4bit, experts: Sequence[int] | None = None) -> Tensor:
    """Return the weights of these experts, or of all of them, `[experts, ..., ...]`, in the dtype that they had."""
    state: Any = weight.quant_state
    chosen = range(state.shape[0]) if experts is None else experts
    outer = state.state2
    return _dequantise(
        weight.data, state.absmax, outer.code, outer.absmax, state.offset, chosen, state.shape, state.dtype
    )


def _dequantise(
    data: Tensor,
    codes: Tensor,
    code: Tensor,
    outer: Tensor,
    offset: Tensor,
    experts: Sequence[int],
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Return the weights of some experts. `data`: two weights in each byte; `codes`: of the scales of blocks, which are
    `code[codes] * outer + offset`, with one of `outer` for each 256 of them."""
    count, size = shape[0], shape[1] * shape[2]
    blocks = size // BLOCK
    first, last = experts[0], experts[-1]
    every = last - first + 1 == len(experts)  # a range needs no copies
    at = None if every else torch.tensor(experts, device=data.device)
    packed, scale_codes = data.view(count, size // 2), codes.view(count, blocks)
    packed, scale_codes = (t[first : last + 1] if at is None else t[at] for t in (packed, scale_codes))
    starts = torch.arange(first, last + 1, device=data.device) if at is None else at
    positions = starts[:, None] * blocks + torch.arange(blocks, device=data.device)  # [experts, blocks]
    scales = code[scale_codes.int()] * outer[positions // OUTER_BLOCK] + offset
    # A row for each block: bitsandbytes' kernel for CPUs is wrong where a row is no multiple of a block.
    rows = torch.Size((scales.numel(), BLOCK))
    state = QuantState(absmax=scales.reshape(-1), shape=rows, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    return dequantize_4bit(packed.reshape(-1, 1), state).view(len(experts), *shape[1:])


@torch.library.custom_op("ray_vlm::expert_products", mutates_args=())
def _products(
    values: Tensor,
    data: Tensor,
    codes: Tensor,
    code: Tensor,
    outer: Tensor,
    offset: Tensor,
    counts: Sequence[int],
    shape: Sequence[int],
    transposed: bool,
) -> Tensor:
    """Multiply rows `[rows, inputs]`, sorted by expert, by their experts' weights. `counts`: rows of each expert;
    `transposed`: the weights are `[experts, inputs, outputs]`. Return `[rows, outputs]`.

    It is one operation, so that selective checkpointing can keep its output (`models/selective.py`)."""
    out = values.new_empty(len(values), shape[2] if transposed else shape[1])
    step = experts_at_once(shape[1] * shape[2] * values.element_size(), values.device.type)
    routed = [expert for expert, count in enumerate(counts) if count]
    start = 0
    for index in range(0, len(routed), step):
        chosen = routed[index : index + step]
        weights = _dequantise(data, codes, code, outer, offset, chosen, shape, values.dtype)
        sizes = [counts[expert] for expert in chosen]
        end = start + sum(sizes)
        _multiply(values[start:end], weights if transposed else weights.mT, sizes, out[start:end])
        start = end
    return out


@_products.register_fake
def _(
    values: Tensor,
    data: Tensor,
    codes: Tensor,
    code: Tensor,
    outer: Tensor,
    offset: Tensor,
    counts: Sequence[int],
    shape: Sequence[int],
    transposed: bool,
) -> Tensor:
    return values.new_empty(len(values), shape[2] if transposed else shape[1])


def experts_at_once(expert_bytes: int, device: str) -> int:
    """Return how many experts, of so many bytes dequantised, are dequantised at a time on a device of this type."""
    return max(1, _AT_ONCE // expert_bytes) if device == "cuda" else 1


def _multiply(rows: Tensor, weights: Tensor, sizes: Sequence[int], out: Tensor) -> None:
    """Write into `out` the products of sorted `rows` and `weights`, `[experts, inputs, outputs]`. `sizes`: rows of each
    expert."""
    if rows.device.type == "cuda" and rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability() >= (8, 0):
        ends = torch.tensor(sizes, device=rows.device).cumsum(0, dtype=torch.int32)
        out.copy_(torch.nn.functional.grouped_mm(rows, weights, offs=ends))  # one kernel for all experts
        return
    start = 0
    for size, weight in zip(sizes, weights, strict=True):
        torch.mm(rows[start : start + size], weight, out=out[start : start + size])
        start += size


class _Products(torch.autograd.Function):
    """The products of rows and frozen weights in 4 bit. Nothing but the weights in 4 bit is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Params4bit, counts: list[int], transposed: bool) -> Tensor:
        ctx.weight, ctx.counts, ctx.transposed = weight, counts, transposed
        return _call(values, weight, counts, transposed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        # The parameter itself is kept and not its data, which ZeRO-3 gathers again for the backward.
        return _call(gradient.contiguous(), ctx.weight, ctx.counts, not ctx.transposed), None, None, None


def _call(values: Tensor, weight: Params4bit, counts: list[int], transposed: bool) -> Tensor:
    state: Any = weight.quant_state
    outer = state.state2
    tensors = (weight.data, state.absmax, outer.code, outer.absmax, state.offset)
    return _products(values.to(state.dtype), *tensors, counts, list(state.shape), transposed)


class QuantisedExperts(Module):
    """Experts in 4 bit; `hold_experts` makes it the first base of a layer's class.

    `expert_shapes`: of the weights before they were quantised. `updates`: for a weight, what adapters that are in use
    add to it, as pairs of factors and a scale (`models/expert_adapters.py`)."""

    layout: Layout
    num_experts: int
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]
    expert_shapes: dict[str, tuple[int, int, int]]
    updates: dict[str, list[tuple[Tensor, Tensor, float]]]

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the routed experts' outputs, `[tokens, hidden]`.

        `hidden`: `[tokens, hidden]`; `top_k_index`, `top_k_weights`: `[tokens, k]`, the experts of a token and what the
        router weighs them by."""
        k = top_k_index.shape[-1]
        flat = top_k_index.reshape(-1)  # [tokens * k]
        order = flat.argsort(stable=True)
        counts = self.count_rows(flat)
        rows = hidden[order // k]  # sorted by expert
        weights = top_k_weights.reshape(-1)[order, None]
        if self.layout.weighs_inputs:
            rows = rows * weights
        inner = self.gate(self.product(rows, counts, "gate_up_proj"))
        outputs = self.product(inner, counts, "down_proj").to(hidden.dtype)
        if not self.layout.weighs_inputs:
            outputs = outputs * weights
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return outputs[back].view(*hidden.shape[:-1], k, -1).sum(dim=-2).to(hidden.dtype)

    def count_rows(self, experts: Tensor) -> list[int]:
        """Return how many of the routed rows each expert has. `experts`: of every row, in any order."""
        return torch.bincount(experts, minlength=self.num_experts).tolist()

    def product(self, rows: Tensor, counts: list[int], name: str) -> Tensor:
        """Multiply rows, sorted by expert, by the weight `name` of their experts, with what adapters add."""
        out = self.multiply(rows, getattr(self, name), counts)
        for left, right, scale in self.updates.get(name, ()):
            out = out + scale * update_product(rows, left, right, counts, self.layout.transposed).to(out.dtype)
        return out

    def multiply(self, rows: Tensor, weight: Any, counts: list[int]) -> Tensor:
        """Multiply rows, sorted by expert, by a weight of their experts."""
        return _Products.apply(rows, weight, counts, self.layout.transposed)

    def gate(self, both: Tensor) -> Tensor:
        """Return the activated gate times the rest, `[rows, inner]`. `both`: `[rows, 2 * inner]`."""
        if hasattr(self, "_apply_gate"):
            return self._apply_gate(both)
        gate, up = both.chunk(2, dim=-1)
        return up * self.act_fn(gate)


def update_product(rows: Tensor, left: Tensor, right: Tensor, counts: list[int], transposed: bool) -> Tensor:
    """Return what low-rank updates `left @ right` of the experts' weights add to the products of sorted rows.

    `left`: `[experts, a, rank]`; `right`: `[experts, rank, b]`, where a weight is `[a, b]`. The factors are multiplied
    with the rows one after the other, so that no update is as large as a weight."""
    first, second = (left, right) if transposed else (right.mT, left.mT)
    if not torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(first.dtype)
    # `unbind` gives both factors one gradient; slices would give one as large as the whole for each expert.
    factors = zip(rows.split(counts), first.unbind(), second.unbind(), strict=True)
    return torch.cat([some @ a @ b for some, a, b in factors if len(some)])


@cache
def _quantised(kind: Any, layout: Layout) -> Any:
    """Return the subclass of a class of experts that holds them in 4 bit."""
    return type(kind.__name__, (QuantisedExperts, kind), {"layout": layout, "__module__": __name__})


@cache
def _routed(kind: Any) -> Any:
    """Return the subclass of Llama-4's mixture that passes experts the tokens routed to them alone.

    transformers multiplies every token by every expert, and those that are not routed by 0."""

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(hidden)  # [tokens, experts]
        index = logits.topk(self.top_k, dim=1).indices
        routed = self.experts(hidden, index, scores.gather(1, index))
        return self.shared_expert(hidden) + routed, logits

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": __name__})
