"""Read Arrow files, the stream that `datasets` writes or the IPC file, in pieces, as rows of named cells.

A file is a row of messages: the schema, dictionaries, and batches of rows, each with a head that says how long its body
is (arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc). To divide a file only
the heads are read. Of a batch that is cut, a piece reads the texts and bytes of its own rows alone.
"""

import mmap
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from ray_vlm.data.records import BadRow, ImageRange
from ray_vlm.data.sources.columns import (
    binary_columns,
    class_features,
    column_kinds,
    column_names,
    cut_groups,
    locate_images,
    rows_of_batch,
)
from ray_vlm.data.sources.pieces import PIECE_ROWS, NumberedRow, Piece, changed_file, unreadable_file
from ray_vlm.errors import DataError
from ray_vlm.storage import describe_file, open_file

if TYPE_CHECKING:
    from pyarrow import Array, Buffer, RecordBatch

_MAGIC, _OLD_FEATHER = b"ARROW1", b"FEA1"
_FILE_START = 8  # bytes before the stream in an IPC file
_GOES_ON = b"\xff\xff\xff\xff"  # before the size of a head; writers before Arrow 0.15 left it out
_READ_AHEAD = 4096  # bytes that are read of a message; most heads are smaller
_LARGEST_HEAD = 64 * 2**20
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3  # kinds of messages
_CUT_BYTES = 2**20  # a smaller body is read as a whole
_AGAIN = "Write or fetch it again."


class _Message(NamedTuple):
    """A message: where it starts in the file, the bytes of its head and of its body, and what the head says.

    `dictionary`: the number of the dictionary that it replaces, -1 for one that it extends and for other messages.
    """

    kind: int
    start: int
    head: int
    body: int
    num_rows: int = 0
    is_compressed: bool = False
    dictionary: int = -1


class ArrowTable:
    """An Arrow file. Its pieces are ranges of rows in it."""

    def __init__(self, address: str):
        """Read the schema and the heads of all batches. Raise `DataError`."""
        from pyarrow import ArrowException

        self.address = address
        try:
            self.version = describe_file(address)[1:]
            with open_file(address) as file:
                messages = _Messages(address, file, self.version[0])
                self._read_heads(messages)
        except (OSError, ValueError, ImportError, ArrowException) as error:
            raise unreadable_file(address, error) from None

    def _read_heads(self, messages: "_Messages") -> None:
        from pyarrow import ipc, py_buffer

        listed = iter(messages)
        self.schema = messages.read_schema(next(listed, None))
        schema = ipc.read_schema(py_buffer(self.schema))
        self.columns: tuple[str, ...] | None = column_names(self.address, schema)
        self.features, self.binary = class_features(schema.metadata or {}), binary_columns(schema)
        self.kinds = column_kinds(schema, self.features)
        batches: list[_Message] = []
        dictionaries: tuple[_Message, ...] = ()
        self.dictionaries: list[tuple[_Message, ...]] = []  # of each batch
        for message in listed:
            if message.kind == _DICTIONARY:
                kept = (old for old in dictionaries if message.dictionary < 0 or old.dictionary != message.dictionary)
                dictionaries = (*kept, message)
            elif message.num_rows:
                batches.append(message)
                self.dictionaries.append(dictionaries)
        if messages.is_file:  # in which a batch may precede its dictionaries
            self.dictionaries = [dictionaries] * len(batches)
        self.batches = batches
        self.ends = tuple(accumulate(message.num_rows for message in batches))

    def describe_copies(self) -> str | None:
        """Return a line on the images that the index holds a copy of, or None if it holds positions alone."""
        if not self.binary or not any(message.is_compressed for message in self.batches):
            return None
        return (
            f"{self.address} is compressed, so images inside it are copied into the index (in data.index_dir); of a "
            "file that is not compressed it holds their positions alone"
        )

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[Piece]:
        """Yield the pieces of the file; nothing is read for them. A change of the file changes all of them."""
        return cut_groups(((message.num_rows, message.body) for message in self.batches), rows, self.version)

    def read(self, piece: Piece) -> list[NumberedRow | BadRow]:
        """Return the rows of a piece. Raise `DataError` if the file has changed."""
        from pyarrow import ArrowException

        rows: list[NumberedRow | BadRow] = []
        row, end = piece.first_row, piece.first_row + piece.num_rows
        before: tuple[tuple[_Message, ...], bytes] | None = None  # the dictionaries of a batch, and what precedes it
        try:
            if describe_file(self.address)[1:] != self.version:
                raise changed_file(self.address)
            with open_file(self.address) as file:
                while row < end:
                    number = bisect_right(self.ends, row)
                    count = min(end, self.ends[number]) - row
                    first = row - self.ends[number] + self.batches[number].num_rows
                    if before is None or before[0] is not self.dictionaries[number]:
                        listed = self.dictionaries[number]
                        texts = (_read_at(file, message.start, message.head + message.body) for message in listed)
                        before = listed, b"".join([self.schema, *texts])
                    part, offset = _Body(file, self.batches[number], before[1]).read(first, count)
                    names = () if offset is None else self.binary
                    columns = {name: _Positions(part.column(name), offset or 0) for name in names}
                    rows += rows_of_batch(part, row, self.features, partial(self._locate, columns, row))
                    row += count
        except (OSError, ValueError, ImportError, ArrowException) as error:
            raise unreadable_file(self.address, error) from None
        return rows

    def _locate(self, columns: dict[str, "_Positions"], first: int, cells: dict[str, Any], row: int) -> None:
        """Give the images among the cells of a row their position in the file. `first`: the number of the first row."""
        for name, positions in columns.items():
            cells[name] = locate_images(cells[name], partial(self._location, positions, row - first))

    def _location(self, positions: "_Positions", row: int, item: int) -> ImageRange:
        return ImageRange(self.address, self.version, *positions.find(row, item))


