"""Generate `docs/jobs.md` from the schema: `python -m ray_vlm.config.docs docs/jobs.md`."""

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ray_vlm.config.compatibility import describe
from ray_vlm.config.schema import JobConfig

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
        model = _section(field.annotation)
        default = " Optional; `null` turns it off." if name == "lora" else ""
        sections.append(f"\n## {name}\n\n{field.description}{default}\n")
        if model is None:
            sections.append(_table([(name, field)]))
        else:
            sections.append(_table([(f"{name}.{key}", value) for key, value in model.model_fields.items()]))
            if name == "data":
                source = _section(model.model_fields["train"].annotation)
                assert source is not None
                sections.append("\nEach of `data.train`, `data.eval`, `data.test` and the entries of `data.mix` has:\n")
                sections.append(_table([(f"data.*.{key}", value) for key, value in source.model_fields.items()]))
    sections += ["\n## What goes together\n\nAs `ray-vlm config --compatibility` prints it.\n"]
    return "\n".join([*sections, "```", *describe(), "```"])


def _section(annotation: Any) -> type[BaseModel] | None:
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _table(rows: list[tuple[str, Any]]) -> str:
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    for key, field in rows:
        values = [str(v) for v in getattr(field.annotation, "__args__", ()) if isinstance(v, str)]
        choice = f" One of: {', '.join(f'`{v}`' for v in values)}." if len(values) > 1 else ""
        lines.append(f"| `{key}` | {_default(field)} | {field.description}{choice} |")
    return "\n".join(lines)


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else field.default_factory()
    return "its defaults" if isinstance(value, BaseModel) else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(write_reference() + "\n", encoding="utf-8")
