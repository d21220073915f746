"""Images of the reports with truth and prediction: which ones are shown, and what is drawn on them."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_vlm.evaluate.prediction import in_words

NUM_IMAGES = 12
_SHOWN_PX = 640  # images are embedded at most this large


@dataclass(frozen=True)
class EvalResult:
    """One evaluation of a report: its title, `metrics.json` and the lines of `predictions.jsonl`."""

    title: str
    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]


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


def draw_picture(position: int, results: Sequence[EvalResult]) -> dict[str, Any] | None:
    """Describe one row's first image with the boxes of every result, in original pixels, or the answers as text; None
    for a row without an image."""
    first = results[0].predictions[position]
    if not first["images"]:
        return None
    width, height = first["sizes"][0]
    views = [_view(result, result.predictions[position]) for result in results]
    return {
        "id": first["id"],
        "width": width,
        "height": height,
        "uri": _data_uri(first["images"][0]) if first["images"][0] else "",
        "truth": _boxes(first["truth"]),
        "words": in_words(first["truth"]),
        "views": views,
        "unit": max(width, height) / 100,
    }


def _view(result: EvalResult, p: dict[str, Any]) -> dict[str, Any]:
    score = p["score"]
    if "hits" in score:
        verdict = f"{sum(score['hits'].values())} of {len(p['truth']['labels'])} found"
    else:
        right = score.get("success", score.get("all", score.get("normalised")))
        verdict = f"{'right' if right else 'wrong'}: {in_words(p['found']) or p['answer'][:200]}"
    return {"title": result.title, "found": _boxes(p["found"]), "verdict": verdict}


def _boxes(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the boxes to draw: those with labels, or the box or point of a GUI step; a point is a box of 4 pixels."""
    boxes, labels = values.get("boxes", []), values.get("labels", [])
    if values.get("box") is not None:
        boxes, labels = [values["box"]], [""]
    elif values.get("point") is not None:
        x, y = values["point"]
        boxes, labels = [[x - 2, y - 2, x + 2, y + 2]], [""]
    pairs = zip(boxes, labels, strict=True)
    return [{"x": b[0], "y": b[1], "w": b[2] - b[0], "h": b[3] - b[1], "label": label} for b, label in pairs]


def _data_uri(path: str) -> str:
    """Return the image as a `data:` URI; empty where the file is missing or cannot be decoded."""
    from PIL import Image

    from ray_vlm.data.images import decode

    try:
        image = Image.fromarray(decode(path))
    except Exception:  # a decoder raises many types for a damaged file
        return ""
    image.thumbnail((_SHOWN_PX, _SHOWN_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
