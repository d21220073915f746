"""Attention of Qwen's image encoders: all windows, or all images of a batch, in one call a layer.

An encoder's input is one row of patches, those of all images one behind another, and a patch attends within its
*segment*: its image (of a video its frame), or in most layers of Qwen2.5-VL a window of it. `cu_seqlens` `[segments +
1]` holds where segments begin and end. Under sdpa transformers splits the row in Python, calls attention once for each
segment, and reads `cu_seqlens` from the device three times a layer. To an attention function with "flash" in its name
it hands over the row and `cu_seqlens` instead, so `attend_at_once` registers one.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from ray_vlm.models.backbone import base_of

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from torch import Tensor, device, dtype
    from torch.nn import Module

# transformers looks for "flash" in it, and saves no configuration with it.
NAME = "ray_vlm_flash_segments"
# Families whose encoder hands over `cu_seqlens`; Qwen3.5's is Qwen3-VL's without DeepStack.
KNOWN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
_MOST_PADDED = 1.5  # pairs of tokens with padding, over those without, up to which segments are padded


@dataclass(frozen=True)
class SegmentBatch:
    """Segments that are attended in one call: `count` of up to `length` tokens.

    `rows`: their tokens in the packed row, a slice or indices. `slots`: where these lie among `count * length` padded
    ones, and `mask` `[count, 1, 1, length]` which of the padded ones are tokens; None if all segments are equally long.
    """

    count: int
    length: int
    rows: "slice | Tensor"
    slots: "Tensor | None" = None
    mask: "Tensor | None" = None


@dataclass(frozen=True)
class SegmentLayout:
    """The batches of all segments of a packed row. `order`: the position of each token of the row in the outputs of the
    batches, one behind another; None if outputs have the order of the row."""

    batches: tuple[SegmentBatch, ...]
    order: "Tensor | None" = None


@dataclass
class Segments:
    """The lengths of a packed row's segments, and their layout, once it is needed."""

    lengths: list[int]
    layout: SegmentLayout | None = None


