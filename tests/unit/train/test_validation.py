"""What happens with the result of a validation, in the training processes or beside them."""

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from ray_vlm.data.plan import Plan
from ray_vlm.distributed import DistributedContext
from ray_vlm.runs.monitor import Monitor, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.attempt import Attempt
from ray_vlm.train.callbacks.metrics import StepTimer
from ray_vlm.train.callbacks.validation import ValidationCallback
from ray_vlm.train.run_context import Progress, RunContext
from ray_vlm.train.validators import ValidationResult


class _Weights:
    """Writes a file that says which weights it is."""

    def gather(self) -> None:
        pass

    def save(self, folder: Path) -> None:
        (folder / "weights").write_text("of the trainer")


class _Validator:
    """Gives the metrics that it was built with, one after the other; `is_ready` decides when."""

    def __init__(self, results: list[dict[str, float]], waits: bool):
        self.step: int | None = None
        self.waits, self.is_ready = waits, waits
        self.resumed: tuple[int, set[int]] | None = None
        self.discarded: list[int] = []
        self._results = results

    def resume(self, step: int, measured: Collection[int]) -> None:
        self.resumed = step, set(measured)

    def submit(self, trainer: Any, since: float) -> None:
        assert self.step is None, "one at a time"
        self.step = trainer.state.global_step

    def ready(self) -> bool:
        return self.step is not None and self.is_ready

    def result(self) -> ValidationResult:
        assert self.step is not None
        step, self.step = self.step, None
        text = f"of step {step}"
        save: Callable[[Path], Any] = lambda folder: (folder / "weights").write_text(text)  # noqa: E731
        return ValidationResult(step, self._results.pop(0), tuple, save)

    def discard(self, step: int) -> None:
        self.discarded.append(step)


class _Trainer:
    def __init__(self, step: int):
        self.state, self.control = TrainerState(global_step=step), TrainerControl()


Build = Callable[..., tuple[ValidationCallback, RunPaths, Progress]]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A function that builds the callback of a run in `tmp_path`."""

    def of(validator: _Validator, patience: int | None = None) -> tuple[ValidationCallback, RunPaths, Progress]:
        paths, progress, weights = RunPaths(tmp_path), Progress(), _Weights()
        paths.store.write(".attempt.json", json.dumps({"attempt": 1, "token": "a"}).encode())
        monitor, plan = Monitor(paths.metrics, attempt=1), Plan(10, 1, 1, 1)
        run = RunContext(paths, Attempt(1, "a"), plan, DistributedContext(), weights, progress, monitor)  # type: ignore[arg-type]
        callback = ValidationCallback(run, validator, "f1_50", patience, StepTimer(), lambda: None)
        return callback, paths, progress

    return of


def test_the_best_weights_are_kept_and_a_worse_validation_changes_nothing(build: Build) -> None:
    validator = _Validator([{"f1_50": 0.5, "loss": 1.0}, {"f1_50": 0.4, "loss": 0.9}], waits=True)
    callback, paths, progress = build(validator)
    assert callback.run(_Trainer(5)) == {"f1_50": 0.5, "loss": 1.0}  # type: ignore[arg-type]
    assert (paths.best / "weights").read_text() == "of step 5"
    callback.run(_Trainer(10))  # type: ignore[arg-type]
    assert (paths.best / "weights").read_text() == "of step 5"
    assert (progress.best or {})["step"] == 5
    assert progress.since_best == 1
    lines = read_metrics(paths.metrics)
    assert [(line["kind"], line["step"], line["epoch"], line["f1_50"]) for line in lines] == [
        ("eval", 5, 0.5, 0.5),
        ("eval", 10, 1.0, 0.4),
    ]
    assert validator.discarded == [5, 10]


def test_training_stops_after_so_many_validations_without_a_better_one(build: Build) -> None:
    callback, _, _ = build(_Validator([{"f1_50": score} for score in (0.5, 0.5, 0.4)], waits=True), patience=2)
    stopped = []
    for step in (1, 2, 3):
        trainer = _Trainer(step)
        callback.run(trainer)  # type: ignore[arg-type]
        stopped.append(trainer.control.should_training_stop)
    assert stopped == [False, False, True], "an equal score is no better one"


def test_a_result_that_comes_later_is_of_the_weights_that_were_submitted(build: Build) -> None:
    validator = _Validator([{"f1_50": 0.5}], waits=False)
    callback, paths, progress = build(validator)
    assert callback.run(_Trainer(4)) == {}  # type: ignore[arg-type]
    args: Any = None
    callback.on_step_end(args, TrainerState(global_step=5), TrainerControl())
    assert progress.best is None
    validator.is_ready = True
    callback.on_step_end(args, TrainerState(global_step=6), TrainerControl())
    assert (progress.best or {})["step"] == 4
    assert (paths.best / "weights").read_text() == "of step 4"
    callback.wait(TrainerControl())  # nothing is left to wait for


def test_an_earlier_attempt_s_validations_count(build: Build) -> None:
    validator = _Validator([], waits=False)
    callback, paths, progress = build(validator)
    earlier = Monitor(paths.metrics, attempt=1)
    for step, score in ((2, 0.5), (4, 0.3), (6, 0.9)):
        earlier.write("eval", step, 0.1, {"f1_50": score, "background_s": 1.0})
    earlier.close()
    callback.resume(4)
    assert progress.best == {"step": 2, "metrics": {"f1_50": 0.5, "background_s": 1.0}, "path": paths.uri("best")}
    assert progress.since_best == 1
    assert validator.resumed == (4, {2, 4}), "the one of step 6 is of weights that are gone"


class _Ranks(DistributedContext):
    """Records what rank 0 exchanges with others, or gives another rank what rank 0 gave it, in the same order."""

    exchanged: list[tuple[str, Any]]

    def _exchange(self, name: str, value: Any) -> Any:
        if self.rank == 0:
            self.exchanged.append((name, value))
            return value
        expected, value = self.exchanged.pop(0)
        assert name == expected, "the ranks would wait for each other for ever"
        return value

    def broadcast(self, value: Any) -> Any:
        return self._exchange("broadcast", value)

    def any_rank(self, *flags: bool) -> list[bool]:
        return self._exchange("any_rank", list(flags))


@pytest.mark.parametrize("waits", [True, False])
def test_all_ranks_exchange_the_same_in_the_same_order(build: Build, waits: bool, tmp_path: Path) -> None:
    """Resume, a validation, steps, and the wait at the end, on rank 0 and on another one."""
    exchanged: list[tuple[str, Any]] = []
    gathered: list[list[str]] = []
    for rank in (0, 1):
        validator = _Validator([{"f1_50": 0.5}], waits)
        validator.is_ready = rank == 0  # on other ranks nothing is ever ready
        callback, _, progress = build(validator)
        calls: list[str] = []
        ranks = _Ranks(rank, 2)
        object.__setattr__(ranks, "exchanged", exchanged)
        weights: Any = type("Weights", (_Weights,), {"gather": lambda self, calls=calls: calls.append("gather")})()
        monitor = callback._run.monitor if rank == 0 else None
        callback._run = replace(callback._run, distributed=ranks, weights=weights, monitor=monitor)
        callback.resume(None)
        callback.run(_Trainer(2))  # type: ignore[arg-type]
        args: Any = None
        for step in (3, 4):
            callback.on_step_end(args, TrainerState(global_step=step), TrainerControl())
        callback.wait(TrainerControl())
        assert (progress.best or {})["step"] == 2
        gathered.append(calls)
    assert exchanged == []
    assert gathered[0] == gathered[1]
