"""Selection of a run's best validation, during training and when a run is resumed. Pure functions."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ray_vlm.runs.monitor import LINE_KEYS, rank_validation


def is_better(metric: str, new: Mapping[str, float], old: Mapping[str, float]) -> bool:
    """Return whether the later validation `new` replaces `old` as the best one.

    They are compared by `metric`, then by loss; if both are equal the later one wins, because it has trained on more
    rows. A validation whose metric is not finite never wins.
    """
    rank, before = _rank(new, metric), _rank(old, metric)
    return rank is not None and (before is None or rank >= before)


def improves(metric: str, new: Mapping[str, float], old: Mapping[str, float]) -> bool:
    """Return whether `metric` itself has improved, the criterion of early stopping."""
    rank, before = _rank(new, metric), _rank(old, metric)
    return rank is not None and (before is None or rank[0] > before[0])


def _rank(numbers: Mapping[str, float], metric: str) -> tuple[float, float] | None:
    return rank_validation({name: float(numbers[name]) for name in (metric, "loss") if name in numbers}, metric)


def recall_best(evals: Sequence[dict[str, Any]], metric: str) -> tuple[dict[str, Any] | None, int]:
    """Return the best validation of the lines `evals` by `metric`, in the form of `Progress.best`, and the number of
    validations since `metric` last improved."""
    best: dict[str, Any] | None = None
    since = 0
    for line in evals:
        metrics = {k: math.nan if v is None else v for k, v in line.items() if k not in LINE_KEYS}
        so_far = best["metrics"] if best else {}
        since = 0 if improves(metric, metrics, so_far) else since + 1
        if is_better(metric, metrics, so_far):
            best = {"step": line["step"], "metrics": metrics}
    return best, since


def score_of(metric: str, metrics: Mapping[str, float]) -> float:
    """Return the score of a validation for Ray, higher is better.

    NaN becomes the lowest finite number, because Ray treats a missing score as the best one if lower is better.
    """
    rank = _rank(metrics, metric)
    return rank[0] if rank else -sys.float_info.max
