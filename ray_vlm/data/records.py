"""One validated example, as all packages exchange it. Plain data; imports nothing heavy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ray_vlm.data.samples import SampleBuilder
    from ray_vlm.data.spec import Sample

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


class Rows(Protocol):
    """The rows of a part of the data, by the numbers that the plan gives them. It is small where it is pickled."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Record: ...

    def sample(self, builder: "SampleBuilder", number: int) -> "Sample":
        """Return row `number` in tokens and pixels. Raise `DataError` if it cannot be read."""
        ...


@dataclass(frozen=True)
class ListedRows:
    """Rows whose records are in memory: `records` is a sequence of them, or a Ray reference to one."""

    records: Any

    @cached_property
    def _listed(self) -> Sequence[Record]:
        if isinstance(self.records, Sequence):
            return self.records
        import ray

        return ray.get(self.records)

    def __len__(self) -> int:
        return len(self._listed)

    def __getitem__(self, number: int) -> Record:
        return self._listed[number]

    def sample(self, builder: "SampleBuilder", number: int) -> "Sample":
        """Return row `number` in tokens and pixels. Raise `DataError` if it cannot be read."""
        return builder.row(self._listed[number])

    def __getstate__(self) -> dict[str, Any]:
        return {"records": self.records}
