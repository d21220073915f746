"""Detection's numbers. Pairing is the task's own `score`; mAP is pycocotools'.

`precision_50`, `recall_50` and `f1_50` count pairs of equal label and IoU >= 0.5 over all images (micro); `mean_iou` is
the mean over true objects of the IoU of the box paired with it whatever its label, 0 where none is; `map`, `map_50` are
COCO's, every box scored 1.0, ties in the order of the answer.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ray_vlm.data.records import Box
from ray_vlm.evaluate.prediction import Prediction, rates


def measure_detection(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Overall numbers, numbers by class, and how many objects there were."""
    totals: dict[str, Counter] = {kind: Counter() for kind in ("hits", "misses", "invented")}
    for prediction in predictions:
        for kind, counter in totals.items():
            counter.update(prediction.score[kind])
    labels = sorted(set().union(*totals.values()))
    ious = [iou for p in predictions for iou in p.score["ious"]]
    hits, misses, invented = (sum(totals[kind].values()) for kind in ("hits", "misses", "invented"))
    overall = rates(hits, misses, invented, "_50")
    overall |= coco_map(predictions) | {"mean_iou": sum(ious) / max(len(ious), 1)}
    per_class = {}
    for label in labels:
        hits, misses, invented = (totals[kind][label] for kind in ("hits", "misses", "invented"))
        per_class[label] = rates(hits, misses, invented, "_50") | {"num": hits + misses}
    return {"overall": overall, "per_class": per_class, "num_objects": len(ious)}


def coco_map(predictions: Sequence[Prediction]) -> dict[str, float]:
    """COCO's mean average precision over IoU 0.50:0.95 and at 0.50; 0.0 where there is no object to find."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    labels = sorted({label for p in predictions for label in p.truth["labels"]})
    if not labels:
        return {"map": 0.0, "map_50": 0.0}
    ids = {label: i + 1 for i, label in enumerate(labels)}
    truth, found = [], []
    for image, p in enumerate(predictions):
        truth += [
            _coco_box(image, ids[label], box) for box, label in zip(p.truth["boxes"], p.truth["labels"], strict=True)
        ]
        pairs = zip(p.found["boxes"], p.found["labels"], strict=True)
        found += [_coco_box(image, ids[label], box) | {"score": 1.0} for box, label in pairs if label in ids]
    for number, box in enumerate(truth, 1):
        box["id"] = number
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = {
            "images": [{"id": i} for i in range(len(predictions))],
            "annotations": truth,
            "categories": [{"id": i, "name": label} for label, i in ids.items()],
        }
        gt.createIndex()
        if not found:
            return {"map": 0.0, "map_50": 0.0}
        run = COCOeval(gt, gt.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {"map": max(float(run.stats[0]), 0.0), "map_50": max(float(run.stats[1]), 0.0)}


def _coco_box(image: int, category: int, box: Box) -> dict[str, Any]:
    w, h = box[2] - box[0], box[3] - box[1]
    return {"image_id": image, "category_id": category, "bbox": [box[0], box[1], w, h], "area": w * h, "iscrowd": 0}
