"""One answer with its truth and score: the input of every metric, table and report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ray_vlm.data.records import SftRecord
from ray_vlm.data.samples import SampleBuilder, parse_answer

if TYPE_CHECKING:
    import PIL.Image


@dataclass(frozen=True)
class Prediction:
    """One answer, the truth of its record and the task's score of it; coordinates are in original pixels.

    `group`: the task of a GUI step; `parsed`: the values parsed from the answer (`Parsed.values`), `found` in files;
    `images`: paths, or None for bytes.
    """

    row: int
    id: str
    group: str
    images: tuple[str | None, ...]
    sizes: tuple[tuple[int, int], ...]
    answer: str
    parsed: Mapping[str, Any]
    ok: bool
    repairs: tuple[str, ...]
    truth: Mapping[str, Any]
    score: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, a line of `predictions.jsonl`."""
        values = asdict(self)
        return {"found" if name == "parsed" else name: value for name, value in values.items()}


def join_names(images: Sequence[str]) -> str:
    """Return the images of a row as one cell of a table: one by its name, several as a JSON list."""
    return "".join(images) if len(images) < 2 else json.dumps(list(images), ensure_ascii=False)


def build_predictions(records: Sequence[SftRecord], answers: Sequence[str], builder: SampleBuilder) -> list[Prediction]:
    """Parse and score each answer with the task's own functions."""
    predictions = []
    for record, text in zip(records, answers, strict=True):
        parsed, truth = parse_answer(text, record, builder), builder.truth(record)
        predictions.append(
            Prediction(
                row=record.row,
                id=record.id,
                group=record.context.get("task", record.group),
                images=tuple(image if isinstance(image, str) else None for image in record.images),
                sizes=record.sizes,
                answer=text,
                parsed=parsed.values,
                ok=parsed.ok,
                repairs=parsed.repairs,
                truth=truth,
                score=builder.task.score(parsed, truth),
            )
        )
    return predictions


def in_words(values: Mapping[str, Any], labels: bool = True) -> str:
    """Return the text of a truth or a parsed answer, without coordinates; `labels`: include the labels of boxes."""
    if "labels" in values:
        return ", ".join(values["labels"]) if labels else ""
    pairs = values.get("attributes") or values.get("output") or {}
    return values.get("answer") or ", ".join(f"{name}: {value}" for name, value in pairs.items())


def draw_predictions(predictions: Sequence[Prediction], count: int = 8) -> "list[tuple[str, PIL.Image.Image]]":
    """Return captions and images of the first few predictions whose images are files."""
    from ray_vlm.data.draw import MIN_SIDE, draw_values

    classes = sorted({label for p in predictions for label in p.truth.get("labels", ())})
    pictures = []
    for p in [p for p in predictions if p.images and p.images[0] is not None][:count]:
        caption = in_words(p.parsed, labels=False)
        picture = draw_values(str(p.images[0]), p.parsed, classes, caption, min_side=MIN_SIDE)
        pictures.append((f"{p.id}: {in_words(p.truth)}", picture))
    return pictures
