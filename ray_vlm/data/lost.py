"""Rows that could be read when they were checked and cannot now: a file deleted, changed, or behind a bad network.

They are asked for again, and then, if the job leaves bad rows out, another row takes their place: the next one in the
data that can be read. Every rank keeps as many rows as planned, so none waits for another.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from ray_vlm.data.records import Record
from ray_vlm.data.rows import Preparer
from ray_vlm.data.spec import Row
from ray_vlm.errors import DataError

WAITS_S = (0.2, 1.0)  # before each new attempt at the row itself
_OTHERS = 16  # rows after it that may take its place


def make_row(preparer: Preparer, records: Sequence[Record], number: int, fill_in: bool) -> Row:
    """The row at position `number`, or with `fill_in` one in its place, whose own position is in it.

    Raises `DataError` where it cannot be read, or none of those after it either.
    """
    first: DataError | None = None
    for wait in (*WAITS_S, None):
        try:
            return replace(preparer.row(records[number]), number=number)
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
            return replace(preparer.row(records[other]), number=other)
        except DataError:
            continue
    raise DataError(f"{first} Nor can any of the {len(others)} rows after it: mend the files or their network.")


def describe_lost(lost: Sequence[tuple[str, str]]) -> str:
    """A sentence on rows (id, id of the one in its place)."""
    named = ", ".join(f"{gone} ({place})" for gone, place in lost[:8])
    more = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
    return f"{len(lost)} rows could not be read any more, and others took their place: {named}{more}"
