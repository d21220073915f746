"""Compute each token of a batch once, and only those that are needed: shared prefixes, packed rows, labelled logits.

DPO's two answers, and all answers of a GRPO group, follow the same images and the same question. TRL lays them out as
rows of a padded batch, so images and question are computed once for each row. `share_prefixes` wraps the forward of the
*backbone*, which TRL's log-probability head calls for hidden states: rows with the same images become one tree - their
common prefix once, then the rest of every row as a branch that attends to the prefix and itself - and the hidden states
are copied back to where TRL expects them. Trees (in SFT of one row each) are packed where that is less work. Losses,
metrics and options stay TRL's; nothing is approximated (prefix sharing: Wang & Hegde 2024, arXiv:2410.20305; packing:
Krell et al. 2021, arXiv:2107.02027; here with M-RoPE positions and images).

Rows that show the same image need it among the inputs only once. `image_spans` of a batch gives each row's range of the
batch's images: `(first, one after the last)`. Ranges of rows may overlap. Without it each image belongs to one row, as
in transformers.
"""

import functools
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ray_vlm.config.method import AlignmentMethod, Method
from ray_vlm.config.schema import Lora
from ray_vlm.models.backbone import base_of
from ray_vlm.models.families import Family
from ray_vlm.models.operations import OperationCounter

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedConfig

Span = tuple[int, int]

_NEEDED = {"input_ids", "attention_mask", "mm_token_type_ids"}
_HANDLED = {*_NEEDED, "pixel_values", "image_grid_thw"}  # with others (a cache, positions) nothing changes
_WIDEST = 8192  # tokens of a pack: its mask has a value for every pair of them
# Outputs of TRL's head that have a value for each scored position (`FusedCausalLMOutput` in trl/trainer/utils.py).
_HEAD_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass(frozen=True)
class PackingOptions:
    """`share`: rows with a common prefix compute it once. `pack`: short rows are concatenated. `hidden`: width of the
    language model, which determines the share of attention in the cost."""

    share: bool = False
    pack: bool = False
    hidden: int = 4096


@dataclass(frozen=True)
class PrefixGroup:
    """Rows that share a prefix. `rows`: their numbers; `length`: tokens of the prefix."""

    rows: tuple[int, ...]
    length: int


def plan_packing(
    method: Method, lora: Lora | None, pack: bool, family: Family, config: "PreTrainedConfig"
) -> PackingOptions:
    """Return whether the rows of a job's batches may share prefixes and be packed.

    `pack`: whether the job wants packing; `config`: the model's."""
    exact = why_not_shared(lora, family) is None
    share = isinstance(method, AlignmentMethod) and method.share_prefixes
    return PackingOptions(exact and share, exact and pack, config.get_text_config().hidden_size)


def why_not_shared(lora: Lora | None, family: Family) -> str | None:
    """Return why rows that share a prefix would give other results than separate rows, or None."""
    if lora is not None and lora.dropout > 0:
        return "lora.dropout would fall otherwise"
    return family.cannot.get("method.share_prefixes")


def share_prefixes(model: "Module", packing: PackingOptions, counter: OperationCounter | None = None) -> None:
    """Let the model's backbone share and pack rows as `packing` says, in forwards without a cache. Exact without
    dropout. `counter` leaves out the padding at the end of packs."""
    backbone = base_of(model).base_model
    plain = backbone.forward

    def forward(*args: object, keep: "Tensor | None" = None, **inputs: Any) -> Any:
        output = share_and_pack(*args, **inputs)
        if keep is not None:  # bool [rows, tokens - 1]: the positions that the head scores
            # The hidden state of a position predicts the next token, so the last column is never scored. The head gets
            # one row of all kept positions, [1, kept, hidden].
            output.last_hidden_state = output.last_hidden_state[:, :-1][keep][None]
        return output

    def share_and_pack(*args: object, image_spans: Sequence[Span] | None = None, **inputs: Any) -> Any:
        names = {name for name, value in inputs.items() if value is not None and value is not False}
        handled = not args and _NEEDED <= names <= _HANDLED
        if not handled and image_spans is None:
            return plain(*args, **inputs)
        images = RowImages(backbone.visual.spatial_merge_size, inputs, image_spans)
        if not handled:
            return plain(*args, **_apart(inputs, images, image_spans))
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        tokens = [ids[mask.bool()].tolist() for ids, mask in rows]
        alone = [PrefixGroup((row,), len(ids)) for row, ids in enumerate(tokens)]
        trees = plan_trees(tokens, images) if packing.share else alone
        sizes = [tree.length + sum(len(tokens[row]) - tree.length for row in tree.rows) for tree in trees]
        packs = plan_packs(sizes, packing.hidden) if packing.pack else [[number] for number in range(len(trees))]
        if len(packs) == len(tokens):  # every row alone: transformers' own layout is less work than ours
            return plain(**_apart(inputs, images, image_spans))
        if counter is not None:
            lengths = [sum(sizes[n] for n in numbers) for numbers in packs]
            counter.leave_out_padding([max(lengths) - length for length in lengths])
        return _run(backbone, plain, inputs, tokens, [[trees[n] for n in numbers] for numbers in packs], images)

    backbone.forward = forward


