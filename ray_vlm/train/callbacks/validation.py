"""Validations of a run: when they are measured, what is written of them, `best/`, and early stopping.

Only validations are reported to Ray: each report waits for the controller's next poll, so a report every step would
throttle training. Ray gets numbers and never a checkpoint: it would lose one if a worker died before the next poll.
This package's own checkpoints are committed by their manifest (`runs/checkpoints.py`).
"""

import time
from collections.abc import Callable

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ray_vlm.distributed import DistributedContext
from ray_vlm.methods.trainer import PlannedTrainer
from ray_vlm.runs.monitor import Monitor, as_python_numbers, current_lines, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.attempt import Attempt, check_owner
from ray_vlm.train.best import improves, is_better, recall_best, score_of
from ray_vlm.train.callbacks.checkpointing import Progress, WeightsWriter, publish_weights
from ray_vlm.train.callbacks.metrics import StepTimer
from ray_vlm.train.validators import ValidationResult, Validator

_WAIT_S = 0.2  # between polls of a validation that the ranks wait for


class ValidationCallback(TrainerCallback):
    """Validates when the trainer asks for it (`run`), and records each result.

    `metric`: `evaluate.metric`, by which weights are compared; `patience`: stop after so many validations without a
    better one; None: never. `tick` keeps the watchdog quiet while this rank waits.
    """

    def __init__(
        self,
        validator: Validator,
        metric: str,
        patience: int | None,
        steps_per_epoch: int,
        attempt: Attempt,
        paths: RunPaths,
        weights: WeightsWriter,
        progress: Progress,
        monitor: Monitor | None,
        timer: StepTimer,
        context: DistributedContext,
        tick: Callable[[], None],
    ):
        self._validator, self._metric, self._patience = validator, metric, patience
        self._steps_per_epoch, self._attempt, self._paths = steps_per_epoch, attempt, paths
        self._weights, self._progress, self._monitor, self._timer = weights, progress, monitor, timer
        self._context, self._tick = context, tick

    def run(self, trainer: PlannedTrainer) -> dict[str, float]:
        """Validate the trainer's weights. Return their metrics, or none yet if they are validated asynchronously."""
        started = time.monotonic()
        self.wait(trainer.control)
        self._validator.submit(trainer, started)
        if not self._validator.waits:
            return {}
        return self._record(trainer.control)

    def wait(self, control: TrainerControl) -> None:
        """Wait for the current asynchronous validation, if there is one, and record it."""
        while self._validator.step is not None:
            (ready,) = self._context.any_rank(self._validator.ready())
            if ready:
                self._record(control)
            else:
                self._tick()
                time.sleep(_WAIT_S)

    def resume(self, step: int) -> None:
        """Restore the validations of earlier attempts up to `step`, and start those that they left unfinished.

        Metrics of an asynchronous validation may be newer than the checkpoint, so they are read from `metrics.jsonl`.
        """
        validations = None
        if self._context.rank == 0:
            lines = [line for line in current_lines(read_metrics(self._paths.metrics)) if line["kind"] == "eval"]
            validations = [line for line in lines if line["step"] <= step]
            if self._validator.waits and not any("background_s" in line for line in validations):
                validations = None
        validations = self._context.broadcast(validations)
        if validations is not None:
            best, self._progress.since_best = recall_best(validations, self._metric)
            self._progress.best = best and best | {"path": self._paths.uri("best")}
        self._validator.resume(step, {line["step"] for line in validations or ()})

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Record an asynchronous validation that has ended, on all ranks after the same step."""
        if self._validator.waits:
            return
        (ready,) = self._context.any_rank(self._validator.ready())
        if ready:
            started = time.monotonic()
            self._record(control)
            self._timer.leave_out(time.monotonic() - started)

    def _record(self, control: TrainerControl) -> dict[str, float]:
        """Write the result of the validation, replace `best/` if it is better, and stop early if due."""
        result = self._validator.result()
        step, metrics, progress = result.step, result.metrics, self._progress
        best_so_far = progress.best["metrics"] if progress.best else {}
        better = is_better(self._metric, metrics, best_so_far)
        progress.since_best = 0 if improves(self._metric, metrics, best_so_far) else progress.since_best + 1
        if better:
            progress.best = {"step": step, "metrics": metrics, "path": self._paths.uri("best")}
            self._weights.gather()
        progress.last = {"step": step, "metrics": metrics}
        if self._monitor is not None:
            self._write(self._monitor, result, better)
        self._report({"step": step, "score": score_of(self._metric, metrics), **metrics})
        self._validator.discard(step)
        if self._patience is not None and progress.since_best >= self._patience:
            control.should_training_stop = True
        return metrics

    def _write(self, monitor: Monitor, result: ValidationResult, better: bool) -> None:
        if better:
            check_owner(self._paths.store, self._attempt)
            publish_weights(self._paths, self._paths.best, result.save, result.step)
        monitor.best = self._progress.best
        monitor.write("eval", result.step, result.step / self._steps_per_epoch, result.metrics)
        monitor.pictures(result.step, result.draw)
        monitor.publish()

    def _report(self, metrics: dict[str, float]) -> None:
        """Report to Ray Train."""
        if self._context.ray:
            import ray.train

            ray.train.report(as_python_numbers(metrics))
