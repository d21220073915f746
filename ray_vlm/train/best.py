"""Which validation of a run is the best, as training goes on and as it is read back. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray_vlm.runs.monitor import LINE_KEYS, rank_validation


def is_better(metric: str, new: Mapping[str, float], old: Mapping[str, float]) -> bool:
    """Whether the later validation `new` takes the place of `old`, the best before it: by `metric`, among equals by the
    loss, and else because it has seen more. One without a finite number never does."""
    rank, before = _rank(new, metric), _rank(old, metric)
    return rank is not None and (before is None or rank >= before)


def improves(metric: str, new: Mapping[str, float], old: Mapping[str, float]) -> bool:
    """Whether `metric` itself is better than before, which is what early stopping waits for."""
    rank, before = _rank(new, metric), _rank(old, metric)
    return rank is not None and (before is None or rank[0] > before[0])


def _rank(numbers: Mapping[str, float], metric: str) -> tuple[float, float] | None:
    return rank_validation({name: float(numbers[name]) for name in (metric, "loss") if name in numbers}, metric)


def recall_best(evals: Sequence[dict[str, Any]], metric: str) -> tuple[dict[str, Any] | None, int]:
    """The best of the lines of validations by `metric`, as `Progress` has it, and how many came since `metric` itself
    was last improved."""
    best: dict[str, Any] | None = None
    since = 0
    for line in evals:
        metrics = {k: math.nan if v is None else v for k, v in line.items() if k not in LINE_KEYS}
        so_far = best["metrics"] if best else {}
        since = 0 if improves(metric, metrics, so_far) else since + 1
        if is_better(metric, metrics, so_far):
            best = {"step": line["step"], "metrics": metrics}
    return best, since
