"""Read a source: create its file on first use, and turn its rows into records, by one function for each format.

A row that cannot be read becomes a `BadRow`.
"""

import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_vlm.config.data import Source
from ray_vlm.config.paths import import_function
from ray_vlm.data.records import BadRow, Record, SftRecord
from ray_vlm.data.sources import fields
from ray_vlm.data.sources.arrow import ArrowTable
from ray_vlm.data.sources.coco import read_coco
from ray_vlm.data.sources.conversations import chat_record, preference_record, prompt_record, read_objects
from ray_vlm.data.sources.fields import Row, shown
from ray_vlm.data.sources.gui import gui_records
from ray_vlm.data.sources.pieces import PIECE_ROWS, Piece, cut_entries, row_digest
from ray_vlm.data.sources.tables import ParquetTable, names_of_rows, no_rows, open_table
from ray_vlm.data.sources.tar import ImageRoot, image_root
from ray_vlm.errors import ConfigError, DataError, RayVlmError

if TYPE_CHECKING:
    from pyarrow import Array, ChunkedArray

_CORNERS = ("x1", "y1", "x2", "y2")
_HASHED_ROWS = 2**18  # at a time
_NOT_ATTRIBUTES = ("id", "image", "group", *_CORNERS, "bbox")


def prepare_source(source: Source) -> None:
    """Call `source.create` with the path if the file is not there yet. Raise `ConfigError` if it cannot be called."""
    if source.create is None or Path(source.path).exists():
        return
    try:
        import_function(source.create)(source.path)
    except RayVlmError:
        raise
    except Exception as error:  # a user's own function
        raise ConfigError(
            f"create={source.create!r} failed for {source.path} ({type(error).__name__}: {error}). "
            "It is module:function, called with the path."
        ) from error


def read_rows(source: Source) -> tuple[list[Record | BadRow], list[str]]:
    """Return all rows of a source in file order, and the class names that it declares.

    Class names are COCO's categories in their order, or else the sorted labels of the rows (for classification
    `attribute=value`, the attributes in the order of their columns). `sizes` of the records is empty: the index reads
    image sizes from the files' headers. Raise `DataError` if the whole file cannot be used.
    """
    reader = SourceReader(source)
    rows: list[Record | BadRow] = []
    labels = []
    for piece in reader.pieces():
        records = reader.read(piece)
        labels.append(labels_of_piece(piece, records))
        rows += records
    changes = unique_ids(source, [row.id for row in rows], [isinstance(row, BadRow) for row in rows])
    for i, change in changes.items():
        rows[i] = change_id(rows[i], change)
    return rows, merge_labels(source, labels)


