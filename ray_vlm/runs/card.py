"""The model card of an export: base, training, scores, cost, and how to load the weights. Pure functions."""

import json
from collections.abc import Mapping
from typing import Any

from ray_vlm.runs.compare import test_of
from ray_vlm.runs.compute import describe_hours, measure_compute
from ray_vlm.runs.read import Run, is_number, setting
from ray_vlm.runs.text import format_duration, format_markdown, format_number, plain_markdown

ADAPTER, MERGED, WHOLE = "adapter", "merged", "model"  # kinds of exports and names of their folders
TITLES = {ADAPTER: "adapter", MERGED: "merged model", WHOLE: "model"}
SHIPPED = "tiny"  # `model.name` of the weights in this package
CHOSE_BEST = "that also chose best/"  # appended to "validation rows" if `data.test_on_eval` is set
_VERSIONS = ("ray-vlm", "torch", "transformers", "trl", "peft", "bitsandbytes")


def write_card(
    run: Run, kind: str, weights: str, licence: str | None = None, checked: Mapping[str, float] | None = None
) -> str:
    """Return the card: Markdown with the hub's YAML header.

    `weights`: `best` or `final`; `licence`: of the base, None if unknown; `checked`: the difference between merged
    weights and base with adapter, from `evaluate.export.merge`.
    """
    base = str(setting(run.job, "model.name"))
    parts = [_head(kind, base, licence), _title(run, kind, weights, base), _how(run), _scores(run), _cost(run)]
    parts += [_check(checked)] if checked is not None else []
    return "\n\n".join([*parts, _loading(run, kind, base)]) + "\n"


def _head(kind: str, base: str, licence: str | None) -> str:
    lines = ["---", f"base_model: {json.dumps(base)}", "pipeline_tag: image-text-to-text"]
    lines.append(f"library_name: {'peft' if kind == ADAPTER else 'transformers'}")
    lines += [f"license: {json.dumps(licence)}"] if licence else []
    return "\n".join([*lines, f"tags: [{'ray_vlm' if kind == WHOLE else 'ray_vlm, lora'}]", "---"])


def _title(run: Run, kind: str, weights: str, base: str) -> str:
    what = {ADAPTER: "LoRA adapter", WHOLE: "fine-tuned model"}.get(kind, TITLES[kind])
    step = run.best["step"] if weights == "best" and run.best else run.step
    name, task = plain_markdown(run.name), setting(run.job, "task.name")
    return f"# {name}\n\nA {what} for {task}, of {plain_markdown(base)}: `{weights}/` of the run `{name}`, step {step}."


def _how(run: Run) -> str:
    job = run.job
    adapted = "all weights"
    if setting(job, "lora"):
        rank, alpha, target = (setting(job, f"lora.{name}") for name in ("rank", "alpha", "target"))
        adapted = f"LoRA of rank {rank}, alpha {alpha} on {', '.join(target or ())}"
    rows: list[tuple[str, Any]] = [
        ("setting", "value"),
        ("method", setting(job, "method.name")),
        ("trained", adapted + (", base in 4 bit (NF4)" if setting(job, "model.load_in_4bit") else "")),
        ("learning rate", setting(job, "train.learning_rate")),
        ("rows in a step", setting(job, "train.global_batch_size")),
        ("steps", run.step),
        ("seed", setting(job, "seed")),
    ]
    for part in ("train", "eval", "test"):
        path, ratio = setting(job, f"data.{part}.path"), setting(job, f"data.{part}.ratio")
        if path or ratio:
            rows.append((f"data, {part}", path.rsplit("/", 1)[-1] if path else f"{ratio} of the training rows"))
    if setting(job, "data.oversample"):
        rows.append(("oversampling", setting(job, "data.oversample")))
    versions = run.section("versions")
    rows.append(("made with", ", ".join(f"{name} {versions[name]}" for name in _VERSIONS if name in versions)))
    return "## How it was trained\n\n" + format_markdown(rows)


def _scores(run: Run) -> str:
    name, metrics = test_of(run)
    overall, intervals = metrics.get("overall", {}), metrics.get("intervals") or {}
    if not overall:
        return "## How good it is\n\nNot measured on test rows: `ray-vlm evaluate` does that."
    rows = [("metric", "value", "interval")]
    for metric, value in overall.items():
        ends = intervals.get(metric)
        known = isinstance(ends, list) and len(ends) == 2 and all(is_number(end) for end in ends)
        interval = " to ".join(format_number(end) for end in ends) if ends and known else "-"
        rows.append((metric, format_number(value), interval))
    rows_are = (
        f"validation rows {CHOSE_BEST}, so higher than on new rows" if metrics.get("rows_chose_best") else "test rows"
    )
    where = f"On {metrics.get('num_rows', '?')} {rows_are} (`evaluate/{plain_markdown(name)}`), with 95 % intervals:"
    return f"## How good it is\n\n{where}\n\n" + format_markdown(rows)


def _cost(run: Run) -> str:
    costs = measure_compute(run)
    rows = [("what", "value"), ("hardware", costs["device"] or "?"), ("workers", costs["num_workers"])]
    rows.append(("wall time", format_duration(run.wall_s)))
    return "## What it cost\n\n" + format_markdown([*rows, *describe_hours(costs)])


def _check(checked: Mapping[str, float]) -> str:
    return (
        f"## Merged weights\n\nMerged into the base without quantisation. On {checked['rows']:.0f} real rows no logit "
        f"differs from that of base and adapter by more than {checked['largest']:.3g}, where the largest is "
        f"{checked['scale']:.3g}; {checked['same_token']:.2%} of the likeliest tokens are the same. Where the base was "
        "trained in 4 bit, evaluate the merged model before you use it: the adapter was trained on the quantised "
        "base, which differs slightly from the unquantised one."
    )


def _loading(run: Run, kind: str, base: str) -> str:
    """Return code that loads the weights from the card's folder, and notes on serving them."""
    lines = ["from transformers import AutoModelForImageTextToText", ""]
    if kind == ADAPTER:
        lines.insert(0, "from peft import PeftModel")
        name = repr(base)
        if base == SHIPPED:  # not on the hub: its weights are in this package
            lines.insert(0, "from importlib.resources import files\n")
            name = 'str(files("ray_vlm") / "demo" / "weights")'
        revision = setting(run.job, "model.revision")
        pinned = f", revision={revision!r}" if revision else ""
        lines.append(f"base = AutoModelForImageTextToText.from_pretrained({name}{pinned})")
        lines.append('model = PeftModel.from_pretrained(base, ".")  # this folder, or its name on the hub')
        rank = setting(run.job, "lora.rank") or 16
        serve = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned=FOLDER"
        note = "vLLM takes adapters on the language model only: merge others first. Not tried on hardware."
    else:
        lines.append('model = AutoModelForImageTextToText.from_pretrained(".")  # this folder, or its name on the hub')
        serve, note = "vllm serve FOLDER", "Not tried on hardware."
    code = "\n".join(lines)
    how = "`preprocessing.json` has the image sizes and prompts of training; use the same."
    return f"## How to load it\n\n```python\n{code}\n```\n\n{how}\n\n    {serve}\n\n{note}"
