"""Compute the common prefix of a batch's rows once, and pack short rows.

DPO's two answers, and all answers of a GRPO group, follow the same images and the same question. TRL lays them out as
rows of a padded batch, so images and question are computed once for each row. `share_prefixes` wraps the forward of the
*backbone*, which TRL's log-probability head calls for hidden states: rows with the same images become one tree - their
common prefix once, then the rest of every row as a branch that attends to the prefix and itself - and the hidden states
are copied back to where TRL expects them. Trees (in SFT of one row each) are packed where that is less work. Losses,
metrics and options stay TRL's; nothing is approximated (prefix sharing: Wang & Hegde 2024, arXiv:2410.20305; packing:
Krell et al. 2021, arXiv:2107.02027; here with M-RoPE positions and images).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.methods.images import RowImages, Span
from ray_vlm.models.backbone import base_of
from ray_vlm.models.families import Family
from ray_vlm.models.operations import OperationCounter
from ray_vlm.models.packing import PackingOptions, plan_packs

_NEEDED = {"input_ids", "attention_mask", "mm_token_type_ids"}
_HANDLED = {*_NEEDED, "pixel_values", "image_grid_thw"}  # with others (a cache, positions) nothing changes


@dataclass(frozen=True)
class PrefixGroup:
    """Rows that share a prefix. `rows`: their numbers; `length`: tokens of the prefix."""

    rows: tuple[int, ...]
    length: int


def plan_folding(job: JobConfig, family: Family, config: Any) -> PackingOptions:
    """Return whether the rows of the job's batches may share prefixes and be packed. `config`: the model's."""
    exact = why_alone(job, family) is None
    share = job.method.name != "sft" and job.method.share_prefixes
    return PackingOptions(exact and share, exact and job.train.packing, config.get_text_config().hidden_size)


def why_alone(job: JobConfig, family: Family) -> str | None:
    """Return why rows that share a prefix would give other results than separate rows, or None."""
    if job.lora is not None and job.lora.dropout > 0:
        return "lora.dropout would fall otherwise"
    return family.cannot.get("method.share_prefixes")


def share_prefixes(model: Any, folding: PackingOptions, counter: OperationCounter | None = None) -> None:
    """Let the model's backbone share and pack rows as `folding` says, in forwards without a cache. Exact without
    dropout. `counter` leaves out the padding at the end of packs."""
    backbone = base_of(model).base_model
    plain = backbone.forward

    def forward(*args: Any, keep: Any = None, **inputs: Any) -> Any:
        output = fold(*args, **inputs)
        if keep is not None:  # bool [rows, tokens - 1]: the positions that the head scores
            output.last_hidden_state = output.last_hidden_state[:, :-1][keep][None]
        return output

    def fold(*args: Any, image_spans: Sequence[Span] | None = None, **inputs: Any) -> Any:
        names = {name for name, value in inputs.items() if value is not None and value is not False}
        handled = not args and _NEEDED <= names <= _HANDLED
        if not handled and image_spans is None:
            return plain(*args, **inputs)
        images = RowImages(backbone.visual, inputs, image_spans)
        if not handled:
            return plain(*args, **_apart(inputs, images, image_spans))
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        tokens = [ids[mask.bool()].tolist() for ids, mask in rows]
        alone = [PrefixGroup((row,), len(ids)) for row, ids in enumerate(tokens)]
        trees = plan_trees(tokens, images) if folding.share else alone
        sizes = [tree.length + sum(len(tokens[row]) - tree.length for row in tree.rows) for tree in trees]
        packs = plan_packs(sizes, folding.hidden) if folding.pack else [[number] for number in range(len(trees))]
        if len(packs) == len(tokens):
            return plain(**_apart(inputs, images, image_spans))
        if counter is not None:
            lengths = [sum(sizes[n] for n in numbers) for numbers in packs]
            counter.leave_out_padding([max(lengths) - length for length in lengths])
        return _run(backbone, plain, inputs, tokens, [[trees[n] for n in numbers] for numbers in packs], images)

    backbone.forward = forward


def _apart(inputs: dict[str, Any], images: RowImages, spans: Sequence[Span] | None) -> dict[str, Any]:
    """Return the inputs with separate images for each row, as transformers expects them."""
    return inputs if spans is None else inputs | images.of_all(range(len(images.spans)))


def plan_trees(tokens: Sequence[list[int]], images: Any) -> list[PrefixGroup]:
    """Group rows with the same images and a common prefix that has all images and at least half of the shorter row.

    `tokens`: of each row, without padding. `images.end(row)`: the number of tokens up to the end of the row's last
    image; `images.same(row, row)`: whether two rows show the same images.
    """
    groups: list[list[int]] = []
    for row in range(len(tokens)):
        for group in groups:
            head = group[0]
            shared = _common([tokens[head], tokens[row]])
            required = max(images.end(head), images.end(row), min(len(tokens[head]), len(tokens[row])) / 2)
            if shared >= required and images.same(head, row):
                group.append(row)
                break
        else:
            groups.append([row])
    return [PrefixGroup(tuple(group), _common([tokens[row] for row in group])) for group in groups]


def _common(sequences: Sequence[list[int]]) -> int:
    """Return the length of the longest common prefix."""
    first, last = min(sequences), max(sequences)  # in sorted order the first and the last have the shortest one
    for i, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return i
    return min(len(first), len(last))


def _run(
    backbone: Any,
    plain: Any,
    inputs: dict[str, Any],
    tokens: list[list[int]],
    packs: Sequence[Sequence[PrefixGroup]],
    images: RowImages,
) -> Any:
    """Run the backbone on packs, and return its output with `last_hidden_state` in the layout of the batch."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    grids = images.grids_of(range(len(tokens)))
    positions, _ = backbone.get_rope_index(ids, inputs["mm_token_type_ids"], image_grid_thw=grids, attention_mask=mask)
    source, tree_of, branch, targets = (tensor.to(ids.device) for tensor in _lay_out(mask, tokens, packs))
    is_token = branch >= 0
    output = plain(
        input_ids=ids.reshape(-1)[source] * is_token,
        attention_mask=_visible(tree_of, branch),
        position_ids=positions.reshape(3, -1)[:, source],
        mm_token_type_ids=inputs["mm_token_type_ids"].reshape(-1)[source] * is_token,
        use_cache=False,
        **images.of_all([tree.rows[0] for pack in packs for tree in pack]),
    )
    hidden = output.last_hidden_state
    output.last_hidden_state = hidden.reshape(-1, hidden.shape[-1])[targets]
    return output


