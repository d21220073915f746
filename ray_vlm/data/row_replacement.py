"""Rows that could be read when they were checked and cannot now: a file deleted, changed, or behind a bad network.

They are asked for again, and then, if the job leaves bad rows out, another row takes their place: the next one in the
data that can be read. Every rank keeps as many rows as planned, so none waits for another. The run keeps the sizes of
its images, so that a row that is gone when it is resumed still has its place in the plan.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

from ray_vlm.data.records import Record
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.errors import DataError

SIZES_FILE = "image_sizes.parquet"  # of a run folder
WAITS_S = (0.2, 1.0)  # before each new attempt at the row itself
_OTHERS = 16  # rows after it that may take its place


def make_row(builder: SampleBuilder, records: Sequence[Record], number: int, fill_in: bool) -> Sample:
    """The row at position `number`, or with `fill_in` one in its place, whose own position is in it.

    Raises `DataError` where it cannot be read, or none of those after it either.
    """
    first: DataError | None = None
    for wait in (*WAITS_S, None):
        try:
            return replace(builder.row(records[number]), number=number)
        except DataError as error:
            if wait is None:
                first = error
            else:
                time.sleep(wait)
    if not fill_in:
        raise DataError(f"{first} Mend that, then go on with --resume.")
    others = [(number + step) % len(records) for step in range(1, min(_OTHERS, len(records) - 1) + 1)]
    for other in others:
        try:
            return replace(builder.row(records[other]), number=other)
        except DataError:
            continue
    raise DataError(f"{first} Nor can any of the {len(others)} rows after it: mend the files or their network.")


def pack_sizes(records: Sequence[Record]) -> bytes:
    """(width, height) of every image that lies in a file of its own, as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = {image: s for r in records for image, s in zip(r.images, r.sizes, strict=True) if isinstance(image, str)}
    rows = [{"image": image, "width": width, "height": height} for image, (width, height) in sizes.items()]
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), buffer)
    return buffer.getvalue()


def unpack_sizes(data: bytes) -> Mapping[str, tuple[int, int]]:
    """What `pack_sizes` packed; nothing where it is damaged, since it is only of use where an image is gone too."""
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
    """A sentence on rows (id, id of the one in its place)."""
    named = ", ".join(f"{gone} ({place})" for gone, place in lost[:8])
    more = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
    return f"{len(lost)} rows could not be read any more, and others took their place: {named}{more}"
