"""Read CSV, TSV and Parquet in pieces, as rows of named cells, and open any table. No file is held as a whole.

A line that cannot be read becomes a `BadRow`.
"""

import csv
import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ray_vlm.config.row_files import split_suffix
from ray_vlm.data.inner_images import LARGEST_GROUP_BYTES
from ray_vlm.data.records import BadRow, ImageCell
from ray_vlm.data.sources.arrow import ArrowTable
from ray_vlm.data.sources.columns import (
    apply_class_names,
    binary_columns,
    class_features,
    column_kinds,
    column_names,
    cut_groups,
    locate_images,
    rows_of_batch,
)
from ray_vlm.data.sources.fields import text_fault
from ray_vlm.data.sources.pieces import (
    MAX_LINE_BYTES,
    PIECE_ROWS,
    CompressedJsonLines,
    JsonLines,
    JsonList,
    LineFile,
    LongLine,
    NumberedRow,
    Piece,
    changed_file,
    cut_entries,
    describe_long,
    read_blocks,
    unreadable_file,
)
from ray_vlm.data.sources.tar import TAR_NAMES
from ray_vlm.data.sources.webdataset import WebDatasetTable
from ray_vlm.errors import DataError
from ray_vlm.runs.text import plural
from ray_vlm.storage import describe_file, open_file, split_options

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import FileMetaData

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_BATCH_ROWS, _BATCH_BYTES = 256, 16 * 2**20  # of Parquet that are decoded at a time; rows may hold images
_LOCAL = threading.local()  # `group`: the row group of a Parquet file that this thread reads


class TableFile(Protocol):
    """A file with rows. It pickles, and is small.

    `columns` are the names that the file gives to its columns (CSV, Parquet, Arrow), so that a missing one is a fault
    of the file and not of its rows; None for JSON, whose rows have names of their own.
    """

    address: str
    columns: tuple[str, ...] | None

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[Piece]:
        """Yield the pieces of the file in order, each of up to `rows` rows. Raise `DataError`."""

    def read(self, piece: Piece) -> list[NumberedRow | BadRow]:
        """Return the rows of a piece. Raise `DataError` if the file has changed."""


class OpenedRows(NamedTuple):
    """The rows of a source, and the folder or tar of its images unless the source names one.

    `follow_links`: images may be symlinks out of the folder. `table` is None for COCO, whose reader opens the file.
    """

    table: TableFile | None
    image_root: str
    follow_links: bool = False


@dataclass(frozen=True)
class Table:
    """The rows of a file in order. `columns` are all names in order of appearance."""

    rows: list[NumberedRow | BadRow]
    columns: tuple[str, ...]


_UNPACK = {".gz": "gunzip", ".zst": "unzstd"}
_REPACK = " Unpack it, or compress it as .gz or .zst."
_YOLO = " If these are YOLO's labels, set format=yolo and give `path` the data.yaml or its folder."
_TOOLS = {  # advice for other suffixes
    ".yaml": _YOLO,
    ".yml": _YOLO,
    ".txt": _YOLO,
    ".xml": " For Pascal VOC set format=voc and give `path` the folder; for a file of CVAT set format=cvat.",
    **dict.fromkeys((".bz2", ".xz", ".lz4", ".zip", ".br"), _REPACK),
    ".tfrecord": " TFRecord is not read: convert it to Parquet or COCO.",
}


def open_table(address: str) -> TableFile:
    """Return the file of rows at an address, by its suffix. Raise `DataError` if the whole file cannot be used."""
    suffix, packed = split_suffix(address)
    if split_options(address)[0].lower().endswith(TAR_NAMES):
        return WebDatasetTable(address)
    if suffix in _SEPARATORS:
        return CsvTable(address, separator=_SEPARATORS[suffix])
    if suffix in (".jsonl", ".ndjson"):
        return CompressedJsonLines(address) if packed else JsonLines(address)
    if suffix == ".json":
        return JsonList(address)
    if packed and suffix in (".parquet", ".arrow", ".feather"):
        raise DataError(
            f"{address}: {suffix} inside {packed} is not read, since no part of it can be read alone. Unpack it "
            f"({_UNPACK[packed]}); these files are compressed inside."
        )
    if suffix == ".parquet":
        return ParquetTable(address)
    if suffix in (".arrow", ".feather"):
        return ArrowTable(address)
    suffix += packed
    raise DataError(
        f"{address}: rows are not read from {suffix or 'a name without a suffix'}. Give a .json, .jsonl, .ndjson, "
        f".csv or .tsv file, of which each may be in .gz or .zst, or a .parquet, .arrow, .feather or .tar file."
        f"{_TOOLS.get(suffix, '')}"
    )


