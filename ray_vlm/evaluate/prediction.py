"""One answer with its truth and score: the input of every metric, table and report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray_vlm.data.records import SftRecord
from ray_vlm.data.samples import SampleBuilder, parse_answer


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
