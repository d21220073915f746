"""Metrics: known cases by hand, and mAP that is 1 for the truth and 0 for nothing."""

import pytest

from ray_vlm.evaluate.metrics import Prediction, coco_map, measure
from ray_vlm.tasks import detection

TRUTH = {"boxes": ((0, 0, 10, 10), (20, 0, 40, 10)), "labels": ("a", "b")}


def _prediction(boxes: tuple, labels: tuple, row: int = 0, ok: bool = True) -> Prediction:
    parsed = detection.Parsed(boxes, labels, ok)
    score = detection.score(parsed, TRUTH)
    return Prediction(row, str(row), "x.jpg", (100, 50), "", boxes, labels, ok, (), TRUTH, score)


def test_truth_scores_one_and_nothing_scores_zero() -> None:
    perfect = measure([_prediction(TRUTH["boxes"], TRUTH["labels"])])["overall"]
    assert all(value == pytest.approx(1.0) for value in perfect.values())
    empty = measure([_prediction((), (), ok=False)])["overall"]
    assert set(empty.values()) == {0.0}
    assert measure([])["overall"]["f1_50"] == 0.0


def test_counts_by_class_and_overall() -> None:
    swapped = _prediction(TRUTH["boxes"], ("b", "b"), row=1)
    found = measure([_prediction(TRUTH["boxes"], TRUTH["labels"]), swapped])
    assert found["per_class"]["a"]["recall_50"] == 0.5
    assert found["per_class"]["b"] == {
        "precision_50": pytest.approx(2 / 3), "recall_50": 1.0, "f1_50": pytest.approx(0.8), "num_objects": 2,
    }  # fmt: skip
    assert found["overall"]["f1_50"] == pytest.approx(0.75)
    assert found["overall"]["mean_iou"] == 1.0, "labels are ignored"
    assert found["overall"]["map_50"] == pytest.approx((51 / 101 + 0.835) / 2, abs=0.05)


def test_map_ignores_labels_that_the_truth_does_not_have() -> None:
    assert coco_map([_prediction(TRUTH["boxes"], ("zebra", "b"))])["map"] == pytest.approx(0.5)


def test_metric_names_are_those_that_a_job_may_ask_for() -> None:
    from ray_vlm.config.check import TASK_METRICS

    assert set(measure([])["overall"]) == set(TASK_METRICS["detection"])
