"""`report.html`: evaluations side by side, the curves of runs, and images with truth and prediction drawn.

One self-contained file, readable in the dark and on a phone; everything that came from data is escaped (Jinja2's
autoescape). Reads what evaluations and runs wrote and nothing else.
"""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_vlm.evaluate.intervals import measure_differences
from ray_vlm.runs.monitor import current_lines, read_metrics

NUM_IMAGES = 12
_SHOWN_PX = 640  # images are embedded at most this large
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
# What a run's curve shows: the first of these that its steps have.
_CURVES = {"reward": "Reward", "preference_accuracy": "Pairs preferred as they should be", "loss": "Loss"}
_CLASS_NUMBERS = {"f1_50": "F1 at IoU 0.5", "success": "Step success", "f1": "F1"}  # what the table by class shows


@dataclass(frozen=True)
class Stage:
    """One evaluation to show: its title, `metrics.json` and predictions."""

    title: str
    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]


def compare(stages: Sequence[Stage]) -> dict[str, dict[str, float]]:
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
    }


def write_report(
    path: Path, title: str, stages: Sequence[Stage], runs: Mapping[str, Path], notes: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Write the report; returns how the last stage differs from the first (`compare`).

    `runs`: names of runs (empty where there is one) and their `metrics.jsonl`, for the curves; `notes`: lines of text.
    """
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    changes = compare(stages)
    curves = [learning_curve(current_lines(read_metrics(file)), name) for name, file in runs.items()]
    html = environment.get_template("report.html.j2").render(
        title=title,
        notes=notes,
        stages=stages,
        headlines=_headlines(stages, changes),
        class_number=next((t for k, t in _CLASS_NUMBERS.items() if k in _any_class(stages)), "F1"),
        classes=_class_table(stages),
        curves=[curve for curve in curves if curve],
        images=[p for i in choose_images(stages[-1].predictions) if (p := _picture(i, stages)) is not None],
    )
    path.write_text(html, encoding="utf-8")
    return changes


def _headlines(stages: Sequence[Stage], changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The metrics of all stages, with their intervals where they are known."""
    rows = []
    for name in (name for name in _TITLES if name in stages[-1].metrics["overall"]):
        values = [stage.metrics["overall"][name] for stage in stages]
        sure = [stage.metrics.get("intervals", {}).get(name) for stage in stages]
        row = {"title": _TITLES[name], "cells": list(zip(values, sure, strict=True)), "best": max(values)}
        rows.append(row | {"change": values[-1] - values[0], "sure": changes.get(name)})
    return rows


def _any_class(stages: Sequence[Stage]) -> dict[str, Any]:
    return next(iter(stages[-1].metrics["per_class"].values()), {})


def _class_table(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    labels = sorted({label for stage in stages for label in stage.metrics["per_class"]})
    key = next((k for k in _CLASS_NUMBERS if k in _any_class(stages)), "f1")
    rows = []
    for label in labels:
        cells = [stage.metrics["per_class"].get(label, {}) for stage in stages]
        count = max(cell.get("num", 0) for cell in cells)
        rows.append({"label": label, "count": count, "values": [cell.get(key, 0.0) for cell in cells]})
    return sorted(rows, key=lambda row: -row["count"])


def _true_classes(prediction: dict[str, Any]) -> set[str]:
    """Classes, conditions or the action of a prediction's truth."""
    truth = prediction["truth"]
    attributes = {f"{name}={value}" for name, value in truth.get("attributes", {}).items()}
    return set(truth.get("labels", ())) | attributes | {v for k, v in truth.get("output", {}).items() if k == "action"}


def choose_images(predictions: Sequence[dict[str, Any]]) -> list[int]:
    """A dozen positions: half of them hold the rarest true class, the rest are evenly spaced."""
    counts = Counter(label for p in predictions for label in _true_classes(p))
    rarest = min(counts, key=lambda label: (counts[label], label)) if counts else None
    rare = [i for i, p in enumerate(predictions) if rarest in _true_classes(p)][: NUM_IMAGES // 2]
    others = [i for i in range(len(predictions)) if i not in rare]
    space = min(NUM_IMAGES - len(rare), len(others))
    return rare + [others[i * len(others) // space] for i in range(space)]


def _picture(position: int, stages: Sequence[Stage]) -> dict[str, Any] | None:
    """One row's first image with the boxes of every stage, in original pixels, or its answers in words."""
    first = stages[0].predictions[position]
    if not first["images"]:
        return None
    width, height = first["sizes"][0]
    views = [_view(stage, stage.predictions[position]) for stage in stages]
    return {
        "id": first["id"],
        "width": width,
        "height": height,
        "uri": _data_uri(first["images"][0]) if first["images"][0] else "",
        "truth": _boxes(first["truth"]),
        "words": _words(first["truth"]),
        "views": views,
        "unit": max(width, height) / 100,
    }


def _view(stage: Stage, p: dict[str, Any]) -> dict[str, Any]:
    score = p["score"]
    if "hits" in score:
        verdict = f"{sum(score['hits'].values())} of {len(p['truth']['labels'])} found"
    else:
        right = score.get("success", score.get("all", score.get("normalised")))
        verdict = f"{'right' if right else 'wrong'}: {_words(p['found']) or p['answer'][:200]}"
    return {"title": stage.title, "found": _boxes(p["found"]), "verdict": verdict}


def _words(values: dict[str, Any]) -> str:
    """What a truth or an answer says beside its boxes."""
    if "labels" in values:
        return ", ".join(values["labels"])
    pairs = values.get("attributes") or values.get("output") or {}
    return values.get("answer") or ", ".join(f"{name}: {value}" for name, value in pairs.items())


def _boxes(values: dict[str, Any]) -> list[dict[str, Any]]:
    """What is drawn: labelled boxes, or the place that a step points at."""
    boxes, labels = values.get("boxes", []), values.get("labels", [])
    if values.get("box") is not None:
        boxes, labels = [values["box"]], [""]
    elif values.get("point") is not None:
        x, y = values["point"]
        boxes, labels = [[x - 2, y - 2, x + 2, y + 2]], [""]
    pairs = zip(boxes, labels, strict=True)
    return [{"x": b[0], "y": b[1], "w": b[2] - b[0], "h": b[3] - b[1], "label": label} for b, label in pairs]


def _data_uri(path: str) -> str:
    from PIL import Image

    from ray_vlm.data.images import decode

    image = Image.fromarray(decode(path))
    image.thumbnail((_SHOWN_PX, _SHOWN_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def learning_curve(
    lines: Sequence[dict[str, Any]], name: str = "", width: int = 760, height: int = 220
) -> dict[str, Any] | None:
    """Points of a run's main number, in training and validation, for an SVG of `width` x `height`; None for a run with
    fewer than two training lines. `name`: the run's, for the title."""
    seen: set[str] = set().union(*(line for line in lines if line["kind"] == "train"))
    key = next((key for key in _CURVES if key in seen), "loss")
    series = {
        kind: [(m["step"], m[key]) for m in lines if m["kind"] == kind and m.get(key) is not None]
        for kind in ("train", "eval")
    }
    train, held_out = series["train"], series["eval"]
    if len(train) < 2:
        return None
    values = [value for _, value in train + held_out]
    floor = [] if key == "reward" else [0.0]  # a reward has no natural zero, and moves little beside its size
    top, bottom = max(values + floor), min(values + floor)
    scale, last = (top - bottom) or 1.0, max(step for step, _ in train)

    def points(found: list[tuple[int, float]]) -> list[tuple[float, float]]:
        return [(round(s / last * width, 1), round((top - v) / scale * height, 1)) for s, v in found]

    smooth, mean = [], train[0][1]
    for step, value in train:
        mean = 0.9 * mean + 0.1 * value
        smooth.append((step, mean))
    return {
        "title": f"{_CURVES[key]}, {name}" if name else _CURVES[key],
        "width": width,
        "height": height,
        "marks": [top, (top + bottom) / 2, bottom],
        "last": last,
        "held_out": points(held_out),
        "train": points(train),
        "smooth": points(smooth),
    }
