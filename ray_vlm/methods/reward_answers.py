"""Test cases for the rewards before training: right and wrong answers to made-up records of each task.

Answers are text in the task's format, so parsing is tested with the scores.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_vlm.data.records import Box
from ray_vlm.tasks.boxes import Frame, write_boxes
from ray_vlm.tasks.classification import attributes_of

FRAME = Frame((1000, 1000), (1000, 1000))
TRUTH = "truth"
ORDER = ("empty", "invented", "shifted", "duplicated", TRUTH)  # answers to a detection, from the worst to the best
_GARBAGE = "I cannot tell."
_BOXES: tuple[Box, ...] = ((100, 100, 300, 300), (600, 150, 840, 350), (420, 400, 560, 520))
_ELSEWHERE: tuple[Box, ...] = ((100, 700, 300, 900), (400, 720, 520, 900), (700, 700, 940, 860))


@dataclass(frozen=True)
class Case:
    """A record with its right answer, named `TRUTH`, first, and wrong answers, each a text by name.

    `judges`: for a wrong answer, the parts that can detect the error; a job that weights none of them ignores it on
    purpose. An answer without judges must always score less than the right one.
    """

    truth: Mapping[str, Any]
    answers: Mapping[str, str]
    judges: Mapping[str, frozenset[str]]


def build_cases(task: str, labels: Sequence[str] = ()) -> list[Case]:
    """Build made-up records of a task, with the job's class names if it has some; boxes are in pixels of `FRAME`."""
    return list(_CASES[task](labels))


def _detection(labels: Sequence[str]) -> Iterator[Case]:
    """Yield a record with two objects, and one with three."""
    names = list(dict.fromkeys((*labels, "pipe", "valve", "crack")))
    for count in (2, 3):
        right = list(zip(_BOXES[:count], names, strict=False))
        invented = [*right[:1], *zip(_ELSEWHERE, [*names[1:count], names[0]], strict=False)]
        answers = {
            TRUTH: right,
            "duplicated": right * 2,
            "shifted": [(_shift(box), name) for box, name in right],
            "invented": invented,
            "empty": [],
        }
        truth = {"boxes": _BOXES[:count], "labels": tuple(names[:count])}
        yield Case(truth, {name: write_boxes(objects, FRAME).text for name, objects in answers.items()}, {})


def _shift(box: Box) -> Box:
    """Move a box by a quarter of its width and height, which leaves an IoU of 0.39."""
    right, down = (box[2] - box[0]) / 4, (box[3] - box[1]) / 4
    return (box[0] + right, box[1] + down, box[2] + right, box[3] + down)


def _classification(labels: Sequence[str]) -> Iterator[Case]:
    right = attributes_of(labels) or {"object": "drain", "condition": "blocked"}
    first, *others = right
    answers = {TRUTH: right, "wrong class": {**right, first: f"not {right[first]}"}}
    judges = {"wrong class": frozenset({"class", first})}
    if others:
        answers["wrong conditions"] = {**right, **{name: f"not {right[name]}" for name in others}}
        judges["wrong conditions"] = frozenset({"conditions", *others})
    texts = {name: json.dumps(answer, ensure_ascii=False) for name, answer in answers.items()}
    yield Case({"attributes": right}, {**texts, "nothing understood": _GARBAGE}, judges)


def _gui_steps(labels: Sequence[str]) -> Iterator[Case]:
    """Yield a step that points at a box, and one that points at nothing."""
    box = _BOXES[0]
    for true_box in (box, None):
        right: dict[str, Any] = {"action": "click", "target": "Save"}
        points = {} if true_box is None else {"bbox_2d": FRAME.encode(true_box)}
        answers = {
            TRUTH: {**right, **points},
            "wrong action": {**right, **points, "action": "scroll"},
            "wrong argument": {**right, **points, "target": "Cancel"},
            "wrong place": {**right, "bbox_2d": FRAME.encode(_ELSEWHERE[2])},
        }
        judges = {"wrong action": {"action"}, "wrong argument": {"argument"}, "wrong place": {"grounding"}}
        texts = {name: json.dumps(answer) for name, answer in answers.items()}
        yield Case(
            {"output": right, "box": true_box, "point": None},
            {**texts, "nothing understood": _GARBAGE},
            {name: frozenset(parts) for name, parts in judges.items()},
        )


def _chat(labels: Sequence[str]) -> Iterator[Case]:
    right = "The gauge reads 42 bar."
    wrong = {"nearly right": "The gauge reads 24 bar.", "another answer": "Two cats sleep on a sofa.", "empty": ""}
    yield Case({"answer": right}, {TRUTH: right, **wrong}, {})


_CASES = {"detection": _detection, "classification": _classification, "gui_steps": _gui_steps, "chat": _chat}
