"""One validated example, as every floor sees it. Plain data; imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the upright original image


@dataclass(frozen=True)
class SftRecord:
    """An example with its right answer.

    `row` is the position in the source (0-based), `images` are absolute paths, `sizes` their upright (width, height)
    in pixels. `truth` belongs to the task; for detection `{"boxes": (Box, ...), "labels": (str, ...)}`.
    """

    id: str
    row: int
    images: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    truth: Mapping[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it is, and why."""

    row: int
    id: str
    reason: str
