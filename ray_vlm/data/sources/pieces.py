"""Divide JSON files into pieces, and read their rows as named cells. No file is held as a whole.

Also what readers of other tables share: pieces, blocks and lines of a file, and the errors of a whole file.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from ray_vlm.config.paths import describe_search
from ray_vlm.data.records import BadRow
from ray_vlm.data.sources.compressed import decompress, is_compressed
from ray_vlm.data.sources.fields import text_fault
from ray_vlm.data.sources.json_stream import DECODER, JsonStream, not_json
from ray_vlm.errors import DataError
from ray_vlm.storage import open_file, read_bytes

MAX_LINE_BYTES = 16 * 2**20
PIECE_ROWS = 2048
PIECE_BYTES = 16 * 2**20  # a piece has fewer rows if they are large
_BLOCK = 4 * 2**20  # bytes of a text file that are read at a time
_BOM = b"\xef\xbb\xbf"
_BLANKS = np.isin(np.arange(256), list(b" \t\n\r\v\f"))  # what `bytes.strip` removes
NumberedRow = tuple[int, dict[str, Any]]  # counted from 0 in the file, with cells by column


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a source, which one process reads. Plain data, and small unless `entries` is filled.

    `first_row` is the number of the first row; `num_rows` counts bad ones too. `fingerprint`, which can be part of a
    file name, changes if the rows, their numbers or their line numbers do. JSON lines: the bytes from `start` to `end`
    of the file, from line `first_line` on. Files that one process has to parse have their rows in `entries`. `labels`:
    class names that the file itself lists (COCO), in the first piece. `num_bytes`: of the rows in the file, about.
    `parts`: of a source of several files its tables, each with a piece of it; a piece of `num_rows` rows has the first
    of their rows.
    """

    first_row: int
    num_rows: int
    fingerprint: str
    start: int = 0
    end: int = 0
    first_line: int = 0
    entries: tuple[Any, ...] = ()
    labels: tuple[str, ...] = ()
    num_bytes: int = 0
    parts: tuple[tuple[Any, "Piece"], ...] = ()

    @property
    def holds_rows(self) -> bool:
        """Whether the piece has the rows themselves, and so is as large as they are."""
        return bool(self.entries) or any(part.holds_rows for _, part in self.parts)


def read_json(address: str) -> Any:
    """Read the value in a UTF-8 JSON file. Raise `DataError`."""
    try:
        data = b"".join(read_blocks(address)) if is_compressed(address) else read_bytes(address)
    except (OSError, ValueError, ImportError) as error:
        raise unreadable_file(address, error) from None
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise not_json(address, error) from None


def unreadable_file(address: str, error: Exception) -> DataError:
    """Return the error for a file that cannot be read. `error`: why."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{address}: no such file. Give `path` the location of the rows.{describe_search(address)}")
    if isinstance(error, IsADirectoryError):
        return DataError(f"{address}: a folder. Give `path` the file with the rows.")
    return DataError(f"{address}: not readable ({error}). Give `path` a file that this machine can read.")


def changed_file(address: str) -> DataError:
    """Return the error for a file that is not the one that was divided into pieces."""
    return DataError(f"{address}: changed while it was read. Start again once nothing writes to it.")


def row_digest(*values: object) -> "blake2b":
    """Return a hash of values that rows depend on, to which the rows are added."""
    return blake2b(repr(values).encode() + b"\n", digest_size=16)


def read_blocks(address: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a file from `start` to `end`, `_BLOCK` at a time; of a compressed one all from `start` on,
    decompressed. Raise `DataError`."""
    try:
        with open_file(address) as file:
            if is_compressed(address):
                for block in decompress(file, address, _BLOCK):
                    yield block[start:]
                    start = max(0, start - len(block))
                return
            file.seek(start)
            while block := file.read(_BLOCK if end is None else min(_BLOCK, end - start)):
                start += len(block)
                yield block
    except (OSError, ValueError, ImportError) as error:
        raise unreadable_file(address, error) from None


