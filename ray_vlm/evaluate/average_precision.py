"""COCO's mean average precision by pycocotools, and its value on resampled images from cached matches.

mAP is not a function of sums over rows, because all boxes of all images are ranked together. The matches of boxes do
not change when images are resampled: pycocotools makes them once, and each resample only weights the ranking anew.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_RECALLS = np.linspace(0.0, 1.0, 101)  # recalls at which COCO reads the precision
_EPS = np.spacing(1)  # as in pycocotools: no division by zero


@dataclass(frozen=True)
class Ranked:
    """The predicted boxes of one class, ranked. `image`: `int64 [boxes]`; `hit`: `bool [10, boxes]`, by IoU threshold
    0.50, 0.55, ...; `objects`: `float64 [images]`, the number of true objects."""

    image: np.ndarray
    hit: np.ndarray
    objects: np.ndarray


def coco_eval(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return pycocotools' `COCOeval` of rows with `truth` and `found`, with its matches; None where one side is empty.

    Every box scores 1.0, so boxes keep the order of the answer.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    labels = sorted({label for row in rows for label in row["truth"]["labels"]})
    ids = {label: i + 1 for i, label in enumerate(labels)}
    truth: list[dict[str, Any]] = []
    predicted: list[dict[str, Any]] = []
    for image, row in enumerate(rows):
        pairs = zip(row["truth"]["boxes"], row["truth"]["labels"], strict=True)
        truth += [_coco_box(image, ids[label], box) | {"id": len(truth) + i} for i, (box, label) in enumerate(pairs, 1)]
        pairs = zip(row["found"].get("boxes", ()), row["found"].get("labels", ()), strict=True)
        predicted += [_coco_box(image, ids[label], box) | {"score": 1.0} for box, label in pairs if label in ids]
    if not truth or not predicted:
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = {
            "info": {},  # pycocotools 2.0.10 requires it
            "images": [{"id": i} for i in range(len(rows))],
            "annotations": truth,
            "categories": [{"id": i, "name": label} for label, i in ids.items()],
        }
        gt.createIndex()
        run = COCOeval(gt, gt.loadRes(predicted), "bbox")
        run.evaluate()
    return run


def _coco_box(image: int, category: int, box: Sequence[float]) -> dict[str, Any]:
    w, h = box[2] - box[0], box[3] - box[1]
    return {"image_id": image, "category_id": category, "bbox": [box[0], box[1], w, h], "area": w * h, "iscrowd": 0}


def coco_map(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return COCO's mean average precision over IoU 0.50:0.95 and at 0.50; 0.0 without true objects."""
    run = coco_eval(rows)
    if run is None:
        return {"map": 0.0, "map_50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        run.accumulate()
        run.summarize()
    return {"map": max(float(run.stats[0]), 0.0), "map_50": max(float(run.stats[1]), 0.0)}


def rank(rows: Sequence[Mapping[str, Any]]) -> list[Ranked]:
    """Return the ranked boxes of each class that has true objects."""
    run = coco_eval(rows)
    if run is None:
        return []
    images, areas = run.params.imgIds, len(run.params.areaRng)
    classes = []
    for k in range(len(run.params.catIds)):
        # `evalImgs` is flat, [class, area range, image]; area range 0 is that of all sizes.
        cells = [run.evalImgs[(k * areas) * len(images) + i] for i in range(len(images))]
        objects = np.zeros(len(rows))
        image, hit = [], [np.zeros((len(run.params.iouThrs), 0), bool)]
        for i, cell in zip(images, cells, strict=True):
            if cell is not None:
                objects[i] = len(cell["gtIds"])
                image += [i] * len(cell["dtIds"])
                hit.append(cell["dtMatches"] > 0)
        classes.append(Ranked(np.array(image, np.int64), np.concatenate(hit, axis=1), objects))
    return classes


def mean_ap(ranked: Sequence[Ranked], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return `map` and `map_50` of each resample, `float64 [resamples]`. `weights`: `float64 [resamples, images]`, the
    count of each image."""
    totals = np.zeros((2, len(weights)))
    classes = np.zeros(len(weights))
    for boxes in ranked:
        count = weights @ boxes.objects
        curves = _precision(boxes, weights, count)
        present = count > 0  # a class without objects in a resample does not count
        totals += np.where(present, np.stack([curves.mean(axis=(1, 2)), curves[:, 0].mean(axis=1)]), 0.0)
        classes += present
    mean, at_50 = np.divide(totals, classes, out=np.zeros_like(totals), where=classes > 0)
    return {"map": mean, "map_50": at_50}


def _precision(ranked: Ranked, weights: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return the precision at COCO's 101 recalls: `float64 [resamples, thresholds, 101]`."""
    thresholds, boxes = ranked.hit.shape
    out = np.zeros((len(weights), thresholds, len(_RECALLS)))
    if not boxes:
        return out
    each = weights[:, ranked.image]  # [resamples, boxes]
    ranks = np.cumsum(each, axis=1)
    for t in range(thresholds):
        hits = np.cumsum(each * ranked.hit[t], axis=1)
        # Highest precision at this rank or a later one: a running maximum from the end.
        best = np.maximum.accumulate((hits / (ranks + _EPS))[:, ::-1], axis=1)[:, ::-1]
        recall = hits / np.maximum(count, 1.0)[:, None]
        for b in range(len(weights)):
            at = np.searchsorted(recall[b], _RECALLS, side="left")
            reached = at < boxes
            out[b, t, reached] = best[b, at[reached]]
    return out
