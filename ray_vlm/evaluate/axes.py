"""Axes of the pages' charts: labelled steps and values with their positions in pixels. Pure functions."""

import math
from collections.abc import Mapping
from typing import Any

_MOST_INTERVALS = 5  # between labelled steps


def add_axes(chart: Mapping[str, Any]) -> dict[str, Any]:
    """Add `x_ticks` and `y_ticks`, lists of (position in pixels, text), to a chart of `runs.curves.layout`."""
    width, height, last = chart["width"], chart["height"], chart["last"]
    top, middle, bottom = chart["marks"]
    values = [(0.0, top), (height / 2, middle), (float(height), bottom)]
    digits = max(2, 1 - math.floor(math.log10(top - bottom)))  # enough to tell the three values apart
    return {
        **chart,
        "x_ticks": [(round(step / last * width, 1), str(step)) for step in tick_steps(math.floor(last))],
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
