"""One pass over a source that validates every row and keeps what planning needs. No pixels are decoded.

Image headers are read in a few threads; token counts come from the real tokenizer and the family's own resize rule.
"""

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from ray_vlm.config.schema import Data, Source
from ray_vlm.data.formats import read_rows
from ray_vlm.data.images import read_size
from ray_vlm.data.records import BadRow, SftRecord
from ray_vlm.data.rows import Preparer, RowSpec, load_preparer
from ray_vlm.errors import DataError

_SHOWN = 20  # bad rows named in an error; all of them are in `bad_rows.jsonl` under `quarantine`
_SLACK_PX = 1.0  # annotation tools round boxes outwards; farther outside than this is an error


@dataclass(frozen=True)
class Index:
    """The usable rows of a source, in file order.

    `image_tokens`, `prompt_tokens` (without images) and `answer_tokens` are `int64 [rows]`; `labels` are the class
    names that the source declares; `bad` are the rows that were left out.
    """

    records: tuple[SftRecord, ...]
    image_tokens: np.ndarray
    prompt_tokens: np.ndarray
    answer_tokens: np.ndarray
    labels: tuple[str, ...]
    bad: tuple[BadRow, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def tokens(self) -> np.ndarray:
        """All tokens of each row, `int64 [rows]`."""
        return self.image_tokens + self.prompt_tokens + self.answer_tokens

    def class_counts(self) -> Counter:
        """Objects by class name."""
        return Counter(label for record in self.records for label in record.truth["labels"])


def read_labels(source: Source) -> list[str]:
    """The class names that a source declares."""
    return read_rows(source)[1]


def build_index(source: Source, data: Data, spec: RowSpec) -> Index:
    """Read, check and measure every row. Under `on_bad_row: raise` any bad row raises `DataError` with all reasons."""
    rows, labels = read_rows(source)
    known = set(spec.labels)
    with ThreadPoolExecutor(8) as pool:
        checked = list(pool.map(lambda row: _check(row, data, known), rows))
    preparer = load_preparer(spec)
    records: list[SftRecord] = []
    counts: list[tuple[int, int, int]] = []
    bad: list[BadRow] = []
    for row in checked:
        if isinstance(row, BadRow):
            bad.append(row)
        elif isinstance(counted := _count(row, preparer, data.max_tokens), BadRow):
            bad.append(counted)
        else:
            records.append(row)
            counts.append(counted)
    if bad and data.on_bad_row == "raise":
        raise DataError(describe_bad(bad, len(rows), source.path))
    if not records:
        raise DataError(f"{source.path}: no usable row among {len(rows)}. " + "; ".join(b.reason for b in bad[:3]))
    columns = np.array(counts, np.int64).reshape(-1, 3)
    return Index(tuple(records), columns[:, 0], columns[:, 1], columns[:, 2], tuple(labels), tuple(bad))


def describe_bad(bad: Iterable[BadRow], num_rows: int, path: str) -> list[str]:
    """One line for each bad row, the first few, and what to do about them."""
    bad = list(bad)
    lines = [f"{path}: row {b.row} (id {b.id or '?'}): {b.reason}" for b in bad[:_SHOWN]]
    more = f" ({len(bad) - _SHOWN} more not shown)" if len(bad) > _SHOWN else ""
    lines.append(
        f"{path}: {len(bad)} of {num_rows} rows are bad{more}. Mend or remove them, or set "
        "data.on_bad_row=quarantine to write them to bad_rows.jsonl and go on without them."
    )
    return lines


def _check(row: SftRecord | BadRow, data: Data, known: set[str]) -> SftRecord | BadRow:
    """The row with its image sizes, or why it is bad."""
    if isinstance(row, BadRow):
        return row
    try:
        sizes = tuple(read_size(path, data.max_image_pixels) for path in row.images)
    except (ValueError, OSError) as error:
        return BadRow(row.row, row.id, f"{error} ({', '.join(row.images)})")
    for box, label in zip(row.truth["boxes"], row.truth["labels"], strict=True):
        if label not in known:
            return BadRow(row.row, row.id, f"class {label!r} is not among the task's labels {sorted(known)}")
        if reason := _box_problem(box, sizes[0]):
            return BadRow(row.row, row.id, reason)
    return replace(row, sizes=sizes)


def _box_problem(box: tuple[float, float, float, float], size: tuple[int, int]) -> str | None:
    x1, y1, x2, y2 = box
    shown = [round(v, 1) for v in box]
    if x2 <= x1 or y2 <= y1:
        return f"box {shown} (x1, y1, x2, y2) is empty or inverted"
    if min(x1, y1) < -_SLACK_PX or x2 > size[0] + _SLACK_PX or y2 > size[1] + _SLACK_PX:
        return f"box {shown} (x1, y1, x2, y2) lies outside its {size[0]}x{size[1]} image"
    if min(x2, size[0]) <= max(x1, 0) or min(y2, size[1]) <= max(y1, 0):
        return f"box {shown} (x1, y1, x2, y2) touches its {size[0]}x{size[1]} image from outside only"
    return None


def _count(row: SftRecord, preparer: Preparer, max_tokens: int | None) -> tuple[int, int, int] | BadRow:
    try:
        counts = preparer.token_counts(row)
    except ValueError as error:
        return BadRow(row.row, row.id, str(error))
    if max_tokens is not None and sum(counts) > max_tokens:
        reason = (
            f"{sum(counts)} tokens ({counts[0]} of images), above data.max_tokens={max_tokens}; lower data.max_pixels"
        )
        return BadRow(row.row, row.id, reason)
    return counts