class ClassNames:
    """A file of rows in which numbers of classes are replaced by names that its data set lists elsewhere."""

    def __init__(self, table: TableFile, features: Mapping[str, Any]):
        self.table, self.features = table, features
        self.address, self.columns = table.address, table.columns

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[Piece]:
        """Yield the pieces of the file."""
        return self.table.pieces(rows)

    def read(self, piece: Piece) -> list[NumberedRow | BadRow]:
        """Return the rows of a piece."""
        rows = self.table.read(piece)
        return [row if isinstance(row, BadRow) else (row[0], self._name(row[1])) for row in rows]

    def _name(self, cells: dict[str, Any]) -> Any:
        """Replace numbers by names. In a CSV file they are text, of which a name of a class is that class first."""
        numbers = {}
        for column, feature in self.features.items():
            value, names = cells.get(column), feature.get("names") if isinstance(feature, dict) else None
            if isinstance(value, str) and names is not None and value not in names and value.strip().isdecimal():
                numbers[column] = int(value)
        return apply_class_names(cells | numbers, self.features)


def open_with_classes(address: str, features: Mapping[str, Any] | None) -> TableFile:
    """Return the file of rows at an address, with the class names of `features`, of `datasets`, unless it has its own.
    Raise `DataError`."""
    table = open_table(address)
    if not features:
        return table
    if isinstance(table, ParquetTable | ArrowTable):
        table.features = table.features or dict(features)
        return table
    return ClassNames(table, features)


def read_table(address: str) -> Table:
    """Read all rows of a file. Raise `DataError` if the whole file cannot be used."""
    return read_all(open_table(address))


def read_all(file: TableFile) -> Table:
    """Read all rows of one or of several files. Raise `DataError` if one cannot be used as a whole."""
    rows = [row for piece in file.pieces() for row in file.read(piece)]
    if not rows:
        raise no_rows(file.address)
    return Table(rows, file.columns if file.columns is not None else tuple(_names(rows)))


def no_rows(address: str) -> DataError:
    """Return the error for a file without rows."""
    return DataError(f"{address}: holds no rows. Give a file with at least one.")


def names_of_rows(file: TableFile, wanted: Collection[str] | None = None) -> tuple[str, ...]:
    """Return all names that rows of a file have, in order of appearance.

    `wanted`: stop once all of these have been met.
    """
    names: dict[str, None] = {}
    for piece in file.pieces():
        names |= _names(file.read(piece))
        if wanted is not None and names.keys() >= set(wanted):
            break
    return tuple(names)


def _names(rows: Iterable[NumberedRow | BadRow]) -> dict[str, None]:
    return {name: None for row in rows if not isinstance(row, BadRow) for name in row[1]}