@dataclass
class LineFile:
    """A text file of lines: `start` is its first byte behind a byte order mark, `newline` what ends its lines."""

    address: str
    columns: tuple[str, ...] | None = None
    start: int = field(default=0, init=False)
    newline: bytes = field(default=b"\n", init=False)

    def __post_init__(self) -> None:
        """Look at the start of the file. Raise `DataError` if it cannot be read or is UTF-16."""
        for i, block in enumerate(read_blocks(self.address)):
            if i == 0 and block.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{self.address}: not UTF-8 but UTF-16. Save it as UTF-8.")
            if i == 0 and block.startswith(_BOM):
                self.start = len(_BOM)
            if b"\n" in block:
                return
        self.newline = b"\r"  # only very old files end lines with a carriage return alone

    def split(self, blocks: Iterable[bytes]) -> Iterator["bytes | LongLine"]:
        """Yield lines, each ended by a newline; of a line above `MAX_LINE_BYTES` only its length is kept."""
        line: bytes | LongLine = b""
        for block in blocks:
            first, *lines = block.split(self.newline)
            line = _extend(line, first)
            if lines:
                yield _extend(line, b"\n")
                yield from (whole + b"\n" for whole in lines[:-1])
                line = lines[-1]
        yield _extend(line, b"\n")


class LongLine(NamedTuple):
    """A line that is too long to be kept."""

    size: int  # with its newline
    is_blank: bool


def _extend(line: bytes | LongLine, more: bytes) -> bytes | LongLine:
    """Append bytes to a line; keep only its size where it becomes too long."""
    if isinstance(line, bytes) and len(line) + len(more) <= MAX_LINE_BYTES:
        return line + more
    size, is_blank = line if isinstance(line, LongLine) else (len(line), not line.strip())
    return LongLine(size + len(more), is_blank and not more.strip())


class JsonLines(LineFile):
    """A file with a JSON object on each line. Its pieces are ranges of bytes, which any process reads by itself."""

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[Piece]:
        """Yield the pieces of the file. They end where the number of rows is a multiple of `rows`, and earlier if the
        rows are large; so a change of one row leaves all other pieces as they were."""
        scan = _LineScan(self.start, rows, ord(self.newline))
        for block in read_blocks(self.address, self.start):
            yield from scan.add(block)
        if (last := scan.last_piece()) is not None:
            yield last

    def read(self, piece: Piece) -> list[NumberedRow | BadRow]:
        """Return the rows of a piece. Raise `DataError` if its bytes have changed."""
        digest = row_digest(piece.first_row, piece.first_line)
        rows: list[NumberedRow | BadRow] = []
        number = piece.first_row
        blocks = _hashed(read_blocks(self.address, piece.start, piece.end), digest)
        for position, line in enumerate(self.split(blocks), piece.first_line):
            if line.is_blank if isinstance(line, LongLine) else not line.strip():
                continue
            value, reason = _json_line(line)
            rows.append(BadRow(number, "", f"line {position} {reason}") if reason else (number, value))
            number += 1
        if digest.hexdigest() != piece.fingerprint.partition("-")[0]:
            raise changed_file(self.address)
        return rows[: piece.num_rows]


class CompressedJsonLines(LineFile):
    """A compressed file with a JSON object on each line. One process divides it, since no other can begin within it;
    `entries` of its pieces are the lines, each with its number."""

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[Piece]:
        """Yield the pieces of the file. Raise `DataError` where it is cut off or damaged."""
        return cut_entries(self._entries(), rows)

    def _entries(self) -> Iterator[tuple[tuple[int, bytes | LongLine], bytes]]:
        for number, line in enumerate(self.split(read_blocks(self.address, self.start)), 1):
            if not (line.is_blank if isinstance(line, LongLine) else not line.strip()):
                text = line if isinstance(line, bytes) else b"%d" % line.size
                yield (number, line), b"%d\n" % number + text

    def read(self, piece: Piece) -> list[NumberedRow | BadRow]:
        """Return the rows of a piece."""
        rows: list[NumberedRow | BadRow] = []
        for row, (number, line) in enumerate(piece.entries, piece.first_row):
            value, reason = _json_line(line)
            rows.append(BadRow(row, "", f"line {number} {reason}") if reason else (row, value))
        return rows