def score_labelled(model: "Module") -> None:
    """Let the fused head of `model`, with or without an adapter, score labelled positions alone. The results are exact.

    With Triton, TRL's fused head skips other tokens itself (`trl/trainer/utils.py`, `add_fused_lm_head`); without, it
    scores every position, and its tile of logits takes hundreds of megabytes. So on CPUs the backbone, which must
    accept `keep` (`share_prefixes`), passes only labelled positions to the head, and the outputs are copied back to the
    positions where TRL's trainers read them.
    """
    base = base_of(model)
    fused = base.forward

    @functools.wraps(fused)  # `generate` inspects the signature
    def forward(*args: object, labels: "Tensor | None" = None, **inputs: Any) -> Any:
        if labels is None or labels.device.type == "cuda" or inputs.get("shift_labels") is not None:
            return fused(*args, labels=labels, **inputs)
        targets = labels[:, 1:]
        mask = targets != -100  # bool [rows, tokens - 1]
        if not inputs.get("fused_lm_head") or not mask.any():
            return fused(*args, labels=labels, **inputs)
        # `shift_labels` are already shifted, and must have the shape of the kept hidden states: [1, kept].
        output = fused(*args, shift_labels=targets[mask][None], keep=mask, **inputs)
        for name in _HEAD_FIELDS:
            if (values := getattr(output, name)) is not None:
                setattr(output, name, values.new_zeros(mask.shape).masked_scatter(mask, values))
        output.label_mask = mask
        return output

    base.forward = forward


