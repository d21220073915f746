"""Validations of a run: when they are measured, what is written of them, `best/`, and early stopping.

Only validations are reported to Ray: each report waits for the controller's next poll, so a report every step would
throttle training. Ray gets numbers and never a checkpoint: it would lose one if a worker died before the next poll.
This package's own checkpoints are committed by their manifest (`runs/checkpoints.py`).
"""

import logging
import time
from collections.abc import Callable

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ray_vlm.methods.trainer import PlannedTrainer
from ray_vlm.runs.monitor import as_python_numbers, current_lines, read_metrics
from ray_vlm.train.attempt import check_owner
from ray_vlm.train.best import improves, is_better, recall_best, score_of
from ray_vlm.train.callbacks.metrics import StepTimer
from ray_vlm.train.run_context import RunContext, publish_weights
from ray_vlm.train.validators import Validator

logger = logging.getLogger(__name__)
_WAIT_S = 0.2  # between polls of a validation that the ranks wait for


class ValidationCallback(TrainerCallback):
    """Validates when the trainer asks for it (`run`), and records each result.

    `metric`: `evaluate.metric`, by which weights are compared; `patience`: stop after so many validations without a
    better one; None: never. `tick` keeps the watchdog quiet while this rank waits.
    """

    def __init__(
        self,
        run: RunContext,
        validator: Validator,
        metric: str,
        patience: int | None,
        timer: StepTimer,
        tick: Callable[[], None],
    ):
        self._run, self._validator, self._metric, self._patience = run, validator, metric, patience
        self._timer, self._tick = timer, tick

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
            (ready,) = self._run.distributed.any_rank(self._validator.ready())
            if ready:
                self._record(control)
            else:
                self._tick()
                time.sleep(_WAIT_S)

    def resume(self, step: int | None) -> None:
        """Restore the validations of earlier attempts up to `step`, and start those that they left unfinished.

        Metrics of an asynchronous validation may be newer than the checkpoint, so they are read from `metrics.jsonl`.
        `step`: of the checkpoint that the run goes on from; None: without one, nothing of earlier attempts counts.
        """
        validations = None
        step = -1 if step is None else step  # the validation before the first step has number 0
        if self._run.distributed.rank == 0:
            lines = [line for line in current_lines(read_metrics(self._run.paths.metrics)) if line["kind"] == "eval"]
            validations = [line for line in lines if line["step"] <= step]
            if self._validator.waits and not any("background_s" in line for line in validations):
                validations = None
        validations = self._run.distributed.broadcast(validations)
        if validations is not None:
            best, since_best = recall_best(validations, self._metric)
            self._run.progress.keep(best and best | {"path": self._run.paths.uri("best")}, since_best)
        self._validator.resume(step, {line["step"] for line in validations or ()})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Record an asynchronous validation that has ended, on all ranks after the same step."""
        if self._validator.waits:
            return
        (ready,) = self._run.distributed.any_rank(self._validator.ready())
        if ready:
            started = time.monotonic()
            self._record(control)
            self._timer.leave_out(time.monotonic() - started)

    def _record(self, control: TrainerControl) -> dict[str, float]:
        """Write the result of the validation, replace `best/` if it is better, and stop early if due."""
        run, result = self._run, self._validator.result()
        step, metrics, best, since_best = result.step, result.metrics, run.progress.best, run.progress.since_best
        best_so_far = best["metrics"] if best else {}
        better = is_better(self._metric, metrics, best_so_far)
        since_best = 0 if improves(self._metric, metrics, best_so_far) else since_best + 1
        if better:
            best = {"step": step, "metrics": metrics, "path": run.paths.uri("best")}
            if self._validator.waits:  # an asynchronous validator has kept the complete weights
                run.weights.gather()
        run.progress.keep(best, since_best, {"step": step, "metrics": metrics})
        if better and run.distributed.rank == 0:
            check_owner(run.paths.store, run.attempt)
            publish_weights(run.paths, run.paths.best, result.save, step)
            logger.debug(f"best/ has the weights of step {step}: {self._metric} {metrics[self._metric]:.4f}")
        run.write("eval", step, step / run.plan.steps_per_epoch, metrics)
        if run.monitor is not None:
            run.monitor.pictures(step, result.draw)
        run.publish()
        self._report({"step": step, "score": score_of(self._metric, metrics), **metrics})
        self._validator.discard(step)
        if self._patience is not None and since_best >= self._patience:
            control.should_training_stop = True
            reason = f"{self._metric} has not improved for {since_best} validations"
            logger.info(f"training stops early: {reason}", extra={"step": step})
        return metrics

    def _report(self, metrics: dict[str, float]) -> None:
        """Report to Ray Train."""
        if self._run.distributed.ray:
            import ray.train

            ray.train.report(as_python_numbers(metrics))
