"""Detection: find every object of the named classes and say where it is.

The answer is fenced JSON, one object on a line, from top to bottom and then from left to right (y1, then x1, then
label); `[]` says that nothing is there. Training targets, validation, evaluation and prediction all use `ask`,
`answer`, `parse` and `score` of this file.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_vlm.data.records import Box
from ray_vlm.tasks.boxes import Frame, iou_matrix, match

PROMPT = (
    "Locate every instance that belongs to the following categories: '{labels}'. "
    "Report bbox coordinates in JSON format."
)
_NUMBER = r"-?\d+(?:\.\d+)?"
_BOX = rf'"bbox_2d"\s*:\s*\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]'
_OBJECT = re.compile(_BOX + r'\s*,\s*"label"\s*:\s*"((?:[^"\\]|\\.)*)"')
_FENCE = re.compile(r"```(?:json)?")  # no repeats beside each other: a model may write a page of spaces


@dataclass(frozen=True)
class Parsed:
    """What was understood of an answer. `ok`: it was the promised JSON; `repairs`: what had to be mended or dropped."""

    boxes: tuple[Box, ...] = ()
    labels: tuple[str, ...] = ()
    ok: bool = True
    repairs: tuple[str, ...] = field(default=())


def ask(labels: Sequence[str], prompt: str | None = None) -> str:
    """The question. `prompt` may hold `{labels}`; None gives the task's own wording."""
    return (prompt or PROMPT).replace("{labels}", ", ".join(labels))


def answer(truth: Mapping[str, Any], frame: Frame) -> str:
    """The right answer as text, coordinates in the family's system."""
    objects = sorted(zip(truth["boxes"], truth["labels"], strict=True), key=lambda o: (o[0][1], o[0][0], o[1]))
    rows = [
        f'\n\t{{"bbox_2d": {frame.encode(box)}, "label": {json.dumps(label, ensure_ascii=False)}}}'
        for box, label in objects
    ]
    return "```json\n[" + ",".join(rows) + ("\n" if rows else "") + "]\n```"


def parse(text: str, frame: Frame) -> Parsed:
    """Read an answer back to original pixels. Never raises; what it mended is in `repairs`."""
    repairs: list[str] = []
    items = _read_json(text)
    ok = items is not None
    if items is None:
        items = [{"bbox_2d": [float(v) for v in m[:4]], "label": _unescape(m[4])} for m in _OBJECT.findall(text)]
        repairs.append("not the promised JSON; objects picked out of the text" if items else "no object found in it")
    boxes, labels = [], []
    for item in items:
        box = _usable_box(item)
        if box is None:
            ok = False
            repairs.append(f"dropped {str(item)[:80]}")
        elif box[2] <= box[0] or box[3] <= box[1]:
            repairs.append(f"dropped an empty box {box}")
        else:
            boxes.append(frame.decode(box))
            labels.append(str(item["label"]))
    return Parsed(tuple(boxes), tuple(labels), ok, tuple(repairs))


def _read_json(text: str) -> list | None:
    start, end = _FENCE.search(text), text.rfind("```")
    inside = text[start.end() : end] if start and end >= start.end() else text
    try:
        value = json.loads(inside, strict=False)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _unescape(label: str) -> str:
    """A label as JSON means it, from between its quotes."""
    try:
        return json.loads(f'"{label}"', strict=False)
    except ValueError:
        return label


def _usable_box(item: Any) -> list[float] | None:
    box = item.get("bbox_2d") if isinstance(item, dict) else None
    if not isinstance(box, list) or len(box) != 4 or not isinstance(item.get("label"), str):
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9 for v in box):
        return None
    return [float(v) for v in box] if all(math.isfinite(v) for v in box) else None


def score(parsed: Parsed, truth: Mapping[str, Any], threshold: float = 0.5) -> dict[str, Any]:
    """Compare an answer with the truth of one image.

    Returns counts by class at `threshold` IoU (`hits`, `misses`, `invented`: label -> number; boxes pair one-to-one
    within a class, most pairs first, then most overlap) and `ious`: for each true object the IoU of the box that is
    paired with it when labels are ignored, 0.0 where none is.
    """
    ious = iou_matrix(truth["boxes"], parsed.boxes)
    same = np.array([[t == p for p in parsed.labels] for t in truth["labels"]], bool).reshape(ious.shape)
    pairs = match(np.where(same & (ious >= threshold), 1000.0 + ious, 0.0))
    hit_truth, hit_answer = {r for r, _ in pairs}, {c for _, c in pairs}
    best = {r: float(ious[r, c]) for r, c in match(ious)}
    return {
        "hits": _count(truth["labels"], hit_truth),
        "misses": _count(truth["labels"], set(range(len(truth["labels"]))) - hit_truth),
        "invented": _count(parsed.labels, set(range(len(parsed.labels))) - hit_answer),
        "ious": [best.get(i, 0.0) for i in range(len(truth["labels"]))],
    }


def _count(labels: Sequence[str], chosen: set[int]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for i in sorted(chosen):
        counts[labels[i]] = counts.get(labels[i], 0) + 1
    return counts
