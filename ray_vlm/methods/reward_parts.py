"""The built-in parts of a GRPO reward: each scores a parsed completion against its row's truth, from 0 to 1.

They are the task's own scores, with intermediate values where the task only has right and wrong, so that a better
answer always earns more.
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
HIT_IOU = 0.5  # a box with this IoU or more is a hit
_APART = 0.1  # with `giou`: the most that a box without overlap earns, and the least that one with overlap earns
_TIE = 1e-9  # added for a right label, to prefer it among pairings of the same quality
_DIAGONALS = 4.0  # a step that points this many diagonals away from its target earns nothing for it


def score_parts(task: str, parsed: Parsed, truth: Mapping[str, Any], box_quality: str = "iou") -> dict[str, float]:
    """Score every part in `PARTS[task]`, each 0..1; for classification also every attribute by its name, unless a part
    has that name. The order of boxes does not matter. `box_quality`: `iou` or `giou`."""
    if task == "detection":
        scores = _detection(parsed, truth, box_quality)
    else:
        scores = {"classification": _classification, "gui_steps": _gui_steps, "chat": _chat}[task](parsed, truth)
    return {**scores, "format": _format(task, parsed, truth)}


def _format(task: str, parsed: Parsed, truth: Mapping[str, Any]) -> float:
    """Return 1.0 for the expected format, 0.5 if something could still be parsed, else 0.0."""
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
    """Score `bbox` (quality of one-to-one pairs) and `category` (pairs that overlap and have the right label), both
    divided by the larger number of objects, and `completeness` (hits over hits, misses and other predicted boxes).

    Objects that parsing dropped as duplicates or as empty count as predicted boxes.
    """
    true, predicted = _objects(truth), _objects(parsed.values)
    num_predicted = len(predicted) + sum(repair.startswith("dropped ") for repair in parsed.repairs)
    if not true or not predicted:
        return dict.fromkeys(("bbox", "category", "completeness"), float(not true and not num_predicted and parsed.ok))
    true_boxes, boxes = [box for box, _ in true], [box for box, _ in predicted]
    ious = iou_matrix(true_boxes, boxes)
    quality = ious if box_quality == "iou" else _graded(ious, giou_matrix(true_boxes, boxes))
    agree = (ious > 0) & np.array([[label == name for _, label in predicted] for _, name in true])
    pairs = match(quality + _TIE * agree)
    most, hits = max(len(true), num_predicted), sum(ious[pair] >= HIT_IOU for pair in pairs)
    return {
        "bbox": float(sum(quality[pair] for pair in pairs) / most),
        "category": float(sum(agree[pair] for pair in pairs) / most),
        "completeness": float(hits / (len(true) + num_predicted - hits)),
    }


def _objects(values: Mapping[str, Any]) -> list[tuple[Box, str]]:
    """Return labelled boxes, sorted, so that the order in the answer does not matter."""
    boxes = (tuple(float(v) for v in box) for box in values.get("boxes", ()))
    return sorted(zip(boxes, values.get("labels", ()), strict=True))  # type: ignore[arg-type]


def giou_matrix(a: Sequence[Box], b: Sequence[Box]) -> np.ndarray:
    """Return the generalised IoU of every pair, `float64 [len(a), len(b)]`, in (-1, 1]: the IoU less the share of the
    smallest enclosing box that neither covers (Rezatofighi et al. 2019, arXiv:1902.09630)."""
    ious = iou_matrix(a, b)
    first, second = np.asarray(a, float).reshape(-1, 1, 4), np.asarray(b, float).reshape(1, -1, 4)
    areas = (first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1)
    enclosing = (np.maximum(first[..., 2:], second[..., 2:]) - np.minimum(first[..., :2], second[..., :2])).prod(-1)
    return ious - 1 + areas / (1 + ious) / enclosing  # the union is (sum of both areas) / (1 + IoU)


def _graded(ious: np.ndarray, gious: np.ndarray) -> np.ndarray:
    """Return the quality of every pair, 0..1: it grows as boxes come nearer, and any overlap is better than none."""
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
    """Score an answer that does not point into its target: under 0.5, and less with the distance. Return 1.0 if there
    is no target and the answer points at nothing."""
    near = gui_steps.NEAR_PX
    region = parsed.values.get("box") or parsed.values.get("point")
    if box is None and point is None:
        return float(region is None)
    if region is None:
        return 0.0
    target = box or (point[0] - near, point[1] - near, point[0] + near, point[1] + near)  # type: ignore[index]
    distance = math.dist(_centre(region), _centre(target))
    return max(0.0, 0.5 * (1 - distance / (_DIAGONALS * math.dist(target[:2], target[2:]))))


def _centre(region: Sequence[float]) -> tuple[float, float]:
    return (region[0] + region[-2]) / 2, (region[1] + region[-1]) / 2


def _chat(parsed: Parsed, truth: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in chat.score(parsed, truth).items()}
