"""Attention over a packed row: each token attends to the prefix of its group and to its own branch, without a mask.

A mask of all pairs of tokens rules out flash attention, is as large as the square of the row, and computes up to eleven
times the pairs that are needed. The three functions here compute the needed ones:

- `attend_segments_at_once` (CUDA, bfloat16 and float16): torch's attention over segments of any lengths. The queries of
  a branch attend to the prefix's keys followed by its own, causal from the bottom right. Keys are copied once a layer.
- `attend_in_parts` (CPUs): attention of branches to the prefix and within themselves are computed apart, and joined by
  the logarithms of their sums of exponentials, as flash attention joins its blocks (Dao et al. 2022, arXiv:2205.14135).
  Nothing is copied, and no pair is computed in vain.
- `attend_in_blocks` (everything else): calls of `scaled_dot_product_attention` for blocks of a branch's queries.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ray_vlm.models.attention import load_varlen
from ray_vlm.models.backbone import base_of, language_model
from ray_vlm.models.layouts import PackedGroup, PackedRow, equal_runs

if TYPE_CHECKING:
    from torch.nn import Module

NAME = "ray_vlm_prefix_groups"
_MASKED = "ray_vlm_prefix_groups_masked"
_BLOCK = 256  # queries of a call: at 1,000 keys 1.1 times the pairs that are needed


def attend_prefix_groups(model: "Module") -> bool:
    """Let the language model attend over packed rows (`packed_row` among the arguments of its forward), and over
    everything else as before. Return whether it is one that can: only sdpa is replaced."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = language_model(base_of(model)).config
    if config._attn_implementation not in ("sdpa", NAME):
        return False
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    # transformers makes the masks of all other calls by this name, as it makes them for sdpa.
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    return True


def attend(
    module: "Module",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_row: PackedRow | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention functions do: `query` `[1, heads, tokens, size]`, `key` and `value` with the
    heads of keys; the output is `[1, tokens, heads, size]`. Without `packed_row` this is transformers' sdpa."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed_row is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
        return output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):
        # As autocast does for torch's attention. Of a model with float32 weights rotary embeddings make queries and
        # keys float32, and values are in the narrow dtype.
        narrow = torch.get_autocast_dtype(query.device.type)
        query, key, value = (part.to(narrow) for part in (query, key, value))
    if packed_row.keys is not None:
        return attend_segments_at_once(query, key, value, packed_row, scale), None
    if query.device.type == "cpu":
        return attend_in_parts(query, key, value, packed_row.groups, scale), None
    return attend_in_blocks(query, key, value, packed_row.groups, scale), None


@contextmanager
def masked_attention(model: "Module") -> Iterator[None]:
    """Let the language model attend over packed rows under a mask of all pairs meanwhile, as a comparison."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = language_model(base_of(model)).config
    ALL_ATTENTION_FUNCTIONS.register(_MASKED, attend_under_a_mask)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_MASKED, sdpa_mask)
    name, config._attn_implementation = config._attn_implementation, _MASKED
    try:
        yield
    finally:
        config._attn_implementation = name
        _mask_of.cache_clear()


def attend_under_a_mask(
    module: "Module",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_row: PackedRow | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as `attend` does, under a mask of all pairs of tokens."""
    from torch.utils.checkpoint import checkpoint
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed_row is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0], None
    mask = _mask_of(packed_row.groups, query.device)
    # On GPUs a layer makes numbers of the mask, twice its size. Recomputed, those of one layer are held at a time.
    output, _ = checkpoint(sdpa_attention_forward, module, query, key, value, mask, use_reentrant=False, **options)
    return output, None


@lru_cache(maxsize=1)  # for the layers of a forward
def _mask_of(groups: tuple[PackedGroup, ...], device: torch.device) -> Tensor:
    return build_mask(groups).to(device)


def build_mask(groups: Sequence[PackedGroup]) -> Tensor:
    """Return which tokens of a packed row attend to each other, `bool [1, 1, tokens, tokens]`."""
    mask = torch.zeros(groups[-1].end, groups[-1].end, dtype=torch.bool)
    for group in groups:
        (start, end), *branches = group.segments()
        mask[start:end, start:end] = True
        for first, last in branches:
            mask[first:last, start:end] = mask[first:last, first:last] = True
    return mask.tril()[None, None]


