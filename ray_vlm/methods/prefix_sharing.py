"""Rows of a batch that begin alike go through the model's beginning once, and short rows lie behind one another.

DPO's two answers, and all answers of a GRPO group, stand behind the same images and the same question. TRL lays them
out as rows of a padded batch, so images and question are encoded once a row. `share_prefixes` wraps the forward of the
*backbone*, which TRL's log-probability head calls for hidden states: rows with the same images become one tree - their
common beginning once, then every row's rest as a branch that sees the beginning and itself - and each row gets its
hidden states back where TRL expects them. Trees, of one row in SFT, are packed behind one another where that is less
work. Losses, metrics and options stay TRL's; nothing is approximated (the idea: Wang & Hegde 2024,
arXiv:2410.20305; packing: Krell et al. 2021, arXiv:2107.02027; here with M-RoPE positions and images).
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
_HANDLED = {*_NEEDED, "pixel_values", "image_grid_thw"}  # anything else (a cache, positions) goes the plain way


@dataclass(frozen=True)
class PrefixGroup:
    """Rows that share a beginning. `rows`: their numbers; `length`: tokens of the beginning."""

    rows: tuple[int, ...]
    length: int


def plan_folding(job: JobConfig, family: Family, config: Any) -> PackingOptions:
    """What may be done to the rows of the job's batches; `config`: the model's."""
    exact = why_alone(job, family) is None
    share = job.method.name != "sft" and job.method.share_prefixes
    return PackingOptions(exact and share, exact and job.train.packing, config.get_text_config().hidden_size)


def why_alone(job: JobConfig, family: Family) -> str | None:
    """Why rows that begin alike would not give what each gives alone, if so."""
    if job.lora is not None and job.lora.dropout > 0:
        return "lora.dropout would fall otherwise"
    return family.cannot.get("method.share_prefixes")


def share_prefixes(model: Any, folding: PackingOptions, counter: OperationCounter | None = None) -> None:
    """Let the model's backbone do to rows what `folding` says, in forwards without a cache. Exact without dropout.
    `counter` is told of the padding behind packs."""
    backbone = base_of(model).base_model
    plain = backbone.forward

    def forward(*args: Any, keep: Any = None, **inputs: Any) -> Any:
        output = fold(*args, **inputs)
        if keep is not None:  # of all tokens but each row's last, those that the head is to score
            output.last_hidden_state = output.last_hidden_state[:, :-1][keep][None]
        return output

    def fold(*args: Any, image_spans: Sequence[Span] | None = None, **inputs: Any) -> Any:
        given = {name for name, value in inputs.items() if value is not None and value is not False}
        handled = not args and _NEEDED <= given <= _HANDLED
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
    """The inputs with each row's images for itself, as transformers wants them."""
    return inputs if spans is None else inputs | images.of_all(range(len(images.spans)))


def plan_trees(tokens: Sequence[list[int]], images: Any) -> list[PrefixGroup]:
    """Rows that show the same images and begin alike, up to the last image and for half of the shorter one or more.

    `tokens`: of each row, without padding. `images.end(row)`: how many of them end with the row's last image;
    `images.same(row, row)`: whether two rows show the same.
    """
    groups: list[list[int]] = []
    for row in range(len(tokens)):
        for group in groups:
            head = group[0]
            shared = _common([tokens[head], tokens[row]])
            least = max(images.end(head), images.end(row), min(len(tokens[head]), len(tokens[row])) / 2)
            if shared >= least and images.same(head, row):
                group.append(row)
                break
        else:
            groups.append([row])
    return [PrefixGroup(tuple(group), _common([tokens[row] for row in group])) for group in groups]


def _common(sequences: Sequence[list[int]]) -> int:
    """How many first tokens all have in common."""
    least, most = min(sequences), max(sequences)  # of sorted sequences the first and the last differ soonest
    for i, (a, b) in enumerate(zip(least, most, strict=False)):
        if a != b:
            return i
    return min(len(least), len(most))


