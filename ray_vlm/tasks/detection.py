"""Detection: find every object of the named classes and give its box.

The answer lists objects from top to bottom and then from left to right (y1, then x1, then label), in the family's own
form (`tasks/codecs.py`), and so does the question; `[]`, or `None` in a form of tokens, means no objects.

`truth` is `{"boxes": (Box, ...), "labels": (str, ...)}`. Placeholder of the prompt: `{labels}`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ray_vlm.config.task import prompt_of
from ray_vlm.data.records import SftRecord
from ray_vlm.tasks.answers import Answer, Parsed, PromptContext, Turns, name_class, with_images
from ray_vlm.tasks.boxes import Frame, box_problem, iou_matrix, match, read_boxes, write_boxes


def check(record: SftRecord, labels: Sequence[str]) -> str | None:
    """Return why a record cannot be trained on, or None."""
    if len(record.images) != 1:
        return f"a detection row needs exactly one image, and this one has {len(record.images)}"
    for box, label in zip(record.truth["boxes"], record.truth["labels"], strict=True):
        if label not in labels:
            return f"class {label!r} is not among the task's labels {sorted(labels)}; add it to task.labels or mend it"
        if reason := box_problem(box, record.sizes[0]):
            return f"{reason}; mend the box, or say what its numbers mean with box_units"
    return None


def tags(record: SftRecord) -> tuple[str, ...]:
    """Return the class of every object."""
    return tuple(record.truth["labels"])


def ask(record: SftRecord, frames: Sequence[Frame], context: PromptContext) -> Turns:
    """Build the turn with the image and the question."""
    codec = frames[0].codec
    question = (prompt_of(context.options) or codec.question).replace("{labels}", codec.separator.join(context.labels))
    return with_images(len(record.images), question, context.options.system)


def answer(record: SftRecord, frames: Sequence[Frame], context: PromptContext) -> Answer:
    """Write the right answer, each object a span of its class."""
    objects = zip(record.truth["boxes"], record.truth["labels"], strict=True)
    return write_boxes(sorted(objects, key=lambda o: (o[0][1], o[0][0], o[1])), frames[0])


def parse(text: str, frames: Sequence[Frame]) -> Parsed:
    """Parse `boxes`, in original pixels, and their `labels`. Never raises; repairs are listed in `repairs`."""
    objects, ok, repairs = read_boxes(text, frames[0])
    boxes, labels = tuple(box for box, _ in objects), tuple(label for _, label in objects)
    return Parsed({"boxes": boxes, "labels": labels}, ok, tuple(repairs))


def name_classes(parsed: Parsed, labels: Sequence[str]) -> Parsed:
    """Return the answer with its labels spelled as in `labels`: an untrained base answers `stop sign` for
    `Stop_Sign`."""
    named = tuple(name_class(label, labels) for label in parsed.values["labels"])
    return replace(parsed, values={**parsed.values, "labels": named})


def score(parsed: Parsed, truth: Mapping[str, Any], threshold: float = 0.5) -> dict[str, Any]:
    """Score an answer against the truth of one image.

    Returns the counts by class at `threshold` IoU (`hits`, `misses`, `invented`: label -> number), from a one-to-one
    matching within each class with the most pairs and, among those, the largest overlap; and `ious`: for each true
    object the IoU of the box matched to it when labels are ignored, 0.0 without a match.
    """
    boxes, labels = parsed.values.get("boxes", ()), parsed.values.get("labels", ())
    ious = iou_matrix(truth["boxes"], boxes)
    same = np.array([[t == p for p in labels] for t in truth["labels"]], bool).reshape(ious.shape)
    # 1000 per pair outweighs any sum of overlaps, so the number of pairs is maximised first
    pairs = match(np.where(same & (ious >= threshold), 1000.0 + ious, 0.0))
    hit_truth, hit_answer = {r for r, _ in pairs}, {c for _, c in pairs}
    best = {r: float(ious[r, c]) for r, c in match(ious)}
    return {
        "hits": _count(truth["labels"], hit_truth),
        "misses": _count(truth["labels"], set(range(len(truth["labels"]))) - hit_truth),
        "invented": _count(labels, set(range(len(labels))) - hit_answer),
        "ious": [best.get(i, 0.0) for i in range(len(truth["labels"]))],
    }


def _count(labels: Sequence[str], chosen: set[int]) -> dict[str, int]:
    return dict(Counter(labels[i] for i in sorted(chosen)))
