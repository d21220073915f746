"""Coverage of bootstrap intervals: the share of simulated data sets whose interval holds the truth, nominally 95 %.

2,000 sets of 150 rows each: a mean of rows, a mean of rows in tasks of 4 similar rows, and F1 of images with several
objects. The truth is that of 100,000 rows from the same source. mAP on 200 sets of 100 images.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.figures import figure, report
from ray_vlm.evaluate.average_precision import coco_map
from ray_vlm.evaluate.intervals import (
    build_statistics,
    measure_intervals,
    middle,
    number_clusters,
    resample,
)

ROWS, TRUTH_ROWS = 150, 100_000
LABELS = ("a", "b", "c")


def chat_rows(rng: np.random.Generator, count: int, together: int) -> list[dict[str, Any]]:
    """Simulate answers that are right with a given chance; the rows of a group share that chance."""
    chances = np.repeat(rng.beta(2, 1, (count + together - 1) // together), together)[:count]
    right = rng.random(count) < chances
    return [
        {
            "group": f"task {i // together}" if together > 1 else "",
            "ok": True,
            "score": {"exact": float(r), "normalised": float(r), "anls": float(r)},
        }
        for i, r in enumerate(right)
    ]


def boxes_rows(rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Simulate images with 0 to 4 objects, each detected with a chance of its own, and invented boxes; with coordinates
    for mAP."""
    rows = []
    for _ in range(count):
        chance, number = rng.beta(4, 2), int(rng.integers(0, 5))
        truth, answer = {"boxes": [], "labels": []}, {"boxes": [], "labels": []}
        score: dict[str, Any] = {"hits": {}, "misses": {}, "invented": {}, "ious": []}
        for k in range(number):
            label, box = str(rng.choice(LABELS)), [100.0 * k, 0.0, 100.0 * k + 50, 50.0]
            truth["boxes"].append(box)
            truth["labels"].append(label)
            hit = rng.random() < chance
            score["hits" if hit else "misses"][label] = score["hits" if hit else "misses"].get(label, 0) + 1
            score["ious"].append(0.8 if hit else 0.0)
            if hit:
                shift = float(rng.uniform(0, 15))
                answer["boxes"].append([box[0] + shift, 0.0, box[2] + shift, 50.0])
                answer["labels"].append(label)
        if rng.random() < 0.3:
            answer["boxes"].append([1000.0, 0.0, 1050.0, 50.0])
            answer["labels"].append(str(rng.choice(LABELS)))
            score["invented"][answer["labels"][-1]] = 1
        rows.append({"group": "", "ok": True, "truth": truth, "found": answer, "score": score})
    return rows


def coverage(
    task: str, metric: str, make: Callable[[np.random.Generator, int], list[dict[str, Any]]], sets: int, rows: int
) -> float:
    """Return the share of sets whose interval holds the truth."""
    many = make(np.random.default_rng(10**6), 20_000 if metric == "map" else TRUTH_ROWS)
    if metric == "map":
        truth = coco_map(many)["map"]
    else:
        statistic = build_statistics(task, many)[metric]
        truth = float(statistic.value(statistic.sums.sum(0)))
    held = 0
    for number in range(sets):
        drawn = make(np.random.default_rng(number), rows)
        if metric == "map":
            low, high = measure_intervals(task, drawn, seed=number)[metric]
        else:
            only = {metric: build_statistics(task, drawn)[metric]}
            low, high = middle(resample(only, number_clusters(drawn), seed=number)[metric])
        held += low <= truth <= high
    return held / sets


def measure(quick: bool) -> Sequence[dict[str, Any]]:
    """Return all figures."""
    sets = 100 if quick else 2000
    arms: list[tuple[str, str, str, Callable[..., list[dict[str, Any]]], int, int]] = [
        ("mean", "chat", "exact", lambda rng, n: chat_rows(rng, n, 1), sets, ROWS),
        ("mean_of_tasks", "chat", "exact", lambda rng, n: chat_rows(rng, n, 4), sets, 2 * ROWS),
        ("f1", "detection", "f1_50", boxes_rows, sets, ROWS),
        ("map", "detection", "map", boxes_rows, sets // 10, 100),
    ]
    figures = []
    for name, task, metric, make, number, rows in arms:
        share = coverage(task, metric, make, number, rows)
        figures += [
            figure(f"statistics.coverage.{name}", share, "", 0.92, most=False),
            figure(f"statistics.coverage.{name}.most", share, "", 0.98),
        ]
    return figures


if __name__ == "__main__":
    report(measure)
