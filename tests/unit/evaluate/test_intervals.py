"""Intervals: the same metrics from sums, mAP from cached matches, and what is drawn together."""

from typing import Any

import numpy as np
import pytest

from ray_vlm.evaluate.average_precision import coco_map, mean_ap, rank
from ray_vlm.evaluate.intervals import build_statistics, measure_differences, measure_intervals
from ray_vlm.evaluate.metrics import measure
from ray_vlm.evaluate.prediction import Prediction
from ray_vlm.tasks import TASKS
from ray_vlm.tasks.answers import Parsed

TASK_NAMES = ("detection", "classification", "gui_steps", "chat")


def _random(task: str, rng: np.random.Generator, row: int) -> Prediction:
    """A prediction that is right by chance."""
    right = rng.random() < 0.6
    if task == "detection":
        count = int(rng.integers(0, 4))
        boxes = [(30.0 * i, 0.0, 30.0 * i + 20, 20.0) for i in range(count)]
        truth: dict[str, Any] = {"boxes": boxes, "labels": [str(rng.choice(["a", "b"])) for _ in boxes]}
        moved = [(x + float(rng.uniform(0, 9)), y, z, w) for x, y, z, w in boxes if rng.random() < 0.8]
        parsed: dict[str, Any] = {"boxes": moved, "labels": [str(rng.choice(["a", "b", "z"])) for _ in moved]}
    elif task == "classification":
        truth = {"attributes": {"object": str(rng.choice(["a", "b", "c"])), "condition": str(rng.choice(["x", "y"]))}}
        parsed = {"attributes": dict(truth["attributes"]) if right else {"object": "A", "condition": "?"}}
    elif task == "gui_steps":
        truth = {"output": {"action": str(rng.choice(["click", "type"]))}, "box": (0, 0, 9, 9), "point": None}
        parsed = {"output": dict(truth["output"]) if right else {"action": "scroll"}, "box": None, "point": (5.0, 5.0)}
    else:
        truth, parsed = {"answer": "a red drain"}, {"answer": "a red drain" if right else "a rod train"}
    score = TASKS[task].score(Parsed(parsed, right), truth)
    group = f"t{row // 3}" if task == "gui_steps" else ""
    return Prediction(row, str(row), group, ("x.jpg",), ((100, 50),), "", parsed, right, (), truth, score)


def _predictions(task: str, count: int = 60, seed: int = 0) -> list[Prediction]:
    rng = np.random.default_rng(seed)
    return [_random(task, rng, row) for row in range(count)]


@pytest.mark.parametrize("task", TASK_NAMES)
def test_sums_give_the_reported_metrics_and_intervals_hold_them(task: str) -> None:
    predictions = _predictions(task)
    overall = measure(task, predictions)["overall"]
    rows = [p.as_dict() for p in predictions]
    statistics = build_statistics(task, rows)
    values = {name: float(s.value(s.sums.sum(axis=0))) for name, s in statistics.items()}
    assert values == pytest.approx({name: overall[name] for name in values}, abs=1e-12)
    assert set(overall) - set(values) == ({"map", "map_50"} if task == "detection" else set())
    for name, (low, high) in measure_intervals(task, rows).items():
        assert low <= overall[name] <= high, name
        assert high > low or overall[name] in (0.0, 1.0), name


def test_map_from_cached_matches_is_that_of_pycocotools() -> None:
    for seed in range(20):
        rows = [p.as_dict() for p in _predictions("detection", 12, seed)]
        once = mean_ap(rank(rows), np.ones((1, len(rows))))
        assert {name: float(values[0]) for name, values in once.items()} == pytest.approx(coco_map(rows), abs=1e-12)


def test_an_image_that_counts_twice_is_two_images() -> None:
    rows = [r for r in (p.as_dict() for p in _predictions("detection", 200)) if len(r["found"]["boxes"]) == 1][:12]
    assert len(rows) == 12
    weights = np.array([[0, 1, 2, 3] * 3], float)
    twice = [row for row, count in zip(rows, weights[0].astype(int), strict=True) for _ in range(count)]
    drawn = mean_ap(rank(rows), weights)
    assert {name: float(values[0]) for name, values in drawn.items()} == pytest.approx(coco_map(twice), abs=1e-12)


def test_differences_are_paired() -> None:
    better, worse = _predictions("detection", seed=1), _predictions("detection", seed=1)
    rows = [p.as_dict() for p in better]
    same = measure_differences("detection", rows, [p.as_dict() for p in worse])
    assert all(low == high == 0.0 for low, high in same.values())
    hurt = [row | {"score": row["score"] | {"hits": {}, "misses": row["score"]["hits"]}} for row in rows]
    low, high = measure_differences("detection", rows, hurt)["recall_50"]
    assert 0 < low < high


def test_rows_of_a_task_are_drawn_together() -> None:
    rows = [p.as_dict() for p in _predictions("chat", 120)]
    alike = [row | {"score": rows[i // 6]["score"], "group": f"g{i // 6}"} for i, row in enumerate(rows)]
    apart = [row | {"group": ""} for row in alike]
    widths = [np.diff(measure_intervals("chat", rows)["exact"])[0] for rows in (alike, apart)]
    assert widths[0] > 1.8 * widths[1]  # the square root of 6, about


def test_nothing_has_no_interval() -> None:
    assert measure_intervals("chat", []) == {}
    assert measure_differences("detection", [], []) == {}
    empty = [p.as_dict() | {"found": {}} for p in _predictions("detection", 5)]
    assert measure_intervals("detection", empty)["map"] == [0.0, 0.0]
