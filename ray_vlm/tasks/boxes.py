"""Boxes and points: overlap, one-to-one matching, and the one codec between pixels and what a family writes.

Boxes and points live in pixels of the upright original image everywhere except inside the text. A `Frame` knows one
image's original and resized size and the codec, and converts both ways; `write_boxes` and `read_boxes` are the text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ray_vlm.data.records import Box, Point
from ray_vlm.tasks.answers import Answer, final_text, read_json


@dataclass(frozen=True)
class Codec:
    """How a family writes boxes.

    `relative_1000` writes `round(x / W * 1000)` in 0..1000; `resized_pixels` writes pixels of the resized image, at
    most its side minus one (QwenLM/Qwen3-VL, qwen-vl-finetune/tools/process_bbox.ipynb). `json` is a fenced list of
    `{"bbox_2d": [x1, y1, x2, y2], "label": "..."}`; `tokens` is Qwen2-VL's
    `<|object_ref_start|>label<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`.
    """

    coordinates: Literal["relative_1000", "resized_pixels"]
    syntax: Literal["json", "tokens"] = "json"


CODECS = {
    "qwen2_vl": Codec("relative_1000", "tokens"),
    "qwen2_5_vl": Codec("resized_pixels"),
    "qwen3_vl": Codec("relative_1000"),  # also of Llama-4 and of families that have no form of their own
}


@dataclass(frozen=True)
class Frame:
    """How one image's pixels map to text. Sizes are (width, height) in pixels.

    `original` is the upright image, `resized` what the model sees; where that is padded, `content` is the part of it
    that shows the image, and lies `offset` pixels from its left and top.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    codec: Codec = CODECS["qwen3_vl"]
    content: tuple[int, int] | None = None
    offset: tuple[int, int] = (0, 0)

    def encode(self, box: Sequence[float]) -> list[int]:
        """Four integers for the text, from original pixels; at least one unit wide and tall, so never empty."""
        x1, y1, x2, y2 = (self._encode(value, axis % 2) for axis, value in enumerate(box))
        x1, y1 = min(x1, self._largest(0) - 1), min(y1, self._largest(1) - 1)
        return [x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)]

    def encode_point(self, point: Sequence[float]) -> list[int]:
        """Two integers for the text, from original pixels."""
        return [self._encode(value, axis) for axis, value in enumerate(point)]

    def decode(self, numbers: Sequence[float]) -> Box:
        """Original pixels, from the four numbers of the text."""
        x1, y1, x2, y2 = (self._decode(value, axis % 2) for axis, value in enumerate(numbers))
        return (x1, y1, x2, y2)

    def decode_point(self, numbers: Sequence[float]) -> Point:
        """Original pixels, from the two numbers of the text."""
        x, y = (self._decode(value, axis) for axis, value in enumerate(numbers))
        return (x, y)

    def _encode(self, value: float, axis: int) -> int:
        place = value / self.original[axis]
        if self.content is not None:
            place = (place * self.content[axis] + self.offset[axis]) / self.resized[axis]
        return min(max(round(place * self._units(axis)), 0), self._largest(axis))

    def _decode(self, value: float, axis: int) -> float:
        place = value / self._units(axis)
        if self.content is not None:
            place = (place * self.resized[axis] - self.offset[axis]) / self.content[axis]
        return place * self.original[axis]

    def _largest(self, axis: int) -> int:
        return self._units(axis) - (self.codec.coordinates == "resized_pixels")

    def _units(self, axis: int) -> int:
        """How many units of text span the resized image along `axis` (0: width, 1: height)."""
        return 1000 if self.codec.coordinates == "relative_1000" else self.resized[axis]


def write_boxes(objects: Sequence[tuple[Box, str]], frame: Frame) -> Answer:
    """Labelled boxes as the family writes them, each object a span of its label; `[]` or `None` for no object."""
    if frame.codec.syntax == "json":
        head, gap, tail = "```json\n[", ",", ("\n" if objects else "") + "]\n```"
        parts = [
            f'\n\t{{"bbox_2d": {frame.encode(b)}, "label": {json.dumps(n, ensure_ascii=False)}}}' for b, n in objects
        ]
    else:
        head, gap, tail = "", "", "" if objects else "None"
        parts = [f"<|object_ref_start|>{n}<|object_ref_end|>{write_region(b, frame)}" for b, n in objects]
    text, spans = head, []
    for number, (part, (_, label)) in enumerate(zip(parts, objects, strict=True)):
        text += gap if number else ""
        spans.append((len(text), len(text) + len(part), label))
        text += part
    return Answer(text + tail, tuple(spans))


def write_region(region: Sequence[float], frame: Frame) -> str:
    """One box or point inside a text: `[x1, y1, x2, y2]`, or Qwen2-VL's `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`."""
    numbers = frame.encode(region) if len(region) == 4 else frame.encode_point(region)
    if frame.codec.syntax == "json":
        return str(numbers)
    pairs = ",".join(f"({numbers[i]},{numbers[i + 1]})" for i in range(0, len(numbers), 2))
    return f"<|box_start|>{pairs}<|box_end|>"


