"""The table of settings that can be combined: every two choices checked against the rules, and the rules themselves.

Only the choices are listed here; the rules are those of `config/check.py` and the limits of the model families.
"""

from collections.abc import Mapping
from typing import Any

from ray_vlm.config.check import RULES, check_job
from ray_vlm.config.schema import JobConfig
from ray_vlm.models.families import FAMILIES

_PLAIN = {"model": {"name": "base"}, "data": {"train": {"path": "rows.json"}}}
_EVAL = {"data": {"eval": {"ratio": 0.1}}}
CHOICES: dict[str, dict[str, Any]] = {
    "sft": {"method": {"name": "sft"}},
    "dpo": {"method": {"name": "dpo"}, "data": {"train": {"format": "preference"}}},
    "grpo": {"method": {"name": "grpo"}},
    "4 bit": {"model": {"load_in_4bit": True}},
    "16 bit": {"model": {"load_in_4bit": False}},
    "all weights": {"lora": None, "model": {"load_in_4bit": False}},
    "LoRA on all parts": {"lora": {"target": ["language", "connector", "vision"]}},
    "LoRA dropout": {"lora": {"dropout": 0.1}},
    "no Ray": {"cluster": {"num_workers": 0}},
    "two workers": {"cluster": {"num_workers": 2}},
    "zero1, zero2": {"cluster": {"deepspeed": "zero2"}},
    "zero3": {"cluster": {"deepspeed": "zero3"}},
    "answers measured": {"evaluate": {"metric": "parse_rate"}, **_EVAL},
    "measured beside": {"evaluate": {"asynchronous": True}, **_EVAL},
    "class weights": {"data": {"class_weights": "inverse"}},
    "oversampling": {"data": {"oversample": "auto"}},
    "vLLM rollouts": {"method": {"name": "grpo", "rollouts": "vllm"}, "cluster": {"gpus_per_worker": 1}},
    "vision cache": {"train": {"vision_cache": "features"}},
    "resident sweep": {"tune": {"resident": True}},
}


def merge(*parts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Merge the sections, or return None if two of them give a setting different values."""
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            existing = merged.get(key)
            if isinstance(existing, dict) and isinstance(value, Mapping):
                both = merge(existing, value)
                if both is None:
                    return None
                merged[key] = both
            elif key in merged and existing != value:
                return None
            else:
                merged[key] = value
    return merged


def refuse(one: str, other: str) -> str | None:
    """Return why two choices cannot be combined; "" if they can, None if they are alternatives of one setting."""
    both = merge(_PLAIN, CHOICES[one], CHOICES[other])
    if both is None:
        return None
    return next((f"{key}: {reason}" for key, reason in check_job(JobConfig.model_validate(both))), "")


def describe() -> list[str]:
    """Return the table of choices, the reasons of the refusals, the limits of the families, and every rule."""
    names, width = list(CHOICES), max(map(len, CHOICES))
    lines = ["What goes together: + yes, x no (see below), . one or the other", ""]
    lines.append(" " * (width + 4) + " ".join(f"{n:>2}" for n in range(1, len(names) + 1)))
    reasons: dict[str, list[str]] = {}
    for number, one in enumerate(names):
        marks = []
        for other in names[: number + 1]:
            why = refuse(one, other)
            marks.append("." if why is None else "x" if why else "+")
            if why:
                reasons.setdefault(why, []).append(one if one == other else f"{other} with {one}")
        lines.append(f"{number + 1:>2} {one:<{width}} " + " ".join(f"{mark:>2}" for mark in marks))
    lines += ["", "Why not:"]
    lines += [f"- {', '.join(pairs)}: {why}" for why, pairs in reasons.items()]
    cannot = [(name, key, why) for name, family in FAMILIES.items() for key, why in family.cannot.items()]
    lines += ["", f"Families: {', '.join(FAMILIES)} and any other AutoModelForImageTextToText."]
    lines += [f"- {name}: not {key}, since {why}." for name, key, why in cannot]
    lines += ["", "Every rule:"]
    return lines + [f"- {', '.join(keys)}: {reason}" for _, keys, reason in RULES]
