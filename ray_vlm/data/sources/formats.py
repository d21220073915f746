"""Read a source: turn its rows into records, by one function for each format.

A row that cannot be read becomes a `BadRow`.
"""

import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ray_vlm.config.data import Source
from ray_vlm.data.records import BadRow, Record, SftRecord, name_file
from ray_vlm.data.sources import fields
from ray_vlm.data.sources.arrow import ArrowTable
from ray_vlm.data.sources.coco import read_coco
from ray_vlm.data.sources.conversations import (
    alpaca_record,
    chat_record,
    preference_record,
    prompt_record,
    query_record,
    rec_record,
)
from ray_vlm.data.sources.cvat import cvat_version, open_cvat
from ray_vlm.data.sources.detect import describe_likely, settle_source
from ray_vlm.data.sources.detection import detection_record
from ray_vlm.data.sources.fields import Row, shown
from ray_vlm.data.sources.file_set import FileSet, folder_of
from ray_vlm.data.sources.files import describe_version, find_files, single_file
from ray_vlm.data.sources.gui import gui_records
from ray_vlm.data.sources.hub import hub_features, hub_root, hub_version, is_hub, local_source
from ray_vlm.data.sources.image_folder import find_members, folder_version, open_members
from ray_vlm.data.sources.label_studio import label_studio_record, open_label_studio
from ray_vlm.data.sources.labelme import labelme_version, open_labelme
from ray_vlm.data.sources.objects import declared_categories, hf_objects_record, objects_record
from ray_vlm.data.sources.pieces import PIECE_ROWS, NumberedRow, Piece, cut_entries, row_digest
from ray_vlm.data.sources.tables import OpenedRows, ParquetTable, names_of_rows, no_rows, open_table, open_with_classes
from ray_vlm.data.sources.tar import ImageRoot, open_images, tar_of
from ray_vlm.data.sources.voc import open_voc, voc_version
from ray_vlm.data.sources.webdataset import Sample
from ray_vlm.data.sources.yolo import open_yolo, yolo_version
from ray_vlm.errors import DataError
from ray_vlm.storage import split_address

if TYPE_CHECKING:
    from pyarrow import Array, ChunkedArray

_RowType = TypeVar("_RowType")
_CORNERS = ("x1", "y1", "x2", "y2")
_HASHED_ROWS = 2**18  # at a time
_NOT_ATTRIBUTES = ("id", "image", "group", *_CORNERS, "bbox")


