"""One validated example, as all packages exchange it. Plain data; imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the upright original image
Point = tuple[float, float]  # x, y in pixels of the upright original image
Image = str | bytes  # an absolute path, an address such as s3://bucket/a.jpg, or the file's own bytes


@dataclass(frozen=True)
class SftRecord:
    """An example with its right answer.

    `row` is the position in the source (0-based), `sizes` the images' upright (width, height) in pixels. `truth` is the
    answer and `context` what the question states beside the images; the task documents both. Some keys mean the same
    for every task: `truth["boxes"]` and `truth["labels"]` are boxes in pixels and their classes; `context["boxes"]`,
    `context["frame"]` and `context["listed"]` are what a reader says of boxes and classes; `context["task"]` groups
    steps. Records of one `group` are never split between train, eval and test. `source` is the position among
    `data.train` and `data.mix`.
    """

    id: str
    row: int
    images: tuple[Image, ...]
    sizes: tuple[tuple[int, int], ...]
    truth: Mapping[str, Any]
    context: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    source: int = 0


@dataclass(frozen=True)
class PreferenceRecord:
    """A prompt with an answer that is preferred and one that is not. Turns are `(role, text)`, with `<image>` tags."""

    id: str
    row: int
    images: tuple[Image, ...]
    sizes: tuple[tuple[int, int], ...]
    prompt: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str
    group: str = ""
    source: int = 0


@dataclass(frozen=True)
class PromptRecord:
    """A prompt to sample answers for; `columns` are handed to reward functions by name."""

    id: str
    row: int
    images: tuple[Image, ...]
    sizes: tuple[tuple[int, int], ...]
    prompt: tuple[tuple[str, str], ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    source: int = 0


Record = SftRecord | PreferenceRecord | PromptRecord


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its position, its id, and the reason with the fix. `source` as in records."""

    row: int
    id: str
    reason: str
    source: int = 0
