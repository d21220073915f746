"""LoRA where the job asks for it, and the count of what is trainable."""

from typing import Any

from ray_vlm.config.schema import Lora
from ray_vlm.errors import ModelError
from ray_vlm.models.families import Family, part_of


def lora_config(lora: Lora, family: Family) -> Any:
    """PEFT's configuration for the job's `lora` section on this family."""
    from peft import LoraConfig

    pattern = "|".join(f"(?:{family.linear[part]})" for part in lora.target)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=pattern,
        task_type="CAUSAL_LM",
    )


def train_parts(model: Any, lora: Lora, family: Family) -> Any:
    """`model` with a loaded adapter, of which only the parts in `lora.target` go on learning.

    Raises `ModelError` where the adapter has none of them.
    """
    there: set[str] = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            there.add(part_of(family, name))
            parameter.requires_grad_(part_of(family, name) in lora.target)
    if not there & set(lora.target):
        raise ModelError(
            f"model.adapter adapts {', '.join(sorted(there))} and lora.target={lora.target} names none of these, so "
            "nothing would learn. Name at least one."
        )
    return model


def count_trainable(model: Any, family: Family) -> dict[str, dict[str, int]]:
    """Weights by part of the model: `{"language": {"trainable": n, "total": n}, ...}`; 4-bit weights count whole."""
    counts: dict[str, dict[str, int]] = {part: {"trainable": 0, "total": 0} for part in family.prefixes}
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            size *= 2  # two 4-bit weights in each stored byte
        part = part_of(family, name)
        counts[part]["total"] += size
        counts[part]["trainable"] += size if parameter.requires_grad else 0
    return counts
