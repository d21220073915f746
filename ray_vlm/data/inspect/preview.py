"""Describe a run before it starts, and mark its rows as the model sees them.

As text: the plan in numbers, and rows with the trained tokens marked. As one PNG (`draw_sheet`): a contact sheet with
the question and the answer under each image. Its boxes and points are read back by `task.parse` from the text that the
model is trained on, so a wrong codec or a shifted box shows.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from PIL import Image, ImageOps

from ray_vlm.data import draw
from ray_vlm.data.balance import Balance, describe_balance
from ray_vlm.data.collate import answered
from ray_vlm.data.index import Index
from ray_vlm.data.inspect.check import plain
from ray_vlm.data.inspect.stats import labelled_regions
from ray_vlm.data.plan import Plan
from ray_vlm.data.records import Record, SftRecord
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import IGNORED, Sample
from ray_vlm.runs.plot import COLOURS, INK
from ray_vlm.runs.text import format_table
from ray_vlm.tasks.answers import IMAGE, Parsed
from ray_vlm.tasks.boxes import Frame
from ray_vlm.tasks.classification import POSITION
from ray_vlm.tasks.codecs import find_numbers

_SHOWN_RECORDS = 2
_TOKEN_NOTE = "trained tokens between [[ and ]], [[x2.50: where they weigh 2.50; the rest is only read"
_QUESTION_CENTRE = re.compile(
    r"([\d.]+)".join(re.escape(piece) for piece in re.split(r"\{[xy]:\.2f\}", POSITION.partition("{region}")[0]))
)

_SOFT, _PANEL, _WRONG = "#5d6873", "#eceff2", COLOURS[4]
# Pixels: the width of a panel, the height of its picture, the space between panels and around them.
_PANEL_WIDTH, _PICTURE, _GAP, _MARGIN = 372, 300, 20, 24
_COLUMNS = 4
_TITLE, _TEXT, _SMALL = 22, 14, 13  # pixels of type
_LEADING = 5
_NAMED = 40  # labels of a legend
_SHOWN_IMAGES = 4


def describe_prepared(index: Index, plan: Plan, builder: SampleBuilder, balance: Balance, shuffle: str = "") -> str:
    """Describe rows, steps, tokens and the mix of classes, then the tokens of the first records. `shuffle`: a line on
    the order of the rows."""
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
        *([shuffle] if shuffle else []),
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


def choose_rows(kinds: Sequence[tuple[str, ...]], kind_of: np.ndarray, count: int) -> Chosen:
    """Choose `count` evenly spaced rows. The rarest tag gets its share of them, and at least a third if that many rows
    have it.

    `kinds`: the distinct tuples of tags; `kind_of`: `int [rows]`, the position of each row's tags among them.
    """
    rows = Counter[str]()
    for kind, number in zip(kinds, np.bincount(kind_of, minlength=len(kinds)).tolist(), strict=True):
        rows.update(dict.fromkeys(kind, number))
    if len(rows) < 2:
        return Chosen(tuple(_spaced(np.arange(len(kind_of)), count)))
    rarest = min(rows, key=lambda tag: (rows[tag], tag))
    share = rows[rarest] / len(kind_of)
    having = np.isin(kind_of, [number for number, kind in enumerate(kinds) if rarest in kind])
    picked = _spaced(np.flatnonzero(having), max(-(-count // 3), round(share * count)))
    others = _spaced(np.flatnonzero(~having), count - len(picked))
    if missing := min(count, len(kind_of)) - len(picked) - len(others):  # too few of the others
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


@dataclass(frozen=True)
class Annotation:
    """A box (four numbers) or a point (two) in original pixels of one image, with its class."""

    image: int
    region: draw.Region
    label: str


@dataclass(frozen=True)
class PreviewPanel:
    """One row. `head`: lines on the row, its images and how exactly regions were read back; `images`: `uint8 [h, w, 3]`
    as the model sees them; `frames`: where originals lie in them; `problem`: what failed in reading back."""

    head: tuple[str, ...]
    images: tuple[np.ndarray, ...]
    frames: tuple[Frame, ...]
    marks: tuple[Annotation, ...]
    question: str
    answer: str
    problem: str = ""


def build_panels(records: Iterable[Record], builder: SampleBuilder) -> list[PreviewPanel]:
    """Build the panel of each record. Raise `DataError` if an image cannot be decoded."""
    return [
        _panel(record, builder) if isinstance(record, SftRecord) else _plain_panel(record, builder)
        for record in records
    ]


def _plain_panel(record: Record, builder: SampleBuilder) -> PreviewPanel:
    """Make the panel of a pair or a prompt: its texts, and the parsed preferred answer."""
    answers = [answer.text for answer in builder.answers(record)]
    frames, turns = builder.frames(record), builder.turns(record)
    parsed = builder.task.parse(answers[0], frames) if answers else Parsed()
    question = next((text for role, text in reversed(turns) if role == "user"), "")
    text = "  rather than  ".join(map(_one_line, answers))
    head = (f"row {record.row} (id {plain(record.id)})",)
    marks = tuple(Annotation(0, region, label or "?") for region, label in draw.regions_of(parsed.values))
    return PreviewPanel(head, builder.row(record).images, frames, marks, _one_line(question), text)


def _panel(record: SftRecord, builder: SampleBuilder) -> PreviewPanel:
    frames, turns = builder.frames(record), builder.turns(record)
    answer = builder.answer(record).text
    parsed = builder.task.parse(answer, frames)
    question = next((text for role, text in reversed(turns) if role == "user"), "")
    texts = [*(text for role, text in turns if role != "system"), answer]
    marks = (
        *(Annotation(0, region, label or "?") for region, label in draw.regions_of(parsed.values)),
        *_classification_marks(parsed, frames, question),
        *_in_text(record, frames, texts),
    )
    images = builder.train_row(record).images
    sizes = ", ".join(
        f"{w}x{h} px -> {image.shape[1]}x{image.shape[0]}, {builder.num_image_tokens((w, h))} tokens"
        for (w, h), image in zip(record.sizes[:1], images, strict=False)
    )
    head = f"row {record.row} (id {plain(record.id)})" + (f", {len(images)} images" if len(images) > 1 else "")
    note, problem = _compare(record, frames, marks)
    if not parsed.ok or parsed.repairs:
        problem = "; ".join(["the answer is not read back as it was written", *parsed.repairs])
    return PreviewPanel(
        tuple(line for line in (head, sizes, note) if line),
        images,
        frames,
        tuple(marks),
        _one_line(question),
        _one_line(answer),
        plain(problem),
    )


def _one_line(text: str) -> str:
    return plain(" ".join(text.replace(IMAGE, " ").split()))


def _classification_marks(parsed: Parsed, frames: Sequence[Frame], question: str) -> Iterator[Annotation]:
    """Yield a classification's answer at the centre that its question states."""
    if frames and (values := parsed.values.get("attributes")) and (match := _QUESTION_CENTRE.search(question)):
        width, height = frames[0].original
        yield Annotation(0, (float(match[1]) * width, float(match[2]) * height), ", ".join(values.values()))