def _run(
    backbone: Any,
    plain: Any,
    inputs: dict[str, Any],
    tokens: list[list[int]],
    packs: Sequence[Sequence[PrefixGroup]],
    images: RowImages,
) -> Any:
    """The backbone's output for the batch, from one row a pack; `last_hidden_state` is in the batch's own layout."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    grids = images.grids_of(range(len(tokens)))
    positions, _ = backbone.get_rope_index(ids, inputs["mm_token_type_ids"], image_grid_thw=grids, attention_mask=mask)
    source, tree_of, branch, places = (made.to(ids.device) for made in _lay_out(mask, tokens, packs))
    there = branch >= 0
    output = plain(
        input_ids=ids.reshape(-1)[source] * there,
        attention_mask=_visible(tree_of, branch),
        position_ids=positions.reshape(3, -1)[:, source],
        mm_token_type_ids=inputs["mm_token_type_ids"].reshape(-1)[source] * there,
        use_cache=False,
        **images.of_all([tree.rows[0] for pack in packs for tree in pack]),
    )
    hidden = output.last_hidden_state
    output.last_hidden_state = hidden.reshape(-1, hidden.shape[-1])[places]
    return output


def _lay_out(mask: Any, tokens: list[list[int]], packs: Sequence[Sequence[PrefixGroup]]) -> tuple[Any, Any, Any, Any]:
    """Where each token of the packs comes from, and where each of the batch goes to.

    `source`: of each token of a pack its place in the flat batch; `tree_of` and `branch`: which tree of the pack it is
    in, and 0 for the tree's beginning, else the number of its branch, -1 behind the end; all `int64 [packs, width]`.
    `places`: of each token of the batch, `[rows, columns]`, its place among the flat packs.
    """
    import torch

    columns = [of_row.nonzero()[:, 0].cpu() for of_row in mask.bool()]  # where a row's tokens stand in the batch
    width = max(sum(tree.length + sum(len(tokens[r]) - tree.length for r in tree.rows) for tree in p) for p in packs)
    places = torch.zeros(mask.shape, dtype=torch.long)
    sources: list[Any] = []
    trees_of: list[Any] = []
    branches: list[Any] = []
    for number, pack in enumerate(packs):
        start, of_pack = number * width, []
        for k, tree in enumerate(pack):
            of_tree = [len(tokens[row]) - tree.length for row in tree.rows]
            flat = [row * mask.shape[1] + columns[row] for row in tree.rows]
            source = torch.cat([flat[0][: tree.length], *(of_row[tree.length :] for of_row in flat)])
            branch = torch.repeat_interleave(torch.arange(len(of_tree) + 1), torch.tensor([tree.length, *of_tree]))
            end = start + tree.length
            for row, size in zip(tree.rows, of_tree, strict=True):
                places[row, columns[row]] = torch.cat(
                    [torch.arange(start, start + tree.length), torch.arange(end, end + size)]
                )
                end += size
            start = end
            of_pack.append((source, torch.full_like(source, k), branch))
        for made, parts in zip((sources, trees_of, branches), zip(*of_pack, strict=True), strict=True):
            made.append(torch.cat(parts))
    pad = torch.nn.utils.rnn.pad_sequence
    source, tree_of = pad(sources, batch_first=True), pad(trees_of, batch_first=True, padding_value=-1)
    return source, tree_of, pad(branches, batch_first=True, padding_value=-1), places


def _visible(tree_of: Any, branch: Any) -> Any:
    """Which tokens see which: `bool [packs, 1, tokens, tokens]`. A token sees those before it of its own tree that
    belong to the beginning (branch 0) or to its own branch."""
    import torch

    earlier = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool, device=branch.device).tril()
    together = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    return (earlier & together & (tree_of[:, None, :] == tree_of[:, :, None]))[:, None]
