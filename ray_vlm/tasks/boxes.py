"""Boxes and points: overlap, one-to-one matching, and the conversion between pixels and the text of a model family.

Boxes and points are in pixels of the upright original image everywhere except inside the text. A `Frame` holds one
image's original and resized size and the codec, and converts both ways; `write_boxes` writes the text and `read_boxes`
reads it.
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
    """How a model family writes boxes.

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
    "qwen3_vl": Codec("relative_1000"),  # also for Llama-4 and for families without a form of their own
}


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
        """Convert a box from original pixels to four integers, at least one unit wide and tall, so never empty."""
        x1, y1, x2, y2 = (self._encode(value, axis % 2) for axis, value in enumerate(box))
        x1, y1 = min(x1, self._largest(0) - 1), min(y1, self._largest(1) - 1)
        return [x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)]

    def encode_point(self, point: Sequence[float]) -> list[int]:
        """Convert a point from original pixels to two integers."""
        return [self._encode(value, axis) for axis, value in enumerate(point)]

    def decode(self, numbers: Sequence[float]) -> Box:
        """Convert the four numbers of the text to a box in original pixels."""
        x1, y1, x2, y2 = (self._decode(value, axis % 2) for axis, value in enumerate(numbers))
        return (x1, y1, x2, y2)

    def decode_point(self, numbers: Sequence[float]) -> Point:
        """Convert the two numbers of the text to a point in original pixels."""
        x, y = (self._decode(value, axis) for axis, value in enumerate(numbers))
        return (x, y)

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
        # the last pixel is side - 1, while relative numbers include 1000
        return self._units(axis) - (self.codec.coordinates == "resized_pixels")

    def _units(self, axis: int) -> int:
        """Return how many units of the text span the resized image along `axis` (0: width, 1: height)."""
        return 1000 if self.codec.coordinates == "relative_1000" else self.resized[axis]


def write_boxes(objects: Sequence[tuple[Box, str]], frame: Frame) -> Answer:
    """Write labelled boxes in the family's form, each object a span of its label; without objects `[]` or `None`."""
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
    """Write one box or point: `[x1, y1, x2, y2]`, or Qwen2-VL's `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`."""
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
_LOOSE = re.compile(  # for objects in broken JSON, and for a truncated last one
    rf'"bbox_2d"\s?:\s?\[\s?{_NUMBER}\s?,\s?{_NUMBER}\s?,\s?{_NUMBER}\s?,\s?{_NUMBER}\s?\]\s?,\s?'
    r'"label"\s?:\s?"((?:[^"\\]|\\.){0,200})"'
)


def read_boxes(text: str, frame: Frame) -> tuple[list[tuple[Box, str]], bool, list[str]]:
    """Return labelled boxes in original pixels, whether the text had the codec's form, and the repairs. Never raises.

    Both syntaxes are read, whichever the codec has. Repeated and empty boxes are dropped.
    """
    syntax, text = frame.codec.syntax, final_text(text)
    items, repairs = _read_tokens(text) if syntax == "tokens" or "<|box_start|>" in text else _read_list(text)
    if syntax == "tokens" and not items and text.strip() != "None":
        items, repairs = _read_list(text)
        repairs = [*repairs, "JSON in place of box tokens"] if items else ["no object found in it"]
    elif syntax == "json" and "<|box_start|>" in text:
        repairs = [*repairs, "box tokens in place of JSON"]
    ok = not repairs
    unique: dict[tuple, None] = {}  # (x1, y1, x2, y2, label), in the order of the text
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


def _read_list(text: str) -> tuple[list, list[str]]:
    value, repairs = read_json(text)
    if isinstance(value, dict):
        value, repairs = [value], [*repairs, "one object in place of a list"]
    if isinstance(value, list):
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
    """Decode the JSON escapes in a label that was cut out from between its quotes."""
    value, _ = read_json(f'"{label}"')
    return value if isinstance(value, str) else label


def read_numbers(item: object, key: str, count: int) -> list[float] | None:
    """Return the `count` finite numbers under `key` of a mapping, or None."""
    numbers = item.get(key) if isinstance(item, Mapping) else None
    if not isinstance(numbers, list) or len(numbers) != count:
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9 for v in numbers):
        return None
    return [float(v) for v in numbers]


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
