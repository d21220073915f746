"""Boxes and points: overlap, one-to-one matching, and the conversion between pixels and the text of a model family.

Boxes and points are in pixels of the upright original image everywhere except inside the text. A `Frame` holds one
image's original and resized size and the codec (`tasks/codecs.py`), and converts both ways; `write_boxes` writes the
text of an answer and `read_boxes` reads it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_vlm.data.records import Box, Point
from ray_vlm.tasks.answers import Answer, final_text
from ray_vlm.tasks.codecs import (
    CODECS,
    Codec,
    frame_objects,
    read_numbers,
    read_objects,
    read_target,
    write_numbers,
    write_object,
    write_target,
)


@dataclass(frozen=True)
class Frame:
    """The mapping between one image's pixels and the text. Sizes are (width, height) in pixels.

    `original` is the size of the upright image and `resized` that of the model's input. In a padded input the image
    fills `content` pixels, `offset` pixels from the left and the top.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    codec: Codec = CODECS["qwen3_vl"]
    content: tuple[int, int] | None = None
    offset: tuple[int, int] = (0, 0)

    def encode(self, box: Sequence[float]) -> list[int]:
        """Convert a box from original pixels to the four integers of the text, at least one unit wide and tall, so
        never empty."""
        x1, y1, x2, y2 = (self._encode(value, axis % 2) for axis, value in enumerate(box))
        x1, y1 = min(x1, self._largest(0) - 1), min(y1, self._largest(1) - 1)
        return self.codec.order([x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)])

    def encode_point(self, point: Sequence[float]) -> list[int]:
        """Convert a point from original pixels to the two integers of the text."""
        return self.codec.order([self._encode(value, axis) for axis, value in enumerate(point)])

    def decode(self, numbers: Sequence[float]) -> Box:
        """Convert the four numbers of the text to a box in original pixels."""
        x1, y1, x2, y2 = (self._decode(value, axis % 2) for axis, value in enumerate(self.codec.order(numbers)))
        return (x1, y1, x2, y2)

    def decode_point(self, numbers: Sequence[float]) -> Point:
        """Convert the two numbers of the text to a point in original pixels."""
        x, y = (self._decode(value, axis) for axis, value in enumerate(self.codec.order(numbers)))
        return (x, y)

    def encode_region(self, region: Sequence[float]) -> list[int]:
        """Convert a box (4 numbers) or a point (2) as `encode` and `encode_point` do."""
        return self.encode(region) if len(region) == 4 else self.encode_point(region)

    def _encode(self, value: float, axis: int) -> int:
        position = value / self.original[axis]  # 0..1
        if self.content is not None:  # from a share of the image to a share of the padded input
            position = (position * self.content[axis] + self.offset[axis]) / self.resized[axis]
        return min(max(round(position * self._units(axis)), 0), self._largest(axis))

    def _decode(self, value: float, axis: int) -> float:
        position = value / self._units(axis)
        if self.content is not None:
            position = (position * self.resized[axis] - self.offset[axis]) / self.content[axis]
        return position * self.original[axis]

    def _largest(self, axis: int) -> int:
        # the last pixel is side - 1, while relative numbers include their last one
        return self._units(axis) - (self.codec.coordinates == "resized_pixels")

    def _units(self, axis: int) -> int:
        """Return how many units of the text span the resized image along `axis` (0: width, 1: height)."""
        return _UNITS.get(self.codec.coordinates) or self.resized[axis]


_UNITS = {"relative_1000": 1000, "relative_1023": 1023}


def write_boxes(objects: Sequence[tuple[Box, str]], frame: Frame) -> Answer:
    """Write labelled boxes in the family's form, each object a span of its label; without objects `[]` or `None`."""
    text, gap, tail = frame_objects(frame.codec, len(objects))
    spans = []
    for number, (box, label) in enumerate(objects):
        text += gap if number else ""
        part = write_object(frame.encode(box), label, frame.codec)
        spans.append((len(text), len(text) + len(part), label))
        text += part
    return Answer(text + tail, tuple(spans))


