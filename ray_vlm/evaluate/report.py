"""`report.html`: two or more evaluations side by side, the loss curve, and images with truth and prediction drawn.

One self-contained file, readable in the dark and on a phone; everything that came from data is escaped (Jinja2's
autoescape). Reads what evaluations and runs wrote and nothing else.
"""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_vlm.runs.monitor import current_lines, read_metrics

NUM_IMAGES = 12
_SHOWN_PX = 640  # images are embedded at most this large
_HEADLINES = ("f1_50", "map", "map_50", "mean_iou", "precision_50", "recall_50", "parse_rate")
_TITLES = {
    "f1_50": "F1 at IoU 0.5",
    "map": "mAP (0.50:0.95)",
    "map_50": "mAP at 0.50",
    "mean_iou": "mean IoU",
    "precision_50": "precision at 0.5",
    "recall_50": "recall at 0.5",
    "parse_rate": "answers that parse",
}


@dataclass(frozen=True)
class Stage:
    """One evaluation to show: its title, `metrics.json` and predictions."""

    title: str
    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]


def write_report(path: Path, title: str, stages: Sequence[Stage], metrics_file: Path | None, notes: list[str]) -> None:
    """Write the report. `metrics_file` is a run's `metrics.jsonl`, for the loss curve; `notes` are lines of text."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    lines = current_lines(read_metrics(metrics_file)) if metrics_file else []
    html = environment.get_template("report.html.j2").render(
        title=title,
        notes=notes,
        stages=stages,
        headlines=[_headline(name, stages) for name in _HEADLINES],
        classes=_class_table(stages),
        curve=loss_curve(lines),
        images=[_picture(i, stages) for i in choose_images(stages[-1].predictions)],
    )
    path.write_text(html, encoding="utf-8")


def _headline(name: str, stages: Sequence[Stage]) -> dict[str, Any]:
    values = [stage.metrics["overall"][name] for stage in stages]
    return {"title": _TITLES[name], "values": values, "change": values[-1] - values[0], "best": max(values)}


def _class_table(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    labels = sorted({label for stage in stages for label in stage.metrics["per_class"]})
    rows = []
    for label in labels:
        cells = [stage.metrics["per_class"].get(label, {}) for stage in stages]
        count = max(cell.get("num_objects", 0) for cell in cells)
        rows.append({"label": label, "count": count, "f1": [cell.get("f1_50", 0.0) for cell in cells]})
    return sorted(rows, key=lambda row: -row["count"])


def choose_images(predictions: Sequence[dict[str, Any]]) -> list[int]:
    """A dozen positions: half of them hold the rarest true class, the rest are evenly spaced."""
    counts = Counter(label for p in predictions for label in p["truth"]["labels"])
    rarest = min(counts, key=lambda label: (counts[label], label)) if counts else None
    rare = [i for i, p in enumerate(predictions) if rarest in p["truth"]["labels"]][: NUM_IMAGES // 2]
    others = [i for i in range(len(predictions)) if i not in rare]
    space = min(NUM_IMAGES - len(rare), len(others))
    return rare + [others[i * len(others) // space] for i in range(space)]


def _picture(position: int, stages: Sequence[Stage]) -> dict[str, Any]:
    """One image with the boxes of every stage, in original pixels."""
    first = stages[0].predictions[position]
    width, height = first["size"]
    views = []
    for stage in stages:
        p = stage.predictions[position]
        found = _boxes(p["boxes"], p["labels"])
        views.append({"title": stage.title, "found": found, "hits": sum(p["score"]["hits"].values())})
    truth = _boxes(first["truth"]["boxes"], first["truth"]["labels"])
    return {
        "id": first["id"],
        "width": width,
        "height": height,
        "uri": _data_uri(first["image"]),
        "truth": truth,
        "views": views,
        "unit": max(width, height) / 100,
    }


def _boxes(boxes: Sequence[Sequence[float]], labels: Sequence[str]) -> list[dict[str, Any]]:
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


def loss_curve(lines: Sequence[dict[str, Any]], width: int = 760, height: int = 220) -> dict[str, Any] | None:
    """Points of the training and validation loss for an SVG of `width` x `height`; None without training lines."""
    train = [(m["step"], m["loss"]) for m in lines if m["kind"] == "train" and m["loss"] is not None]
    held_out = [(m["step"], m["loss"]) for m in lines if m["kind"] == "eval" and m["loss"] is not None]
    if len(train) < 2:
        return None
    top = max(value for _, value in train + held_out) or 1.0
    last = max(step for step, _ in train)

    def points(series: list[tuple[int, float]]) -> list[tuple[float, float]]:
        return [(round(s / last * width, 1), round(height - v / top * height, 1)) for s, v in series]

    smooth, mean = [], train[0][1]
    for step, value in train:
        mean = 0.9 * mean + 0.1 * value
        smooth.append((step, mean))
    return {
        "width": width,
        "height": height,
        "top": top,
        "last": last,
        "held_out": points(held_out),
        "train": points(train),
        "smooth": points(smooth),
    }
