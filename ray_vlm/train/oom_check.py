"""Run the heaviest batch of the plan before the first step, so that a lack of memory shows at once and not hours later.

The batch goes forward and backward as in training, without an optimizer step. Gradients, TRL's counters and the random
state are restored afterwards.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import RunError
from ray_vlm.machine import GIB
from ray_vlm.methods import METHODS
from ray_vlm.models.backbone import recompute
from ray_vlm.models.precision import autocast
from ray_vlm.train.context import DistributedContext
from ray_vlm.train.memory_plan import Probe

_KEPT = ("_metrics", "_total_train_tokens", "_step")  # counters that TRL updates in `compute_loss`


def run_probe(trainer: Any, job: JobConfig, probe: Probe, context: DistributedContext) -> str:
    """Run the batch and return a sentence on its memory. Raises `RunError` if it does not fit."""
    import torch

    records, model = trainer.fetch_records(), trainer.model
    rows = [trainer.builder.row(records[number]) for number in probe.rows]
    description = f"{len(rows)} rows of up to {probe.tokens:,} tokens"
    try:
        with _no_trace(trainer, context), _measure(model, context) as took:
            batch = METHODS[job.method.name].heaviest(trainer, rows, context.device)
            with autocast(job.train.precision, context.device):
                trainer.compute_loss(model, batch).backward()
            del batch
    except torch.OutOfMemoryError as error:
        raise RunError(_refuse(description, str(error).split(". ")[0], probe)) from error
    moments = 2 * sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    if context.device.startswith("cuda"):
        capacity = torch.cuda.get_device_properties(context.device).total_memory
        if (needed := took["before"] + took["above"] + moments) > capacity:
            reason = f"with the optimizer {needed / GIB:.1f} of {capacity / GIB:.1f} GiB"
            raise RunError(_refuse(description, reason, probe))
    return (
        f"the heaviest batch ({description}) took {took['above'] / GIB:.3f} GiB above the model, predicted "
        f"{probe.predicted / GIB:.3f}"
    )


def _refuse(description: str, reason: str, probe: Probe) -> str:
    return (
        f"the heaviest batch of the plan ({description}; rows {', '.join(map(str, probe.rows[:8]))}) does not fit: "
        f"{reason}. Lower train.micro_batch_size or data.max_pixels, set train.gradient_checkpointing, or let "
        "train.memory=auto choose."
    )


@contextmanager
def _measure(model: Any, context: DistributedContext) -> Iterator[dict[str, float]]:
    """Measure the bytes allocated `before` the body, and the peak `above` them."""
    import torch

    from ray_vlm.models.rehearse import LiveBytes

    took: dict[str, float] = {}
    if context.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(context.device)
        took["before"] = torch.cuda.memory_allocated(context.device)
        yield took
        took["above"] = torch.cuda.max_memory_allocated(context.device) - took["before"]
    else:
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            yield took
        took["above"] = live.peak


@contextmanager
def _no_trace(trainer: Any, context: DistributedContext) -> Iterator[None]:
    import torch

    saved = {name: copy.deepcopy(getattr(trainer, name)) for name in _KEPT if hasattr(trainer, name)}
    model, args = trainer.model, trainer.args
    was_training = model.training
    if args.gradient_checkpointing:
        recompute(model, dict(args.gradient_checkpointing_kwargs or {}) or None)
    model.train()
    devices = [context.device] if context.device.startswith("cuda") else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        trainer.clock.take()
        trainer.operations.take()
        for name, value in saved.items():
            setattr(trainer, name, value)