@dataclass
class CsvTable(LineFile):
    """A CSV or TSV file. One process reads it: only a record's end says where the next one begins. `entries` of its
    pieces are the rows."""

    separator: str = ","

    def __post_init__(self) -> None:
        """Read the header. Raise `DataError` if there is none."""
        super().__post_init__()
        address = self.address
        header = next((cells for _, _, cells in self._records() if cells), [])
        if isinstance(header, str):
            raise DataError(f"{address}: the first line is not a CSV header ({header}). Mend its quotes.")
        names = [name.strip() for name in header]
        if not any(names) or text_fault(names):
            raise DataError(f"{address}: the first line must be a header with the names of the columns, as UTF-8 text.")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not all(names):
            raise DataError(
                f"{address}: the header has {twice or 'a column'} twice or empty. Give each column one name."
            )
        self.columns = tuple(names)

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[Piece]:
        """Yield the pieces of the file."""
        return cut_entries(self._entries(), rows, self.columns)

    def read(self, piece: Piece) -> list[NumberedRow | BadRow]:
        """Return the rows of a piece."""
        return list(piece.entries)

    def _entries(self) -> Iterator[tuple[NumberedRow | BadRow, bytes]]:
        """Yield the rows behind the header, with their line numbers and bytes."""
        names = self.columns or ()
        records = ((line, lines, cells) for line, lines, cells in self._records() if cells)
        next(records)
        for row, (number, lines, cells) in enumerate(records):
            size = max(line.size if isinstance(line, LongLine) else len(line) for line in lines)
            value, reason = _csv_row(cells, names, size)
            texts = (line if isinstance(line, bytes) else b"%d" % line.size for line in lines)
            identity = b"".join([b"%d\n" % number, *texts])
            yield BadRow(row, "", f"line {number} {reason}") if reason else (row, value), identity

    def _records(self) -> Iterator[tuple[int, list[bytes | LongLine], list[str] | str]]:
        """Yield the number of the first line, the lines, and the cells or why there are none; a blank line has no
        cells.

        After a broken record, reading continues at the line behind its first, so that an unclosed quote does not
        swallow the rest of the file. The lines of one record are held, and no cell has more than `MAX_LINE_BYTES`.
        """
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
        lines = self.split(read_blocks(self.address, self.start))
        again: deque[bytes | LongLine] = deque()  # lines behind the first of a broken record
        record: list[bytes | LongLine] = []

        def feed() -> Iterator[str]:
            while (line := again.popleft() if again else next(lines, None)) is not None:
                record.append(line)
                if isinstance(line, LongLine):
                    raise csv.Error(f"field larger than field limit ({MAX_LINE_BYTES})")
                yield line.decode("utf-8", "surrogateescape")

        number, ended = 1, False
        while not ended:
            try:
                for cells in csv.reader(feed(), delimiter=self.separator, strict=True):
                    yield number, record, cells if any(cells) or len(cells) > 1 else []
                    number += len(record)
                    record = []
                ended = True
            except csv.Error as error:
                again.extendleft(reversed(record[1:]))
                yield number, record[:1], str(error)
                number += 1
                record = []


def _csv_row(cells: list[str] | str, names: tuple[str, ...], size: int) -> tuple[dict[str, Any], str | None]:
    """Return cells by name, or why there are none."""
    if size > MAX_LINE_BYTES:
        return {}, describe_long(size)
    if isinstance(cells, str):
        return {}, f"is not CSV ({cells}); write a quote inside quotes twice"
    if any("\0" in cell for cell in cells):
        return {}, "holds NUL characters; write the file again"
    if text_fault(cells):
        return {}, "is not UTF-8; save the file as UTF-8"
    if len(cells) != len(names):
        return {}, f"has {len(cells)} cells for {len(names)} columns; put quotes around cells that hold a separator"
    return dict(zip(names, cells, strict=True)), None