def _in_text(record: SftRecord, frames: Sequence[Frame], texts: Sequence[str]) -> Iterator[Annotation]:
    """Yield the regions in a chat's texts, if there are as many as the record has."""
    boxes = record.context.get("boxes", ())
    regions = [numbers for text in texts for numbers in find_numbers(text, frames[0].codec)] if frames else []
    if boxes and len(regions) == len(boxes):
        numbers = record.context.get("image_of") or (0,) * len(boxes)
        for region, image in zip(regions, numbers, strict=True):
            read = frames[image].decode(region) if len(region) == 4 else frames[image].decode_point(region)
            yield Annotation(image, read, "in the text")


def _compare(record: SftRecord, frames: Sequence[Frame], marks: Sequence[Annotation]) -> tuple[str, str]:
    """Return how far marks lie from the regions of the data: as a note, or as a problem if too far."""
    read = [np.array(mark.region) for mark in marks]
    right = [np.array(region) for _, region, _ in labelled_regions(record)]
    if not right or "attributes" in record.truth:
        return "", ""
    near = [min((float(abs(r - b).max()) for r in read if len(r) == len(b)), default=np.inf) for b in right]
    units = [np.subtract(f.decode_point((1, 1)), f.decode_point((0, 0))).max() for f in frames]
    reach = 1 + 2.5 * float(max(units))
    if lost := sum(distance > reach for distance in near):
        return "", f"{lost} of {len(right)} regions are not read back where the data has them"
    return f"{len(right)} region{'s' if len(right) > 1 else ''} read back within {max(near):.1f} px", ""


