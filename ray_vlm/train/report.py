"""The callback that turns a trainer's events into the run folder: lines of metrics, `best/`, Ray's reports.

Ray is told only of validations: each report waits for the controller's next poll, so one every step
would throttle training.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from ray_vlm.config.schema import JobConfig
from ray_vlm.runs.monitor import Monitor
from ray_vlm.runs.paths import RunPaths, write_folder

_LOGGED = ("loss", "learning_rate", "grad_norm", "mean_token_accuracy")


@dataclass
class Progress:
    """What a run has reached; `best` is `{"step", "metrics", "path"}` once a validation has chosen one."""

    best: dict[str, Any] | None = None
    since_best: int = 0
    epoch_losses: list[float] = field(default_factory=list)


class RunCallback(TrainerCallback):
    """Writes what happens. `monitor` is None on every rank but 0.

    `save` writes weights into a folder, `describe` how inputs were made; `tell` reports to Ray.
    """

    def __init__(
        self,
        job: JobConfig,
        paths: RunPaths,
        monitor: Monitor | None,
        save: Callable[[Any], None],
        describe: Callable[[Any], None],
        tell: Callable[[dict[str, Any]], None],
    ):
        self.job = job
        self.paths = paths
        self.monitor = monitor
        self.save = save
        self.describe = describe
        self.tell = tell
        self.progress = Progress()
        self._last = time.monotonic()
        self._tokens = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:
            return
        now = time.monotonic()
        tokens = logs.get("num_tokens", 0.0)
        values = {k: v for k, v in logs.items() if k in _LOGGED}
        values["tokens_per_s"] = (tokens - self._tokens) / max(now - self._last, 1e-9)
        values["step_s"] = now - self._last
        self._tokens, self._last = tokens, now
        self.progress.epoch_losses.append(float(logs["loss"]))
        if self.monitor is not None:
            self.monitor.write("train", state.global_step, state.epoch or 0.0, values)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losses, self.progress.epoch_losses = self.progress.epoch_losses, []
        if self.monitor is not None and losses:
            mean = sum(losses) / len(losses)
            self.monitor.write("epoch", state.global_step, state.epoch or 0.0, {"loss": mean})

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        self._last = time.monotonic()  # the next step's time must not count the validation
        name = self.job.evaluate.metric
        best_so_far = self.progress.best["metrics"][name] if self.progress.best else math.nan
        better = is_better(name, metrics[name], best_so_far)
        self.progress.since_best = 0 if better else self.progress.since_best + 1
        if better:
            best = {"step": state.global_step, "metrics": metrics, "path": str(self.paths.best)}
            self.progress.best = best
        if self.monitor is not None:
            self.monitor.write("eval", state.global_step, state.epoch or 0.0, metrics)
            if better:
                write_folder(self.paths.best, self.save)
        self.tell({"step": state.global_step, **metrics})
        patience = self.job.train.early_stopping_patience
        if patience is not None and self.progress.since_best >= patience:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.monitor is not None:
            self.describe(self.paths.root / f"checkpoint-{state.global_step}")
        self._last = time.monotonic()


def is_better(metric: str, new: float, old: float) -> bool:
    """Whether `new` beats `old`; NaN never does. Losses fall, every other metric rises."""
    return new == new and (old != old or (new < old if metric == "loss" else new > old))