def attend_segments_at_once(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float) -> Tensor:
    """Attend by `torch.nn.attention.varlen.varlen_attn`, whose arguments differ between torch's versions."""
    assert row.keys is not None
    keys = row.keys
    packed = query[0].transpose(0, 1)  # [tokens, heads, size]
    gathered = [part[0].transpose(0, 1).index_select(0, keys.index) for part in (key, value)]
    varlen = load_varlen()
    assert varlen is not None  # `takes_segments` was asked before keys were planned
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}  # causal from the bottom right
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in inspect.signature(varlen).parameters:
            options["enable_gqa"] = True
        else:  # torch before 2.12
            gathered = [part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in gathered]
    output = varlen(
        packed.contiguous(), *gathered, keys.query_ends, keys.key_ends, keys.longest_query, keys.longest_key, **options
    )
    return output[None]


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, groups: Sequence[PackedGroup], scale: float) -> Tensor:
    """Attend by calls of torch's attention, with a small mask for each block of a branch's queries."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) if repeats > 1 else part for part in (key, value))
    outputs, masks = [], dict[tuple[int, int], Tensor]()
    for group in groups:
        (start, end), *branches = group.segments()
        own = (query[:, :, start:end], key[:, :, start:end], value[:, :, start:end])
        outputs.append(scaled_dot_product_attention(*own, is_causal=True, scale=scale))
        for first, last in branches:
            keys, values = (torch.cat([part[:, :, start:end], part[:, :, first:last]], dim=2) for part in (key, value))
            for block in range(first, last, _BLOCK):
                stop = min(block + _BLOCK, last)
                shape = (stop - block, group.prefix + stop - first)
                if shape not in masks:
                    ones = torch.ones(shape, dtype=torch.bool, device=query.device)
                    masks[shape] = ones.tril(shape[1] - shape[0])
                parts = (query[:, :, block:stop], keys[:, :, : shape[1]], values[:, :, : shape[1]])
                outputs.append(scaled_dot_product_attention(*parts, attn_mask=masks[shape], scale=scale))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def attend_in_parts(query: Tensor, key: Tensor, value: Tensor, groups: Sequence[PackedGroup], scale: float) -> Tensor:
    """Attend in parts, on a CPU."""
    output: Tensor = _Parts.apply(query, key, value, tuple(groups), scale)
    return output


class _Parts(torch.autograd.Function):
    """Attention over a packed row from torch's flash attention for CPUs, whose forward also returns the logarithm of
    each query's sum of exponentials. Its backward is given the joined output and logarithm in place of its own, with
    which the gradients of all parts add up to those of the whole."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: tuple[PackedGroup, ...], scale: float
    ) -> Tensor:
        _, heads, tokens, size = query.shape
        output, logs = query.new_empty(tokens, heads, size), []
        for run in equal_runs(groups):
            parts = [_run_of(part, *run) for part in (query, key, value)]
            part, log = _attend(*parts, 0.0, True, scale=scale)  # [segments, heads, tokens, size], [.., heads, tokens]
            output[run[0] : run[0] + run[1] * run[2]] = part.transpose(1, 2).flatten(0, 1)
            logs.append(log.transpose(1, 2).flatten(0, 1))
        joined = torch.cat(logs)  # [tokens, heads]
        for group in groups:
            if not (group.branches and group.prefix):  # torch's kernel divides by the number of keys
                continue
            begin = group.start + group.prefix
            part, log = _attend(
                query[:, :, begin : group.end],
                key[:, :, group.start : begin],
                value[:, :, group.start : begin],
                0.0,
                False,
                scale=scale,
            )
            own, log = joined[begin : group.end], log[0].transpose(0, 1)
            both = torch.logaddexp(own, log)
            share = (log - both).exp()[..., None].to(output.dtype)
            output[begin : group.end].lerp_(part[0].transpose(0, 1), share)
            own.copy_(both)
        ctx.save_for_backward(query, key, value, output, joined)
        ctx.groups, ctx.scale = groups, scale
        return output[None]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, joined = ctx.saved_tensors
        groups, scale = ctx.groups, ctx.scale
        out, log = (
            output.transpose(0, 1)[None],
            joined.transpose(0, 1)[None],
        )  # [1, heads, tokens, size], [1, heads, ..]
        gradient = gradient.transpose(1, 2)
        inputs = (gradient, query, key, value, out)
        gradients = [torch.empty_like(part) for part in (query, key, value)]
        for run in equal_runs(groups):
            parts = [_run_of(part, *run) for part in inputs]
            logs = _run_of(log[..., None], *run)[..., 0]
            own = _attend_backward(*parts, logs, 0.0, True, scale=scale)
            for total, part in zip(gradients, own, strict=True):
                _run_of(total, *run).copy_(part)
        for group in groups:
            if not (group.branches and group.prefix):
                continue
            begin = group.start + group.prefix
            branches, prefix = slice(begin, group.end), slice(group.start, begin)
            queries = (gradient[:, :, branches], query[:, :, branches])
            keys = (key[:, :, prefix], value[:, :, prefix])
            across = _attend_backward(
                *queries, *keys, out[:, :, branches], log[:, :, branches], 0.0, False, scale=scale
            )
            for total, part, rows in zip(gradients, across, (branches, prefix, prefix), strict=True):
                total[:, :, rows] += part
        return *gradients, None, None


def _run_of(part: Tensor, start: int, length: int, count: int) -> Tensor:
    """Return the segments of a run of `[1, heads, tokens, size]` as `[count, heads, length, size]`, without a copy."""
    return part[0, :, start : start + length * count].unflatten(1, (count, length)).transpose(0, 1)


_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