class SourceReader:
    """Reads a source in pieces. It pickles, is small, and reads any piece in any process.

    COCO and GUI files are read as a whole by the process that divides them, since a row needs others. Their pieces hold
    records, and `first_row` of these counts the records.
    """

    def __init__(self, source: Source):
        """Open the file and check its columns. Raise `DataError` if the whole file cannot be used.

        Names of JSON rows are collected from all rows only if the job names a column, and then until each has been met,
        or if every column is an attribute.
        """
        self.source, self.format = source, FORMATS[source.format]
        self.columns: tuple[str, ...] = ()
        self.root: ImageRoot = ""
        if source.format == "coco":
            self.root = image_root(source)
            return
        self.table = open_table(source.path)
        self.takes_all_names = self.format.has_attributes and not _named_attributes(source)
        if self.table.columns is not None:
            self.columns = self.table.columns
        elif self.takes_all_names or source.columns:
            self.columns = names_of_rows(self.table, None if self.takes_all_names else source.columns.values())
        self._check_columns()
        self.root = image_root(source)

    def _check_columns(self) -> None:
        """Raise `DataError` for missing columns."""
        source, existing = self.source, ", ".join(self.columns)[:400]
        problems = [
            f"{source.path}: no column {column!r}, named by columns.{name}; it has {existing}."
            for name, column in source.columns.items()
            if self.columns and column not in self.columns
        ]
        if self.table.columns is not None:
            available = {*self.columns, *source.columns}
            problems += [
                f"{source.path}: no column {' or '.join(names)}; it has {existing}. Add it, or name its column, as in "
                f"{fields.column_setting(names[0])}."
                for names in self.format.needs
                if not available & set(names)
            ]
        if problems:
            raise DataError(problems) if any(self.table.pieces()) else no_rows(source.path)

    def describe_copies(self) -> str | None:
        """Return a line on the images that an index of the source holds a copy of, or None."""
        table = None if self.source.format == "coco" else self.table
        return table.describe_copies() if isinstance(table, ParquetTable | ArrowTable) else None

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[Piece]:
        """Yield the pieces of the source in order, each of up to `rows` rows. Raise `DataError` where the file cannot
        be used, or if it holds no rows."""
        if self.format.make is None:
            yield from self._record_pieces(rows)
            return
        names = f"-{row_digest(self.columns).hexdigest()}" if self.takes_all_names else ""
        left = self.source.max_rows
        piece = None
        for piece in self.table.pieces(rows):
            if left is not None and piece.num_rows > left:
                piece = replace(
                    piece, num_rows=left, entries=piece.entries[:left], fingerprint=f"{piece.fingerprint}-{left}"
                )
            yield replace(piece, fingerprint=piece.fingerprint + names)
            if left is not None and (left := left - piece.num_rows) == 0:
                return
        if piece is None:
            raise no_rows(self.source.path)

    def _record_pieces(self, rows: int) -> Iterator[Piece]:
        """Yield the pieces of a file that is read as a whole."""
        labels: list[str] = []
        if self.source.format == "coco":
            records, labels = read_coco(self.source, self.root)
        else:
            table = [row for piece in self.table.pieces() for row in self.table.read(piece)]
            if not table:
                raise no_rows(self.source.path)
            listed = [row if isinstance(row, BadRow) else self._row(*row) for row in table]
            records = gui_records(listed, self.source)
        for piece in cut_entries(((record, _serialize(record)) for record in records), rows):
            names = f"-{row_digest(labels).hexdigest()}" if labels else ""
            yield replace(piece, labels=tuple(labels), fingerprint=piece.fingerprint + names)
            labels = []

    def read(self, piece: Piece) -> list[Record | BadRow]:
        """Return the rows of a piece, with ids as they are written. Raise `DataError` if the file has changed."""
        make, needs = self.format.make, self.format.needs
        if make is None:
            return list(piece.entries)
        rows = (row if isinstance(row, BadRow) else self._row(*row) for row in self.table.read(piece))
        return [row if isinstance(row, BadRow) else _made(row, make, needs) for row in rows]

    def _row(self, number: int, cells: dict[str, Any]) -> Row | BadRow:
        """Return the cells under the names of ray_vlm, with id and group."""
        source = self.source
        if source.columns:
            cells = cells | {field: cells.get(column) for field, column in source.columns.items()}
        name, group = cells.get("id"), cells.get("group")
        try:
            is_missing = fields.is_empty(name)
            if not is_missing and (isinstance(name, bool) or not isinstance(name, (str, int))):
                raise ValueError(f"id {shown(name)} is neither a text nor a whole number; mend it")
            name = str(number) if is_missing else fields.word(name, "id")
            group = "" if fields.is_empty(group) and "group" not in source.columns else fields.word(group, "group")
        except ValueError as error:
            return BadRow(number, "", str(error))
        return Row(number, name, group, cells, source, self.root, self.columns)


