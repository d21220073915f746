"""The built-in parts of a GRPO reward: one parsed completion against its row's truth, each part between 0 and 1.

They are the task's own scores, graded where the task only says right or wrong, so that there is something to climb.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_vlm.data.records import Box
from ray_vlm.tasks import chat, classification, gui_steps
from ray_vlm.tasks.answers import Parsed
from ray_vlm.tasks.boxes import iou_matrix, match

PARTS: dict[str, tuple[str, ...]] = {
    "detection": ("format", "bbox", "category", "completeness"),
    "classification": ("format", "class", "conditions"),
    "gui_steps": ("format", "action", "argument", "grounding"),
    "chat": ("format", "exact", "normalised", "anls"),
}
HIT_IOU = 0.5  # a box that overlaps this much has found its object
_APART = 0.1  # with `giou`: what a box is worth at most that does not overlap the true one, and at least if it does
_TIE = 1e-9  # between pairings of the same quality, the one with more right labels
_DIAGONALS = 4.0  # a step that points this many diagonals away from its place earns nothing for it


def score_parts(task: str, parsed: Parsed, truth: Mapping[str, Any], box_quality: str = "iou") -> dict[str, float]:
    """Every part in `PARTS[task]`, each 0..1; for classification also every attribute by its name, unless a part has
    it. Does not depend on the order in which boxes are listed. `box_quality`: `iou` or `giou`."""
    if task == "detection":
        scores = _detection(parsed, truth, box_quality)
    else:
        scores = {"classification": _classification, "gui_steps": _gui_steps, "chat": _chat}[task](parsed, truth)
    return {**scores, "format": _format(task, parsed, truth)}


def _format(task: str, parsed: Parsed, truth: Mapping[str, Any]) -> float:
    """1.0 for the promised form, 0.5 where something could still be understood, else 0.0."""
    values = parsed.values
    understood = {
        "detection": lambda: bool(values.get("boxes")),
        "classification": lambda: any(name in values.get("attributes", {}) for name in truth["attributes"]),
        "gui_steps": lambda: any(name in values.get("output", {}) for name in truth["output"]),
        "chat": lambda: bool(values.get("answer")),
    }
    named = task != "classification" or truth["attributes"].keys() == values.get("attributes", {}).keys()
    return 1.0 if parsed.ok and named else 0.5 * understood[task]()


def _detection(parsed: Parsed, truth: Mapping[str, Any], box_quality: str) -> dict[str, float]:
    """`bbox`: quality of one-to-one pairs, `category`: pairs that overlap and have the right label, both over the
    larger number of objects; `completeness`: hits over hits, misses and all other boxes that were written.

    Objects that parsing dropped because they repeat another, or are none, were written and count as boxes.
    """
    right, found = _objects(truth), _objects(parsed.values)
    num_found = len(found) + sum(repair.startswith("dropped ") for repair in parsed.repairs)
    if not right or not found:
        return dict.fromkeys(("bbox", "category", "completeness"), float(not right and not num_found and parsed.ok))
    true_boxes, boxes = [box for box, _ in right], [box for box, _ in found]
    ious = iou_matrix(true_boxes, boxes)
    quality = ious if box_quality == "iou" else _graded(ious, giou_matrix(true_boxes, boxes))
    agree = (ious > 0) & np.array([[label == name for _, label in found] for _, name in right])
    pairs = match(quality + _TIE * agree)
    most, hits = max(len(right), num_found), sum(ious[pair] >= HIT_IOU for pair in pairs)
    return {
        "bbox": float(sum(quality[pair] for pair in pairs) / most),
        "category": float(sum(agree[pair] for pair in pairs) / most),
        "completeness": float(hits / (len(right) + num_found - hits)),
    }


def _objects(values: Mapping[str, Any]) -> list[tuple[Box, str]]:
    """Labelled boxes in an order that does not depend on how they were listed."""
    boxes = (tuple(float(v) for v in box) for box in values.get("boxes", ()))
    return sorted(zip(boxes, values.get("labels", ()), strict=True))  # type: ignore[arg-type]


def giou_matrix(a: Sequence[Box], b: Sequence[Box]) -> np.ndarray:
    """Generalised IoU of every pair, `float64 [len(a), len(b)]`, in (-1, 1]: IoU less the share of the smallest box
    around both that neither covers (Rezatofighi et al. 2019, arXiv:1902.09630)."""
    ious = iou_matrix(a, b)
    first, second = np.asarray(a, float).reshape(-1, 1, 4), np.asarray(b, float).reshape(1, -1, 4)
    areas = (first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1)
    around = (np.maximum(first[..., 2:], second[..., 2:]) - np.minimum(first[..., :2], second[..., :2])).prod(-1)
    return ious - 1 + areas / (1 + ious) / around


def _graded(ious: np.ndarray, gious: np.ndarray) -> np.ndarray:
    """Quality of every pair, 0..1: grows as boxes come nearer, and any overlap is worth more than none."""
    return np.where(ious > 0, _APART + (1 - _APART) * ious, _APART * (1 + np.minimum(gious, 0)))


def _classification(parsed: Parsed, truth: Mapping[str, Any]) -> dict[str, float]:
    correct = {k: float(v) for k, v in classification.score(parsed, truth)["correct"].items()}
    first, *others = correct.values()
    return {**correct, "class": first, "conditions": sum(others) / len(others) if others else 1.0}


def _gui_steps(parsed: Parsed, truth: Mapping[str, Any]) -> dict[str, float]:
    scores = gui_steps.score(parsed, truth)
    arguments, inside = scores["arguments"], scores["inside"]
    return {
        "action": float(scores["action"]),
        "argument": 1.0 if arguments is None else arguments,
        "grounding": 1.0 if inside else _nearness(parsed, truth["box"], truth["point"]),
    }


def _nearness(parsed: Parsed, box: Box | None, point: Sequence[float] | None) -> float:
    """What an answer earns that does not point into its place: under 0.5, and less the farther away. 1.0 where there
    is no place and the answer names none."""
    near = gui_steps.NEAR_PX
    found = parsed.values.get("box") or parsed.values.get("point")
    if box is None and point is None:
        return float(found is None)
    if found is None:
        return 0.0
    place = box or (point[0] - near, point[1] - near, point[0] + near, point[1] + near)  # type: ignore[index]
    distance = math.dist(_centre(found), _centre(place))
    return max(0.0, 0.5 * (1 - distance / (_DIAGONALS * math.dist(place[:2], place[2:]))))


def _centre(region: Sequence[float]) -> tuple[float, float]:
    return (region[0] + region[-2]) / 2, (region[1] + region[-1]) / 2


def _chat(parsed: Parsed, truth: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in chat.score(parsed, truth).items()}