def _hashed(blocks: Iterable[bytes], digest: "blake2b") -> Iterator[bytes]:
    for block in blocks:
        digest.update(block)
        yield block


class _LineScan:
    """The division of a file into pieces, found while its blocks pass by once."""

    def __init__(self, start: int, rows: int, newline: int):
        self.limit, self.newline = rows, newline
        self.position = start  # of the next block
        self.filled = False  # whether the line that goes on in the next block has text
        self.row, self.line = 0, 1  # of the next complete line
        self._begin(start, 0, 1)

    def _begin(self, start: int, row: int, line: int) -> None:
        self.start, self.first_row, self.first_line = start, row, line
        self.digest = row_digest(row, line)

    def _piece(self, end: int, rows: int) -> Piece:
        size = end - self.start
        return Piece(self.first_row, rows, self.digest.hexdigest(), self.start, end, self.first_line, num_bytes=size)

    def add(self, block: bytes) -> Iterator[Piece]:
        """Yield the pieces that end in the next block."""
        data = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(data == self.newline) + 1  # behind each newline
        starts = np.concatenate([[0], ends])
        filled = self._find_filled(block, data, starts)
        rows = self.row + np.cumsum(filled)  # up to and including each line
        full = np.flatnonzero(filled & (rows % self.limit == 0))
        hashed, line = 0, 0  # bytes and lines of the block that belong to earlier pieces
        while len(ends):
            by_rows = full[np.searchsorted(full, line) :][:1]
            size = self.start + PIECE_BYTES - self.position
            last = int(min([*by_rows, np.searchsorted(ends, size)]))
            if last >= len(ends):
                break
            end = int(ends[last])
            self.digest.update(memoryview(block)[hashed:end])
            if rows[last] > self.first_row:
                yield self._piece(self.position + end, int(rows[last]) - self.first_row)
            self._begin(self.position + end, int(rows[last]), self.line + last + 1)
            hashed, line = end, last + 1
        self.digest.update(memoryview(block)[hashed:])
        self.position += len(block)
        self.line += len(ends)
        self.row = int(rows[-1]) if len(ends) else self.row

    def _find_filled(self, block: bytes, data: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Return for each line that ends in the block whether it has text, `bool [lines]`; note it of the next one."""
        ends = np.append(starts[1:], len(block))
        filled = ~_BLANKS[data[np.minimum(starts, len(block) - 1)]] & (ends > starts)
        filled[0] |= self.filled
        for i in np.flatnonzero(~filled & (ends - starts > 1)):
            filled[i] = bool(block[starts[i] : ends[i]].strip())
        self.filled = bool(filled[-1])
        return filled[:-1]

    def last_piece(self) -> Piece | None:
        """Return the piece behind the last full one, if it has rows."""
        rows = self.row + self.filled - self.first_row
        return self._piece(self.position, rows) if rows else None


def _json_line(line: bytes | LongLine) -> tuple[Any, str | None]:
    """Return the object in a line, or why there is none."""
    if isinstance(line, LongLine):
        return None, describe_long(line.size)
    if b"\0" in line:
        return None, "holds NUL characters; write the file again"
    try:
        value = _parse(line.decode())
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        return None, f"is not JSON ({error}); mend it, one object a line"
    if not isinstance(value, dict):
        return None, f"is {_kind(value)}; a row is a JSON object {{...}}"
    return value, text_fault(value) if b"\\u" in line else None


def describe_long(size: int) -> str:
    """Return why a line of so many bytes is bad."""
    return f"is {size} bytes long, above {MAX_LINE_BYTES}; keep images in files of their own"


def _parse(text: str) -> Any:
    """Return `json.loads(text)`, faster for a plain line."""
    try:
        value, end = DECODER.raw_decode(text)
    except json.JSONDecodeError:  # for white space before the value, or for the message
        return json.loads(text)
    return value if text[end:] in ("\n", "", "\r\n") else json.loads(text)


def _kind(value: object) -> str:
    kinds = {list: "a list", dict: "an object", str: "a text", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")


@dataclass
class JsonList:
    """A file with a JSON list of objects, or an object with that list under `data`. One process divides it; `entries`
    of its pieces are the objects as text."""

    address: str
    columns: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Raise `DataError` if the file cannot be read."""
        next(read_blocks(self.address), b"")

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[Piece]:
        """Yield the pieces of the list. Raise `DataError` where the file is no JSON."""
        return cut_entries(_json_entries(self.address), rows)

    def read(self, piece: Piece) -> list[NumberedRow | BadRow]:
        """Return the rows of a piece."""
        return [_json_entry(row, text) for row, text in enumerate(piece.entries, piece.first_row)]


def _json_entry(row: int, text: str) -> NumberedRow | BadRow:
    try:
        entry = _parse(text)
    except RecursionError as error:
        return BadRow(row, "", f"entry {row} is nested too deeply ({error})")
    if not isinstance(entry, dict):
        return BadRow(row, "", f"entry {row} is {_kind(entry)}; a row is a JSON object {{...}}")
    reason = text_fault(entry) if "\\u" in text else None
    return BadRow(row, "", f"entry {row} {reason}") if reason else (row, entry)


def cut_entries(
    entries: Iterable[tuple[Any, bytes]], rows: int, names: tuple[str, ...] | None = None
) -> Iterator[Piece]:
    """Yield pieces of entries, which come with the bytes that identify them. `names`: those of all columns."""
    held: list[Any] = []
    first, size, digest = 0, 0, row_digest(0, names)
    for row, (entry, identity) in enumerate(entries):
        held.append(entry)
        digest.update(b"%d\n" % len(identity))
        digest.update(identity)
        size += len(identity)
        if (row + 1) % rows == 0 or size >= PIECE_BYTES:
            yield Piece(first, len(held), digest.hexdigest(), entries=tuple(held), num_bytes=size)
            held = []
            first, size, digest = row + 1, 0, row_digest(row + 1, names)
    if held:
        yield Piece(first, len(held), digest.hexdigest(), entries=tuple(held), num_bytes=size)


def _json_entries(address: str) -> Iterator[tuple[str, bytes]]:
    """Yield the entries of the list in a JSON file, as text and as bytes."""
    stream = JsonStream(address, read_blocks(address))
    listed = stream.peek() == "["
    if listed:
        yield from stream.items()
    elif stream.peek() == "{":
        for key in stream.members():
            if key == "data" and listed:
                raise DataError(f"{address}: has `data` twice. Keep one list.")
            if key == "data" and stream.peek() == "[":
                listed = True
                yield from stream.items()
            else:
                stream.value()
    else:
        stream.value()
    if stream.peek():
        stream.fail("Extra data")
    if not listed:
        raise DataError(f"{address}: expected a JSON list of objects, or an object with that list under `data`.")


def skim_json(address: str, count: int) -> Iterator[tuple[str, Any]]:
    """Yield the members of the object in a JSON file, of a list the first `count` values alone; any other value has the
    name "". The file is read as far as members are asked for. Raise `DataError`."""
    stream = JsonStream(address, read_blocks(address))
    is_object = stream.peek() == "{"
    for name in stream.members() if is_object else ("",):
        if stream.peek() == "[":
            values = stream.values()
            yield name, list(islice(values, count))
            if is_object:
                deque(values, maxlen=0)
        else:
            yield name, stream.value()[0]
    if is_object and stream.peek():
        stream.fail("Extra data")