def _lay_out(mask: Any, tokens: list[list[int]], packs: Sequence[Sequence[PrefixGroup]]) -> tuple[Any, Any, Any, Any]:
    """Map the tokens of the packs to the batch, and those of the batch to the packs.

    Return `source`, the index in the flattened batch of each token of a pack; `tree_of`, the number of its tree in the
    pack; `branch`, 0 for the tree's prefix, else the number of its branch; both -1 for padding; all `int64 [packs,
    width]`. Last `targets`, for each token of the batch its index in the flattened packs, `int64 [rows, columns]`.
    """
    import torch

    columns = [row.nonzero()[:, 0].cpu() for row in mask.bool()]  # the columns of each row's tokens in the batch
    width = max(sum(tree.length + sum(len(tokens[r]) - tree.length for r in tree.rows) for tree in p) for p in packs)
    targets = torch.zeros(mask.shape, dtype=torch.long)
    sources: list[Any] = []
    trees_of: list[Any] = []
    branches: list[Any] = []
    for number, pack in enumerate(packs):
        start, pack_parts = number * width, []
        for k, tree in enumerate(pack):
            branch_lengths = [len(tokens[row]) - tree.length for row in tree.rows]
            # Indices of each row's tokens in the flattened batch; the prefix is taken from the first row.
            flat = [row * mask.shape[1] + columns[row] for row in tree.rows]
            source = torch.cat([flat[0][: tree.length], *(indices[tree.length :] for indices in flat)])
            lengths = torch.tensor([tree.length, *branch_lengths])
            branch = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            end = start + tree.length  # of the prefix, then of each branch
            for row, size in zip(tree.rows, branch_lengths, strict=True):
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


def _visible(tree_of: Any, branch: Any) -> Any:
    """Return the attention mask, `bool [packs, 1, tokens, tokens]`: a token attends to itself and to earlier tokens of
    its tree in the prefix (branch 0) or in its own branch."""
    import torch

    earlier = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool, device=branch.device).tril()
    together = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    return (earlier & together & (tree_of[:, None, :] == tree_of[:, :, None]))[:, None]