class ParquetTable:
    """A Parquet file. Its pieces are ranges of rows in it; reading one decodes only the row groups that it lies in."""

    def __init__(self, address: str):
        """Read names, types and row groups. Raise `DataError`."""
        from pyarrow import ArrowException, parquet

        self.address = address
        try:
            self.version = describe_file(address)[1:]
            with open_file(address) as opened, parquet.ParquetFile(opened) as file:
                schema, groups = file.schema_arrow, [file.metadata.row_group(i) for i in range(file.num_row_groups)]
                self.groups = tuple((group.num_rows, group.total_byte_size) for group in groups)
                self.binary = binary_columns(schema)
                self.image_bytes = _image_bytes(file.metadata, self.binary)
        except (OSError, ValueError, ImportError, ArrowException) as error:
            raise unreadable_file(address, error) from None
        self.columns: tuple[str, ...] | None = column_names(address, schema)
        self.features = class_features(schema.metadata or {})
        self.kinds = column_kinds(schema, self.features)
        self.ends = tuple(accumulate(num_rows for num_rows, _ in self.groups))

    def describe_copies(self) -> str | None:
        """Return a line on the images that the index holds a copy of, or None if it holds positions alone."""
        large = [size for size in self.image_bytes if size > LARGEST_GROUP_BYTES]
        if not large:
            return None
        return (
            f"{self.address}: the images of {plural(len(large), 'row group')}, {sum(large) / 1e6:,.0f} MB, are copied "
            f"once into the index (in data.index_dir): a group of more than {LARGEST_GROUP_BYTES / 2**20:.0f} MiB is "
            "too large to be read for each of its rows. A file with groups of 100 rows, say, needs no copy"
        )

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[Piece]:
        """Yield the pieces of the file; nothing is read for them. A change of the file changes all of them."""
        return cut_groups(self.groups, rows, self.version)

    def read(self, piece: Piece) -> list[NumberedRow | BadRow]:
        """Return the rows of a piece. Raise `DataError` if the file has changed."""
        from pyarrow import ArrowException

        rows: list[NumberedRow | BadRow] = []
        row, end = piece.first_row, piece.first_row + piece.num_rows
        try:
            while row < end:
                for batch in self._batches(row, end):
                    decoded = sum(batch.column(name).nbytes for name in self.binary) / max(1, batch.num_rows)
                    rows += rows_of_batch(batch, row, self.features, partial(self._locate, decoded))
                    row += batch.num_rows
        except (OSError, ValueError, ImportError, ArrowException) as error:
            raise unreadable_file(self.address, error) from None
        return rows

    def _batches(self, row: int, end: int) -> Iterator["RecordBatch"]:
        """Yield the rows of one group from `row` to `end`, or to the end of the group.

        A group can be decoded only from its start. This thread goes on where it stopped if the next piece lies behind.
        """
        number = bisect_right(self.ends, row)
        start = self.ends[number] - self.groups[number][0]  # of the group
        key = (os.getpid(), self.address, self.version, number)
        group: _RowGroup | None = getattr(_LOCAL, "group", None)
        _LOCAL.group = None
        if group is None or group.key != key or row < start + group.first:
            group = _RowGroup(key, self._decode(number))
        yield from group.take(row - start, min(end, self.ends[number]) - start)
        if end < self.ends[number]:
            _LOCAL.group = group

    def _decode(self, number: int) -> Iterator["RecordBatch"]:
        from pyarrow import parquet

        if describe_file(self.address)[1:] != self.version:
            raise changed_file(self.address)
        num_rows, size = self.groups[number]
        batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * num_rows // max(1, size)))
        with open_file(self.address) as opened, parquet.ParquetFile(opened, buffer_size=2**20) as file:
            yield from file.iter_batches(batch_rows, row_groups=[number])

    def _locate(self, row_bytes: float, cells: dict[str, Any], row: int) -> None:
        """Give the images among the cells their position in the file, unless their group is too large for that.
        `row_bytes`: of the images of a row here, which a dictionary in the file may hold once for many rows."""
        number = bisect_right(self.ends, row)
        if max(self.image_bytes[number], row_bytes * self.groups[number][0]) > LARGEST_GROUP_BYTES:
            return
        cell = ImageCell(self.address, self.version, number, row - self.ends[number] + self.groups[number][0], "")
        for column in self.binary:
            cells[column] = locate_images(cells[column], partial(_in_column, cell, column))


def _in_column(cell: ImageCell, column: str, item: int) -> ImageCell:
    return replace(cell, column=column, item=item)


def _image_bytes(metadata: "FileMetaData", columns: Collection[str]) -> tuple[int, ...]:
    """Return the bytes of some columns in each row group, before compression; what a dictionary holds counts once."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    return tuple(
        sum(
            chunk.total_uncompressed_size
            for chunk in map(group.column, range(group.num_columns))
            if any(f"{chunk.path_in_schema}.".startswith(f"{column}.") for column in columns)
        )
        for group in groups
    )


class _RowGroup:
    """The batches of a row group, decoded from its start as far as rows were asked for."""

    def __init__(self, key: tuple, batches: Iterator["RecordBatch"]):
        self.key, self.batches = key, batches
        self.batch = next(batches)
        self.first = 0  # row of the batch in the group

    def take(self, row: int, end: int) -> Iterator["RecordBatch"]:
        """Yield the rows from `row`, which may not lie before the current batch, to `end`."""
        while row < end:
            while row >= self.first + self.batch.num_rows:
                self.first += self.batch.num_rows
                self.batch = next(self.batches)
            part = self.batch.slice(row - self.first, end - row)
            yield part
            row += part.num_rows
