"""Parallel coordinates: one axis for each searched setting and one for the metric, one line for each trial. Pure."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from ray_vlm.runs.read import is_number
from ray_vlm.runs.text import format_setting
from ray_vlm.tune.space import LISTS, Setting, Space
from ray_vlm.tune.trials import Trial, rank

WIDTH, HEIGHT = 760, 240  # pixels of the drawing


def lay_out(space: Space, trials: Sequence[Trial], metric: str) -> dict[str, Any] | None:
    """Lay out the axes with their marks, and the lines from left to right, the best trial last so that it is drawn on
    top; None with fewer than two trials that have a number."""
    order = rank(trials)
    if len(order) < 2:
        return None
    shown = [trials[i] for i in reversed(order)]
    axes = [_axis(s, [t.values.get(s.key) for t in shown]) for s in space.searched]
    axes.append(_number_axis(metric, [t.metrics[metric] for t in shown], log=False))
    gap = WIDTH / max(1, len(axes) - 1)
    for i, axis in enumerate(axes):
        axis["x"] = round(i * gap, 1)
    lines = []
    for position, trial in enumerate(shown):
        values = [*(trial.values.get(s.key) for s in space.searched), trial.metrics[metric]]
        points = [(axis["x"], axis["y_of"](value)) for axis, value in zip(axes, values, strict=True)]
        share, best = position / (len(shown) - 1), position == len(shown) - 1
        lines.append({"name": trial.name, "points": points, "share": round(share, 3), "best": best})
    drawn = [{k: axis[k] for k in ("title", "x", "marks")} for axis in axes]
    return {"width": WIDTH, "height": HEIGHT, "axes": drawn, "lines": lines}


def _axis(setting: Setting, values: Sequence[Any]) -> dict[str, Any]:
    if setting.kind not in LISTS and all(is_number(value) for value in values):
        return _number_axis(setting.key, [*setting.args[:2], *values], "log" in setting.kind)
    names = list(dict.fromkeys(json.dumps(v, sort_keys=True) for v in [*setting.args, *values]))
    if all(is_number(json.loads(name)) for name in names):
        names.sort(key=lambda name: float(json.loads(name)))
    heights = {name: _down((i + 0.5) / len(names)) for i, name in enumerate(names)}
    marks = [(y, format_setting(json.loads(name))) for name, y in heights.items()]
    return {"title": setting.key, "marks": marks, "y_of": lambda v: heights[json.dumps(v, sort_keys=True)]}


def _number_axis(title: str, values: Sequence[float], log: bool) -> dict[str, Any]:
    scale: Callable[[float], float] = math.log if log and min(values) > 0 else float
    low, high = scale(min(values)), scale(max(values))

    def y_of(value: float) -> float:
        return _down((scale(value) - low) / ((high - low) or 1.0))

    marks = [(y_of(value), format_setting(float(value))) for value in dict.fromkeys((min(values), max(values)))]
    return {"title": title, "marks": marks, "y_of": y_of}


def _down(share: float) -> float:
    """Return the pixels from the top of a share of the height: 0.0 is the bottom, where y is largest in an SVG."""
    return round((1 - share) * HEIGHT, 1)
