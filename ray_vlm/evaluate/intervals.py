"""Bootstrap intervals of metrics, and of the difference between two evaluations of the same rows.

Nearly every metric is a function of sums over rows (`statistics.py`), so a resample is a vector of weights and all
resamples are one matrix product; mAP is computed anew for fewer resamples. Rows that belong together (steps of a task,
photos of a site) are drawn together. Intervals are percentile intervals (Efron 1979); a difference is *paired*: both
sides have the same resamples.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ray_vlm.evaluate.average_precision import Ranked, mean_ap, rank
from ray_vlm.evaluate.statistics import Row, Statistic, build_statistics, clusters_of

NUM_RESAMPLES = 2000
NUM_RANKED = 200  # resamples of mAP
LEVEL = 0.95
_CHUNK = 4_000_000  # weights in memory at a time


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
    numbers = number_clusters(clusters_of(sides[0]))
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


def number_clusters(clusters: Sequence[Hashable]) -> np.ndarray:
    """Number clusters from 0, in the order in which they first appear."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(cluster, len(known)) for cluster in clusters], np.int64)


def _by_cluster(sums: np.ndarray, numbers: np.ndarray, count: int) -> np.ndarray:
    """Sum the rows of each cluster: `float64 [clusters, columns]`."""
    out = np.zeros((count, sums.shape[1]))
    np.add.at(out, numbers, sums)
    return out