def _serialize(record: Record | BadRow) -> bytes:
    """Return bytes that are the same for equal records."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 5)
    pickler.fast = True  # writes a value anew where it is met again: no matter whether equal values are one object
    pickler.dump(record)
    return buffer.getvalue()


def labels_of_piece(piece: Piece, rows: Iterable[Record | BadRow]) -> list[str]:
    """Return the class names that a piece declares, in order of appearance. `rows`: those of the piece."""
    records = (row for row in rows if isinstance(row, SftRecord))
    return list(piece.labels or dict.fromkeys(label for record in records for label in _labels(record)))


def merge_labels(source: Source, labels: Iterable[Iterable[str]]) -> list[str]:
    """Return the class names that a source declares, as `read_rows` does. `labels`: those of its pieces in order."""
    merged = list(dict.fromkeys(label for names in labels for label in names))
    if source.format == "coco":
        return merged
    attributes: dict[str, int] = {}  # to their positions in the order of the columns
    for label in merged:
        if "=" in label:
            attributes.setdefault(label.partition("=")[0], len(attributes))
    return sorted(merged, key=lambda label: (attributes.get(label.partition("=")[0], 0), label))


def unique_ids(
    source: Source, ids: "Sequence[str] | Array | ChunkedArray", is_bad: Sequence[bool] | np.ndarray
) -> dict[int, tuple[str, str] | str]:
    """Return what has to change where rows of a source share an id.

    Rows that share one, as several questions about one image do, are numbered: the second becomes `ID#2`. They form one
    group, so that no split separates them. The value of such a row is its new id, and the group to use if it has none.
    Of GUI steps such rows are bad, and the value is the reason. Bad rows count, but do not change.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if source.format == "coco":  # its reader refuses them
        return {}
    listed = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids, pa.large_string())
    column = pa.chunked_array(listed.chunks if isinstance(listed, pa.ChunkedArray) else [listed], listed.type)
    rows = _rows_alike(np.concatenate([np.empty(0, np.uint64), *map(_hash_texts, column.chunks)]))
    names = column.take(pa.array(rows)).to_pylist()
    counts = Counter(names)
    bad = np.asarray(is_bad, bool)[rows].tolist()
    shared = [
        (row, name) for row, name, skip in zip(rows.tolist(), names, bad, strict=True) if counts[name] > 1 and not skip
    ]
    if source.format == "gui_csv":
        return {row: f"id {name} is used by {counts[name]} rows; make it unique" for row, name in shared}
    numbered = column.filter(pc.match_substring_regex(column, "#[0-9]+$")) if shared else column.slice(0, 0)
    taken = set(numbered.to_pylist())
    met: Counter[str] = Counter()
    changes: dict[int, tuple[str, str] | str] = {}
    for row, name in shared:
        met[name] += 1
        while met[name] > 1 and f"{name}#{met[name]}" in taken:
            met[name] += 1
        changes[row] = (name if met[name] == 1 else f"{name}#{met[name]}", name)
    return changes


def _rows_alike(hashes: np.ndarray) -> np.ndarray:
    """Return the rows whose hash another row has too, in order."""
    ordered = np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(repeated):
        return np.empty(0, np.int64)
    positions = np.minimum(np.searchsorted(repeated, hashes), len(repeated) - 1)
    return np.flatnonzero(repeated[positions] == hashes)


def _hash_texts(column: "Array") -> np.ndarray:
    """Return a hash of each text, `uint64 [rows]`. Its memory is small beside a table of ten million texts."""
    import pyarrow as pa

    column = column.cast(pa.large_string())
    _, places, texts = column.buffers()
    offsets = np.frombuffer(places, np.int64)[column.offset : column.offset + len(column) + 1]
    data = np.append(np.frombuffer(texts or b"", np.uint8), np.zeros(8, np.uint8))
    words = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))  # the eight bytes from each byte on
    masks = np.array([2 ** (8 * size) - 1 for size in range(9)], np.uint64)
    hashes = np.diff(offsets).astype(np.uint64)
    for first in range(0, len(column), _HASHED_ROWS):
        part = hashes[first : first + _HASHED_ROWS]
        starts, sizes, rows = offsets[first:][: len(part)], part.astype(np.int64), np.arange(len(part))
        for position in range(0, int(sizes.max()), 8):
            rows = rows[sizes[rows] > position]
            word = words[starts[rows] + position] & masks[np.minimum(sizes[rows] - position, 8)]
            mixed = (part[rows] ^ word) * np.uint64(0x9E3779B97F4A7C15)
            part[rows] = mixed ^ (mixed >> np.uint64(29))
    return hashes


def change_id(row: Record | BadRow, change: tuple[str, str] | str) -> Record | BadRow:
    """Return a row with the change that `unique_ids` asks for."""
    if isinstance(row, BadRow):
        return row
    if isinstance(change, str):
        return BadRow(row.row, row.id, change)
    return replace(row, id=change[0], group=row.group or change[1])


def objects_record(row: Row) -> SftRecord:
    """Read detection from ms-swift's `objects`; `messages` are not read."""
    pictures = fields.images(row, "images", "image")
    if len(pictures) != 1:
        raise ValueError(f"the row has {len(pictures)} images; a detection row has one. Split or mend it")
    labels, boxes, _, units = read_objects(row, 1)
    if len(labels) != len(boxes):
        raise ValueError(f"objects has {len(labels)} ref for {len(boxes)} bbox; give each box its name")
    for corners in boxes:
        fields.box(corners, "objects.bbox")
    return SftRecord(row.id, row.number, pictures, (), {"boxes": boxes, "labels": labels}, units, row.group)


