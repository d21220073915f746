"""Describe a run before it starts: the plan in numbers, and rows with the trained tokens marked.

`preview_images.py` makes pictures of the same rows.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ray_vlm.data.balance import Balance, describe_balance
from ray_vlm.data.collate import answered
from ray_vlm.data.index import Index
from ray_vlm.data.inspect.check import plain
from ray_vlm.data.plan import Plan
from ray_vlm.data.records import Record
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import IGNORED, Sample
from ray_vlm.runs.text import format_table

_SHOWN_RECORDS = 2
_TOKEN_NOTE = "trained tokens between [[ and ]], [[x2.50: where they weigh 2.50; the rest is only read"


def describe_prepared(index: Index, plan: Plan, builder: SampleBuilder, balance: Balance) -> str:
    """Describe rows, steps, tokens and the mix of classes, then the tokens of the first records."""
    tokens = index.tokens
    step = plan.step_rows(0)
    most = plan.max_tokens_per_micro_batch
    limit = f"{most} tokens" if most else str(plan.micro_batch_size)
    lines = [
        f"rows {len(index)}, left out {len(index.bad)}; {plan.rows_per_epoch} shown in an epoch",
        f"steps {plan.num_steps}, {plan.steps_per_epoch} an epoch; {plan.global_batch_size} rows a step on "
        f"{plan.world_size} worker(s), {plan.accumulation} micro-batch(es) of up to {limit} each",
        f"tokens a row {tokens.min()} to {tokens.max()}, mean {tokens.mean():.0f} "
        f"({index.image_tokens.mean():.0f} of images, {index.answer_tokens.mean():.0f} trained); "
        f"first step {int(tokens[step].sum())}, mean step {tokens.mean() * plan.global_batch_size:.0f}",
        *describe_balance(balance),
        f"first records, {_TOKEN_NOTE}:",
    ]
    lines += [_token_view(index, i, builder) for i in range(min(_SHOWN_RECORDS, len(index)))]
    return "\n".join(lines)


@dataclass(frozen=True)
class Chosen:
    """Rows of a preview: `positions` in the index, ascending; `rarest` is the rarest class or condition, `having` how
    many of the rows have it, `share` its share of all rows."""

    positions: tuple[int, ...]
    rarest: str | None = None
    having: int = 0
    share: float = 0.0


def choose_rows(tags: Sequence[tuple[str, ...]], count: int) -> Chosen:
    """Choose `count` evenly spaced rows. The rarest tag gets its share of them, and at least a third if that many rows
    have it."""
    rows = Counter(tag for row_tags in tags for tag in set(row_tags))
    if len(rows) < 2:
        return Chosen(tuple(_spaced(np.arange(len(tags)), count)))
    rarest = min(rows, key=lambda tag: (rows[tag], tag))
    share = rows[rarest] / len(tags)
    having = np.array([rarest in row_tags for row_tags in tags])
    picked = _spaced(np.flatnonzero(having), max(-(-count // 3), round(share * count)))
    others = _spaced(np.flatnonzero(~having), count - len(picked))
    if missing := min(count, len(tags)) - len(picked) - len(others):  # too few of the others
        picked = _spaced(np.flatnonzero(having), len(picked) + missing)
    return Chosen(tuple(sorted([*picked, *others])), rarest, len(picked), share)


def _spaced(positions: np.ndarray, count: int) -> list[int]:
    """Return at most `count` of the positions, one from each of `count` equal stretches.

    The position within a stretch varies, since rows may repeat with a period (the steps of tasks).
    """
    count = min(count, len(positions))
    stretch = len(positions) / max(count, 1)
    # Steps of the golden ratio spread the positions within the stretches evenly.
    return [int(positions[int(i * stretch + (0.5 + i * 0.618) % 1.0 * max(stretch - 1, 0))]) for i in range(count)]


def describe_choice(chosen: Chosen, codec_name: str) -> list[str]:
    """Describe the rows of a picture, and how to read it."""
    lines = [f"Drawn from the text that is trained, read back as predictions are (boxes in the form of {codec_name})."]
    if chosen.rarest is not None:
        lines.append(
            f"{chosen.having} of these {len(chosen.positions)} rows show {plain(chosen.rarest)}, the rarest "
            f"({chosen.share:.1%} of all rows)."
        )
    return lines


def describe_rows(index: Index, builder: SampleBuilder, chosen: Chosen, num_views: int = 3) -> str:
    """Show the tokens of the first chosen rows, then a table of how the tokens of all chosen rows are trained."""
    lines = [f"{_TOKEN_NOTE}:"]
    lines += [_token_view(index, i, builder) for i in chosen.positions[:num_views]]
    rows = [row for i in chosen.positions for row in trained_rows(index.records[i], builder)]
    counts = count_tokens(rows, builder.image_token_id)
    return "\n".join([*lines, "", *_count_lines(counts, len(chosen.positions))])


@dataclass(frozen=True)
class TokenCounts:
    """Tokens by use: trained, only read (prompt and images); `weight` is the mean over trained tokens."""

    trained: int
    prompt: int
    image: int
    weight: float

    @property
    def total(self) -> int:
        """All tokens."""
        return self.trained + self.prompt + self.image


def count_tokens(rows: Sequence[Sample], image_token_id: int) -> TokenCounts:
    """Count the tokens of rows as they are trained."""
    trained = image = total = 0
    weight = 0.0
    for row in rows:
        is_trained = row.labels != IGNORED
        trained, total = trained + int(is_trained.sum()), total + len(row.input_ids)
        image += int((row.input_ids == image_token_id).sum())
        weight += float(is_trained.sum() if row.weights is None else row.weights[is_trained].sum())
    return TokenCounts(trained, total - trained - image, image, weight / max(trained, 1))


def _count_lines(counts: TokenCounts, num_rows: int) -> list[str]:
    rows = [[f"tokens of {num_rows} rows", "sum", "a row", "share"]]
    kinds = {"trained": counts.trained, "only read, prompt": counts.prompt, "only read, images": counts.image}
    for name, count in {**kinds, "all": counts.total}.items():
        share = count / max(counts.total, 1)
        rows.append([f"  {name}", f"{count:,}", f"{count / max(num_rows, 1):,.1f}", f"{share:.1%}"])
    return [format_table(rows), f"  mean weight of a trained token: {counts.weight:.3f}"]


def _token_view(index: Index, position: int, builder: SampleBuilder) -> str:
    record = index.records[position]
    views = [_marked_text(row, builder) for row in trained_rows(record, builder)]
    return f"--- row {record.row} (id {plain(record.id)})\n" + "\n--- against\n".join(views)


def trained_rows(record: Record, builder: SampleBuilder) -> list[Sample]:
    """Return what a model sees of a record in training: one row, or one for each answer of a pair. Of a prompt, no
    token is trained."""
    row = builder.row(record)
    if row.completions:
        return [answered(row, completion) for completion in row.completions]
    return [row if len(row.labels) else answered(row, np.zeros(0, np.int32))]


def _marked_text(row: Sample, builder: SampleBuilder) -> str:
    weights = np.ones(len(row.input_ids), np.float32) if row.weights is None else row.weights
    image = row.input_ids == builder.image_token_id
    trained = row.labels != IGNORED
    runs = groupby(range(len(row.input_ids)), key=lambda i: (image[i], trained[i], weights[i] if trained[i] else 1.0))
    pieces: list[str] = []
    for (is_image, is_trained, weight), positions in runs:
        ids = row.input_ids[list(positions)].tolist()
        if is_image:
            pieces.append(f"<image: {len(ids)} tokens>")
            continue
        text = plain(builder.tokenizer.decode(ids), keep="\n\t")
        mark = "" if weight == 1 else f"x{weight:.2f}:"
        pieces.append(f"[[{mark}{text}]]" if is_trained else text)
    return "".join(pieces)
