"""The callback that turns a trainer's events into the run folder: lines of metrics, `best/`, Ray's reports.

Ray is told only of validations: each report waits for the controller's next poll, so one every step would throttle
training. It is told numbers and never given a checkpoint: one that it has taken is lost if a worker dies before the
next poll, and its own list of them can be torn. Ours count when their manifest is there (`runs/checkpoints.py`).
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

_WAIT_S = 0.2  # between looks at a validation that is waited for


@dataclass
class Progress:
    """What a run has reached; `best` is `{"step", "metrics", "path"}` once a validation has chosen one;
    `since_best` counts validations since the metric was last improved.

    Goes into every checkpoint: `last` are step and metrics of the last validation, `epoch_losses` those of the epoch
    so far, `lost` the rows of all ranks that could not be read, each with the one in its place.
    """

    best: dict[str, Any] | None = None
    since_best: int = 0
    epoch_losses: list[float] = field(default_factory=list)
    last: dict[str, Any] | None = None
    lost: list[Sequence[int]] = field(default_factory=list)


class RunCallback(TrainerCallback):
    """Writes what happens. `monitor` is None on every rank but 0.

    `save` writes weights and how inputs were made into a folder, after all ranks have called `gather`; `tell` reports
    to Ray; `stop_asked` says after every step whether this rank was told to leave, `notice` whether machines are about
    to be taken away, and `agree` makes of one rank's flags those of all; `tick` is called while others are waited for;
    `check_owner` is asked before anything is replaced; `logged` names the numbers that are kept; `gradients` gives
    their norms by part of the model, which `check_finite` looks at before the optimizer moves; `usage` what the step
    took since it was last asked, `samples` captions and images of the last validation; `background` measures in the
    ranks' stead where validation is asynchronous; `count_lost` puts rows that ranks lost into `progress`.
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
        self.leaving: str | None = None  # why, where machines are about to be taken away
        self.checkpoint_s = 0.0  # how long the last one took
        self._held_s = 0.0  # how long the ranks waited for the last validation to begin
        self._last = time.monotonic()
        self._tokens = 0.0
        self._step = 0
        self._norms: dict[str, float] = {}
        self._spikes = Spikes()
        self._skipped = False  # the step that is being logged
        self._rate: dict[str, float] = {}  # learning rate of the last step that was logged

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = time.monotonic()
        state.compute_steps(args, state.max_steps)  # a checkpoint's state would bring its old intervals back
        if state.global_step % self.plan.steps_per_epoch == 0:
            self.progress.epoch_losses = []  # those of an epoch that was over

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._norms = self.gradients(kwargs["model"])
        self._skipped = self.check_finite(kwargs["model"], state.global_step, self._norms)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / self.plan.steps_per_epoch  # the Trainer's is wrong in an epoch resumed midway
        self._step = state.global_step
        asked = self.notice is not None and state.global_step < self.plan.num_steps and self.notice.is_due()
        measured = self.background is not None and self.background.ready()
        stop, measured, asked = self.agree(self.stop_asked(), measured, asked)
        if asked and self.notice is not None:  # all workers together: Ray waits for them
            self.leaving = self.notice.look()
            stop = stop or self.leaving is not None
        if measured:
            started = time.monotonic()
            self._collect(control)
            self._last += time.monotonic() - started  # no part of the step
        if stop and state.global_step < self.plan.num_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def reached(self) -> tuple[float | None, dict[str, Any]]:
        """For a checkpoint now: the score of the validation at this very step, if there was one, and the progress."""
        last = self.progress.last
        score = score_of(self.job.evaluate.metric, last["metrics"]) if last and last["step"] == self._step else None
        return score, asdict(self.progress)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        state.log_history.clear()  # metrics.jsonl has it
        if "loss" not in logs:
            return
        if self.job.cluster.deepspeed and not math.isfinite(logs["loss"]):  # its gradients are not to be seen
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
            if self.job.method.name != "grpo" and (told := self._spikes.look(state.global_step, values["loss"])):
                self.monitor.note(state.global_step, told)  # GRPO's loss says little by its height
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
            return  # `hand_over` gave no numbers yet
        self._restart_clock()
        self._measured(state.global_step, kwargs["metrics"], self.samples, self.save, control)

    def hand_over(self, trainer: Any) -> dict[str, float]:
        """What the trainer calls in place of a validation where `background` has it; gives no numbers yet."""
        started = time.monotonic()
        self.settle(trainer.control)
        self.gather()
        self.background.begin(trainer.state.global_step, self.save)
        self._held_s = time.monotonic() - started
        self._restart_clock()
        return {}

    def settle(self, control: Any) -> None:
        """Wait for the validation that is under way beside training, if one is."""
        while self.background is not None and self.background.step is not None:
            (measured,) = self.agree(self.background.ready())
            if measured:
                self._collect(control)
            else:
                self.tick()
                time.sleep(_WAIT_S)

    def recall(self, step: int, context: DistributedContext) -> None:
        """Take over what an earlier attempt measured beside training up to `step`, and what it left to be measured.

        A checkpoint knows nothing of numbers that came after it was written, so they are read from the lines.
        """
        found = None
        if context.rank == 0:
            lines = [line for line in current_lines(read_metrics(self.paths.metrics)) if line["kind"] == "eval"]
            found = [line for line in lines if line["step"] <= step]
            if self.background is None and not any("background_s" in line for line in found):
                found = None
        found = context.broadcast(found)
        if found is not None:
            best, self.progress.since_best = recall_best(found, self.job.evaluate.metric)
            self.progress.best = best and best | {"path": self.paths.uri("best")}
        if self.background is not None:
            self.background.resume(step, {line["step"] for line in found or ()})
        elif context.rank == 0:
            find_left(self.paths.store, -1)  # nobody will measure them

    def _collect(self, control: Any) -> None:
        found = self.background.collect()
        metrics = found.metrics | {"validation_s": self._held_s}
        self._measured(found.step, metrics, lambda: found.pictures, self.background.save(found.step), control)
        self.background.forget(found.step)

    def _measured(
        self,
        step: int,
        metrics: dict[str, float],
        samples: Callable[[], Sequence[tuple[str, Any]]],
        save: Callable[[Path], None],
        control: Any,
    ) -> None:
        """Write down what was measured of the weights of `step`, which `save` writes, and draw the consequences."""
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
        """The next step's time must not count what came between."""
        self._last = time.monotonic()
        self.usage()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.monitor is not None:
            self.monitor.write("checkpoint", state.global_step, state.epoch or 0.0, {"checkpoint_s": self.checkpoint_s})
            self.monitor.publish()
        self._last = time.monotonic()


def by_part(norms: dict[str, float], whole: float) -> dict[str, float]:
    """`grad_norm_<part>`, as `whole` is: from before gradients were clipped, which scaled all parts alike."""
    clipped = math.hypot(*norms.values())
    scale = whole / clipped if clipped > 0 else 0.0
    return {f"grad_norm_{part}": norm * scale for part, norm in norms.items()}


def publish_weights(paths: RunPaths, folder: Path, save: Callable[[Path], None], step: int) -> None:
    """Replace `best/` or `final/` where the run is kept."""
    if paths.remote is None:
        write_folder(folder, save)
    else:
        replace_folder(paths.store, folder.name, save, step)


def score_of(metric: str, metrics: dict[str, float]) -> float:
    """One finite number for whoever ranks reports, higher is better. NaN is the worst, and never missing: Ray takes a
    missing score for the best when lower is better."""
    value = -metrics[metric] if metric == "loss" else metrics[metric]
    return float(value) if math.isfinite(value) else -sys.float_info.max


def plain(metrics: dict[str, Any]) -> dict[str, int | float | str]:
    """The same numbers as Python's own: Ray ends a run that reports those of numpy or torch."""
    return {k: v if type(v) in (int, str, bool) else float(v) for k, v in metrics.items()}