def classification_record(row: Row) -> SftRecord:
    """Read `image` and attribute columns, and a box in `x1, y1, x2, y2` or `bbox` if there is one."""
    pictures = fields.images(row, "image")
    if len(pictures) != 1:
        raise ValueError(f"the row has {len(pictures)} images; a classification row has one. Split or mend it")
    attributes = {name: fields.word(row.cells.get(name), f"attribute {name}") for name in _attributes(row)}
    corners = _box_of(row)
    context = {} if corners is None else {"box": corners, **fields.box_units(row)}
    return SftRecord(row.id, row.number, pictures, (), {"attributes": attributes}, context, row.group)


def _attributes(row: Row) -> list[str]:
    """Return the attributes that `columns` names, or every column that has no other meaning."""
    taken = {*_NOT_ATTRIBUTES, *row.source.columns.values()}
    attributes = _named_attributes(row.source) or [name for name in row.columns if name not in taken]
    if not attributes:
        raise DataError(
            f"{row.source.path}: no column with an attribute. It has {', '.join(row.columns)}; add one, such as "
            f"`label`, or name one, as in {fields.column_setting('label')}."
        )
    return attributes


def _named_attributes(source: Source) -> list[str]:
    return [name for name in source.columns if name not in _NOT_ATTRIBUTES]


def _box_of(row: Row) -> tuple[float, float, float, float] | None:
    if (value := row.first("bbox")) is not None:
        return fields.box(fields.nested(value, "bbox"), "bbox")
    corners = [row.cells.get(name) for name in _CORNERS]
    if all(fields.is_empty(v) for v in corners):
        return None
    return fields.box([_number(v) for v in corners], ", ".join(_CORNERS))


def _number(value: object) -> object:
    """Return the number in a CSV cell; return other values unchanged, for the check of the box to report."""
    try:
        return float(value) if isinstance(value, str) and "_" not in value else value
    except ValueError:
        return value


def _labels(record: SftRecord) -> list[str]:
    if "attributes" in record.truth:
        return [f"{name}={value}" for name, value in record.truth["attributes"].items()]
    return list(record.truth.get("labels", ()))


def _made(row: Row, make: Callable[[Row], Record], needs: tuple[tuple[str, ...], ...]) -> Record | BadRow:
    try:
        for names in needs:
            if row.first(*names) is None:
                existing = ", ".join(row.cells)[:200]
                raise ValueError(
                    f"no {' or '.join(names)}; the row has {existing}. Fill it, or name its column, as in "
                    f"{fields.column_setting(names[0], _guess_column(row, needs))}"
                )
        return make(row)
    except ValueError as error:
        return BadRow(row.number, row.id, str(error))


def _guess_column(row: Row, needs: tuple[tuple[str, ...], ...]) -> str:
    """Return the only filled column whose name the format does not know, or the placeholder NAME."""
    known = {*_NOT_ATTRIBUTES, "images", *row.source.columns, *(name for names in needs for name in names)}
    unknown = [name for name, value in row.cells.items() if name not in known and not fields.is_empty(value)]
    return unknown[0] if len(unknown) == 1 else "NAME"


@dataclass(frozen=True)
class Format:
    """How rows of a format become records.

    `make` raises `ValueError` for a row that cannot be used; None: the file is read as a whole. One column of each
    group of names in `needs` must be filled. `has_attributes`: columns without another meaning are attributes.
    """

    make: Callable[[Row], Record] | None
    needs: tuple[tuple[str, ...], ...] = ()
    has_attributes: bool = False


FORMATS: dict[str, Format] = {
    "coco": Format(None),
    "llava": Format(partial(chat_record, column="conversations"), (("conversations",),)),
    "messages": Format(partial(chat_record, column="messages"), (("messages",),)),
    "objects": Format(objects_record, (("images", "image"), ("objects",))),
    "image_csv": Format(classification_record, (("image",),), has_attributes=True),
    "gui_csv": Format(None, (("Task_id",), ("Image_id",), ("Instruction",), ("Output",), ("Grounding",))),
    "preference": Format(
        preference_record,
        (
            ("prompt", "messages", "conversations"),
            ("chosen", "messages"),
            ("rejected", "rejected_response"),
        ),
    ),
    "prompt": Format(prompt_record, (("prompt", "problem"),)),
}