def attend_at_once(model: "Module") -> bool:
    """Let each layer of the model's image encoder attend in one call. Return whether the encoder is one that can.

    Only sdpa is replaced: another attention was chosen for a reason."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    base = base_of(model)
    if base.config.model_type not in KNOWN:
        return False
    config = base.get_encoder(modality="image").config
    if config._attn_implementation not in ("sdpa", NAME):
        return False
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend_segments)
    # Not by `set_attn_implementation`, which would look for a package or a kernel of that name.
    config._attn_implementation = NAME
    return True


def attend_segments(
    module: "Module",
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    attention_mask: None,
    *,
    cu_seq_lens_q: "Tensor",
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: object,
) -> "tuple[Tensor, None]":
    """Attend within each segment of `query`, `key` and `value` `[1, heads, tokens, head size]`.

    Return `[1, tokens, heads, head size]`, and None for the weights, as transformers' attention functions do. `options`
    are those of flash attention that segments do not need."""
    segments = segments_of(cu_seq_lens_q)
    packed = tuple(part[0].transpose(0, 1) for part in (query, key, value))  # [tokens, heads, head size]
    varlen = None if dropout else _varlen_for(query)
    if varlen is not None:
        return _attend_varlen(varlen, packed, cu_seq_lens_q, max(segments.lengths), scaling)[None], None
    if segments.layout is None:
        segments.layout = build_layout(segments.lengths, query.device, query.device.type == "cpu")
    return _attend_batches(packed, segments.layout, scaling, dropout)[None], None


def segments_of(cu_seqlens: "Tensor") -> Segments:
    """Return the segments that `cu_seqlens` describes.

    All layers of a forward, and their recomputation, pass the same tensor. Its lengths are those that `know_segments`
    was given on the host; otherwise they are read from the device, once a forward."""
    known = _known_segments()
    if cu_seqlens not in known:
        known[cu_seqlens] = Segments((cu_seqlens[1:] - cu_seqlens[:-1]).tolist())
    return known[cu_seqlens]


def know_segments(cu_seqlens: "Tensor", lengths: list[int]) -> None:
    """Let `segments_of` know the lengths of the segments that this very tensor describes."""
    known = _known_segments()
    if cu_seqlens not in known:
        known[cu_seqlens] = Segments(lengths)


@cache
def _known_segments() -> "MutableMapping[Tensor, Segments]":
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()  # by identity; an entry goes when its tensor does


def plan_batches(lengths: Sequence[int], is_cpu: bool) -> list[list[int]]:
    """Return the numbers of the segments that are attended in each call.

    On a CPU a call costs little, but memory for copies is slow: each run of equally long segments is one call, which
    reads the row where it lies. Elsewhere all segments are one call, with padding up to the longest, unless this
    computes too many pairs of tokens; then those of one length are one call.
    """
    numbers = range(len(lengths))
    if is_cpu:
        return [list(run) for _, run in groupby(numbers, key=lengths.__getitem__)]
    if len(lengths) * max(lengths) ** 2 <= _MOST_PADDED * sum(length**2 for length in lengths):
        return [list(numbers)]
    by_length: dict[int, list[int]] = {}
    for number in numbers:
        by_length.setdefault(lengths[number], []).append(number)
    return list(by_length.values())


def build_layout(lengths: Sequence[int], device: "device", is_cpu: bool) -> SegmentLayout:
    """Build the layout of segments of these lengths, with its indices on `device`."""
    import torch

    lengths = [length for length in lengths if length]
    starts = [0, *accumulate(lengths)]
    groups = plan_batches(lengths, is_cpu)
    if len(groups) == 1:
        return SegmentLayout((_pad(lengths, device),))
    batches, rows_of = [], [range(starts[number], starts[number + 1]) for number in range(len(lengths))]
    for group in groups:
        first, last = group[0], group[-1]
        if last - first + 1 == len(group):
            rows: slice | Tensor = slice(starts[first], starts[last + 1])
        else:
            rows = torch.tensor([row for number in group for row in rows_of[number]], device=device)
        batches.append(SegmentBatch(len(group), lengths[first], rows))
    order = [number for group in groups for number in group]
    if order == sorted(order):
        return SegmentLayout(tuple(batches))
    tokens = torch.tensor([row for number in order for row in rows_of[number]], device=device)
    return SegmentLayout(tuple(batches), tokens.argsort())


def _pad(lengths: Sequence[int], device: "device") -> SegmentBatch:
    """Build the one batch of all segments."""
    import torch

    count, longest = len(lengths), max(lengths)
    if min(lengths) == longest:
        return SegmentBatch(count, longest, slice(None))
    slots = [number * longest + n for number, length in enumerate(lengths) for n in range(length)]
    is_token = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    mask = is_token[:, None, None].to(device)
    return SegmentBatch(count, longest, slice(None), torch.tensor(slots, device=device), mask)


def _attend_batches(
    packed: "Sequence[Tensor]", layout: SegmentLayout, scaling: float | None, dropout: float
) -> "Tensor":
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    outputs = []
    for batch in layout.batches:
        query, key, value = (_unpack(part, batch) for part in packed)
        output = scaled_dot_product_attention(query, key, value, batch.mask, dropout, scale=scaling)
        output = output.transpose(1, 2).flatten(0, 1)  # [count * length, heads, head size]
        outputs.append(output if batch.slots is None else output.index_select(0, batch.slots))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined if layout.order is None else joined.index_select(0, layout.order)


def _unpack(packed: "Tensor", batch: SegmentBatch) -> "Tensor":
    """Return the batch's tokens of `[tokens, heads, head size]` as `[count, heads, length, head size]`."""
    rows = batch.rows
    tokens = packed[rows] if isinstance(rows, slice) else packed.index_select(0, rows)
    if batch.slots is not None:
        # Zeros, and not other tokens: a NaN of another segment, times a weight of zero, would be NaN.
        padded = tokens.new_zeros(batch.count * batch.length, *tokens.shape[1:])
        tokens = padded.index_copy_(0, batch.slots, tokens)
    return tokens.unflatten(0, (batch.count, batch.length)).transpose(1, 2)


def _varlen_for(query: "Tensor") -> "Callable[..., Any] | None":
    """Return torch's attention over segments of any lengths if it takes these tensors."""
    return load_varlen() if takes_segments(query.device, query.dtype, query.shape[-1]) else None


def takes_segments(device: "device", dtype: "dtype", size: int) -> bool:
    """Return whether torch's attention over segments takes tensors of this head size; flash attention computes it."""
    return device.type == "cuda" and why_no_segments(device, dtype, size) is None


def why_no_segments(device: "device", dtype: "dtype", size: int) -> str | None:
    """Return why torch's attention over segments does not take tensors of this head size on a GPU, None if it does."""
    import torch

    if torch.version.hip:
        return "it is not used on AMD's cards"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes bfloat16 and float16, and this is {str(dtype).removeprefix('torch.')}"
    if size % 8 or size > 256:
        return f"it takes head sizes up to 256 that are multiples of 8, and this is {size}"
    if not (torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled()):
        return "this torch is built without flash attention, or it is turned off"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"it needs compute capability 8.0, and this card has {capability[0]}.{capability[1]}"
    return None if load_varlen() is not None else f"torch {torch.__version__} has none that takes a scale"


@cache
def load_varlen() -> "Callable[..., Any] | None":
    """Return `torch.nn.attention.varlen.varlen_attn`, or None where torch has none that takes a scale."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "scale" in inspect.signature(varlen_attn).parameters else None


def _attend_varlen(
    varlen: "Callable[..., Any]", packed: "Sequence[Tensor]", cu_seqlens: "Tensor", longest: int, scaling: float | None
) -> "Tensor":
    import torch

    ends = cu_seqlens.to(packed[0].device, torch.int32)
    # Values are a view of the layer's joint output of queries, keys and values, and cuDNN's offsets are of packed rows.
    query, key, value = (part.contiguous() for part in packed)
    output: Tensor = varlen(query, key, value, ends, ends, longest, longest, scale=scaling)
    return output
