"""One validated example, as all packages exchange it. Plain data; imports nothing heavy."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the upright original image
Point = tuple[float, float]  # x, y in pixels of the upright original image


@dataclass(frozen=True, slots=True)
class ImageRange:
    """An image that is `length` bytes of a file from `start` on, as in a tar or an Arrow file.

    `version`: the file's bytes and time of the last change (ns) when it was indexed. `name`: of a tar's member.
    """

    address: str
    version: tuple[int, int]
    start: int
    length: int
    name: str = ""

    def __str__(self) -> str:
        return f"{self.address}/{self.name}" if self.name else f"{self.address} (byte {self.start})"


@dataclass(frozen=True, slots=True)
class ImageCell:
    """An image in a Parquet file: a cell of `column`, of row `row` in row group `group`.

    `version`: as of `ImageRange`. `item`: the position in a cell that is a list, -1 for one that is not.
    """

    address: str
    version: tuple[int, int]
    group: int
    row: int
    column: str
    item: int = -1

    def __str__(self) -> str:
        item = f", image {self.item}" if self.item >= 0 else ""
        return f"{self.address} (row group {self.group}, row {self.row}, column {self.column}{item})"


InnerImage = ImageRange | ImageCell  # an image inside a file that holds many
# An absolute path, an address such as s3://bucket/a.jpg, a position in a file, or the image file's own bytes.
Image = str | bytes | InnerImage


class LocatedBytes(bytes):
    """The bytes of an image that a reader has read, and `location`, from which they can be read again."""

    location: InnerImage

    def __new__(cls, data: bytes, location: InnerImage) -> "LocatedBytes":
        """Return a copy of `data` that knows its location."""
        self = super().__new__(cls, data)
        self.location = location
        return self

    def __reduce__(self) -> tuple[type["LocatedBytes"], tuple[bytes, InnerImage]]:
        return LocatedBytes, (bytes(self), self.location)


def hash_bytes(data: bytes) -> int:
    """Return a hash of 64 bits, by which equal bytes are found."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def plain_bytes(value: Any) -> Any:
    """Return a cell with the bytes in it without their location, as users' functions and the index take it."""
    if isinstance(value, LocatedBytes):
        return bytes(value)
    if isinstance(value, dict):
        return {name: plain_bytes(part) for name, part in value.items()}
    return [plain_bytes(part) for part in value] if isinstance(value, list) else value


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


def name_file(reason: str, files: Iterable[Sequence[Any]], position: int) -> str:
    """Return why a row is bad with its file and its number in it, as `shard-2.jsonl row 7: ...`.

    `files`: of some consecutive rows of a source the name, the first row in it and the number of rows of each file;
    none if the source is one file. `position`: of the row among these rows.
    """
    for name, first, num_rows in files:
        if position < num_rows:
            return f"{name} row {first + position}: {reason}"
        position -= num_rows
    return reason
