"""What a worker writes of its run while it trains: rank 0's lines of `metrics.jsonl`, the trackers, the console."""

import logging
import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from ray_vlm.config.schema import Track
from ray_vlm.config.train import Precision
from ray_vlm.distributed import DistributedContext
from ray_vlm.logs import PROGRESS, attached
from ray_vlm.models.families import Family
from ray_vlm.models.lora import count_trainable
from ray_vlm.models.precision import describe_emulation
from ray_vlm.runs.console import Console
from ray_vlm.runs.monitor import Monitor, TrainingLog, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.runs.trackers import KeptFiles, build_trackers
from ray_vlm.train.attempt import Attempt, check_owner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class _MetricsHandler(logging.Handler):
    """Appends the package's lines to a run's `metrics.jsonl`, which under Ray the driver prints.

    A record may have its own `step` (`extra={"step": 3}`). The file is opened for each line, because the base is loaded
    before the run's own monitor exists.
    """

    def __init__(self, paths: RunPaths, attempt: int, step: int):
        super().__init__(logging.INFO)
        self._paths, self._attempt, self._step = paths, attempt, step

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name != Console.__module__  # its lines come from this file

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a line that cannot be written must not end the work
            monitor = Monitor(self._paths.metrics, self._attempt)
            kind = "progress" if record.name == PROGRESS.name else "note"
            monitor.text(kind, getattr(record, "step", self._step), record.getMessage().strip())
            monitor.close()
            if kind == "progress":  # the monitor copies notes to an object store with its next lines
                self._paths.publish(self._paths.metrics)


def to_metrics(paths: RunPaths, rank: int, attempt: int, step: int) -> AbstractContextManager[None]:
    """While the body runs, append rank 0's lines to the run's metrics: notes, and the progress of long work.

    `attempt`: its number; `step`: that of lines without one.
    """
    return attached(_MetricsHandler(paths, attempt, step)) if rank == 0 else nullcontext()


def open_monitor(
    paths: RunPaths,
    job: Mapping[str, Any],
    track: Track,
    attempt: Attempt,
    context: DistributedContext,
    num_steps: int,
    log_every_steps: int,
) -> Monitor | None:
    """Return rank 0's monitor, None on other ranks. Without Ray it also prints; under Ray the driver does.

    `job`: as `run.json` has it.
    """
    if context.rank != 0:
        return None
    wandb: dict[str, Any] = {}
    if track.wandb:
        wandb = {"project": track.wandb_project, "entity": track.wandb_entity}
        wandb |= {"group": track.wandb_group, "tags": list(track.wandb_tags) or None}
    trackers = build_trackers(paths, job, attempt.step, wandb, track.tensorboard)
    show = None if context.ray else Console(num_steps, log_every_steps).show
    log = TrainingLog(paths, job, read_metrics(paths.metrics), lambda: check_owner(paths.store, attempt))
    files = KeptFiles(paths)

    def publish() -> None:
        paths.publish(paths.metrics)
        files.publish(everything=monitor.closed)

    monitor = Monitor(paths.metrics, attempt.number, trackers, show, publish, log.add)
    return monitor


def write_start(
    monitor: Monitor,
    attempt: Attempt,
    precision: Precision,
    model: "PreTrainedModel",
    family: Family,
    context: DistributedContext,
    num_steps: int,
) -> None:
    """Write the first line of an attempt, after a note on the device."""
    if (emulated := describe_emulation(precision, context.device)) is not None:
        logger.info(emulated)
    device = name_device(context.device)
    counts = count_trainable(model, family)
    monitor.start(attempt.step, counts, device=device, num_steps=num_steps, num_workers=context.world_size)


def name_device(device: str) -> str:
    """Return the name of the GPU or of the processor."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")
    except OSError:
        return platform.processor() or "CPU"
