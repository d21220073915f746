"""`report.html`: evaluations side by side, the curves of runs, and images with truth and prediction drawn.

One self-contained file with a dark mode and a layout for phones; all text from data is escaped (Jinja2's autoescape).
It reads only the files that evaluations and runs wrote.
"""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_vlm.config.check_method import TASK_METRICS
from ray_vlm.data.draw import MIN_SIDE, draw_values, regions_of
from ray_vlm.evaluate.intervals import measure_differences
from ray_vlm.evaluate.prediction import in_words
from ray_vlm.runs.monitor import current_lines, read_metrics
from ray_vlm.runs.plot import learning_curve
from ray_vlm.runs.read import is_number

if TYPE_CHECKING:
    import numpy as np
    from jinja2 import Environment

NUM_IMAGES = 12  # with truth and prediction drawn
_MAX_SIDE = 640  # pixels of an embedded image's longer side
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
_CLASS_NUMBERS = {"f1_50": "F1 at IoU 0.5", "success": "Step success", "f1": "F1"}  # of the table by class


@dataclass(frozen=True)
class EvalResult:
    """One evaluation of a report: its title, `metrics.json` and the lines of `predictions.jsonl`."""

    title: str
    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]


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
    a_class: dict[str, Any] = next(iter(results[-1].metrics["per_class"].values()), {})
    number = next((name for name in _CLASS_NUMBERS if name in a_class), "f1")
    html = render(
        "report.html.j2",
        title=title,
        notes=notes,
        columns=len(results),
        results=results,
        headlines=_headlines(results, changes),
        class_number=_CLASS_NUMBERS[number],
        classes=_class_table(results, number),
        curves=[curve for curve in curves if curve],
        images=draw_pictures(results),
    )
    path.write_text(html, encoding="utf-8")
    return changes


def render(template: str, folder: Path | None = None, **values: object) -> str:
    """Render a template of this folder, or of `folder`, whose templates may extend these; every value is escaped."""
    return _environment(folder).get_template(template).render(**values)


@cache
def _environment(folder: Path | None) -> "Environment":
    """Return the templates' environment. It is cached: compiling a template takes longer than rendering it."""
    from jinja2 import Environment, FileSystemLoader

    folders = [Path(__file__).parent, *([folder] if folder else [])]
    return Environment(loader=FileSystemLoader(folders), autoescape=True)


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


def _class_table(results: Sequence[EvalResult], number: str) -> list[dict[str, Any]]:
    labels = sorted({label for result in results for label in result.metrics["per_class"]})
    rows = []
    for label in labels:
        cells = [result.metrics["per_class"].get(label, {}) for result in results]
        count = max(cell.get("num", 0) for cell in cells)
        if count:
            rows.append({"label": label, "count": count, "values": [cell.get(number, 0.0) for cell in cells]})
    return sorted(rows, key=lambda row: -row["count"])


def _true_classes(prediction: dict[str, Any]) -> set[str]:
    """Return the labels, the `attribute=value` pairs or the action of a prediction's truth."""
    truth = prediction["truth"]
    attributes = {f"{name}={value}" for name, value in truth.get("attributes", {}).items()}
    return set(truth.get("labels", ())) | attributes | {v for k, v in truth.get("output", {}).items() if k == "action"}


def choose_images(predictions: Sequence[dict[str, Any]]) -> list[int]:
    """Choose a dozen positions: half of them hold the rarest true class, the rest are evenly spaced.

    Where some rows have a box or a point to draw, the rarest class is chosen among those rows.
    """
    shapes = ("boxes", "box", "point")
    drawn = [i for i, p in enumerate(predictions) if any(p["truth"].get(name) for name in shapes)]
    drawn = drawn or list(range(len(predictions)))
    counts = Counter(label for i in drawn for label in _true_classes(predictions[i]))
    rarest = min(counts, key=lambda label: (counts[label], label)) if counts else None
    rare = [i for i in drawn if rarest in _true_classes(predictions[i])][: NUM_IMAGES // 2]
    others = [i for i in range(len(predictions)) if i not in rare]
    space = min(NUM_IMAGES - len(rare), len(others))
    return rare + [others[i * len(others) // space] for i in range(space)]


def draw_pictures(results: Sequence[EvalResult]) -> list[dict[str, Any]]:
    """Draw the first image of a dozen rows with the regions of the truth and of every result; describe the answers in
    words. Rows without an image are left out."""
    predictions = results[-1].predictions if results else []
    classes = {label for p in predictions for _, label in regions_of(p["truth"])}
    pictures = []
    for first, *others in ([r.predictions[i] for r in results] for i in choose_images(predictions)):
        if first["images"]:
            pixels = _decode(first["images"][0])
            views = zip(results, (first, *others), strict=True)
            pictures.append(
                {
                    "id": first["id"],
                    "words": in_words(first["truth"]),
                    "drawn": any(regions_of(p[key]) for p in (first, *others) for key in ("truth", "found")),
                    "views": [_view(result.title, p, pixels, sorted(classes)) for result, p in views],
                }
            )
    return pictures


def _view(title: str, p: dict[str, Any], pixels: "np.ndarray", classes: Sequence[str]) -> dict[str, str]:
    score, buffer = p["score"], io.BytesIO()
    if "hits" in score:
        verdict = f"{sum(score['hits'].values())} of {len(p['truth']['labels'])} found"
    else:
        right = score.get("success", score.get("all", score.get("normalised")))
        verdict = f"{'right' if right else 'wrong'}: {in_words(p['found']) or p['answer'][:200]}"
    picture = draw_values(pixels, p["found"], classes, "", p["truth"], MIN_SIDE, _MAX_SIDE, p["sizes"][0])
    picture.save(buffer, "JPEG", quality=80)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"title": title, "verdict": verdict, "uri": uri}


def _decode(path: str | None) -> "np.ndarray":
    """Return the image; one grey pixel where the file is missing or cannot be decoded."""
    import numpy as np

    from ray_vlm.data.images import decode

    try:
        return decode(path or "")
    except Exception:  # a decoder raises many types for a damaged file
        return np.full((1, 1, 3), 160, np.uint8)