def read_rows(source: Source) -> tuple[list[Record | BadRow], list[str]]:
    """Return all rows of a source in file order, and the class names that it declares.

    Class names are those that a file lists, in its order, or else the sorted labels of the rows (for classification
    `attribute=value`, the attributes in the order of their columns). `sizes` of the records is empty: the index reads
    image sizes from the files' headers. Raise `DataError` if the whole file cannot be used.
    """
    source = settle_source(source)
    reader = SourceReader(source)
    rows: list[Record | BadRow] = []
    labels = []
    for piece in reader.pieces():
        records = reader.read(piece)
        labels.append(labels_of_piece(piece, records))
        rows += reader.name_files(piece, records)
    changes = unique_ids(source, [row.id for row in rows], [isinstance(row, BadRow) for row in rows])
    for i, change in changes.items():
        rows[i] = change_id(rows[i], change)
    return rows, merge_labels(source, labels, reader.declared)


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
        source = settle_source(source)
        self.format = FORMATS[source.format]
        local = local_source(source)
        opened = self.format.open(local)
        self.source = (
            source.model_copy(update={"follow_links": True}) if opened.follow_links or local.follow_links else source
        )
        self.columns: tuple[str, ...] = ()
        self.declared: list[str] = []  # class names in their order, where they stand beside the rows
        self.root: ImageRoot = open_images(source.image_root or opened.image_root)
        if source.format == "coco":
            return
        assert opened.table is not None
        self.table = opened.table
        self.takes_all_names = self.format.has_attributes and not _named_attributes(source)
        if self.table.columns is not None:
            self.columns = self.table.columns
        elif self.takes_all_names or source.columns:
            self.columns = names_of_rows(self.table, None if self.takes_all_names else source.columns.values())
        if source.format == "hf_objects":
            features = getattr(self.table, "features", {})
            self.declared = declared_categories(features.get(source.columns.get("objects", "objects")))
        self._check_columns()

    def _check_columns(self) -> None:
        """Raise `DataError` for missing columns."""
        source, existing = self.source, ", ".join(self.columns)[:400]
        problems = [
            f"{source.name}: no column {column!r}, named by columns.{name}; it has {existing}."
            for name, column in source.columns.items()
            if self.columns and column not in self.columns
        ]
        if self.table.columns is not None:
            available = {*self.columns, *source.columns}
            problems += [
                f"{source.name}: no column {' or '.join(names)}; it has {existing}. Add it, or name its column, as in "
                f"{fields.column_setting(names[0])}."
                for names in self.format.needs
                if not available & set(names)
            ]
        if problems:
            problems[-1] += "" if source.columns else describe_likely(source)
            raise DataError(problems) if any(self.table.pieces()) else no_rows(source.name)

    def describe_copies(self) -> str | None:
        """Return a line on the images that an index of the source holds a copy of, or None."""
        table = None if self.source.format == "coco" else self.table
        return table.describe_copies() if isinstance(table, ParquetTable | ArrowTable | FileSet) else None

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
            raise no_rows(self.source.name)

    def _record_pieces(self, rows: int) -> Iterator[Piece]:
        """Yield the pieces of a file that is read as a whole."""
        labels: list[str] = []
        if self.source.format == "coco":
            records, labels = read_coco(self.source, self.root)
        else:
            table, files = list[NumberedRow | BadRow](), list[tuple[str, int, int]]()
            for piece in self.table.pieces():
                table += self.table.read(piece)
                files += self.files_of(piece)
            if not table:
                raise no_rows(self.source.name)
            listed = [row if isinstance(row, BadRow) else self._row(*row) for row in table]
            records = [_name_file(record, files, record.row) for record in gui_records(listed, self.source)]
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

    def files_of(self, piece: Piece) -> list[tuple[str, int, int]]:
        """Return the files of a piece, as `records.name_file` takes them; none if the source is one file."""
        return self.table.files_of(piece) if piece.parts and isinstance(self.table, FileSet) else []

    def name_files(self, piece: Piece, rows: Sequence[_RowType]) -> list[_RowType]:
        """Return the rows of a piece with their files in the reasons of bad ones."""
        files = self.files_of(piece)
        return [_name_file(row, files, i) for i, row in enumerate(rows)]

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


def _name_file(row: _RowType, files: Sequence[tuple[str, int, int]], position: int) -> _RowType:
    """Return a row with its file in the reason if it is bad; the arguments are those of `records.name_file`."""
    return replace(row, reason=name_file(row.reason, files, position)) if isinstance(row, BadRow) else row


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


def merge_labels(source: Source, labels: Iterable[Iterable[str]], declared: Sequence[str] = ()) -> list[str]:
    """Return the class names that a source declares, as `read_rows` does. `labels`: those of its pieces in order;
    `declared`: those of its reader."""
    merged = list(dict.fromkeys([*declared, *(label for names in labels for label in names)]))
    if declared or FORMATS[source.format].lists_labels:
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


def classification_record(row: Row) -> SftRecord:
    """Read `image` and attribute columns, and a box in `x1, y1, x2, y2` or `bbox` if there is one. Where no column is
    named `image`, `file_name` is it, as in the metadata of a folder (huggingface.co/docs/datasets/image_dataset)."""
    pictures = fields.images(row, _image_column(row))
    if len(pictures) != 1:
        raise ValueError(f"the row has {len(pictures)} images; a classification row has one. Split or mend it")
    attributes = {name: fields.word(row.cells.get(name), f"attribute {name}") for name in _attributes(row)}
    corners = _box_of(row)
    context = {} if corners is None else {"box": corners, **fields.box_units(row)}
    return SftRecord(row.id, row.number, pictures, (), {"attributes": attributes}, context, row.group)


def _folder_record(row: Row) -> SftRecord:
    return classification_record(replace(row, columns=("image", "label")))


def _image_column(row: Row) -> str:
    return "image" if "image" in row.cells or "image" in row.columns else "file_name"


