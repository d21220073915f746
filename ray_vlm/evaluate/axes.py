"""Axes of the pages' charts: labelled steps and values with their positions in pixels. Pure functions."""

import math
from collections.abc import Mapping
from typing import Any

_MOST_INTERVALS = 5  # between labelled steps


def add_axes(chart: Mapping[str, Any]) -> dict[str, Any]:
    """Add `x_ticks` and `y_ticks`, lists of (position in pixels, text), to a chart of `runs.curves.layout`.

    A chart whose values are all equal gets a range around them: 0 to 1 for shares, so a line of zeros is at the bottom.
    """
    width, height = chart["width"], chart["height"]
    top, middle, bottom = chart["marks"]
    curves = chart["curves"]
    if top == bottom:
        value = top
        top = 1.0 if 0 <= value <= 1 else value + 0.5
        middle, bottom = top - 0.5, top - 1.0
        # `layout` puts a flat line at the top, y = 0; the new range spans 1.0, which is `height` pixels.
        curves = [_move_down(curve, round((top - value) * height, 1)) for curve in curves]
    digits = max(2, 1 - math.floor(math.log10(top - bottom)))  # enough to tell the three values apart
    values = [(0.0, top), (height / 2, middle), (float(height), bottom)]
    return {
        **chart,
        "curves": curves,
        "x_ticks": [
            (round(step / chart["last"] * width, 1), str(step)) for step in tick_steps(math.floor(chart["last"]))
        ],
        "y_ticks": [(y, f"{value:.{digits}f}") for y, value in values],
    }


def tick_steps(last: int) -> list[int]:
    """Return whole steps from 0 to `last` at equal distances of 1, 2 or 5 times a power of ten, without duplicates.

    `last` itself is added where it is at least half a distance away from the one before.
    """
    distance = next(
        factor * 10**exponent
        for exponent in range(len(str(last)) + 1)
        for factor in (1, 2, 5)
        if factor * 10**exponent * _MOST_INTERVALS >= last
    )
    steps = list(range(0, last + 1, distance))
    return [*steps, last] if 2 * (last - steps[-1]) >= distance else steps


def _move_down(curve: Mapping[str, Any], pixels: float) -> dict[str, Any]:
    lines = {name: [(x, y + pixels) for x, y in curve[name]] for name in ("line", "dots", "faint")}
    return {**curve, **lines}
