"""LoRA adapters, frozen parts, learning rates of parts, and the count of trainable weights."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray_vlm.config.schema import Lora
from ray_vlm.errors import ModelError
from ray_vlm.models.families import Family, part_of

_ADDED = re.compile(r"\.(lora_\w+|modules_to_save)\.")  # in the names of weights that PEFT adds to the base's


def lora_config(lora: Lora, family: Family) -> Any:
    """Return PEFT's configuration for the job's `lora` section on this family.

    Raise `ModelError` if a target part has no linear layers in this family.
    """
    from peft import LoraConfig

    if absent := [part for part in lora.target if part not in family.linear]:
        raise ModelError(
            f"lora.target={lora.target}: {family.model_type} has no linear layers in its {absent[0]}. Name others: "
            f"{', '.join(family.linear)}."
        )
    ranks = {family.linear[part]: rank for part, rank in (lora.ranks or {}).items()}
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        rank_pattern=ranks,
        alpha_pattern={pattern: lora.alpha * rank / lora.rank for pattern, rank in ranks.items()},
        lora_dropout=lora.dropout,
        target_modules="|".join(f"(?:{family.linear[part]})" for part in lora.target),
        modules_to_save=lora.modules_to_save,
        task_type="CAUSAL_LM",
    )


def check_modules(model: Any, names: Sequence[str]) -> None:
    """Raise `ModelError` for names with which no module's name ends, and suggest the nearest."""
    known = {name.rpartition(".")[2] for name, _ in model.named_modules()} - {""}
    wrong = [name for name in names if name.rpartition(".")[2] not in known]
    if wrong:
        near = difflib.get_close_matches(wrong[0], known, n=3) or sorted(known)[:3]
        raise ModelError(f"lora.modules_to_save: the model has no {wrong[0]!r}. The nearest: {', '.join(near)}.")


def freeze_parts(model: Any, parts: Sequence[str], family: Family) -> Any:
    """Freeze these parts of `model`, and return it."""
    for name, parameter in model.named_parameters():
        if part_of(family, name) in parts:
            parameter.requires_grad_(False)
    return model


def split_rates(optimizer: Any, named: Iterable[tuple[str, Any]], family: Family, rates: Mapping[str, float]) -> None:
    """Give the weights of parts in `rates` (part: peak learning rate) groups of their own in `optimizer`."""
    part = {id(parameter): part_of(family, name) for name, parameter in named}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for key in (None, *rates):  # weights without a rate of their own stay first, in their order
            parameters = [p for p in group["params"] if (part[id(p)] if part[id(p)] in rates else None) == key]
            if parameters:
                groups.append(group | {"params": parameters} | ({"lr": rates[key]} if key else {}))
    optimizer.param_groups[:] = groups


def train_parts(model: Any, lora: Lora, family: Family) -> Any:
    """Freeze the weights of a loaded adapter outside the parts in `lora.target`, and return `model`.

    Raise `ModelError` if the adapter has none of these parts.
    """
    adapted: set[str] = set()
    frozen = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            adapted.add(part_of(family, name))
            if part_of(family, name) not in lora.target:
                frozen.append(parameter.requires_grad_(False))
    switch = model.set_adapter

    def set_adapter(*args: Any, **kwargs: Any) -> None:
        switch(*args, **kwargs)  # PEFT makes the whole adapter trainable when it is switched back from the reference
        for parameter in frozen:
            parameter.requires_grad_(False)

    model.set_adapter = set_adapter
    if not adapted & set(lora.target):
        raise ModelError(
            f"model.adapter adapts {', '.join(sorted(adapted))} and lora.target={lora.target} names none of these, so "
            "nothing would learn. Name at least one."
        )
    return model


def num_weights(parameter: Any) -> int:
    """Return the weights of a parameter: 4-bit weights unpacked, and under ZeRO-3 those of all slices."""
    stored = getattr(parameter, "ds_numel", parameter.numel())
    return 2 * stored if type(parameter).__name__ == "Params4bit" else stored  # two 4-bit weights in each byte


def count_trainable(model: Any, family: Family) -> dict[str, dict[str, int]]:
    """Count weights by part of the model: `{"language": {"trainable": n, "total": n, "in_4bit": n}, ...}`.

    `total` and `in_4bit` count the base alone, without adapters and without the layers that PEFT copies to train them
    in full. Every 4-bit weight counts as one.
    """
    counts = {part: {"trainable": 0, "total": 0, "in_4bit": 0} for part in family.prefixes}
    for name, parameter in model.named_parameters():
        size, part = num_weights(parameter), part_of(family, name)
        if type(parameter).__name__ == "Params4bit":
            counts[part]["in_4bit"] += size
        counts[part]["total"] += 0 if _ADDED.search(name) else size
        counts[part]["trainable"] += size if parameter.requires_grad else 0
    return counts
