"""Values are drawn by number, the same again whenever they are asked for, and survive the way through TPE."""

from pathlib import Path
from typing import Any

import pytest

from ray_vlm.tune.search import build_scheduler, decode, draw_trials, encode
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

    from ray_vlm.config.schema import JobConfig

    job = JobConfig.model_validate(
        {"model": {"name": "x"}, "data": {}, "tune": {"scheduler": scheduler, "reduction_factor": 2}}
    )
    rule = build_scheduler(job, 10)
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
