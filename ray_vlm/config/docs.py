"""Documents that are made from the schema and the rules.

`docs/jobs.md` lists every setting (`python -m ray_vlm.config.docs docs/jobs.md`). `ray-vlm config --compatibility`
prints which settings can be combined: every two choices are checked against the rules of `config/check.py` and the
limits of the model families, so only the choices are listed here.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ray_vlm.config.check import RULES, check_job
from ray_vlm.config.data import Source
from ray_vlm.config.schema import JobConfig
from ray_vlm.config.section import sections_of
from ray_vlm.models.families import FAMILIES

_HEAD = """# Job files

A job is one YAML file. This page lists every setting with its default and is generated from `ray_vlm/config/` by
`make docs`. A setting is written `section.key`, and on the command line `section.key=value` replaces the file's value:

    ray-vlm train jobs/demo_sft.yaml train.learning_rate=2e-3 model.load_in_4bit=false

Unknown keys are errors. `ray-vlm config JOB` prints the job with every default; `--dry-run` adds the plan (rows, steps,
tokens) and the first records with the trained tokens marked. `method` and `task` may be given by name alone.
Your own names are keys too, such as `data.oversample.toe-drain=7`; quote a name with a dot or an equals sign:
`data.oversample."5.5 inch"=2`. Paths, and the modules of `module:function`, are looked for in the current folder, then
in the folder of the job file.
"""


def write_reference() -> str:
    """Return the page as Markdown."""
    sections = [_HEAD]
    for name, field in JobConfig.model_fields.items():
        models = sections_of(field.annotation)
        default = " Optional; `null` turns it off." if name == "lora" else ""
        sections.append(f"\n## {name}\n\n{field.description}{default}")
        if not models:
            sections.append("\n" + _table([(name, field)]))
        for model in models:
            if len(models) > 1:
                sections.append(f"\n### {name}: {model.model_fields['name'].default}")
            sections.append("\n" + _table([(f"{name}.{key}", value) for key, value in model.model_fields.items()]))
        if name == "data":
            sections.append("\nEach of `data.train`, `data.eval`, `data.test` and the entries of `data.mix` has:\n")
            sections.append(_table([(f"data.*.{key}", value) for key, value in Source.model_fields.items()]))
    sections += ["\n## What goes together\n\nAs `ray-vlm config --compatibility` prints it.\n"]
    return "\n".join([*sections, "```", *describe_compatibility(), "```"])


def _table(rows: list[tuple[str, FieldInfo]]) -> str:
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    for key, field in rows:
        values = [str(v) for v in getattr(field.annotation, "__args__", ()) if isinstance(v, str)]
        choice = f" One of: {', '.join(f'`{v}`' for v in values)}." if len(values) > 1 else ""
        lines.append(f"| `{key}` | {_default(field)} | {field.description}{choice} |")
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "its defaults" if isinstance(value, BaseModel) else f"`{json.dumps(value)}`"


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


def describe_compatibility() -> list[str]:
    """Return the table of choices that go together, the reasons of refusals, the families' limits, and every rule."""
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


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(write_reference() + "\n", encoding="utf-8")
