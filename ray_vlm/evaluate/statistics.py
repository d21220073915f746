"""Every metric as a function of sums over rows, for bootstrap intervals.

A `Statistic` has columns of numbers for each row and a function of the columns' sums. With every row counted once its
value is the metric that `metrics.py` reports (a test compares them).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_vlm.evaluate.metrics import known_value

Row = Mapping[str, Any]  # a line of predictions.jsonl


@dataclass(frozen=True)
class Statistic:
    """`sums`: `float64 [rows, columns]`; `value` maps sums `[..., columns]` to the metric `[...]`."""

    sums: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]


def build_statistics(task: str, rows: Sequence[Row]) -> dict[str, Statistic]:
    """Build the task's metrics except mAP, which ranks boxes over all images (`average_precision.py`)."""
    return _BUILD[task](rows) | {"parse_rate": _mean([[row["ok"]] for row in rows])}


def clusters_of(rows: Sequence[Row]) -> list[tuple[str, Any]]:
    """Return the cluster of each row: its group (the task of a GUI step), or the row alone."""
    return [("group", row["group"]) if row["group"] else ("row", i) for i, row in enumerate(rows)]


def divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return `above / below`, and 0.0 where `below` is 0."""
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below > 0)


def _mean(values: Sequence[Sequence[Any]]) -> Statistic:
    """Build the mean over all values of all rows that are not None."""
    numbers = [[float(v) for v in row if v is not None] for row in values]
    sums = np.array([[sum(row), len(row)] for row in numbers], np.float64).reshape(len(numbers), 2)
    return Statistic(sums, lambda s: divide(s[..., 0], s[..., 1]))


def _f1(sums: np.ndarray) -> np.ndarray:
    """Return F1 from sums `[..., 3]` of hits, misses and invented ones."""
    hits, misses, invented = sums[..., 0], sums[..., 1], sums[..., 2]
    return divide(2 * hits, 2 * hits + misses + invented)


def _of_detection(rows: Sequence[Row]) -> dict[str, Statistic]:
    kinds = ("hits", "misses", "invented")
    counts = np.array([[sum(row["score"][kind].values()) for kind in kinds] for row in rows], np.float64).reshape(-1, 3)
    return {
        "precision_50": Statistic(counts, lambda s: divide(s[..., 0], s[..., 0] + s[..., 2])),
        "recall_50": Statistic(counts, lambda s: divide(s[..., 0], s[..., 0] + s[..., 1])),
        "f1_50": Statistic(counts, _f1),
        "mean_iou": _mean([row["score"]["ious"] for row in rows]),
    }


def _of_classification(rows: Sequence[Row]) -> dict[str, Statistic]:
    values: dict[str, list[str]] = {}
    for row in rows:
        for name, value in row["truth"]["attributes"].items():
            if value not in values.setdefault(name, []):
                values[name].append(value)
    column = {tag: i for i, tag in enumerate((name, value) for name, known in values.items() for value in known)}
    counts = np.zeros((len(rows), len(column), 3))
    for i, row in enumerate(rows):
        for name, value in row["truth"]["attributes"].items():
            right = row["score"]["correct"][name]
            counts[i, column[name, value], 0 if right else 1] += 1
            answered = known_value(row["found"].get("attributes", {}).get(name), values[name])
            if answered is not None and not right:
                counts[i, column[name, answered], 2] += 1
    parts = [[column[name, value] for value in known] for name, known in values.items()]
    flat = counts.reshape(len(rows), -1)  # [rows, values * 3]: hits, misses, invented of each value
    return {
        "accuracy": _mean([[row["score"]["all"]] for row in rows]),
        "attribute_accuracy": _mean([list(row["score"]["correct"].values()) for row in rows]),
        "balanced_accuracy": Statistic(flat, _mean_of_parts(parts, lambda s: divide(s[..., 0], s[..., 0] + s[..., 1]))),
        "macro_f1": Statistic(flat, _mean_of_parts(parts, _f1)),
    }


def _mean_of_parts(
    parts: Sequence[Sequence[int]], rate: Callable[[np.ndarray], np.ndarray]
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function: the mean of `rate` over each attribute's values that a resample has, averaged over
    attributes."""

    def value(sums: np.ndarray) -> np.ndarray:
        counts = sums.reshape(*sums.shape[:-1], -1, 3)  # [..., values, 3]
        present = counts[..., 0] + counts[..., 1] > 0
        rates = np.where(present, rate(counts), 0.0)
        means = [divide(rates[..., part].sum(-1), present[..., part].sum(-1)) for part in map(list, parts)]
        return np.mean(means, axis=0) if means else np.zeros(sums.shape[:-1])

    return value


def _of_gui_steps(rows: Sequence[Row]) -> dict[str, Statistic]:
    steps: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        steps.setdefault(row["group"], []).append(i)
    task_success: list[list[bool]] = [[] for _ in rows]
    for positions in steps.values():  # a task's success counts once, at its first step
        task_success[positions[0]] = [all(rows[i]["score"]["success"] for i in positions)]
    names = {"step_success": "success", "action_accuracy": "action", "argument_accuracy": "arguments"}
    names |= {"grounding": "inside", "mean_iou": "iou"}
    statistics = {name: _mean([[row["score"][key]] for row in rows]) for name, key in names.items()}
    return statistics | {"task_success": _mean(task_success)}


def _of_chat(rows: Sequence[Row]) -> dict[str, Statistic]:
    return {name: _mean([[row["score"][name]] for row in rows]) for name in ("exact", "normalised", "anls")}


_BUILD: dict[str, Callable[[Sequence[Row]], dict[str, Statistic]]] = {
    "detection": _of_detection,
    "classification": _of_classification,
    "gui_steps": _of_gui_steps,
    "chat": _of_chat,
}
