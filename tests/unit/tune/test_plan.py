"""A sweep's plan is arithmetic: how many trials fit, what cannot work is told, and who is best is never a NaN."""

import math
from typing import Any

import pytest

from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.tune.plan import SweepPlan, pareto, plan_sweep, rank_trials
from ray_vlm.tune.space import Setting, Space

SPACE = Space((Setting("lora.rank", "choice", (8, 16)),), "space.yaml")
GRID = Space((Setting("lora.rank", "grid", (8, 16, 32)), Setting("seed", "grid", (0, 1))), "space.yaml")


def _job(tune: dict[str, Any] | None = None, **cluster: Any) -> JobConfig:
    return JobConfig.model_validate({"model": {"name": "x"}, "data": {}, "cluster": cluster, "tune": tune or {}})


@pytest.mark.parametrize(
    ("cluster", "resources", "at_once"),
    [
        ({"num_workers": 1}, {"CPU": 2}, 1),
        ({"num_workers": 1}, {"CPU": 9}, 4),
        ({"num_workers": 0, "cpus_per_worker": 2}, {"CPU": 2}, 1),
        ({"num_workers": 2, "gpus_per_worker": 1}, {"CPU": 64, "GPU": 5}, 2),
        ({"num_workers": 1, "gpus_per_worker": 1}, {"CPU": 256, "GPU": 32}, 16),
    ],
)
def test_trials_side_by_side(cluster: dict, resources: dict, at_once: int) -> None:
    assert plan_sweep(_job(**cluster), SPACE, resources).at_once == at_once


def test_every_combination_of_a_grid_as_often() -> None:
    alone = {"num_trials": 14, "default_first": False}
    assert plan_sweep(_job(alone, num_workers=1), GRID, {"CPU": 4}) == SweepPlan(12, 2, 2.0, 0)
    assert plan_sweep(_job({"num_trials": 14}, num_workers=1), GRID, {"CPU": 4}).num_trials == 13
    resident = _job({"resident": True}, num_workers=1, cpus_per_worker=2)
    assert plan_sweep(resident, SPACE, {"CPU": 2}) == SweepPlan(16, 1, 2.0, 0, in_process=True)
    with pytest.raises(ConfigError, match="6 combinations"):
        plan_sweep(_job({"num_trials": 5}), GRID, {"CPU": 4})
    with pytest.raises(ConfigError, match="optuna does not go through grids"):
        plan_sweep(_job({"search": "optuna"}), GRID, {"CPU": 4})


def test_a_trial_that_fits_nowhere_is_told_with_all_that_is_missing() -> None:
    with pytest.raises(RunError) as error:
        plan_sweep(_job(num_workers=4, gpus_per_worker=1, cpus_per_worker=4), SPACE, {"CPU": 8, "GPU": 2})
    assert [problem.split(",")[0] for problem in error.value.problems] == [
        "tune: a trial needs 17 CPU",
        "tune: a trial needs 4 GPU",
    ]


def test_a_trial_must_fit_on_a_node() -> None:
    """Eight CPUs on four nodes hold no process of four."""
    nodes = [{"CPU": 2.0}] * 4
    for tune, workers in ({"resident": True}, 1), ({}, 0), ({}, 1):
        with pytest.raises(RunError, match="the largest has 2"):
            plan_sweep(_job(tune, num_workers=workers, cpus_per_worker=4), SPACE, {"CPU": 8.0}, nodes)
    assert plan_sweep(_job({"resident": True}, cpus_per_worker=2), SPACE, {"CPU": 8.0}, nodes).at_once == 4


def test_the_best_is_never_one_without_a_number() -> None:
    trials = [{"f1_50": 0.5}, {"f1_50": math.nan}, {}, {"f1_50": 0.7}, {"f1_50": 0.7}, {"f1_50": math.inf}]
    assert rank_trials(trials, "f1_50") == [3, 4, 0]
    assert rank_trials([{"loss": 0.2}, {"loss": 0.1}], "loss") == [1, 0]
    assert rank_trials([{"loss": math.nan}], "loss") == []


def test_the_pareto_set() -> None:
    trials = [
        {"map": 0.5, "loss": 0.1},
        {"map": 0.6, "loss": 0.3},
        {"map": 0.4, "loss": 0.2},
        {"map": 0.6, "loss": 0.3},
    ]
    assert pareto([*trials, {"map": 0.9}], ["map", "loss"]) == [0, 1, 3]
