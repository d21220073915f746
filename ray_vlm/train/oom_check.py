"""Run the heaviest batch of the plan before the first step, so that a lack of memory shows at once and not hours later.

The batch goes forward and backward as in training, without an optimizer step. GRPO samples before: the first tokens of
the answers to as many prompts as are sampled at a time, with memory held for the keys and values of all further ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ray_vlm.config.train import Optimizer, Precision
from ray_vlm.errors import RunError
from ray_vlm.machine import GIB
from ray_vlm.methods.trainer import PlannedTrainer
from ray_vlm.models.card_memory import read_card, release_memory
from ray_vlm.models.memory import describe_portion, moment_bytes
from ray_vlm.models.rehearse import LiveBytes
from ray_vlm.train.memory_plan import Probe, count_trained


def run_heaviest_batch(
    trainer: PlannedTrainer, probe: Probe, precision: Precision, optimizer: Optimizer = "adamw"
) -> str:
    """Run the batch and return a sentence on its memory. Raises `RunError` if it does not fit."""
    model, device = trainer.model, str(trainer.args.device)
    rows = [trainer.inputs.rows.sample(trainer.builder, number) for number in probe.rows]
    description = f"{len(rows)} rows of up to {probe.tokens:,} tokens"
    with _measure(model, device) as sampled:
        prompts = trainer.try_rollout(rows, precision)
    release_memory()
    try:
        with _measure(model, device) as took:
            trainer.try_heaviest_batch(rows, precision)
    except torch.OutOfMemoryError as error:
        raise RunError(_refuse(description, str(error).split(". ")[0] + _tell_others(device), probe)) from error
    parts = [
        f"the heaviest batch ({description}) took {took['above'] / GIB:.3f} GiB above the model, predicted "
        f"{probe.predicted / GIB:.3f} GiB"
    ]
    if prompts is not None:
        at_a_time = describe_portion(prompts)
        parts.append(f"{at_a_time}: {sampled['above'] / GIB:.3f} GiB above the model")
    if (card := read_card(device)) is not None:
        moments = moment_bytes(optimizer, count_trained(model))
        needed = max(sampled["before"] + sampled["above"], took["before"] + took["above"]) + moments
        if needed > card.available:
            reason = f"with the optimizer {needed / GIB:.1f} of {card.available / GIB:.1f} GiB{_tell_others(device)}"
            raise RunError(_refuse(description, reason, probe))
        reserved = max(sampled["reserved"], took["reserved"])
        parts.append(
            f"with the optimizer {needed / GIB:.1f} GiB allocated; {reserved / GIB:.1f} reserved at the peak, of "
            f"{card.available / GIB:.1f} that others leave of the GPU's {card.total / GIB:.1f}"
        )
    return "; ".join(parts)


def _tell_others(device: str) -> str:
    """Return the end of a sentence on what other processes hold of the GPU, empty if that is next to nothing."""
    card = read_card(device)
    return f"; {words}" if card is not None and (words := card.describe_others()) else ""


def _refuse(description: str, reason: str, probe: Probe) -> str:
    return (
        f"the heaviest batch of the plan ({description}; rows {', '.join(map(str, probe.rows[:8]))}) does not fit: "
        f"{reason}. Lower train.micro_batch_size or data.max_pixels, set train.gradient_checkpointing, or let "
        "train.memory=auto choose."
    )


@contextmanager
def _measure(model: torch.nn.Module, device: str) -> Iterator[dict[str, float]]:
    """Measure the bytes allocated `before` the body, the peak `above` them, and on GPUs the peak of what is `reserved`
    from the card, free blocks included."""
    took: dict[str, float] = {}
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        took["before"] = torch.cuda.memory_allocated(device)
        yield took
        took["above"] = torch.cuda.max_memory_allocated(device) - took["before"]
        took["reserved"] = torch.cuda.max_memory_reserved(device)
    else:
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            yield took
        took["above"] = live.peak
