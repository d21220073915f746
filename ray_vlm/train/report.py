"""The callback that writes a trainer's events into the run folder (metrics, `best/`) and reports to Ray.

Only validations are reported to Ray: each report waits for the controller's next poll, so a report every step would
throttle training. Ray gets numbers and never a checkpoint: it would lose one if a worker died before the next poll.
This package's own checkpoints are committed by their manifest (`runs/checkpoints.py`).
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.plan import Plan
from ray_vlm.runs.checkpoints import replace_folder
from ray_vlm.runs.monitor import Monitor, current_lines, read_metrics
from ray_vlm.runs.paths import RunPaths, write_folder
from ray_vlm.train.async_validator import find_left
from ray_vlm.train.best import improves, is_better, recall_best
from ray_vlm.train.context import DistributedContext
from ray_vlm.train.nonfinite import Spikes

_WAIT_S = 0.2  # between polls of a validation that the ranks wait for


@dataclass
class Progress:
    """The state of a run that goes into every checkpoint.

    `best`: `{"step", "metrics", "path"}` of the best validation, or None; `since_best`: validations since the metric
    last improved; `last`: step and metrics of the last validation; `epoch_losses`: of the current epoch; `lost`: the
    rows of all ranks that could not be read, each with its replacement.
    """

    best: dict[str, Any] | None = None
    since_best: int = 0
    epoch_losses: list[float] = field(default_factory=list)
    last: dict[str, Any] | None = None
    lost: list[Sequence[int]] = field(default_factory=list)


class RunCallback(TrainerCallback):
    """Records a trainer's events. `monitor` is None on every rank except 0.

    `save` writes weights and preprocessing into a folder, after all ranks have called `gather`; `tell` reports to Ray.
    `stop_asked` returns after every step whether this rank should stop, `notice` checks for preemptions, and `agree`
    combines the flags of all ranks by OR. `tick` keeps the watchdog quiet while this rank waits. `check_owner` runs
    before anything is replaced. `logged` selects the numbers to write. `gradients` returns norms by part of the model,
    which `check_finite` checks before the optimizer's step. `usage` returns the times and memory since its last call,
    `samples` captions and images of the last validation. `background` is the `AsyncValidator`, or None. `count_lost`
    collects the unreadable rows of all ranks in `progress`.
    """

    logged: Callable[[dict[str, Any]], dict[str, Any]] = staticmethod(lambda logs: dict(logs))
    gradients: Callable[[Any], dict[str, float]] = staticmethod(lambda model: {})
    usage: Callable[[], dict[str, float]] = staticmethod(dict)
    samples: Callable[[], Sequence[tuple[str, Any]]] = staticmethod(tuple)
    stop_asked: Callable[[], bool] = staticmethod(lambda: False)
    notice: Any = None
    tick: Callable[[], None] = staticmethod(lambda: None)
    agree: Callable[..., Sequence[bool]] = staticmethod(lambda *flags: flags)
    background: Any = None
    check_owner: Callable[[], None] = staticmethod(lambda: None)
    gather: Callable[[], None] = staticmethod(lambda: None)
    count_lost: Callable[[], list[Sequence[int]]] = staticmethod(list)
    check_finite: Callable[[Any, int, dict[str, float]], bool] = staticmethod(lambda model, step, norms: False)

    def __init__(
        self,
        job: JobConfig,
        paths: RunPaths,
        plan: Plan,
        monitor: Monitor | None,
        save: Callable[[Path], None],
        tell: Callable[[dict[str, Any]], None],
    ):
        self.job = job
        self.paths = paths
        self.plan = plan
        self.monitor = monitor
        self.save = save
        self.tell = tell
        self.progress = Progress()
        self.stopped = False
        self.leaving: str | None = None  # the reason, if a preemption is announced
        self.checkpoint_s = 0.0  # of the last checkpoint
        self._held_s = 0.0  # how long the start of the last asynchronous validation took
        self._last = time.monotonic()
        self._tokens = 0.0
        self._step = 0
        self._norms: dict[str, float] = {}
        self._spikes = Spikes()
        self._skipped = False  # whether `check_finite` skipped the current step
        self._rate: dict[str, float] = {}  # learning rate of the last logged step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = time.monotonic()
        state.compute_steps(args, state.max_steps)  # the restored state has the intervals of the earlier job
        if state.global_step % self.plan.steps_per_epoch == 0:
            self.progress.epoch_losses = []  # the checkpoint was written at the end of an epoch

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._norms = self.gradients(kwargs["model"])
        self._skipped = self.check_finite(kwargs["model"], state.global_step, self._norms)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = (
            state.global_step / self.plan.steps_per_epoch
        )  # the Trainer's value is wrong in an epoch resumed midway
        self._step = state.global_step
        due = self.notice is not None and state.global_step < self.plan.num_steps and self.notice.is_due()
        measured = self.background is not None and self.background.ready()
        stop, measured, due = self.agree(self.stop_asked(), measured, due)
        if due and self.notice is not None:  # a barrier of all workers
            self.leaving = self.notice.look()
            stop = stop or self.leaving is not None
        if measured:
            started = time.monotonic()
            self._collect(control)
            self._last += time.monotonic() - started  # not part of the step
        if stop and state.global_step < self.plan.num_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def reached(self) -> tuple[float | None, dict[str, Any]]:
        """Return the score of the validation at this step, or None without one, and the progress, for a checkpoint."""
        last = self.progress.last
        score = score_of(self.job.evaluate.metric, last["metrics"]) if last and last["step"] == self._step else None
        return score, asdict(self.progress)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        state.log_history.clear()  # metrics.jsonl has it
        if "loss" not in logs:
            return
        if self.job.cluster.deepspeed and not math.isfinite(logs["loss"]):  # DeepSpeed does not expose gradients
            self.check_finite(kwargs["model"], state.global_step - 1, {"the loss": logs["loss"]})
        now = time.monotonic()
        tokens = logs.get("num_tokens", 0.0)
        values = self.logged(logs | ({"loss": math.nan} if self._skipped else {}))
        values["tokens_per_s"] = (tokens - self._tokens) / max(now - self._last, 1e-9)
        values["step_s"] = now - self._last
        values |= by_part(self._norms, float(logs.get("grad_norm") or 0.0)) | self.usage()
        self._tokens, self._last = tokens, now
        self._rate = {name: logs[name] for name in ("learning_rate",) if name in logs}
        if math.isfinite(values["loss"]):
            self.progress.epoch_losses.append(float(logs["loss"]))
        if self.monitor is not None:
            if self.job.method.name != "grpo" and (message := self._spikes.look(state.global_step, values["loss"])):
                self.monitor.note(state.global_step, message)  # the size of GRPO's loss is no measure of its quality
            self.monitor.write("train", state.global_step, state.epoch or 0.0, values)
            if state.global_step % self.job.train.log_every_steps == 0:
                self.monitor.publish()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped and state.global_step % self.plan.steps_per_epoch:
            return  # the epoch goes on in the next attempt
        losses, self.progress.epoch_losses = self.progress.epoch_losses, []
        if self.monitor is not None and losses:
            mean = {"loss": sum(losses) / len(losses)}
            self.monitor.write("epoch", state.global_step, state.epoch or 0.0, mean | self._rate)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.background is not None:
            return  # the metrics come later, from `_collect`
        self._restart_clock()
        self._measured(state.global_step, kwargs["metrics"], self.samples, self.save, control)

    def hand_over(self, trainer: Any) -> dict[str, float]:
        """Start an asynchronous validation; the trainer calls this as its `validate`. Return no metrics yet."""
        started = time.monotonic()
        self.settle(trainer.control)
        self.gather()
        self.background.begin(trainer.state.global_step, self.save)
        self._held_s = time.monotonic() - started
        self._restart_clock()
        return {}

    def settle(self, control: Any) -> None:
        """Wait for the current asynchronous validation, if there is one."""
        while self.background is not None and self.background.step is not None:
            (measured,) = self.agree(self.background.ready())
            if measured:
                self._collect(control)
            else:
                self.tick()
                time.sleep(_WAIT_S)

    def recall(self, step: int, context: DistributedContext) -> None:
        """Restore the validations of earlier attempts up to `step`, and start those that they left unfinished.

        Metrics of an asynchronous validation may be newer than the checkpoint, so they are read from `metrics.jsonl`.
        """
        validations = None
        if context.rank == 0:
            lines = [line for line in current_lines(read_metrics(self.paths.metrics)) if line["kind"] == "eval"]
            validations = [line for line in lines if line["step"] <= step]
            if self.background is None and not any("background_s" in line for line in validations):
                validations = None
        validations = context.broadcast(validations)
        if validations is not None:
            best, self.progress.since_best = recall_best(validations, self.job.evaluate.metric)
            self.progress.best = best and best | {"path": self.paths.uri("best")}
        if self.background is not None:
            self.background.resume(step, {line["step"] for line in validations or ()})
        elif context.rank == 0:
            find_left(self.paths.store, -1)  # deletes weights that nothing will validate

    def _collect(self, control: Any) -> None:
        result = self.background.collect()
        metrics = result.metrics | {"validation_s": self._held_s}
        self._measured(result.step, metrics, lambda: result.pictures, self.background.save(result.step), control)
        self.background.forget(result.step)

    def _measured(
        self,
        step: int,
        metrics: dict[str, float],
        samples: Callable[[], Sequence[tuple[str, Any]]],
        save: Callable[[Path], None],
        control: Any,
    ) -> None:
        """Record the metrics of the weights of `step`, replace `best/` if they are better, and stop early if due."""
        name = self.job.evaluate.metric
        best_so_far = self.progress.best["metrics"] if self.progress.best else {}
        better = is_better(name, metrics, best_so_far)
        self.progress.since_best = 0 if improves(name, metrics, best_so_far) else self.progress.since_best + 1
        if better:
            self.progress.best = {"step": step, "metrics": metrics, "path": self.paths.uri("best")}
            self.gather()
        self.progress.last = {"step": step, "metrics": metrics}
        if self.monitor is not None:
            if better:
                self.check_owner()
                publish_weights(self.paths, self.paths.best, save, step)
            self.monitor.best = self.progress.best
            self.monitor.write("eval", step, step / self.plan.steps_per_epoch, metrics)
            self.monitor.pictures(step, samples)
            self.monitor.publish()
        self.tell({"step": step, "score": score_of(name, metrics), **metrics})
        patience = self.job.train.early_stopping_patience
        if patience is not None and self.progress.since_best >= patience:
            control.should_training_stop = True

    def _restart_clock(self) -> None:
        """Exclude the time until now from the next step."""
        self._last = time.monotonic()
        self.usage()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.monitor is not None:
            self.monitor.write("checkpoint", state.global_step, state.epoch or 0.0, {"checkpoint_s": self.checkpoint_s})
            self.monitor.publish()
        self._last = time.monotonic()


def by_part(norms: dict[str, float], total: float) -> dict[str, float]:
    """Return `grad_norm_<part>` from before clipping, as `total` is: clipping scales all parts by the same factor."""
    clipped = math.hypot(*norms.values())
    scale = total / clipped if clipped > 0 else 0.0
    return {f"grad_norm_{part}": norm * scale for part, norm in norms.items()}


def publish_weights(paths: RunPaths, folder: Path, save: Callable[[Path], None], step: int) -> None:
    """Replace `best/` or `final/` of the run."""
    if paths.remote is None:
        write_folder(folder, save)
    else:
        replace_folder(paths.store, folder.name, save, step)


def score_of(metric: str, metrics: dict[str, float]) -> float:
    """Return the score of a validation for Ray, higher is better.

    NaN becomes the lowest finite number, because Ray treats a missing score as the best one if lower is better.
    """
    value = -metrics[metric] if metric == "loss" else metrics[metric]
    return float(value) if math.isfinite(value) else -sys.float_info.max
