"""`report.html`: evaluations side by side, the curves of runs, and images with truth and prediction drawn.

One self-contained file with a dark mode and a layout for phones; all text from data is escaped (Jinja2's autoescape).
It reads only the files that evaluations and runs wrote.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_vlm.config.check_method import TASK_METRICS
from ray_vlm.evaluate.axes import add_axes
from ray_vlm.evaluate.intervals import measure_differences
from ray_vlm.evaluate.pictures import EvalResult, choose_images, draw_picture
from ray_vlm.runs.monitor import current_lines, read_metrics
from ray_vlm.runs.plot import learning_curve
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
_CLASS_NUMBERS = {
    "f1_50": "F1 at IoU 0.5",
    "success": "Step success",
    "f1": "F1",
}  # of the table by class


def compare(results: Sequence[EvalResult]) -> dict[str, dict[str, float]]:
    """Compare the last result with the first: `{metric: {"difference", "low", "high"}}` with the paired 95 %
    interval; empty where they hold different rows."""
    first, last = results[0], results[-1]
    if first is last or [p["id"] for p in first.predictions] != [p["id"] for p in last.predictions]:
        return {}
    intervals = measure_differences(last.metrics["task"], last.predictions, first.predictions)
    overall = [result.metrics["overall"] for result in (last, first)]
    return {
        name: {"difference": overall[0][name] - overall[1][name], "low": low, "high": high}
        for name, (low, high) in intervals.items()
        if is_number(overall[0].get(name)) and is_number(overall[1].get(name))
    }


def write_report(
    path: Path, title: str, results: Sequence[EvalResult], runs: Mapping[str, Path], notes: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Write the report and return how the last result differs from the first (`compare`).

    `runs`: names of runs (empty where there is one) and their `metrics.jsonl`, for the curves; `notes`: lines of text.
    """
    changes = compare(results)
    curves = [learning_curve(current_lines(read_metrics(file)), name) for name, file in runs.items()]
    html = render(
        "report.html.j2",
        title=title,
        notes=notes,
        columns=len(results),
        results=results,
        headlines=_headlines(results, changes),
        class_number=next((t for k, t in _CLASS_NUMBERS.items() if k in _any_class(results)), "F1"),
        classes=_class_table(results),
        curves=[curve for curve in curves if curve],
        images=[p for i in choose_images(results[-1].predictions) if (p := draw_picture(i, results)) is not None],
    )
    path.write_text(html, encoding="utf-8")
    return changes


def render(template: str, folder: Path | None = None, **values: Any) -> str:
    """Render a template of this folder, or of `folder`, whose templates may extend these; every value is escaped."""
    return _environment(folder).get_template(template).render(**values)


@cache
def _environment(folder: Path | None) -> "Environment":
    """Return the templates' environment. It is cached: compiling a template takes longer than rendering it."""
    from jinja2 import Environment, FileSystemLoader

    folders = [Path(__file__).parent, *([folder] if folder else [])]
    environment = Environment(loader=FileSystemLoader(folders), autoescape=True)
    environment.filters["add_axes"] = add_axes
    return environment


def _headlines(results: Sequence[EvalResult], changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each metric, with the value and the interval (where known) of every result."""
    rows = []
    overall = results[-1].metrics["overall"]
    first = TASK_METRICS.get(str(results[-1].metrics.get("task")), ())  # the task's main metrics come first
    for name in (name for name in dict.fromkeys([*first, *_TITLES]) if name in overall and name in _TITLES):
        values = [result.metrics["overall"].get(name) for result in results]
        known = [value for value in values if is_number(value)]
        intervals = [result.metrics.get("intervals", {}).get(name) for result in results]
        row = {
            "title": _TITLES[name],
            "cells": list(zip(values, intervals, strict=True)),
            "best": max(known, default=None),
        }
        both = is_number(values[0]) and is_number(values[-1])
        rows.append(row | {"change": values[-1] - values[0] if both else None, "interval": changes.get(name)})
    return rows


def _any_class(results: Sequence[EvalResult]) -> dict[str, Any]:
    return next(iter(results[-1].metrics["per_class"].values()), {})


def _class_table(results: Sequence[EvalResult]) -> list[dict[str, Any]]:
    labels = sorted({label for result in results for label in result.metrics["per_class"]})
    key = next((k for k in _CLASS_NUMBERS if k in _any_class(results)), "f1")
    rows = []
    for label in labels:
        cells = [result.metrics["per_class"].get(label, {}) for result in results]
        count = max(cell.get("num", 0) for cell in cells)
        if count:
            rows.append({"label": label, "count": count, "values": [cell.get(key, 0.0) for cell in cells]})
    return sorted(rows, key=lambda row: -row["count"])