def draw_sheet(panels: Sequence[PreviewPanel], title: str, notes: Sequence[str]) -> bytes:
    """Return the sheet as PNG, about 1600 pixels wide: title, notes, legend, and the panels in rows of four."""
    labels = sorted({mark.label for panel in panels for mark in panel.marks})
    columns = min(_COLUMNS, max(1, len(panels)))
    width = max(columns * (_PANEL_WIDTH + _GAP) - _GAP, 850)
    head = [*_wrapped(title, _TITLE, INK, width, 1), ("", _LEADING, INK)]
    head += [line for note in notes for line in _wrapped(plain(note), _TEXT, _SOFT, width, 1)]
    captions = [draw.draw_lines(_caption(panel), _PANEL_WIDTH) for panel in panels]
    tiles = [draw.stack([_draw_pictures(p, labels), text], 4) for p, text in zip(panels, captions, strict=True)]
    rows = [draw.stack(tiles[i : i + columns], _GAP, across=True) for i in range(0, len(tiles), columns)]
    sheet = draw.stack([draw.draw_lines(head, width), *_legend(labels, width), *rows], _GAP)
    out = io.BytesIO()
    ImageOps.expand(sheet, _MARGIN, draw.WHITE).save(out, format="PNG")
    return out.getvalue()


def _legend(labels: Sequence[str], width: int) -> list[Image.Image]:
    """Return the legend in lines of labels."""
    lines: list[list[Image.Image]] = [[]]
    for label in labels[:_NAMED]:
        tag = draw.draw_tag(label, draw.colour_of(label, labels), _TEXT)
        if sum(other.width + _LEADING for other in lines[-1]) + tag.width > width:
            lines.append([])
        lines[-1].append(tag)
    return [draw.stack([draw.stack(line, _LEADING, across=True) for line in lines], _LEADING)] if labels else []


def _caption(panel: PreviewPanel) -> list[draw.Line]:
    """Return the lines under a picture."""
    parts = [(line, _SMALL, _SOFT, 1) for line in panel.head]
    parts += [(panel.problem, _SMALL, _WRONG, 3)] if panel.problem else []
    parts += [(f"Q: {panel.question}", _TEXT, _SOFT, 3), (f"A: {panel.answer}", _TEXT, INK, 8)]
    return [line for text, size, color, most in parts for line in _wrapped(text, size, color, _PANEL_WIDTH, most)]


def _wrapped(text: str, size: int, color: str, width: float, most: int) -> list[draw.Line]:
    return [(line, size, color) for line in draw.wrap(text, size, width, most)]


def _draw_pictures(panel: PreviewPanel, labels: Sequence[str]) -> Image.Image:
    """Draw the row's images side by side, with their marks."""
    shown = panel.images[:_SHOWN_IMAGES]
    if not shown:
        return draw.draw_lines([("no image", _TEXT, _SOFT)], _PANEL_WIDTH, _PANEL)
    tiles, room = [], (_PANEL_WIDTH + _LEADING) // len(shown) - _LEADING
    for number, pixels in enumerate(shown):
        height, width = pixels.shape[:2]
        scale = min(room / width, _PICTURE / height)
        picture = draw.resize(pixels, width * scale, height * scale)
        marks = [mark for mark in panel.marks if mark.image == number]
        regions = [(on_picture(mark.region, panel.frames[number], scale), mark.label) for mark in marks]
        draw.draw_regions(picture, regions, [draw.colour_of(mark.label, labels) for mark in marks], 3, _SMALL)
        tiles.append(ImageOps.pad(picture, (room, _PICTURE), color=_PANEL))
    return draw.stack(tiles, _LEADING, across=True)


def on_picture(region: draw.Region, frame: Frame, scale: float) -> draw.Region:
    """Convert a region from pixels of the original image to those of what the model sees, times `scale`."""
    shown = frame.content or frame.resized
    return tuple(
        scale * (value / frame.original[i % 2] * shown[i % 2] + frame.offset[i % 2]) for i, value in enumerate(region)
    )
