"""Where the tokens of a batch go in the language model, planned on the host from the rows of the batch.

A batch in TRL's layout has a row for each answer, padded to the longest. Computed so, a prompt and its images are
computed once for each answer, and padding is computed too. A `PackedLayout` has all tokens in one row instead: rows
with the same images and the same beginning are one group, which has the common prefix once and then the rest of every
row as a branch, and groups follow one another. `models/shared_attention.py` lets a token attend to its prefix and its
own branch alone. A `PaddedLayout` keeps TRL's rows, and needs no mask where padding is only on the right: no token of a
causal model looks there.

Everything here is numpy and plain numbers. Nothing is read from the device that trains.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, device

Span = tuple[int, int]

# Costs are in tokens of one layer: a token takes 72 hidden^2 operations in forward and backward, a pair of tokens that
# attend to each other 12 hidden. What a call of attention on a CPU takes beside its work is worth 20, 12 and 3 tokens
# of layers of width 64, 128 and 256, measured on one core: narrow layers spend more on what is no matrix product.
_CALL, _NARROW = 500_000, 350  # a call costs _CALL / (hidden (hidden + _NARROW)) tokens
_WORTH = 0.95  # of the rows' cost: a packed row also copies tokens there and hidden states back, and calls are small
_MASKED = 2.0  # a pair under a mask, against one of a causal call
MULTIPLE = 128  # tokens to which a packed row is padded on GPUs: tiles of matrix products, and fewer shapes


@dataclass(frozen=True)
class PackingOptions:
    """`share`: rows with a common prefix compute it once. `pack`: rows are concatenated. `hidden`: width of the
    language model, which determines the share of attention in the cost."""

    share: bool = False
    pack: bool = False
    hidden: int = 4096


@dataclass(frozen=True)
class PrefixGroup:
    """Rows that share a prefix. `rows`: their numbers; `length`: tokens of the prefix."""

    rows: tuple[int, ...]
    length: int


@dataclass(frozen=True)
class PackedGroup:
    """A group in a packed row. `start`: where it begins; `prefix`: tokens of its prefix; `branches`: tokens of each
    branch behind it. A row that shares nothing is a prefix without branches."""

    start: int
    prefix: int
    branches: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """One past the last token of the group."""
        return self.start + self.prefix + sum(self.branches)

    @property
    def pairs(self) -> int:
        """Pairs of tokens that attend to each other."""
        own = sum(n * self.prefix + n * (n + 1) // 2 for n in self.branches)
        return self.prefix * (self.prefix + 1) // 2 + own

    def segments(self) -> list[Span]:
        """Return the ranges of the prefix and of each branch in the packed row."""
        ends = np.cumsum([self.start + self.prefix, *self.branches]).tolist()
        return list(zip([self.start, *ends[:-1]], ends, strict=True))


@dataclass(frozen=True)
class PackedKeys:
    """The keys of each segment of a packed row, one segment behind another: of a branch the prefix, then its own.

    `index` `[keys]`: where the keys lie in the packed row. `query_ends`, `key_ends` `int32 [segments + 1]`: where
    segments begin and end among queries and keys. `longest_query`, `longest_key`: tokens of the longest segment.
    """

    index: "Tensor"
    query_ends: "Tensor"
    key_ends: "Tensor"
    longest_query: int
    longest_key: int

    def moved(self, move: "Callable[[Tensor], Tensor]") -> "PackedKeys":
        """Return the same with the result of `move` in place of each tensor."""
        index, query_ends, key_ends = map(move, (self.index, self.query_ends, self.key_ends))
        return replace(self, index=index, query_ends=query_ends, key_ends=key_ends)


@dataclass(frozen=True)
class PackedRow:
    """Which tokens of a packed row attend to each other. `keys`: for attention over segments on GPUs, else None."""

    groups: tuple[PackedGroup, ...]
    keys: PackedKeys | None = None

    @property
    def pairs(self) -> int:
        """Pairs of tokens that attend to each other."""
        return sum(group.pairs for group in self.groups)


@dataclass(frozen=True)
class PaddedLayout:
    """TRL's rows as they are.

    `position_ids` `int64 [3, rows, columns]`: M-RoPE's axes. `masked`: whether attention needs the batch's mask.
    `images`, `image_numbers`: the ranges of patches, and the numbers, of the images of the rows one behind another;
    None: the batch's as they are. `tokens`, `pairs`: those that are computed beyond what the rows need."""

    position_ids: "Tensor"
    masked: bool
    images: tuple[Span, ...] | None
    image_numbers: tuple[int, ...] | None
    tokens: int
    pairs: int

    def to(self, device: "str | device", non_blocking: bool = False) -> "PaddedLayout":
        """Return the same with tensors on `device`."""
        return replace(self, position_ids=self.position_ids.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PaddedLayout":
        """Return the same in pinned memory of the host."""
        return replace(self, position_ids=self.position_ids.pin_memory())


@dataclass(frozen=True)
class PackedLayout:
    """All tokens of a batch in one row.

    `row`: which of them attend to each other. `source` `int64 [1, tokens]`: index of each token in the flattened
    batch. `targets` `int64 [rows, columns]`: for each token of the batch its index in the packed row; padding has 0.
    `position_ids` `int64 [3, 1, tokens]`: positions that a token has in a row of its own. `is_token` `bool [1,
    tokens]`: which tokens are no padding; None: all. `images` and the others: as in `PaddedLayout`.

    Rows a and b, which share the prefix PP, and c alone:

        batch  a: P P a a .    packed   P P a a b c c c
               b: P P b . .    groups   (0, 2, (2, 1)), (5, 3)
               c: c c c . .    targets  a: 0 1 2 3 .   b: 0 1 4 . .   c: 5 6 7 . .
    """

    row: PackedRow
    source: "Tensor"
    targets: "Tensor"
    position_ids: "Tensor"
    is_token: "Tensor | None"
    images: tuple[Span, ...] | None
    image_numbers: tuple[int, ...] | None
    tokens: int
    pairs: int

    def to(self, device: "str | device", non_blocking: bool = False) -> "PackedLayout":
        """Return the same with tensors on `device`."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedLayout":
        """Return the same in pinned memory of the host."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def _moved(self, move: "Callable[[Tensor], Tensor]") -> "PackedLayout":
        source, targets, position_ids = map(move, (self.source, self.targets, self.position_ids))
        is_token = None if self.is_token is None else move(self.is_token)
        keys = None if self.row.keys is None else self.row.keys.moved(move)
        row = replace(self.row, keys=keys)
        return replace(self, row=row, source=source, targets=targets, position_ids=position_ids, is_token=is_token)


@dataclass(frozen=True)
class BatchRows:
    """A batch on the host.

    `tokens`: of each row, `int64` without padding; `prompts`: how many of them are its prompt, which has all images;
    `starts`: the column of its first token; `columns`: of the batch; `spans`: the range of its images; `grids`: of each
    image its frames, rows and columns of patches."""

    tokens: Sequence[np.ndarray]
    prompts: Sequence[int]
    starts: Sequence[int]
    columns: int
    spans: Sequence[Span]
    grids: Sequence[tuple[int, int, int]]


# (input_ids, mm_token_type_ids, image_grid_thw=..., attention_mask=...) -> positions and deltas, as transformers'
# models have it
RopeIndex = Callable[..., "tuple[Tensor, Tensor]"]


class LayoutPlanner:
    """Plans the layouts of a job's batches."""

    def __init__(
        self, rope_index: RopeIndex, packing: PackingOptions, image_token: int, is_cpu: bool, segment_keys: bool
    ):
        """`rope_index`: the backbone's `get_rope_index`. `image_token`: its id. `is_cpu`: whether a CPU trains.
        `segment_keys`: whether attention takes the keys of all segments at once (`PackedKeys`)."""
        self.packing = packing
        self._rope_index = rope_index
        self._image_token = image_token
        self._is_cpu = is_cpu
        self._segment_keys = segment_keys

    def plan(self, rows: BatchRows) -> PackedLayout | PaddedLayout:
        """Return the cheaper layout of a batch."""
        lengths = [len(ids) for ids in rows.tokens]
        groups = [PrefixGroup((row,), length) for row, length in enumerate(lengths)]
        if self.packing.share:
            groups = group_rows(rows.tokens, rows.prompts, rows.spans)
        packed = place_groups(groups, lengths)
        masked = any(rows.starts)
        if not (self.packing.share or self.packing.pack) or not is_packed_cheaper(
            packed, len(lengths), rows.columns, masked, self.packing.hidden, self._is_cpu
        ):
            return self._plan_padded(rows, lengths, masked)
        return self._plan_packed(rows, groups, packed)

    def _plan_padded(self, rows: BatchRows, lengths: Sequence[int], masked: bool) -> PaddedLayout:
        import torch

        positions = self._positions(rows)
        placed = np.ones((3, len(lengths), rows.columns), np.int64)
        for row, (start, length) in enumerate(zip(rows.starts, lengths, strict=True)):
            placed[:, row, start : start + length] = positions[row]
        images = _images_of(range(len(lengths)), rows)
        tokens = len(lengths) * rows.columns - sum(lengths)
        pairs = len(lengths) * rows.columns * (rows.columns + 1) // 2 - sum(n * (n + 1) // 2 for n in lengths)
        if masked:  # the mask shows how much is needed
            tokens = pairs = 0
        return PaddedLayout(torch.from_numpy(placed), masked, *images, tokens=tokens, pairs=pairs)

    def _plan_packed(
        self, rows: BatchRows, groups: Sequence[PrefixGroup], packed: Sequence[PackedGroup]
    ) -> PackedLayout:
        import torch

        in_row, positions = self._positions(rows), []
        targets = np.zeros((len(rows.tokens), rows.columns), np.int64)
        sources: list[np.ndarray] = []
        for group, packed_group in zip(groups, packed, strict=True):
            segments = packed_group.segments()
            branch_rows = [row for row in group.rows if len(rows.tokens[row]) > group.length]
            begin = packed_group.start
            prefix = np.arange(begin, begin + group.length)
            for row in group.rows:
                # Every row of the group reads the one prefix.
                targets[row, rows.starts[row] : rows.starts[row] + group.length] = prefix
            parts = [(group.rows[0], 0, group.length), *((row, group.length, None) for row in branch_rows)]
            for (row, first, end), (start, stop) in zip(parts, segments, strict=True):
                last = len(rows.tokens[row]) if end is None else end
                column = rows.starts[row]
                sources.append(np.arange(row * rows.columns + column + first, row * rows.columns + column + last))
                positions.append(in_row[row][:, first:last])
                targets[row, column + first : column + last] = np.arange(start, stop)
        tokens = packed[-1].end
        padding = 0 if self._is_cpu else -tokens % MULTIPLE
        sources.append(np.zeros(padding, np.int64))
        positions.append(np.zeros((3, padding), np.int64))
        is_token = None if not padding else torch.arange(tokens + padding)[None] < tokens
        computed = [*packed, PackedGroup(tokens, padding)] if padding else list(packed)
        packed_row = PackedRow(tuple(computed), plan_keys(computed) if self._segment_keys else None)
        total = tokens + padding
        images = _images_of([group.rows[0] for group in groups], rows)
        return PackedLayout(
            packed_row,
            torch.from_numpy(np.concatenate(sources))[None],
            torch.from_numpy(targets),
            torch.from_numpy(np.concatenate(positions, axis=1))[:, None],
            is_token,
            *images,
            tokens=padding,
            pairs=total * (total + 1) // 2 - sum(group.pairs for group in packed),
        )

    def _positions(self, rows: BatchRows) -> list[np.ndarray]:
        """Return M-RoPE's positions of each row, `int64 [3, tokens]`.

        They are those of the rows, not of a packed row, so a token has the position that it has in a row of its own.
        M-RoPE gives an image fewer positions than tokens, so they cannot be counted from the layout. Behind the prompt,
        which has all images, they count up."""
        keys = [_prompt_key(*row) for row in zip(rows.tokens, rows.prompts, rows.spans, strict=True)]
        first = {key: row for row, key in reversed(list(enumerate(keys)))}  # a row of each prompt
        of_prompts = dict(zip(first, self._prompt_positions(rows, list(first.values())), strict=True))
        positions = []
        for key, ids, length in zip(keys, rows.tokens, rows.prompts, strict=True):
            begin = of_prompts[key][:, :length]
            behind = begin.max(initial=-1) + 1 + np.arange(len(ids) - length)
            positions.append(np.concatenate([begin, np.tile(behind, (3, 1))], axis=1))
        return positions

    def _prompt_positions(self, rows: BatchRows, chosen: Sequence[int]) -> np.ndarray:
        """Return the positions of the prompts of these rows, `int64 [prompts, 3, longest]`."""
        import torch

        prompts = [torch.from_numpy(rows.tokens[row][: rows.prompts[row]]) for row in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        grids = [rows.grids[number] for row in chosen for number in range(*rows.spans[row])]
        positions, _ = self._rope_index(
            ids,
            (ids == self._image_token).long() * mask,
            image_grid_thw=torch.tensor(grids) if grids else None,
            attention_mask=mask,
        )
        return np.asarray(positions).transpose(1, 0, 2)


def _prompt_key(tokens: np.ndarray, length: int, span: Span) -> tuple[Span | None, bytes]:
    """Return what rows of the same prompt and the same images have in common."""
    return (span if span[0] < span[1] else None), tokens[:length].tobytes()


def _images_of(order: Sequence[int], rows: BatchRows) -> tuple[tuple[Span, ...] | None, tuple[int, ...] | None]:
    """Return the ranges of patches, and the numbers, of the images that rows of this order show, one row behind
    another; None twice if they are the batch's images as they are.

    Features are scattered to the image tokens in order, so images must have the order of the rows."""
    numbers = tuple(number for row in order for number in range(*rows.spans[row]))
    if numbers == tuple(range(len(rows.grids))):
        return None, None
    ends = np.cumsum([0, *(frames * height * width for frames, height, width in rows.grids)]).tolist()
    return tuple((ends[number], ends[number + 1]) for number in numbers), numbers


def group_rows(tokens: Sequence[np.ndarray], prompts: Sequence[int], spans: Sequence[Span]) -> list[PrefixGroup]:
    """Group rows with the same images and the same prompt. Their prefix is all that they have in common, with the
    prompt at least.

    `tokens`: of each row, without padding. `prompts`: tokens of each row's prompt, which has all its images. `spans`:
    the range of each row's images; rows show the same images if these are equal, or both empty.
    """
    groups: dict[tuple[Span | None, bytes], list[int]] = {}
    for row, values in enumerate(zip(tokens, prompts, spans, strict=True)):
        groups.setdefault(_prompt_key(*values), []).append(row)
    return [PrefixGroup(tuple(rows), _common([tokens[row] for row in rows])) for rows in groups.values()]


def _common(rows: Sequence[np.ndarray]) -> int:
    """Return the length of the longest common prefix."""
    first, length = rows[0], min(map(len, rows))
    for ids in rows[1:]:
        differ = np.flatnonzero(first[:length] != ids[:length])
        length = int(differ[0]) if len(differ) else length
    return length


def place_groups(groups: Sequence[PrefixGroup], lengths: Sequence[int]) -> list[PackedGroup]:
    """Return the groups one behind another in a packed row. `lengths`: tokens of each row."""
    packed, start = [], 0
    for group in groups:
        own = [lengths[row] - group.length for row in group.rows]
        packed.append(PackedGroup(start, group.length, tuple(n for n in own if n)))
        start = packed[-1].end
    return packed


def plan_keys(groups: Sequence[PackedGroup]) -> PackedKeys:
    """Return the keys of all segments of a packed row."""
    import torch

    index, queries, keys = [], [], []
    for group in groups:
        prefix = np.arange(group.start, group.start + group.prefix)
        for number, (start, end) in enumerate(group.segments()):
            own = np.arange(start, end)
            index.append(own if number == 0 else np.concatenate([prefix, own]))
            queries.append(end - start)
            keys.append(len(index[-1]))
    query_ends, key_ends = (
        torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32) for lengths in (queries, keys)
    )
    return PackedKeys(torch.from_numpy(np.concatenate(index)), query_ends, key_ends, max(queries), max(keys))


def equal_runs(groups: Sequence[PackedGroup]) -> list[tuple[int, int, int]]:
    """Return runs of neighbouring segments of one length, `(start, tokens of a segment, segments)`, without empty
    ones. Attention within the segments of a run is one call."""
    runs: list[tuple[int, int, int]] = []
    for start, end in (segment for group in groups for segment in group.segments()):
        if start == end:
            continue
        if runs and runs[-1][1] == end - start:
            first, length, count = runs[-1]
            runs[-1] = (first, length, count + 1)
        else:
            runs.append((start, end - start, 1))
    return runs


def is_packed_cheaper(
    groups: Sequence[PackedGroup], rows: int, columns: int, masked: bool, hidden: int, is_cpu: bool
) -> bool:
    """Return whether one packed row of these groups costs clearly less than `rows` rows of `columns` tokens.

    The answer depends on shapes alone, so a run that is resumed computes in the order that it had. `masked`: whether
    attention over the rows needs a mask. On GPUs attention over a packed row is one call.
    """
    branched = [group for group in groups if group.branches]
    calls = len(equal_runs(groups)) + len(branched) if is_cpu else 1
    pairs = sum(group.pairs for group in groups)
    call = _CALL / (hidden * (hidden + _NARROW))
    packed = groups[-1].end + pairs / (6 * hidden) + calls * call
    row_pairs = _MASKED * columns**2 if masked else columns * (columns + 1) / 2
    padded = rows * (columns + row_pairs / (6 * hidden)) + call
    return packed < _WORTH * padded
