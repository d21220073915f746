"""The numbers of every step and epoch, in `metrics.jsonl` and on the trackers."""

import logging
import math
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ray_vlm.distributed import DistributedContext
from ray_vlm.methods.clock import Clock, split_time
from ray_vlm.methods.trainer import PlannedBatches
from ray_vlm.models.operations import OperationCounter
from ray_vlm.train.callbacks.gradient_norms import GradientNormsCallback
from ray_vlm.train.callbacks.nonfinite import NonfiniteCallback
from ray_vlm.train.callbacks.preemption import PreemptionCallback
from ray_vlm.train.run_context import RunContext

logger = logging.getLogger(__name__)
_WINDOW, _LEAST = 50, 20  # number of previous losses to compare with, and the minimum


class StepTimer:
    """Measures the seconds of a step without the time of validations and checkpoints, which callbacks leave out."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def restart(self) -> None:
        """Leave out the time until now."""
        self._last = time.monotonic()

    def leave_out(self, seconds: float) -> None:
        """Leave out this time."""
        self._last += seconds

    def take(self) -> float:
        """Return the seconds since the last call, without what was left out."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return seconds


class Usage:
    """The time of each part of a step, the work, and the memory."""

    def __init__(
        self, batches: PlannedBatches, clock: Clock, operations: OperationCounter, context: DistributedContext
    ):
        self._batches, self._clock, self._operations, self._context = batches, clock, operations, context
        self._num_images = batches.num_images

    def take(self) -> dict[str, float]:
        """Return the usage since the last call.

        These are the times of `split_time`; the images, the tokens of the language model (`model_tokens`) and the model
        FLOPs (`model_tflop`) of all ranks, estimated as this rank's times the number of ranks; and the peak memory so
        far (GiB, of the GPU or of this process).
        """
        images = self._batches.num_images - self._num_images
        self._num_images = self._batches.num_images
        times, (work, flops) = split_time(self._clock.take()), self._operations.take()
        totals = {"images": images, "model_tokens": work.tokens, "model_tflop": flops / 1e12}
        totals = {name: value * self._context.world_size for name, value in totals.items()}
        return times | totals | {"peak_memory_gib": peak_memory(self._context.device)}


def peak_memory(device: str) -> float:
    """Return the peak memory so far in GiB: allocated on the GPU, or resident in this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


class Spikes:
    """Detects losses far above the previous ones."""

    def __init__(self) -> None:
        self.last: deque[float] = deque(maxlen=_WINDOW)

    def look(self, step: int, loss: float) -> str | None:
        """Return a message if `loss` exceeds the median of the previous losses by more than ten times their median
        absolute deviation and by more than half of the median; None otherwise or with too few losses."""
        before = list(self.last)
        self.last.append(loss if math.isfinite(loss) else (statistics.median(before) if before else 0.0))
        if len(before) < _LEAST or not math.isfinite(loss):
            return None
        middle = statistics.median(before)
        spread = statistics.median(abs(value - middle) for value in before)
        if middle > 0 and loss > middle + 10 * spread and loss > 1.5 * middle:
            return f"step {step}: loss {loss:.4g}, where the median of the last {len(before)} is {middle:.4g}"
        return None


class MetricsCallback(TrainerCallback):
    """Writes the numbers of every step, and the mean loss of every epoch.

    `logged` selects TRL's numbers. `watches_loss`: report jumps of the loss; the size of GRPO's loss is no measure of
    its quality. The other callbacks are those whose results enter a line; they come before this one.
    """

    def __init__(
        self,
        run: RunContext,
        logged: Callable[[Mapping[str, Any]], dict[str, Any]],
        timer: StepTimer,
        usage: Usage,
        norms: GradientNormsCallback,
        nonfinite: NonfiniteCallback,
        preemption: PreemptionCallback,
        log_every_steps: int,
        watches_loss: bool,
    ):
        self._run, self._logged, self._timer, self._usage = run, logged, timer, usage
        self._norms, self._nonfinite, self._preemption = norms, nonfinite, preemption
        self._log_every_steps, self._watches_loss = log_every_steps, watches_loss
        self._spikes = Spikes()
        self._tokens = 0.0
        self._rate: dict[str, float] = {}  # learning rate of the last logged step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start the time of the first step."""
        self._timer.restart()
        state.compute_steps(args, state.max_steps)  # the restored state has the intervals of the earlier job
        if state.global_step % self._run.plan.steps_per_epoch == 0:
            self._run.progress.epoch_losses.clear()  # the checkpoint was written at the end of an epoch

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Set the epoch: the Trainer's value is wrong in an epoch that was resumed midway."""
        state.epoch = state.global_step / self._run.plan.steps_per_epoch

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the line of a step."""
        logs: dict[str, float] = kwargs["logs"]
        state.log_history.clear()  # metrics.jsonl has it
        if "loss" not in logs:
            return
        tokens, seconds = logs.get("num_tokens", 0.0), self._timer.take()
        values = self._logged(logs | ({"loss": math.nan} if self._nonfinite.skipped else {}))
        values["tokens_per_s"] = (tokens - self._tokens) / max(seconds, 1e-9)
        values["step_s"] = seconds
        values |= norms_by_part(self._norms.norms, float(logs.get("grad_norm") or 0.0)) | self._usage.take()
        self._tokens = tokens
        self._rate = {name: logs[name] for name in ("learning_rate",) if name in logs}
        if math.isfinite(values["loss"]):
            self._run.progress.epoch_losses.append(float(logs["loss"]))
        if self._watches_loss and (message := self._spikes.look(state.global_step, values["loss"])):
            logger.info(message, extra={"step": state.global_step})
        self._run.write("train", state.global_step, state.epoch, values)
        if state.global_step % self._log_every_steps == 0:
            self._run.publish()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Write the mean loss of the epoch."""
        if self._preemption.stopped and state.global_step % self._run.plan.steps_per_epoch:
            return  # the epoch goes on in the next attempt
        if losses := self._run.progress.epoch_losses:
            mean = {"loss": sum(losses) / len(losses)}
            self._run.write("epoch", state.global_step, state.epoch, mean | self._rate)
            losses.clear()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Leave the validation out of the next step's time and usage."""
        self._timer.restart()
        self._usage.take()


def norms_by_part(norms: Mapping[str, float], total: float) -> dict[str, float]:
    """Return `grad_norm_<part>` from before clipping, as `total` is: clipping scales all parts by the same factor."""
    clipped = math.hypot(*norms.values())
    scale = total / clipped if clipped > 0 else 0.0
    return {f"grad_norm_{part}": norm * scale for part, norm in norms.items()}