def write_region(region: Sequence[float], frame: Frame, image: int = 0) -> str:
    """Write one box or point within a text, as the family does. `image`: the index of its image."""
    return write_numbers(frame.encode_region(region), frame.codec, image)


def write_step_target(region: Sequence[float], frame: Frame) -> tuple[str, list[int] | str]:
    """Return the key and the value that a box or a point has in the JSON of a GUI step."""
    return write_target(frame.encode_region(region), frame.codec)


def read_step_target(step: Mapping[str, Any], frame: Frame) -> tuple[Box | None, Point | None]:
    """Return the box and the point of a GUI step's JSON in original pixels, each None if absent or broken."""
    box, point = read_target(step, frame.codec)
    return frame.decode(box) if box else None, frame.decode_point(point) if point else None


def read_boxes(text: str, frame: Frame) -> tuple[list[tuple[Box, str]], bool, list[str]]:
    """Return labelled boxes in original pixels, whether the text had the codec's form, and the repairs. Never raises.

    JSON is read in place of tokens and tokens in place of JSON, where the numbers mean the same. Repeated and empty
    boxes are dropped.
    """
    items, repairs = read_objects(final_text(text), frame.codec)
    ok = not repairs
    unique: dict[tuple, None] = {}  # (four numbers, label), in the order of the text
    for item in items:
        numbers, label = read_numbers(item, "bbox_2d", 4), item.get("label") if isinstance(item, dict) else None
        if numbers is None or not isinstance(label, str):
            ok = False
            repairs.append(f"dropped {str(item)[:80]}")
        elif numbers[2] <= numbers[0] or numbers[3] <= numbers[1]:
            repairs.append(f"dropped an empty box {numbers}")
        elif (key := (*numbers, label)) in unique:
            repairs.append(f"dropped a repeated box {numbers}")
        else:
            unique[key] = None
    return [(frame.decode(key[:4]), key[4]) for key in unique], ok, repairs


_SLACK_PX = 1.0  # annotation tools round boxes outwards; farther outside than this is an error


def box_problem(box: Sequence[float], size: tuple[int, int]) -> str | None:
    """Return why a box (4 numbers) or a point (2), in original pixels, cannot belong to an image of `size` (width,
    height); None if it can."""
    rounded = [round(v, 1) for v in box]
    if len(box) == 2:
        inside = all(-_SLACK_PX <= v <= side + _SLACK_PX for v, side in zip(box, size, strict=True))
        return None if inside else f"point {rounded} (x, y) lies outside its {size[0]}x{size[1]} image"
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        return f"box {rounded} (x1, y1, x2, y2) is empty or inverted"
    if min(x1, y1) < -_SLACK_PX or x2 > size[0] + _SLACK_PX or y2 > size[1] + _SLACK_PX:
        return f"box {rounded} (x1, y1, x2, y2) lies outside its {size[0]}x{size[1]} image"
    if min(x2, size[0]) <= max(x1, 0) or min(y2, size[1]) <= max(y1, 0):
        return f"box {rounded} (x1, y1, x2, y2) touches its {size[0]}x{size[1]} image from outside only"
    return None


def iou_matrix(a: Sequence[Box], b: Sequence[Box]) -> np.ndarray:
    """Return the intersection over union of every pair, `float64 [len(a), len(b)]`."""
    first, second = np.asarray(a, float).reshape(-1, 1, 4), np.asarray(b, float).reshape(1, -1, 4)
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    inter = np.clip(high - low, 0, None).prod(axis=-1)
    union = (first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1) - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def match(scores: np.ndarray) -> list[tuple[int, int]]:
    """Return the one-to-one pairs (row, column) of positive score with the largest total (Hungarian method, scipy)."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(-scores)
    return [(int(r), int(c)) for r, c in zip(rows, columns, strict=True) if scores[r, c] > 0]
