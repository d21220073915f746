"""Rows as marked pictures: what the model sees, with boxes and points read back from the text that it is trained on.

They pass through the answer's text and `task.parse`, so a wrong codec or a shifted box shows. `preview_plot.py` draws
them.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ray_vlm.data.index import Index
from ray_vlm.data.records import Record, SftRecord
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import SampleSpec
from ray_vlm.data.stats import regions_of
from ray_vlm.data.survey import plain
from ray_vlm.tasks.answers import IMAGE, Parsed
from ray_vlm.tasks.boxes import Frame
from ray_vlm.tasks.classification import POSITION

_QUESTION_CENTRE = re.compile(
    r"([\d.]+)".join(re.escape(piece) for piece in re.split(r"\{[xy]:\.2f\}", POSITION.partition("{region}")[0]))
)
_REGION = re.compile(
    r"\[(\d+), (\d+)(?:, (\d+), (\d+))?\]|<\|box_start\|>\((\d+),(\d+)\)(?:,\((\d+),(\d+)\))?<\|box_end\|>"
)


@dataclass(frozen=True)
class Annotation:
    """A box (four numbers) or a point (two) in original pixels of one image, with its class."""

    image: int
    region: tuple[float, ...]
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


def make_cells(index: Index, spec: SampleSpec, positions: Sequence[int]) -> list[PreviewPanel]:
    """Make panels of the rows at these positions. Raise `DataError` if an image cannot be decoded."""
    builder = load_sample_builder(spec)
    panels = []
    for position in positions:
        record = index.records[position]
        panels.append(_panel(record, builder) if isinstance(record, SftRecord) else _plain_panel(record, builder))
    return panels


def _plain_panel(record: Record, builder: SampleBuilder) -> PreviewPanel:
    """Make the panel of a pair or a prompt: its texts, and the parsed preferred answer."""
    answers = [answer.text for answer in builder.answers(record)]
    frames, turns = builder.frames(record), builder.turns(record)
    parsed = builder.task.parse(answers[0], frames) if answers else Parsed()
    question = next((text for role, text in reversed(turns) if role == "user"), "")
    text = "  rather than  ".join(map(_one_line, answers))
    head = (f"row {record.row} (id {plain(record.id)})",)
    return PreviewPanel(head, builder.row(record).images, frames, tuple(_answered(parsed)), _one_line(question), text)


def _panel(record: SftRecord, builder: SampleBuilder) -> PreviewPanel:
    frames, turns = builder.frames(record), builder.turns(record)
    answer = builder.answer(record).text
    parsed = builder.task.parse(answer, frames)
    question = next((text for role, text in reversed(turns) if role == "user"), "")
    texts = [*(text for role, text in turns if role != "system"), answer]
    marks = (
        *_answered(parsed),
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


def _answered(parsed: Parsed) -> Iterator[Annotation]:
    """Yield the regions that the task parses from the answer."""
    values = parsed.values
    for box, label in zip(values.get("boxes", ()), values.get("labels", ()), strict=True):
        yield Annotation(0, tuple(box), label)
    for key in ("box", "point"):
        if values.get(key) is not None:
            yield Annotation(0, tuple(values[key]), str(values["output"].get("action", "")))


def _classification_marks(parsed: Parsed, frames: Sequence[Frame], question: str) -> Iterator[Annotation]:
    """Yield a classification's answer at the centre that its question states."""
    if frames and (values := parsed.values.get("attributes")) and (match := _QUESTION_CENTRE.search(question)):
        width, height = frames[0].original
        yield Annotation(0, (float(match[1]) * width, float(match[2]) * height), ", ".join(values.values()))


def _in_text(record: SftRecord, frames: Sequence[Frame], texts: Sequence[str]) -> Iterator[Annotation]:
    """Yield the regions in a chat's texts, if there are as many as the record has."""
    boxes = record.context.get("boxes", ())
    regions = [[float(v) for v in match.groups() if v] for text in texts for match in _REGION.finditer(text)]
    if boxes and len(regions) == len(boxes):
        numbers = record.context.get("image_of") or (0,) * len(boxes)
        for region, image in zip(regions, numbers, strict=True):
            read = frames[image].decode(region) if len(region) == 4 else frames[image].decode_point(region)
            yield Annotation(image, read, "in the text")


def _compare(record: SftRecord, frames: Sequence[Frame], marks: Sequence[Annotation]) -> tuple[str, str]:
    """Return how far marks lie from the regions of the data: as a note, or as a problem if too far."""
    read = [np.array(mark.region) for mark in marks]
    right = [np.array(region) for tag, region, _ in regions_of(record)] if "attributes" not in record.truth else []
    if not right:
        return "", ""
    near = [min((float(abs(r - b).max()) for r in read if len(r) == len(b)), default=np.inf) for b in right]
    units = [np.subtract(f.decode_point((1, 1)), f.decode_point((0, 0))).max() for f in frames]
    reach = 1 + 2.5 * float(max(units))
    if lost := sum(distance > reach for distance in near):
        return "", f"{lost} of {len(right)} regions are not read back where the data has them"
    return f"{len(right)} region{'s' if len(right) > 1 else ''} read back within {max(near):.1f} px", ""
