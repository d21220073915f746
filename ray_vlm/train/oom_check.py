"""Run the heaviest batch of the plan before the first step, so that a lack of memory shows at once and not hours later.

The batch goes forward and backward as in training, without an optimizer step.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ray_vlm.config.train import Precision
from ray_vlm.errors import RunError
from ray_vlm.machine import GIB
from ray_vlm.methods.trainer import PlannedTrainer
from ray_vlm.models.rehearse import LiveBytes
from ray_vlm.train.memory_plan import Probe


def run_heaviest_batch(trainer: PlannedTrainer, probe: Probe, precision: Precision) -> str:
    """Run the batch and return a sentence on its memory. Raises `RunError` if it does not fit."""
    model, device = trainer.model, str(trainer.args.device)
    rows = [trainer.inputs.rows.sample(trainer.builder, number) for number in probe.rows]
    description = f"{len(rows)} rows of up to {probe.tokens:,} tokens"
    try:
        with _measure(model, device) as took:
            trainer.try_heaviest_batch(rows, precision)
    except torch.OutOfMemoryError as error:
        raise RunError(_refuse(description, str(error).split(". ")[0], probe)) from error
    moments = 2 * sum(4 * int(p.numel()) for p in model.parameters() if p.requires_grad)
    if device.startswith("cuda"):
        capacity = torch.cuda.get_device_properties(device).total_memory
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
def _measure(model: torch.nn.Module, device: str) -> Iterator[dict[str, float]]:
    """Measure the bytes allocated `before` the body, and the peak `above` them."""
    took: dict[str, float] = {}
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        took["before"] = torch.cuda.memory_allocated(device)
        yield took
        took["above"] = torch.cuda.max_memory_allocated(device) - took["before"]
    else:
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            yield took
        took["above"] = live.peak