class _Positions:
    """Where the bytes in the cells of a column lie in the file."""

    def __init__(self, array: "Array", offset: int):
        """Read the offsets of values. `offset`: from addresses in memory to positions in the file."""
        from pyarrow import types

        self.rows: np.ndarray | None = None  # the number of the first value of each row that is a list
        if types.is_fixed_size_list(array.type):
            self.rows = (array.offset + np.arange(len(array))) * array.type.list_size
            array = array.values
        elif types.is_list(array.type) or types.is_large_list(array.type):
            self.rows = array.offsets.to_numpy()
            array = array.values
        array = array.field("bytes") if types.is_struct(array.type) else array
        first, last = array.offset, array.offset + len(array)
        *_, offsets, data = array.buffers()
        if types.is_fixed_size_binary(array.type):
            self.ends = np.arange(first, last + 1) * array.type.byte_width
        else:
            wide = types.is_large_binary(array.type)
            self.ends = np.frombuffer(offsets or b"", np.int64 if wide else np.int32)[first : last + 1]
        self.start = (data.address if data is not None else 0) + offset

    def find(self, row: int, item: int) -> tuple[int, int]:
        """Return the first byte and the number of bytes of a value. `item`: its number in a list, else -1."""
        number = row if self.rows is None else int(self.rows[row]) + item
        first, end = int(self.ends[number]), int(self.ends[number + 1])
        return self.start + first, end - first


class _Body:
    """The body of a batch, in memory that is as large as the body; pages that are not read take none."""

    def __init__(self, file: BinaryIO, message: _Message, before: bytes):
        """Read the head. `before`: the messages that must precede the batch."""
        from pyarrow import py_buffer

        self.file, self.message = file, message
        self.head = len(before) + message.head
        size = self.head + message.body
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes = memoryview(memory)
        self.bytes[: len(before)] = before
        _read_into(file, message.start, self.bytes[len(before) : self.head])
        self.buffer = py_buffer(memory)
        self.start = self.buffer.address + self.head

    def read(self, first: int, count: int) -> tuple["RecordBatch", int | None]:
        """Return `count` rows from `first` on, and what turns an address in memory into a position in the file; None if
        their values do not lie in the file as they are. Raise `ValueError` for a damaged file."""
        message = self.message
        few = 2 * count < message.num_rows and message.body > _CUT_BYTES and not message.is_compressed
        part = self._read_some(first, count) if few else None
        if part is None:
            self._load(0, message.body)
            part = self._batch().slice(first, count)
        _check(part)
        inside = not message.is_compressed and self._is_inside(part)
        return part, message.start + message.head - self.start if inside else None

    def _read_some(self, first: int, count: int) -> "RecordBatch | None":
        """Return rows of which nothing else but small buffers is read, or None if this batch cannot be read so."""
        batch = self._batch()  # all of its values are zeros as yet
        if not self._is_inside(batch):
            return None
        held = sorted({(d.address - self.start, d.size) for c in batch.columns for d, _, _ in _values(c)})
        end = 0
        for start, size in (*held, (self.message.body, 0)):
            self._load(end, start)
            end = max(end, start + size)
        part = batch.slice(first, count)
        for data, low, high in [values for column in part.columns for values in _values(column)]:
            self._load(data.address - self.start + low, data.address - self.start + high)
        return part

    def _batch(self) -> "RecordBatch":
        from pyarrow import ipc

        batch = ipc.open_stream(self.buffer).read_next_batch()
        batch.validate()
        return batch

    def _is_inside(self, batch: "RecordBatch") -> bool:
        """Return whether a batch has no values outside this memory, as copies of other alignment or byte order are."""
        buffers = [b for column in batch.columns for b in column.buffers() if b is not None and b.size]
        return all(0 <= b.address - self.start <= self.message.body - b.size for b in buffers)

    def _load(self, start: int, end: int) -> None:
        """Read bytes of the body from the file."""
        if start < end:
            position = self.message.start + self.message.head + start
            _read_into(self.file, position, self.bytes[self.head + start : self.head + end])


