"""The line of every step and of every epoch."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from ray_vlm.data.plan import Plan
from ray_vlm.distributed import DistributedContext
from ray_vlm.runs.monitor import Monitor, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.attempt import Attempt
from ray_vlm.train.callbacks.metrics import MetricsCallback, StepTimer
from ray_vlm.train.run_context import Progress, RunContext


@pytest.fixture
def parts(tmp_path: Path) -> Any:
    """A metrics callback with the callbacks that it reads, of a plan of two steps an epoch."""
    beside = SimpleNamespace(
        norms=SimpleNamespace(norms={"language": 3.0, "vision": 4.0}),
        nonfinite=SimpleNamespace(skipped=False),
        preemption=SimpleNamespace(stopped=False),
        progress=Progress(),
        lines=lambda: read_metrics(tmp_path / "metrics.jsonl"),
    )
    usage: Any = SimpleNamespace(take=lambda: {"data_s": 0.25})
    plan, monitor = Plan(8, 4, 1, 1, num_epochs=2.0), Monitor(tmp_path / "metrics.jsonl", attempt=1)
    weights: Any = None
    attempt, context = Attempt(1, "a"), DistributedContext()
    beside.callback = MetricsCallback(
        RunContext(RunPaths(tmp_path), attempt, plan, context, weights, beside.progress, monitor),
        dict,
        StepTimer(),
        usage,
        beside.norms,
        beside.nonfinite,
        beside.preemption,
        log_every_steps=1,
        watches_loss=True,
    )
    return beside


def _step(parts: Any, step: int, **logs: float) -> None:
    state = TrainerState(global_step=step, epoch=step / 2)
    parts.callback.on_log(None, state, TrainerControl(), logs=logs)


def test_a_step_has_its_norms_by_part_times_and_throughput(parts: Any) -> None:
    _step(parts, 1, loss=2.0, grad_norm=10.0, learning_rate=1e-3, num_tokens=100.0)
    (line,) = parts.lines()
    assert (line["kind"], line["step"], line["loss"], line["data_s"]) == ("train", 1, 2.0, 0.25)
    # The norms are of clipped gradients, 5 in all; before clipping it was 10.
    assert (line["grad_norm_language"], line["grad_norm_vision"]) == (6.0, 8.0)
    assert line["tokens_per_s"] == pytest.approx(100.0 / line["step_s"])


def test_a_skipped_step_has_no_loss_and_does_not_count_in_its_epoch(parts: Any) -> None:
    parts.nonfinite.skipped = True
    _step(parts, 1, loss=5.0)
    parts.nonfinite.skipped = False
    _step(parts, 2, loss=1.0, learning_rate=1e-3)
    parts.callback.on_epoch_end(None, TrainerState(global_step=2, epoch=1.0), TrainerControl())
    first, second, epoch = parts.lines()
    assert first["loss"] is None
    assert second["loss"] == 1.0
    assert (epoch["kind"], epoch["loss"], epoch["learning_rate"]) == ("epoch", 1.0, 1e-3)
    assert parts.progress.epoch_losses == []


def test_an_epoch_that_goes_on_in_the_next_attempt_has_no_line_yet(parts: Any) -> None:
    _step(parts, 1, loss=1.0)
    parts.preemption.stopped = True
    parts.callback.on_epoch_end(None, TrainerState(global_step=1, epoch=0.5), TrainerControl())
    assert [line["kind"] for line in parts.lines()] == ["train"]
    assert parts.progress.epoch_losses == [1.0], "the checkpoint takes it along"


def test_the_time_that_is_left_out_is_not_a_step_s() -> None:
    timer = StepTimer()
    timer.leave_out(100.0)
    assert timer.take() < -90
    assert math.isclose(timer.take(), 0.0, abs_tol=1.0)
