"""The training methods: for each a trainer, TRL's with this package's batches. The losses are TRL's. Imports no ray."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray_vlm.methods.trainer import PlannedTrainer


def load_method(name: str) -> "type[PlannedTrainer]":
    """Return the trainer class of `method.name`. Its import loads TRL, so only processes that train call this."""
    if name == "sft":
        from ray_vlm.methods.sft import WeightedSFTTrainer

        return WeightedSFTTrainer
    if name == "dpo":
        from ray_vlm.methods.dpo import PairedDPOTrainer

        return PairedDPOTrainer
    from ray_vlm.methods.grpo import PlannedGRPOTrainer

    return PlannedGRPOTrainer