def _values(array: "Array") -> Iterator[tuple["Buffer", int, int]]:
    """Yield of each column of texts or bytes inside an array the buffer of its values, and the range of it that the
    array has. Raise `ValueError` if the offsets of values make no sense."""
    from pyarrow import types

    kind, last = array.type, array.offset + len(array)
    if types.is_struct(kind):
        for number in range(kind.num_fields):
            yield from _values(array.field(number))
    elif types.is_fixed_size_list(kind):
        size = kind.list_size
        yield from _values(array.values.slice(array.offset * size, len(array) * size))
    elif types.is_list(kind) or types.is_large_list(kind):
        low, high = _range(array.buffers()[1], array.offset, last, len(array.values), types.is_large_list(kind))
        yield from _values(array.values.slice(low, high - low))
    elif types.is_binary(kind) or types.is_string(kind) or types.is_large_binary(kind) or types.is_large_string(kind):
        _, offsets, data = array.buffers()
        if data is not None:
            wide = types.is_large_binary(kind) or types.is_large_string(kind)
            yield data, *_range(offsets, array.offset, last, data.size, wide)


def _range(offsets: "Buffer | None", first: int, last: int, limit: int, wide: bool) -> tuple[int, int]:
    """Return where the first value begins and the last one ends."""
    if offsets is None or first == last:
        return 0, 0
    ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[first : last + 1]
    if len(ends) <= last - first or ends[0] < 0 or ends[-1] > limit or (np.diff(ends) < 0).any():
        raise ValueError("the offsets of its values are damaged")
    return int(ends[0]), int(ends[-1])


def _check(batch: "RecordBatch") -> None:
    """Raise `ValueError` if values of a batch cannot be read. Texts that are not UTF-8 pass: their rows are bad."""
    from pyarrow import ArrowInvalid

    for column in batch.columns:
        list(_values(column))
        try:
            column.validate(full=True)
        except ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise


class _Messages:
    """The messages of an Arrow file in order, from their heads."""

    def __init__(self, address: str, file: BinaryIO, size: int):
        self.address, self.file, self.end = address, file, size
        start = _read_at(file, 0, min(size, _FILE_START))
        if start.startswith(_OLD_FEATHER):
            raise DataError(f"{address}: Feather of version 1. Write it with version=2.")
        self.is_file = start.startswith(_MAGIC)
        self.start = _FILE_START if self.is_file else 0
        if self.is_file:
            foot = _read_at(file, max(0, size - 10), min(size, 10))
            footer = int.from_bytes(foot[:4], "little")
            if size < 2 * _FILE_START or not foot.endswith(_MAGIC) or footer > size - 10 - _FILE_START:
                raise self._cut_off("its footer is missing")
            self.end = size - 10 - footer

    def __iter__(self) -> Iterator[_Message]:
        position = self.start
        while (message := self._read(position)) is not None:
            if (message.kind == _SCHEMA) != (position == self.start) or message.kind not in (1, 2, 3):
                raise self._damaged(position)
            yield message
            position += message.head + message.body

    def read_schema(self, message: _Message | None) -> bytes:
        """Return the message with the schema, which is the first."""
        if message is None:
            raise DataError(f"{self.address}: not an Arrow file. Give a .arrow file as `datasets` or pyarrow write it.")
        return _read_at(self.file, message.start, message.head + message.body)

    def _read(self, position: int) -> _Message | None:
        """Read the head of the message at a position; None where the messages end."""
        if self.is_file and position == self.end:
            return None  # early writers put no end mark before the footer
        ahead = _read_at(self.file, position, min(_READ_AHEAD, self.end - position))
        if len(ahead) < 8:
            raise self._cut_off("it has no end mark" if not ahead else "it ends within a message")
        before = 8 if ahead.startswith(_GOES_ON) else 4
        (size,) = struct.unpack_from("<i", ahead, before - 4)
        if size == 0:
            return None
        if position == self.start and before == 4 and not 0 < size <= min(_LARGEST_HEAD, self.end):
            return None  # no Arrow file
        if not 0 < size <= _LARGEST_HEAD:
            raise self._damaged(position)
        head = before + size
        if head > len(ahead):
            ahead += _read_at(self.file, position + len(ahead), max(0, min(head, self.end - position) - len(ahead)))
        if head > len(ahead):
            raise self._cut_off("it ends within a message")
        try:
            message = _parse(ahead[before:head], position, head)
        except (struct.error, IndexError):
            raise self._damaged(position) from None
        if message.body < 0 or message.num_rows < 0:
            raise self._damaged(position)
        if position + head + message.body > self.end:
            raise self._cut_off("it ends within a message")
        return message

    def _cut_off(self, reason: str) -> DataError:
        return DataError(f"{self.address}: the file is not complete ({reason}). {_AGAIN}")

    def _damaged(self, position: int) -> DataError:
        return DataError(f"{self.address}: damaged, no message of an Arrow file is at byte {position}. {_AGAIN}")


class _Fields:
    """A table of a flatbuffer (flatbuffers.dev/internals), whose fields have numbers."""

    def __init__(self, data: bytes, start: int):
        self.data, self.start = data, start
        self.numbers = start - _number(data, start, "<i")

    def _at(self, field: int) -> int:
        """Return the position of a field, 0 for one that is left out."""
        offset = 4 + 2 * field
        if offset >= _number(self.data, self.numbers, "<H"):
            return 0
        inside = _number(self.data, self.numbers + offset, "<H")
        return self.start + inside if inside else 0

    def number(self, field: int, kind: str = "<q") -> int:
        """Return a number, by default one of eight bytes; 0 for a field that is left out."""
        position = self._at(field)
        return _number(self.data, position, kind) if position else 0

    def table(self, field: int) -> "_Fields | None":
        """Return a table, or None if it is left out."""
        position = self._at(field)
        return _Fields(self.data, position + _number(self.data, position, "<I")) if position else None

    def vector(self, field: int) -> int:
        """Return the position of the first item of a list, 0 if there is none."""
        position = self._at(field)
        start = position + _number(self.data, position, "<I") if position else 0
        return start + 4 if start and _number(self.data, start, "<I") else 0


def _number(data: bytes, position: int, kind: str) -> int:
    if position < 0:
        raise IndexError(position)
    return int(struct.unpack_from(kind, data, position)[0])


def _parse(data: bytes, start: int, head: int) -> _Message:
    """Return what a head says (format/Message.fbs and Schema.fbs of Arrow). Raise `IndexError` or `struct.error`."""
    fields = _Fields(data, _number(data, 0, "<I"))
    kind, body = fields.number(1, "<B"), fields.number(3)
    header = fields.table(2)
    if header is None:
        raise IndexError(start)
    if kind == _BATCH:
        length = header.vector(1)
        if length and _number(data, length, "<q") != header.number(0):
            raise IndexError(start)  # the first column has another number of rows
        return _Message(kind, start, head, body, header.number(0), header.table(3) is not None)
    if kind == _DICTIONARY:
        return _Message(kind, start, head, body, dictionary=-1 if header.number(2, "<B") else header.number(0))
    return _Message(kind, start, head, body)


def _read_at(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _read_into(file: Any, position: int, target: memoryview) -> None:
    """Fill `target` with the bytes of a file from `position` on. Raise `ValueError` where the file ends."""
    file.seek(position)
    read: Callable[[memoryview], int] = file.readinto
    done = 0
    while done < len(target):
        size = read(target[done:])
        if not size:
            raise ValueError(f"it ends {len(target) - done} bytes before a batch of rows does")
        done += size
