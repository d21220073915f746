"""Metrics of detection. The task's own `score` pairs boxes; mAP is that of pycocotools.

`precision_50`, `recall_50` and `f1_50` count pairs of equal label and IoU >= 0.5 over all images (micro); `mean_iou` is
the mean over true objects of the IoU of the box paired with it, whatever its label, and 0 without one; `map`, `map_50`
are COCO's, with every box scored 1.0 and ties in the order of the answer. `unknown_labels`: the most frequent answered
labels that no true object has, with their counts.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ray_vlm.evaluate.average_precision import coco_map
from ray_vlm.evaluate.prediction import Prediction, rates

_SHOWN = 10  # unknown labels in the metrics


def measure_detection(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return the metrics overall and by class, the number of true objects, and the unknown labels."""
    totals: dict[str, Counter] = {kind: Counter() for kind in ("hits", "misses", "invented")}
    for prediction in predictions:
        for kind, counter in totals.items():
            counter.update(prediction.score[kind])
    labels = sorted(set().union(*totals.values()))
    ious = [iou for p in predictions for iou in p.score["ious"]]
    hits, misses, invented = (sum(totals[kind].values()) for kind in ("hits", "misses", "invented"))
    overall = rates(hits, misses, invented, "_50")
    overall |= coco_map([{"truth": p.truth, "found": p.parsed} for p in predictions])
    overall["mean_iou"] = sum(ious) / max(len(ious), 1)
    per_class = {}
    for label in labels:
        hits, misses, invented = (totals[kind][label] for kind in ("hits", "misses", "invented"))
        per_class[label] = rates(hits, misses, invented, "_50") | {"num": hits + misses}
    known = totals["hits"] + totals["misses"]
    others = Counter({label: count for label, count in totals["invented"].items() if label not in known})
    return {
        "overall": overall,
        "per_class": per_class,
        "num_objects": len(ious),
        "unknown_labels": dict(others.most_common(_SHOWN)),
    }
