"""Make rows by their numbers, and replace those that could be read when they were checked and cannot be read now: a
file was deleted or changed, or is behind a failing network.

Such a row is read again, and then, if the job leaves bad rows out, replaced by the next row in the data that can be
read, or by one from elsewhere. Every rank keeps as many rows as planned, so none waits for another. The run keeps the
sizes of its images, so that a row whose image is gone when the run is resumed keeps its position in the plan.
"""

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from typing import Any, overload

from ray_vlm.data.records import Image, Record
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.errors import DataError

SIZES_FILE = "image_sizes.parquet"  # of a run folder
WAITS_S = (0.2, 1.0)  # before each new attempt at the row itself
_OTHERS = 16  # rows after it that may take its place, and as many from all over the data


class Rows(Sequence[Any]):
    """The records of a part of the data, by the numbers that the plan gives them. It is small where it is pickled."""

    @abstractmethod
    def images(self, number: int) -> tuple[Image, ...]:
        """Return where the images of row `number` are."""

    @abstractmethod
    def sample(self, builder: SampleBuilder, number: int, images: Sequence[Image] | None = None) -> Sample:
        """Return row `number` in tokens and pixels. Raise `DataError` if it cannot be read.

        `images`: those of the row, if they have been fetched already.
        """


class ListedRows(Rows):
    """Rows whose records are in memory, as for a few."""

    def __init__(self, records: Sequence[Record]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, number: int) -> Any: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Any]: ...
    def __getitem__(self, number: int | slice) -> Any:
        return self._records[number]

    def images(self, number: int) -> tuple[Image, ...]:
        """Return where the images of row `number` are."""
        return self._records[number].images

    def sample(self, builder: SampleBuilder, number: int, images: Sequence[Image] | None = None) -> Sample:
        """Return row `number` in tokens and pixels. Raise `DataError` if it cannot be read."""
        record = self._records[number]
        sample = builder.row(record if images is None else replace(record, images=tuple(images)))
        return replace(sample, number=number)


def make_row(
    builder: SampleBuilder,
    rows: Rows,
    number: int,
    replace_unreadable: bool,
    fetched: "Future[tuple[Image, ...]] | None" = None,
) -> Sample:
    """Return the row at position `number`, or with `replace_unreadable` a replacement, which holds its own position.

    `fetched`: its images, if they are being fetched; if that fails, they are read again. Raise `DataError` if the row
    cannot be read, nor, with `replace_unreadable`, any of those after it.
    """
    if fetched is not None:
        with suppress(DataError, OSError, ValueError):
            return rows.sample(builder, number, fetched.result())
    first: DataError | None = None
    for wait in (*WAITS_S, None):
        try:
            return rows.sample(builder, number)
        except DataError as error:
            if wait is None:
                first = error
            else:
                time.sleep(wait)
    if not replace_unreadable:
        raise DataError(f"{first} Mend it, then go on with --resume.")
    # The next rows, then some from all over: where a file of the index is lost, many in a row are.
    steps = [*range(1, _OTHERS + 1), *(len(rows) * part // (_OTHERS + 1) for part in range(1, _OTHERS + 1))]
    others = dict.fromkeys((number + step) % len(rows) for step in steps)
    others.pop(number, None)
    for other in others:
        try:
            return rows.sample(builder, other)
        except DataError:
            continue
    raise DataError(f"{first} None of {len(others)} other rows can be read either: mend the files or their network.")


def pack_sizes(sizes: Mapping[str, tuple[int, int]]) -> bytes:
    """Return (width, height) of images by their path, as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": image, "width": width, "height": height} for image, (width, height) in sizes.items()]
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), buffer)
    return buffer.getvalue()


def unpack_sizes(data: bytes) -> Mapping[str, tuple[int, int]]:
    """Read what `pack_sizes` wrote; empty if damaged, since it matters only if an image is gone too."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(BytesIO(data))
    except (OSError, ValueError, pa.ArrowException):
        return {}
    if table.schema != _schema():
        return {}
    images, widths, heights = (column.to_pylist() for column in table.columns)
    return dict(zip(images, zip(widths, heights, strict=True), strict=True))


def _schema() -> Any:
    import pyarrow as pa

    sides = [pa.field(name, pa.int32(), nullable=False) for name in ("width", "height")]
    return pa.schema([pa.field("image", pa.string(), nullable=False), *sides])


def describe_lost(lost: Sequence[tuple[str, str]]) -> str:
    """Describe lost rows in a sentence; each is (id, id of its replacement)."""
    named = ", ".join(f"{gone} ({replacement})" for gone, replacement in lost[:8])
    more = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
    return f"{len(lost)} rows could not be read any more, and others took their place: {named}{more}"
