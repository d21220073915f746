"""What a worker writes of its run while it trains: rank 0's lines of `metrics.jsonl`, the trackers, the console."""

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ray_vlm.config.schema import Track
from ray_vlm.config.train import Precision
from ray_vlm.distributed import DistributedContext
from ray_vlm.models.families import Family
from ray_vlm.models.lora import count_trainable
from ray_vlm.models.precision import describe_emulation
from ray_vlm.runs.console import Console, send_progress
from ray_vlm.runs.monitor import Monitor, TrainingLog, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.runs.trackers import KeptFiles, build_trackers
from ray_vlm.train.attempt import Attempt, check_owner

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def send_worker_progress(paths: RunPaths, context: DistributedContext, attempt: Attempt) -> Iterator[None]:
    """Append the progress of long work in the body, such as loading the base or a validation, to the run's metrics.

    Only rank 0 writes. Under Ray the driver prints. The file is opened for each line, because the base is loaded before
    the run's own monitor exists.
    """
    if context.rank == 0:
        paths.refresh(paths.metrics)  # an object store cannot append: the whole file is written again
    show = None if context.ray else Console(0, 1).show

    def write(text: str) -> None:
        if context.rank == 0:
            monitor = Monitor(paths.metrics, attempt.number, (), show, lambda: paths.publish(paths.metrics))
            monitor.progress(attempt.step, text)
            monitor.close()

    with send_progress(write):
        yield


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
    paths.refresh(paths.metrics)  # an object store cannot append: the whole file is written again
    log = TrainingLog(paths, job, read_metrics(paths.metrics), lambda: check_owner(paths.store, attempt))
    files = KeptFiles(paths)

    def publish() -> None:
        paths.publish(paths.metrics)
        files.publish(everything=monitor.closed)

    monitor = Monitor(paths.metrics, attempt.number, trackers, show, publish, log.add)
    for tracker in trackers:
        for text in tracker.notes:
            monitor.note(attempt.step, text)
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
    """Write the first line of an attempt, after notes on the device and on the checkpoint that it resumes from."""
    if (emulated := describe_emulation(precision, context.device)) is not None:
        monitor.note(attempt.step, emulated)
    for text in attempt.notes:
        monitor.note(attempt.step, text)
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
