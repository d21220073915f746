"""Boxes: overlap, one-to-one matching, and the one codec between pixels and the numbers that a family writes.

Boxes live in pixels of the upright original image everywhere except inside the text. A `Frame` knows the original and
the resized size of one image and the family's coordinate system, and converts both ways.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ray_vlm.data.records import Box

Coordinates = Literal["relative_1000", "resized_pixels"]


@dataclass(frozen=True)
class Frame:
    """How one image's pixels map to text. `original` and `resized` are (width, height) in pixels.

    `relative_1000` writes `round(x / W * 1000)` in 0..1000 (Qwen3-VL; QwenLM/Qwen3-VL process_bbox.ipynb).
    `resized_pixels` writes pixels of the resized image, at most its side minus one (Qwen2.5-VL, same file).
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    coordinates: Coordinates

    def encode(self, box: Sequence[float]) -> list[int]:
        """Four integers for the text, from original pixels; at least one unit wide and tall, so never empty."""
        x1, y1, x2, y2 = (self._encode(value, axis % 2) for axis, value in enumerate(box))
        x1, y1 = min(x1, self._largest(0) - 1), min(y1, self._largest(1) - 1)
        return [x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)]

    def decode(self, numbers: Sequence[float]) -> Box:
        """Original pixels, from the four numbers of the text."""
        x1, y1, x2, y2 = (v / self._units(i % 2) * self.original[i % 2] for i, v in enumerate(numbers))
        return (x1, y1, x2, y2)

    def _encode(self, value: float, axis: int) -> int:
        return min(max(round(value / self.original[axis] * self._units(axis)), 0), self._largest(axis))

    def _largest(self, axis: int) -> int:
        return self._units(axis) - (self.coordinates == "resized_pixels")

    def _units(self, axis: int) -> int:
        """How many units of text span the image along `axis` (0: width, 1: height)."""
        return 1000 if self.coordinates == "relative_1000" else self.resized[axis]


def iou_matrix(a: Sequence[Box], b: Sequence[Box]) -> np.ndarray:
    """Intersection over union of every pair, `float64 [len(a), len(b)]`."""
    first, second = np.asarray(a, float).reshape(-1, 1, 4), np.asarray(b, float).reshape(1, -1, 4)
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    inter = np.clip(high - low, 0, None).prod(axis=-1)
    union = (first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1) - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def match(scores: np.ndarray) -> list[tuple[int, int]]:
    """One-to-one pairs (row, column) of positive score with the largest total (Hungarian method, scipy)."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(-scores)
    return [(int(r), int(c)) for r, c in zip(rows, columns, strict=True) if scores[r, c] > 0]
