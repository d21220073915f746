"""Values are drawn by number, the same again whenever they are asked for, and survive the way through TPE; a sweep's
plan is arithmetic, and what cannot work is told."""

from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.schema import JobConfig, Tune
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.tune.search import SweepPlan, build_scheduler, decode, draw_trials, encode, plan_sweep
from ray_vlm.tune.space import Setting, Space, own_values

SPACE = Space(
    (
        Setting("train.learning_rate", "loguniform", (1e-5, 1e-3)),
        Setting("seed", "randint", (0, 3)),
        Setting("data.oversample", "choice", (None, {"drain": 2.0})),
        Setting("lora.rank", "grid", (8, 16)),
        Setting("lora.alpha", "derived", ("2 * lora.rank",)),
    )
)


def test_draws_stay_in_the_space_and_go_through_the_grid() -> None:
    draws = draw_trials(SPACE, 41, seed=0, default_first=True)
    assert draws[0] == {}
    assert [d["lora.rank"] for d in draws[1:]] == [8, 16] * 20
    rates = [d["train.learning_rate"] for d in draws[1:]]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert 0.3 < sum(rate < 1e-4 for rate in rates) / 40 < 0.7, "half of them below the geometric middle"
    assert {d["seed"] for d in draws[1:]} == {0, 1, 2}
    assert all(type(d["seed"]) is int for d in draws[1:])
    assert {str(d["data.oversample"]) for d in draws[1:]} == {"None", "{'drain': 2.0}"}


def test_a_longer_sweep_begins_as_the_shorter_one() -> None:
    assert draw_trials(SPACE, 20, 3, False)[:8] == draw_trials(SPACE, 8, 3, False)
    assert draw_trials(SPACE, 8, 3, False) != draw_trials(SPACE, 8, 4, False)


def test_values_come_back_from_tpe() -> None:
    values = {"train.learning_rate": 1e-4, "seed": 2, "data.oversample": {"drain": 2.0}, "lora.rank": 16}
    coded = encode(SPACE, values)
    assert coded == {"train.learning_rate": 1e-4, "seed": 2, "data.oversample": 1, "lora.rank": 1}
    assert decode(SPACE, coded) == values


def test_tpe_draws_without_announcing_itself(capfd: pytest.CaptureFixture) -> None:
    from ray_vlm.tune.search import _tpe

    drawn = _tpe(SPACE, 0, {}).suggest("a")
    assert drawn is not None
    assert {s.key for s in SPACE.searched} | {"number"} == set(drawn)
    assert "study" not in capfd.readouterr().err


def test_the_jobs_own_values_are_a_trial_only_inside_the_space() -> None:
    job: dict[str, Any] = {"train": {"learning_rate": 1e-4}, "seed": 0, "data": {"oversample": None}}
    assert own_values(SPACE, job | {"lora": {"rank": 8}}) == {
        "train.learning_rate": 1e-4,
        "seed": 0,
        "data.oversample": None,
        "lora.rank": 8,
    }
    assert own_values(SPACE, job | {"lora": {"rank": 9}}) is None


@pytest.mark.parametrize("scheduler", ["asha", "median", "none"])
def test_schedulers_end_trials_at_equal_steps(scheduler: str, tmp_path: Path) -> None:
    """The worst of six trials is ended at its first validation, the best never."""
    from ray.tune.schedulers import TrialScheduler

    rule = build_scheduler(Tune.model_validate({"scheduler": scheduler, "reduction_factor": 2}), 10)
    assert rule.set_search_properties("score", "max")
    ended = []

    class Trial:
        def __init__(self, name: str) -> None:
            self.trial_id, self.status, self.last_result = name, "RUNNING", {}

        def is_finished(self) -> bool:
            return False

    trials = [Trial(str(i)) for i in range(6)]
    for trial in trials:
        rule.on_trial_add(None, trial)
    for step in (10, 20):
        for trial in reversed(trials):
            result = {"step": step, "score": float(trial.trial_id) / 10 + step, "training_iteration": step // 10}
            if trial not in ended and rule.on_trial_result(None, trial, result) == TrialScheduler.STOP:
                ended.append(trial)
    assert (len(ended) > 0) == (scheduler != "none")
    assert trials[5] not in ended
    assert scheduler == "none" or trials[0] in ended


LISTED = Space((Setting("lora.rank", "choice", (8, 16)),), "space.yaml")
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
    assert plan_sweep(_job(**cluster), LISTED, resources).at_once == at_once


def test_every_combination_of_a_grid_as_often() -> None:
    alone = {"num_trials": 14, "default_first": False}
    assert plan_sweep(_job(alone, num_workers=1), GRID, {"CPU": 4}) == SweepPlan(12, 2, 2.0, 0)
    assert plan_sweep(_job({"num_trials": 14}, num_workers=1), GRID, {"CPU": 4}).num_trials == 13
    resident = _job({"resident": True}, num_workers=1, cpus_per_worker=2)
    assert plan_sweep(resident, LISTED, {"CPU": 2}) == SweepPlan(16, 1, 2.0, 0, in_process=True)
    with pytest.raises(ConfigError, match="6 combinations"):
        plan_sweep(_job({"num_trials": 5}), GRID, {"CPU": 4})
    with pytest.raises(ConfigError, match="optuna does not go through grids"):
        plan_sweep(_job({"search": "optuna"}), GRID, {"CPU": 4})


def test_a_trial_that_fits_nowhere_is_told_with_all_that_is_missing() -> None:
    with pytest.raises(RunError) as error:
        plan_sweep(_job(num_workers=4, gpus_per_worker=1, cpus_per_worker=4), LISTED, {"CPU": 8, "GPU": 2})
    assert [problem.split(",")[0] for problem in error.value.problems] == [
        "tune: a trial needs 17 CPU",
        "tune: a trial needs 4 GPU",
    ]


def test_a_trial_must_fit_on_a_node() -> None:
    """Eight CPUs on four nodes hold no process of four."""
    nodes = [{"CPU": 2.0}] * 4
    for tune, workers in ({"resident": True}, 1), ({}, 0), ({}, 1):
        with pytest.raises(RunError, match="the largest has 2"):
            plan_sweep(_job(tune, num_workers=workers, cpus_per_worker=4), LISTED, {"CPU": 8.0}, nodes)
    assert plan_sweep(_job({"resident": True}, cpus_per_worker=2), LISTED, {"CPU": 8.0}, nodes).at_once == 4
