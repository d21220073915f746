"""Trials are ranked by their best validation, and the best is never a NaN."""

import math

from ray_vlm.tune.trials import Trial, pareto, rank_trials


def _rank(metrics: list[dict[str, float]], metric: str) -> list[int]:
    return rank_trials([Trial(f"{i:03d}", {}, "finished", 1, 1, metric, values) for i, values in enumerate(metrics)])


def test_the_best_is_never_one_without_a_number() -> None:
    trials = [{"f1_50": 0.5}, {"f1_50": math.nan}, {}, {"f1_50": 0.7}, {"f1_50": 0.7}, {"f1_50": math.inf}]
    assert _rank(trials, "f1_50") == [3, 4, 0]
    assert _rank([{"loss": 0.2}, {"loss": 0.1}], "loss") == [1, 0]
    assert _rank([{"loss": math.nan}], "loss") == []


def test_the_pareto_set() -> None:
    trials = [
        {"map": 0.5, "loss": 0.1},
        {"map": 0.6, "loss": 0.3},
        {"map": 0.4, "loss": 0.2},
        {"map": 0.6, "loss": 0.3},
    ]
    assert pareto([*trials, {"map": 0.9}], ["map", "loss"]) == [0, 1, 3]
