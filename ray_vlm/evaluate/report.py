"""`report.html`: evaluations side by side, the curves of runs, and images with truth and prediction drawn.

One self-contained file, readable in the dark and on a phone; everything that came from data is escaped (Jinja2's
autoescape). Reads what evaluations and runs wrote and nothing else.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_vlm.config.check_method import TASK_METRICS
from ray_vlm.evaluate.intervals import measure_differences
from ray_vlm.evaluate.pictures import EvalResult, choose_images, draw_picture
from ray_vlm.runs.curves import learning_curve
from ray_vlm.runs.monitor import current_lines, read_metrics
from ray_vlm.runs.read import is_number

if TYPE_CHECKING:
    from jinja2 import Environment

_TITLES = {
    "f1_50": "F1 at IoU 0.5",
    "map": "mAP (0.50:0.95)",
    "map_50": "mAP at 0.50",
    "mean_iou": "mean IoU",
    "precision_50": "precision at 0.5",
    "recall_50": "recall at 0.5",
    "accuracy": "accuracy (all attributes right)",
    "attribute_accuracy": "accuracy of single attributes",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "step_success": "step success",
    "task_success": "task success",
    "action_accuracy": "action",
    "argument_accuracy": "arguments",
    "grounding": "pointing inside the box",
    "exact": "exact match",
    "normalised": "normalised match",
    "anls": "ANLS",
    "parse_rate": "answers that parse",
}
_CLASS_NUMBERS = {"f1_50": "F1 at IoU 0.5", "success": "Step success", "f1": "F1"}  # what the table by class shows


def compare(stages: Sequence[EvalResult]) -> dict[str, dict[str, float]]:
    """How the last stage differs from the first: `{metric: {"difference", "low", "high"}}` with the paired 95 %
    interval; nothing where they are of other rows."""
    first, last = stages[0], stages[-1]
    if first is last or [p["id"] for p in first.predictions] != [p["id"] for p in last.predictions]:
        return {}
    found = measure_differences(last.metrics["task"], last.predictions, first.predictions)
    overall = [stage.metrics["overall"] for stage in (last, first)]
    return {
        name: {"difference": overall[0][name] - overall[1][name], "low": low, "high": high}
        for name, (low, high) in found.items()
        if is_number(overall[0].get(name)) and is_number(overall[1].get(name))
    }


def write_report(
    path: Path, title: str, stages: Sequence[EvalResult], runs: Mapping[str, Path], notes: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Write the report; returns how the last stage differs from the first (`compare`).

    `runs`: names of runs (empty where there is one) and their `metrics.jsonl`, for the curves; `notes`: lines of text.
    """
    changes = compare(stages)
    curves = [learning_curve(current_lines(read_metrics(file)), name) for name, file in runs.items()]
    html = render(
        "report.html.j2",
        title=title,
        notes=notes,
        columns=len(stages),
        stages=stages,
        headlines=_headlines(stages, changes),
        class_number=next((t for k, t in _CLASS_NUMBERS.items() if k in _any_class(stages)), "F1"),
        classes=_class_table(stages),
        curves=[curve for curve in curves if curve],
        images=[p for i in choose_images(stages[-1].predictions) if (p := draw_picture(i, stages)) is not None],
    )
    path.write_text(html, encoding="utf-8")
    return changes


def render(template: str, folder: Path | None = None, **values: Any) -> str:
    """A page of this folder's templates, or of another one's that build on them; every value is escaped."""
    return _environment(folder).get_template(template).render(**values)


@cache
def _environment(folder: Path | None) -> "Environment":
    """Keeps what it compiled, which takes longer than to fill it in."""
    from jinja2 import Environment, FileSystemLoader

    folders = [Path(__file__).parent, *([folder] if folder else [])]
    return Environment(loader=FileSystemLoader(folders), autoescape=True)


def _headlines(stages: Sequence[EvalResult], changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The metrics of all stages, with their intervals where they are known."""
    rows = []
    overall = stages[-1].metrics["overall"]
    first = TASK_METRICS.get(str(stages[-1].metrics.get("task")), ())  # what the task is about comes first
    for name in (name for name in dict.fromkeys([*first, *_TITLES]) if name in overall and name in _TITLES):
        values = [stage.metrics["overall"].get(name) for stage in stages]
        known = [value for value in values if is_number(value)]
        sure = [stage.metrics.get("intervals", {}).get(name) for stage in stages]
        row = {"title": _TITLES[name], "cells": list(zip(values, sure, strict=True)), "best": max(known, default=None)}
        both = is_number(values[0]) and is_number(values[-1])
        rows.append(row | {"change": values[-1] - values[0] if both else None, "sure": changes.get(name)})
    return rows


def _any_class(stages: Sequence[EvalResult]) -> dict[str, Any]:
    return next(iter(stages[-1].metrics["per_class"].values()), {})


def _class_table(stages: Sequence[EvalResult]) -> list[dict[str, Any]]:
    labels = sorted({label for stage in stages for label in stage.metrics["per_class"]})
    key = next((k for k in _CLASS_NUMBERS if k in _any_class(stages)), "f1")
    rows = []
    for label in labels:
        cells = [stage.metrics["per_class"].get(label, {}) for stage in stages]
        count = max(cell.get("num", 0) for cell in cells)
        if count:
            rows.append({"label": label, "count": count, "values": [cell.get(key, 0.0) for cell in cells]})
    return sorted(rows, key=lambda row: -row["count"])