def _attributes(row: Row) -> list[str]:
    """Return the attributes that `columns` names, or every column that has no other meaning."""
    taken = {*_NOT_ATTRIBUTES, _image_column(row), *row.source.columns.values()}
    attributes = _named_attributes(row.source) or [name for name in row.columns if name not in taken]
    if not attributes:
        raise DataError(
            f"{row.source.name}: no column with an attribute. It has {', '.join(row.columns)}; add one, such as "
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
                if isinstance(row.cells, Sample):
                    existing += f" (files .{', .'.join(row.cells.extensions)})"
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


def open_rows(source: Source) -> OpenedRows:
    """Open the files of a source, by their suffixes. Raise `DataError`."""
    files = find_files(source)
    if not is_hub(source):
        if not (folder := folder_of(files)) and source.image_root is None:
            raise DataError(
                f"{source.name}: no folder has all of its files, which would be that of the images. Set image_root, or "
                "give each folder an entry of data.mix."
            )
        return OpenedRows(open_table(files[0]) if len(files) == 1 else FileSet(files), folder)
    opens = partial(open_with_classes, features=hub_features(source))
    table = opens(files[0]) if len(files) == 1 else FileSet(files, opens)
    return OpenedRows(table, hub_root(source), follow_links=True)


def _open_coco(source: Source) -> OpenedRows:
    file = single_file(source)
    return OpenedRows(None, split_address(file)[0], follow_links=is_hub(source))


def _open_folder(source: Source) -> OpenedRows:
    root, members = find_members(source)
    return OpenedRows(open_members(source, root, members), root)


def source_version(source: Source) -> list[Any]:
    """Return what identifies the present content of a source: the versions of its files, and of a tar with its images.
    It is JSON, and small. Raise `DataError` as opening the source does."""
    version = hub_version(source) if is_hub(source) else FORMATS[source.format].version(source)
    tar = tar_of(source.image_root)
    return [*version, *(describe_version([tar]) if tar else ())]


def row_files(source: Source) -> tuple[str, ...]:
    """Return the addresses of the files whose rows are those of a source; none for formats of folders. Raise
    `DataError`."""
    return find_files(source) if FORMATS[source.format].version is _files_version else ()


def _files_version(source: Source) -> list[Any]:
    return describe_version(find_files(source))


@dataclass(frozen=True)
class Format:
    """How rows of a format become records.

    `make` raises `ValueError` for a row that cannot be used; None: the file is read as a whole. One column of each
    group of names in `needs` must be filled. `has_attributes`: columns without another meaning are attributes.
    `lists_labels`: the data set lists its class names, in their order. `open` returns the rows; `version` what
    identifies the present content of the files that `open` reads.
    """

    make: Callable[[Row], Record] | None
    needs: tuple[tuple[str, ...], ...] = ()
    has_attributes: bool = False
    lists_labels: bool = False
    open: Callable[[Source], OpenedRows] = open_rows
    version: Callable[[Source], list[Any]] = _files_version


FORMATS: dict[str, Format] = {
    "coco": Format(None, lists_labels=True, open=_open_coco),
    "yolo": Format(detection_record, lists_labels=True, open=open_yolo, version=yolo_version),
    "voc": Format(detection_record, open=open_voc, version=voc_version),
    "labelme": Format(detection_record, open=open_labelme, version=labelme_version),
    "cvat": Format(detection_record, lists_labels=True, open=open_cvat, version=cvat_version),
    "label_studio": Format(label_studio_record, open=open_label_studio),
    "hf_objects": Format(hf_objects_record, (("image", "images", "file_name"),)),
    "llava": Format(partial(chat_record, column="conversations"), (("conversations",),)),
    "messages": Format(partial(chat_record, column="messages"), (("messages",),)),
    "openai": Format(partial(chat_record, column="messages"), (("messages",),)),
    "query_response": Format(query_record, (("query",), ("response",))),
    "alpaca": Format(alpaca_record, (("instruction", "input"), ("output",))),
    "objects": Format(objects_record, (("images", "image"), ("objects",))),
    "image_csv": Format(classification_record, (("image", "file_name"),), has_attributes=True),
    "image_folder": Format(_folder_record, open=_open_folder, version=folder_version),
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
    "rec": Format(rec_record, (("problem", "prompt", "conversations", "messages"),)),
}
