"""Metrics: known cases by hand, and mAP that is 1 for the truth and 0 for nothing."""

import pytest

from ray_vlm.evaluate.average_precision import coco_map
from ray_vlm.evaluate.metrics import measure
from ray_vlm.evaluate.prediction import Prediction
from ray_vlm.tasks import TASKS
from ray_vlm.tasks.answers import Parsed

TRUTH = {"boxes": ((0, 0, 10, 10), (20, 0, 40, 10)), "labels": ("a", "b")}


def _prediction(boxes: tuple, labels: tuple, row: int = 0, ok: bool = True) -> Prediction:
    return _of("detection", {"boxes": boxes, "labels": labels}, TRUTH, row, ok)


def _of(task: str, parsed: dict, truth: dict, row: int = 0, ok: bool = True, group: str = "") -> Prediction:
    score = TASKS[task].score(Parsed(parsed, ok), truth)
    return Prediction(row, str(row), group, ("x.jpg",), ((100, 50),), "", parsed, ok, (), truth, score)


def test_truth_scores_one_and_nothing_scores_zero() -> None:
    perfect = measure("detection", [_prediction(TRUTH["boxes"], TRUTH["labels"])])["overall"]
    assert all(value == pytest.approx(1.0) for value in perfect.values())
    empty = measure("detection", [_prediction((), (), ok=False)])["overall"]
    assert set(empty.values()) == {0.0}
    assert measure("detection", [])["overall"]["f1_50"] == 0.0


def test_counts_by_class_and_overall() -> None:
    swapped = _prediction(TRUTH["boxes"], ("b", "b"), row=1)
    metrics = measure("detection", [_prediction(TRUTH["boxes"], TRUTH["labels"]), swapped])
    assert metrics["per_class"]["a"]["recall_50"] == 0.5
    assert metrics["per_class"]["b"] == {
        "precision_50": pytest.approx(2 / 3), "recall_50": 1.0, "f1_50": pytest.approx(0.8), "num": 2,
    }  # fmt: skip
    assert metrics["overall"]["f1_50"] == pytest.approx(0.75)
    assert metrics["overall"]["mean_iou"] == 1.0, "labels are ignored"
    assert metrics["overall"]["map_50"] == pytest.approx((51 / 101 + 0.835) / 2, abs=0.05)


def test_labels_that_no_object_has_are_counted() -> None:
    zebras = _prediction((*TRUTH["boxes"], (1, 1, 3, 3)), ("zebra", "b", "zebra"))
    metrics = measure("detection", [zebras, _prediction(TRUTH["boxes"], ("b", "yak"), row=1)])
    assert metrics["unknown_labels"] == {"zebra": 2, "yak": 1}


def test_map_ignores_labels_that_the_truth_does_not_have() -> None:
    assert coco_map([_prediction(TRUTH["boxes"], ("zebra", "b")).as_dict()])["map"] == pytest.approx(0.5)


def test_classification_by_attribute_and_value() -> None:
    def row(answered: dict, i: int) -> Prediction:
        truth = {"attributes": {"object": "a" if i < 3 else "b", "condition": "clear"}}
        return _of("classification", {"attributes": answered}, truth, i)

    clear = {"condition": "clear"}
    metrics = measure(
        "classification",
        [row({"object": "a"} | clear, 0), row({"object": "a"} | clear, 1), row({"object": "b"}, 2), row({}, 3)],
    )
    overall = metrics["overall"]
    assert overall["accuracy"] == 0.5
    assert overall["attribute_accuracy"] == 4 / 8
    assert metrics["per_class"]["object=a"] == {"precision": 1.0, "recall": 2 / 3, "f1": pytest.approx(0.8), "num": 3}
    assert metrics["per_class"]["object=b"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "num": 1}
    assert overall["balanced_accuracy"] == pytest.approx(((2 / 3 + 0) / 2 + 0.5) / 2)


def test_case_changes_no_count() -> None:
    truths = ({"condition": "blocked"}, {"condition": "clear"})
    rows = [_of("classification", {"attributes": {"condition": "Blocked"}}, {"attributes": t}) for t in truths]
    assert measure("classification", rows)["per_class"]["condition=blocked"]["precision"] == 0.5


def test_a_step_without_a_box_counts_in_the_mean_iou() -> None:
    truth = {"output": {"action": "click"}, "box": (0.0, 0.0, 10.0, 10.0), "point": None}
    rows = [_of("gui_steps", truth, truth, group="1"), _of("gui_steps", truth | {"box": None}, truth, group="2")]
    assert measure("gui_steps", rows)["overall"]["mean_iou"] == 0.5


def test_gui_steps_by_step_and_by_task() -> None:
    truth = {"output": {"action": "click", "target": "x"}, "box": (0.0, 0.0, 10.0, 10.0), "point": None}
    done = {"output": {"action": "done"}, "box": None, "point": None}
    hit = truth | {"point": None}
    off = truth | {"box": (50.0, 50.0, 60.0, 60.0)}
    predictions = [
        _of("gui_steps", hit, truth, 0, group="1"),
        _of("gui_steps", done, done, 1, group="1"),
        _of("gui_steps", off, truth, 2, group="2"),
        _of("gui_steps", done, done, 3, group="2"),
    ]
    metrics = measure("gui_steps", predictions)
    assert (metrics["num_tasks"], metrics["num_rows"]) == (2, 4)
    overall = metrics["overall"]
    assert (overall["step_success"], overall["task_success"], overall["grounding"]) == (0.75, 0.5, 0.5)
    assert (overall["action_accuracy"], overall["argument_accuracy"], overall["mean_iou"]) == (1.0, 1.0, 0.5)
    assert metrics["per_class"]["action=click"]["success"] == 0.5


def test_chat_means() -> None:
    predictions = [_of("chat", {"answer": a}, {"answer": "cat"}, i) for i, a in enumerate(("cat", "The cat", "dog"))]
    overall = measure("chat", predictions)["overall"]
    assert (overall["exact"], overall["normalised"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


@pytest.mark.parametrize("task", list(TASKS))
def test_metric_names_are_those_that_a_job_may_ask_for(task: str) -> None:
    from ray_vlm.config.check_method import TASK_METRICS

    assert set(measure(task, [])["overall"]) == set(TASK_METRICS[task])