class RowImages:
    """The images of a batch, row by row."""

    def __init__(self, merge: int, inputs: dict[str, Any], spans: Sequence[Span] | None):
        """`merge`: patches along a side of a visual token. `spans`: `image_spans` of the batch, if it has them."""
        self.pixels: Any = inputs.get("pixel_values")  # [patches of all images, patch values]
        self.grids: Any = inputs.get("image_grid_thw")  # int64 [images, 3]: frames, rows and columns of patches
        patches = [] if self.grids is None else self.grids.prod(dim=1).tolist()
        # Patches of all images lie behind one another, without a row's number: this is where each image starts.
        self.starts = [0]
        for size in patches:
            self.starts.append(self.starts[-1] + size)
        rows = zip(inputs["mm_token_type_ids"], inputs["attention_mask"], strict=True)
        kinds = [kind[mask.bool()] for kind, mask in rows]
        self.ends = [int(kind.nonzero()[-1]) + 1 if kind.any() else 0 for kind in kinds]
        merged = [size // merge**2 for size in patches]
        self.spans = list(spans) if spans else spans_of([int(kind.sum()) for kind in kinds], merged)

    def end(self, row: int) -> int:
        """Return the number of the row's tokens up to the end of its last image."""
        return self.ends[row]

    def of(self, row: int) -> dict[str, "Tensor"]:
        """Return the row's pixels and grids; an empty dictionary without images."""
        first, end = self.spans[row]
        if first == end:
            return {}
        pixels = self.pixels[self.starts[first] : self.starts[end]]
        return {"pixel_values": pixels, "image_grid_thw": self.grids[first:end]}

    def grids_of(self, rows: Sequence[int]) -> "Tensor | None":
        """Return `image_grid_thw` of rows, one after another; None without images."""
        numbers = [number for row in rows for number in range(*self.spans[row])]
        return self.grids[numbers] if numbers else None

    def of_all(self, rows: Sequence[int]) -> dict[str, "Tensor"]:
        """Return the pixels and grids of rows, one after another; an empty dictionary without images."""
        import torch

        parts = [part for row in rows if (part := self.of(row))]
        return {name: torch.cat([part[name] for part in parts]) for name in (parts or [{}])[0]}

    def same(self, one: int, other: int) -> bool:
        """Return whether two rows show the same images, pixel by pixel."""
        import torch

        if self.spans[one] == self.spans[other]:
            return True
        first, second = self.of(one), self.of(other)
        return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def spans_of(tokens: Sequence[int], sizes: Sequence[int]) -> list[Span]:
    """Return each row's range of images if no image is shared. `tokens`: image tokens of each row; `sizes`: of each
    image."""
    spans, number = [], 0
    for left in tokens:
        first = number
        while left > 0:  # the images of a batch are in the order of its rows: take them until the row's tokens are used
            left -= sizes[number]
            number += 1
        spans.append((first, number))
    return spans


def _apart(inputs: dict[str, Any], images: RowImages, spans: Sequence[Span] | None) -> dict[str, Any]:
    """Return the inputs with separate images for each row, as transformers expects them."""
    return inputs if spans is None else inputs | images.of_all(range(len(images.spans)))


class _ImagesOfRows(Protocol):
    def end(self, row: int) -> int: ...
    def same(self, one: int, other: int) -> bool: ...


def plan_trees(tokens: Sequence[list[int]], images: _ImagesOfRows) -> list[PrefixGroup]:
    """Group rows with the same images and a common prefix that has all images and at least half of the shorter row.

    `tokens`: of each row, without padding. `images`: as `RowImages`.
    """
    groups: list[list[int]] = []
    for row in range(len(tokens)):
        for group in groups:
            head = group[0]
            shared = _common([tokens[head], tokens[row]])
            # A prefix that ends within an image would split its features; a short one would
            # save little.
            required = max(images.end(head), images.end(row), min(len(tokens[head]), len(tokens[row])) / 2)
            if shared >= required and images.same(head, row):
                group.append(row)
                break
        else:
            groups.append([row])
    return [PrefixGroup(tuple(group), _common([tokens[row] for row in group])) for group in groups]


def _common(sequences: Sequence[list[int]]) -> int:
    """Return the length of the longest common prefix."""
    from trl.data_utils import common_prefix_length

    return common_prefix_length(min(sequences), max(sequences))  # the first and the last one in sorted order


def plan_packs(sizes: Sequence[int], hidden: int) -> list[list[int]]:
    """Return the numbers of the rows of each pack, for the number of packs that costs least.

    Rows are assigned the largest first, each to the shortest pack (Graham 1969), so packs have similar lengths.
    Attention adds `length / (6 hidden)` to the cost of a token: a layer has 12 `hidden`^2 weights, and attention covers
    the whole pack.
    """
    ranked = sorted(range(len(sizes)), key=lambda n: (-sizes[n], n))
    most = max(max(sizes), _WIDEST)
    candidates = [_deal(sizes, ranked, count) for count in range(1, len(sizes) + 1)]
    costs = [(_cost(sizes, packs, hidden), packs) for packs in candidates]
    return min((cost, packs) for (cost, width), packs in costs if width <= most)[1]


def _deal(sizes: Sequence[int], ranked: Sequence[int], count: int) -> list[list[int]]:
    packs: list[list[int]] = [[] for _ in range(count)]
    lengths = [(0, number) for number in range(count)]  # a heap, whose first entry is the shortest pack
    for row in ranked:
        length, number = heapq.heappop(lengths)
        packs[number].append(row)
        heapq.heappush(lengths, (length + sizes[row], number))
    return packs


def _cost(sizes: Sequence[int], packs: Sequence[Sequence[int]], hidden: int) -> tuple[float, int]:
    """Return the cost of the packs, and the tokens of the longest."""
    width = max(sum(sizes[row] for row in pack) for pack in packs)  # shorter packs are padded to it
    return len(packs) * width * (1 + width / (6 * hidden)), width


def _run(
    backbone: "Module",
    plain: Callable[..., Any],
    inputs: dict[str, Any],
    tokens: list[list[int]],
    packs: Sequence[Sequence[PrefixGroup]],
    images: RowImages,
) -> Any:
    """Run the backbone on packs, and return its output with `last_hidden_state` in the layout of the batch."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    grids = images.grids_of(range(len(tokens)))
    # [3, rows, columns]: time, height and width. They are those of the rows in the batch, not of the packs, so a token
    # has the position that it has in a row of its own. M-RoPE gives an image fewer positions than tokens, so they
    # cannot be counted from the layout of the packs.
    positions, _ = backbone.get_rope_index(  # type: ignore[operator]
        ids, inputs["mm_token_type_ids"], image_grid_thw=grids, attention_mask=mask
    )
    source, tree_of, branch, targets = (tensor.to(ids.device) for tensor in _lay_out(mask, tokens, packs))
    is_token = branch >= 0  # the padding at the end of a pack becomes token 0 of kind text, which nothing attends to
    output = plain(
        input_ids=ids.reshape(-1)[source] * is_token,
        attention_mask=_visible(tree_of, branch),
        position_ids=positions.reshape(3, -1)[:, source],
        mm_token_type_ids=inputs["mm_token_type_ids"].reshape(-1)[source] * is_token,
        use_cache=False,
        # Features are scattered to the image tokens in order, so images are in the order of the trees in the packs.
        **images.of_all([tree.rows[0] for pack in packs for tree in pack]),
    )
    hidden = output.last_hidden_state  # [packs, width, hidden]
    output.last_hidden_state = hidden.reshape(-1, hidden.shape[-1])[targets]  # [rows, columns, hidden]
    return output


def _lay_out(
    mask: "Tensor", tokens: list[list[int]], packs: Sequence[Sequence[PrefixGroup]]
) -> tuple["Tensor", "Tensor", "Tensor", "Tensor"]:
    """Map the tokens of the packs to the batch, and those of the batch to the packs.

    Return `source`, the index in the flattened batch of each token of a pack; `tree_of`, the number of its tree in the
    pack; `branch`, 0 for the tree's prefix, else the number of its branch; both -1 for padding; all `int64 [packs,
    width]`. Last `targets`, for each token of the batch its index in the flattened packs, `int64 [rows, columns]`.

    A pack of a tree of rows a and b, which share the prefix PP, and a tree of row c alone:

        batch  a: P P a a .    pack     P P a a b c c c
               b: P P b . .    tree_of  0 0 0 0 0 1 1 1
               c: c c c . .    branch   0 0 1 1 2 0 0 0
    """
    import torch

    # The columns of each row's tokens in the batch: rows may be padded on either side. On the CPU, since the loops
    # below make many small tensors, each of which would be a kernel on a GPU.
    columns = [row.nonzero()[:, 0].cpu() for row in mask.bool()]
    width = max(sum(tree.length + sum(len(tokens[r]) - tree.length for r in tree.rows) for tree in p) for p in packs)
    targets = torch.zeros(mask.shape, dtype=torch.long)  # padding of the batch gets any token's hidden state
    sources: list[Tensor] = []
    trees_of: list[Tensor] = []
    branches: list[Tensor] = []
    for number, pack in enumerate(packs):
        start, pack_parts = number * width, []  # `start`: of the tree, in the flattened packs
        for k, tree in enumerate(pack):
            branch_lengths = [len(tokens[row]) - tree.length for row in tree.rows]
            # Indices of each row's tokens in the flattened batch; the prefix is taken from the first row.
            flat = [row * mask.shape[1] + columns[row] for row in tree.rows]
            source = torch.cat([flat[0][: tree.length], *(indices[tree.length :] for indices in flat)])
            lengths = torch.tensor([tree.length, *branch_lengths])
            branch = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            end = start + tree.length  # of the prefix, then of each branch
            for row, size in zip(tree.rows, branch_lengths, strict=True):
                # Every row of the tree reads the one prefix, and then its own branch.
                targets[row, columns[row]] = torch.cat(
                    [torch.arange(start, start + tree.length), torch.arange(end, end + size)]
                )
                end += size
            start = end
            pack_parts.append((source, torch.full_like(source, k), branch))
        for batches, parts in zip((sources, trees_of, branches), zip(*pack_parts, strict=True), strict=True):
            batches.append(torch.cat(parts))
    pad = torch.nn.utils.rnn.pad_sequence
    source, tree_of = pad(sources, batch_first=True), pad(trees_of, batch_first=True, padding_value=-1)
    return source, tree_of, pad(branches, batch_first=True, padding_value=-1), targets


def _visible(tree_of: "Tensor", branch: "Tensor") -> "Tensor":
    """Return the attention mask, `bool [packs, 1, tokens, tokens]`: a token attends to itself and to earlier tokens of
    its tree in the prefix (branch 0) or in its own branch.

    Padding has tree and branch -1, so it attends to padding alone; a row of the mask without any token would be NaN."""
    import torch

    earlier = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool, device=branch.device).tril()
    # [packs, query, key]: the key is in the prefix, or query and key are in the same branch.
    together = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    return (earlier & together & (tree_of[:, None, :] == tree_of[:, :, None]))[:, None]
