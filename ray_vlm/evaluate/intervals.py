"""Bootstrap intervals of metrics, and of the difference between two evaluations of the same rows.

Nearly every metric is a function of sums over rows: a `Statistic` has columns of numbers for each row and a function of
the columns' sums. With every row counted once its value is the metric that `metrics.py` reports (a test compares them).
A resample is then a vector of weights and all resamples are one matrix product; mAP is computed anew for fewer
resamples. Rows that belong together (steps of a task, photos of a site) are drawn together. Intervals are percentile
intervals (Efron 1979); a difference is *paired*: both sides have the same resamples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_vlm.evaluate.average_precision import Ranked, mean_ap, rank
from ray_vlm.evaluate.metrics import known_value

NUM_RESAMPLES = 2000
NUM_RANKED = 200  # resamples of mAP
LEVEL = 0.95
_CHUNK = 4_000_000  # weights in memory at a time

Row = Mapping[str, Any]  # a line of predictions.jsonl


@dataclass(frozen=True)
class Statistic:
    """`sums`: `float64 [rows, columns]`; `value` maps sums `[..., columns]` to the metric `[...]`."""

    sums: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]


def measure_intervals(task: str, rows: Sequence[Row], seed: int = 0) -> dict[str, list[float]]:
    """Return `{metric: [low, high]}`, the middle 95 % of resamples. `rows`: lines of `predictions.jsonl`."""
    if not rows:
        return {}
    (drawn,) = _resample(task, [rows], seed)
    return {name: middle(np.clip(values, 0.0, 1.0)) for name, values in drawn.items()}


def measure_differences(task: str, after: Sequence[Row], before: Sequence[Row], seed: int = 0) -> dict[str, Any]:
    """Return `{metric: [low, high]}` of `after` minus `before`, which hold the same rows in the same order."""
    if not after:
        return {}
    new, old = _resample(task, [after, before], seed)
    return {name: middle(new[name] - old[name]) for name in new if name in old}


def middle(values: np.ndarray) -> list[float]:
    """Return the interval of the middle 95 % of the values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def _resample(task: str, sides: Sequence[Sequence[Row]], seed: int) -> list[dict[str, np.ndarray]]:
    """Return, for each side, the value of each metric in each resample, `float64 [resamples]`."""
    numbers = number_clusters(sides[0])
    resamples = [resample(build_statistics(task, rows), numbers, seed) for rows in sides]
    if task == "detection":
        for values, rows in zip(resamples, sides, strict=True):
            values |= _resample_ranked(rank(rows), numbers, seed)
    return resamples


def resample(statistics: Mapping[str, Statistic], numbers: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return the value of each metric in each resample. `numbers`: `int64 [rows]`, the cluster of each row, from 0."""
    count = int(numbers.max()) + 1
    sums = {name: _by_cluster(s.sums, numbers, count) for name, s in statistics.items()}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    for weights in _weights(count, seed, NUM_RESAMPLES):
        for name, statistic in statistics.items():
            parts[name].append(np.asarray(statistic.value(weights @ sums[name])))
    return {name: np.concatenate(values) for name, values in parts.items()}


def _resample_ranked(ranked: Sequence[Ranked], numbers: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return mAP of the resamples, reflected at that of the rows, which gives the reversed percentile interval.

    COCO's envelope (the highest precision at this recall or a later one) biases mAP of few images upwards, and that of
    a resample of them again by about as much. The reflection subtracts this second bias instead of adding it.
    """
    parts = [mean_ap(ranked, w[:, numbers]) for w in _weights(int(numbers.max()) + 1, seed, NUM_RANKED)]
    unweighted = mean_ap(ranked, np.ones((1, len(numbers))))
    return {name: 2 * unweighted[name] - np.concatenate([part[name] for part in parts]) for name in ("map", "map_50")}


def _weights(count: int, seed: int, num_resamples: int) -> Iterator[np.ndarray]:
    """Yield how often each of `count` clusters is in each resample: `float64 [part of the resamples, count]`."""
    rng = np.random.default_rng(seed)
    size = max(1, min(num_resamples, _CHUNK // count))
    for start in range(0, num_resamples, size):
        rows = min(size, num_resamples - start)
        # Each row of draws gets its own range of numbers, so that one `bincount` counts all resamples.
        drawn = rng.integers(0, count, (rows, count)) + np.arange(rows)[:, None] * count
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def number_clusters(rows: Sequence[Row]) -> np.ndarray:
    """Number the cluster of each row from 0: its group (the task of a GUI step), or the row alone."""
    known: dict[tuple[str, Any], int] = {}
    clusters = [("group", row["group"]) if row["group"] else ("row", i) for i, row in enumerate(rows)]
    return np.array([known.setdefault(cluster, len(known)) for cluster in clusters], np.int64)


def _by_cluster(sums: np.ndarray, numbers: np.ndarray, count: int) -> np.ndarray:
    """Sum the rows of each cluster: `float64 [clusters, columns]`."""
    out = np.zeros((count, sums.shape[1]))
    np.add.at(out, numbers, sums)
    return out


def build_statistics(task: str, rows: Sequence[Row]) -> dict[str, Statistic]:
    """Build the task's metrics except mAP, which ranks boxes over all images (`average_precision.py`)."""
    return _BUILD[task](rows) | {"parse_rate": _mean([[row["ok"]] for row in rows])}


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
