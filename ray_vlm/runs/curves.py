"""Curves of a run: points, smoothing, thinning, and the layout for an SVG. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_vlm.runs.read import Run, is_number

Points = list[tuple[float, float]]

# The main number of a run: the first of these keys that its training lines have, and its title.
MAIN = {"reward": "Reward", "preference_accuracy": "Pairs preferred as they should be", "loss": "Loss"}
FROM_ZERO = ("loss", "preference_accuracy")  # axes that include 0; a reward has no natural zero
_MOST = 400  # points drawn of a line; more are not visible
_WEIGHT = 0.9  # of the previous values in a smoothed line
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Curve:
    """One curve of a chart: its title, the line, separate dots, and a faint line behind it."""

    title: str
    line: Points
    dots: Points = ()  # type: ignore[assignment]
    faint: Points = ()  # type: ignore[assignment]


def points_of(lines: Sequence[dict[str, Any]], kind: str, key: str) -> Points:
    """Return (step, value) of every line of that kind with a finite number under `key`."""
    values: list[tuple[int, Any]] = [(line["step"], line.get(key)) for line in lines if line["kind"] == kind]
    return [(step, value) for step, value in values if is_number(value)]


def main_key(lines: Sequence[dict[str, Any]]) -> str:
    """Return the first key of `MAIN` that the training lines have, or `loss`."""
    train = [line for line in lines if line["kind"] == "train"]
    return next((key for key in MAIN if any(key in line for line in train)), "loss")


def smooth(points: Points) -> Points:
    """Return the exponential mean of the values, corrected for the bias of its start.

    The n-th mean is that of n values with weights `_WEIGHT ** (n - i)`, as TensorBoard divides by `1 - _WEIGHT ** n`.
    """
    means, mean, total_weight = [], 0.0, 0.0
    for step, value in points:
        total_weight = _WEIGHT * total_weight + 1
        mean += (value - mean) / total_weight  # this form keeps a constant line constant, to the bit
        means.append((step, mean))
    return means


def thin(points: Points, most: int = _MOST) -> Points:
    """Return at most `most` of the points, evenly spaced, including the first and the last."""
    if len(points) <= most:
        return list(points)
    last = len(points) - 1
    return [points[round(i * last / (most - 1))] for i in range(most)]


def spark(points: Points, width: int = 40) -> str:
    """Return the smoothed line as a sparkline of at most `width` characters; empty without points."""
    values = [value for _, value in thin(smooth(points), width)]
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(_BLOCKS) - 1) / ((high - low) or 1.0)
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values)


def learning_curve(lines: Sequence[dict[str, Any]], name: str = "") -> dict[str, Any] | None:
    """Return the chart of a run's main number in training and validation; None with fewer than two training lines."""
    key = main_key(lines)
    train = points_of(lines, "train", key)
    if len(train) < 2:
        return None
    curve = Curve("training, each step and smoothed", smooth(train), points_of(lines, "eval", key), train)
    return layout(f"{MAIN[key]}, {name}" if name else MAIN[key], [curve], key in FROM_ZERO)


def overlay(runs: Sequence[Run], titles: Sequence[str], kind: str, key: str, title: str) -> dict[str, Any] | None:
    """Return one chart of a number in several runs, one colour each; None if no run has it.

    Training lines are smoothed; validations are joined and marked.
    """
    curves = []
    for run, name in zip(runs, titles, strict=True):
        points = points_of(run.current, kind, key)
        curves.append(Curve(name, smooth(points)) if kind == "train" else Curve(name, points, points))
    return layout(title, curves, key in FROM_ZERO) if any(curve.line for curve in curves) else None


def layout(title: str, curves: Sequence[Curve], from_zero: bool, width: int = 760, height: int = 220) -> dict[str, Any]:
    """Return the input of the page's `chart` macro: points in pixels of `width` x `height`, and labels of both axes.

    y grows downwards in an SVG, so the largest value is at 0. If all values are equal, the axis is a range around them:
    0 to 1 for shares, so a line of zeros is at the bottom.
    """
    everything = [point for curve in curves for point in (*curve.line, *curve.dots, *curve.faint)]
    values = [value for _, value in everything] + ([0.0] if from_zero else [])
    top, bottom = max(values), min(values)
    if everything and top == bottom:
        top, bottom = (1.0, 0.0) if 0 <= top <= 1 else (top + 0.5, top - 0.5)
    scale, last = (top - bottom) or 1.0, max((step for step, _ in everything), default=1) or 1

    def to_pixels(points: Points) -> Points:
        return [(round(s / last * width, 1), round((top - v) / scale * height, 1)) for s, v in thin(points)]

    return {
        "title": title,
        "width": width,
        "height": height,
        "marks": [top, (top + bottom) / 2, bottom],
        "last": last,
        "curves": [
            {
                "number": i,
                "title": c.title,
                "line": to_pixels(c.line),
                "dots": to_pixels(c.dots),
                "faint": to_pixels(c.faint),
            }
            for i, c in enumerate(curves)
        ],
    }