_NUMBER = r"(-?\d{1,9}(?:\.\d{1,9})?)"
_PAIR = rf"\(\s?{_NUMBER}\s?,\s?{_NUMBER}\s?\)"
_TOKENS = re.compile(
    rf"<\|object_ref_start\|>([^<]{{0,200}})<\|object_ref_end\|>|<\|box_start\|>{_PAIR}\s?,\s?{_PAIR}(?:<\|box_end\|>)?"
)
_LOOSE = re.compile(  # an object whose JSON is broken, and the cut-off last one
    rf'"bbox_2d"\s?:\s?\[\s?{_NUMBER}\s?,\s?{_NUMBER}\s?,\s?{_NUMBER}\s?,\s?{_NUMBER}\s?\]\s?,\s?'
    r'"label"\s?:\s?"((?:[^"\\]|\\.){0,200})"'
)


def read_boxes(text: str, frame: Frame) -> tuple[list[tuple[Box, str]], bool, list[str]]:
    """Labelled boxes in original pixels, whether the text was the promised form, and what was repaired. Never raises.

    Either syntax is read, whatever was promised. A box that says nothing new is dropped, as are empty ones.
    """
    promised, text = frame.codec.syntax, final_text(text)
    items, repairs = _read_tokens(text) if promised == "tokens" or "<|box_start|>" in text else _read_list(text)
    if promised == "tokens" and not items and text.strip() != "None":
        items, repairs = _read_list(text)
        repairs = [*repairs, "JSON in place of box tokens"] if items else ["no object found in it"]
    elif promised == "json" and "<|box_start|>" in text:
        repairs = [*repairs, "box tokens in place of JSON"]
    ok = not repairs
    found: dict[tuple, None] = {}
    for item in items:
        numbers, label = read_numbers(item, "bbox_2d", 4), item.get("label") if isinstance(item, dict) else None
        if numbers is None or not isinstance(label, str):
            ok = False
            repairs.append(f"dropped {str(item)[:80]}")
        elif numbers[2] <= numbers[0] or numbers[3] <= numbers[1]:
            repairs.append(f"dropped an empty box {numbers}")
        elif (key := (*numbers, label)) in found:
            repairs.append(f"dropped a repeated box {numbers}")
        else:
            found[key] = None
    return [(frame.decode(key[:4]), key[4]) for key in found], ok, repairs


def _read_list(text: str) -> tuple[list, list[str]]:
    value, repairs = read_json(text)
    if isinstance(value, dict):
        value, repairs = [value], [*repairs, "one object in place of a list"]
    if value is not None and isinstance(value, list):
        return value, repairs
    loose = [{"bbox_2d": [float(v) for v in m[:4]], "label": _unescape(m[4])} for m in _LOOSE.findall(text)]
    return loose, ["not the promised JSON; objects picked out of the text" if loose else "no object found in it"]


def _read_tokens(text: str) -> tuple[list, list[str]]:
    items: list[dict[str, Any]] = []
    label = ""
    for name, *numbers in _TOKENS.findall(text):
        if not numbers[0]:
            label = name
        else:
            items.append({"bbox_2d": [float(v) for v in numbers], "label": label})
    rest = _TOKENS.sub("", text).strip()
    return items, ["text around the boxes"] if rest not in ("", "None") else []


def _unescape(label: str) -> str:
    """A label as JSON means it, from between its quotes."""
    value, _ = read_json(f'"{label}"')
    return value if isinstance(value, str) else label


def read_numbers(item: Any, key: str, count: int) -> list[float] | None:
    """`count` finite numbers under `key` of a mapping, or None."""
    numbers = item.get(key) if isinstance(item, Mapping) else None
    if not isinstance(numbers, list) or len(numbers) != count:
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9 for v in numbers):
        return None
    return [float(v) for v in numbers]


_SLACK_PX = 1.0  # annotation tools round boxes outwards; farther outside than this is an error


def box_problem(box: Sequence[float], size: tuple[int, int]) -> str | None:
    """Why a box, or a point, of two or four original pixels cannot belong to an image of (width, height)."""
    shown = [round(v, 1) for v in box]
    if len(box) == 2:
        inside = all(-_SLACK_PX <= v <= side + _SLACK_PX for v, side in zip(box, size, strict=True))
        return None if inside else f"point {shown} (x, y) lies outside its {size[0]}x{size[1]} image"
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        return f"box {shown} (x1, y1, x2, y2) is empty or inverted"
    if min(x1, y1) < -_SLACK_PX or x2 > size[0] + _SLACK_PX or y2 > size[1] + _SLACK_PX:
        return f"box {shown} (x1, y1, x2, y2) lies outside its {size[0]}x{size[1]} image"
    if min(x2, size[0]) <= max(x1, 0) or min(y2, size[1]) <= max(y1, 0):
        return f"box {shown} (x1, y1, x2, y2) touches its {size[0]}x{size[1]} image from outside only"
    return None


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
