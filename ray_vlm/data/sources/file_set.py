"""The rows of several files as those of one table, such as the shards of a data set."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain, islice, takewhile
from typing import Any, TypeVar

from ray_vlm.data.records import BadRow
from ray_vlm.data.sources.arrow import ArrowTable
from ray_vlm.data.sources.pieces import PIECE_BYTES, PIECE_ROWS, JsonLines, NumberedRow, Piece, row_digest
from ray_vlm.data.sources.tables import ParquetTable, TableFile, open_table
from ray_vlm.errors import DataError
from ray_vlm.runs.text import plural
from ray_vlm.storage import full_address, is_remote, split_address, split_options

_REQUESTS = 32  # files of an object store that are opened or read at a time
_PARSED = 4  # of these, files that a process parses to divide them, whose rows are then in memory
_LARGE_PARTS = 2  # files in a piece of large files: the end of one and the start of the next
_SHOWN = 4
_T = TypeVar("_T")
_R = TypeVar("_R")


class FileSet:
    """Several files with the same columns, as one table: row numbers run on from file to file.

    It pickles, and is small: a piece has the tables of its rows. Small files share a piece.
    """

    def __init__(self, addresses: Sequence[str], opens: Callable[[str], TableFile] = open_table):
        """Open all files, by `opens`. Raise `DataError` if one of them cannot be used, or if their columns differ."""
        self.address, self.num_files = addresses[0], len(addresses)
        self.folder = f"{split_options(folder)[0].rstrip('/')}/" if (folder := folder_of(addresses)) else ""
        self.remote = any(map(is_remote, addresses))
        self._tables = tuple(self._map(opens, addresses, _REQUESTS))
        first = self._tables[0]
        self.columns = first.columns
        for table in self._tables[1:]:
            _check_columns(first, table)
            for name in ("columns", "kinds", "features"):  # equal ones are kept and pickled once
                if hasattr(first, name) and getattr(table, name, None) == getattr(first, name):
                    setattr(table, name, getattr(first, name))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": ()}

    @property
    def features(self) -> dict[str, Any]:
        """What `datasets` wrote about the columns of the first file, empty if it did not."""
        return getattr(self._tables[0], "features", {}) if self._tables else {}

    def _map(self, function: Callable[[_T], _R], items: Iterable[_T], threads: int) -> Iterator[_R]:
        """Yield results in order. Files of an object store are waited for by threads."""
        return (_map_ahead if self.remote else _map_here)(function, items, threads)

    def describe_copies(self) -> str | None:
        """Return a line on the images that the index holds a copy of, or None if it holds positions alone."""
        readers = (table for table in self._tables if isinstance(table, ParquetTable | ArrowTable))
        lines = [line for line in (table.describe_copies() for table in readers) if line is not None]
        if len(lines) < 2:
            return lines[0] if lines else None
        return f"{lines[0]} (the same is true of {plural(len(lines) - 1, 'more file')} of this source)"

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[Piece]:
        """Yield the pieces of all files, each of up to `rows` rows. Pieces of files are joined while they are small.

        Where rows are large, pieces end within the ranges that numbers of rows alone would give: a change of one file
        leaves the pieces of other ranges as they were if its number of rows is the same.
        """
        parts: list[tuple[TableFile, Piece]] = []
        row = first = start = size = 0  # `start`: of the range, `first`: of the piece
        for table, piece in self._pieces(rows):
            end = row + piece.num_rows
            is_full = end - start > rows
            if parts and (is_full or size + piece.num_bytes > PIECE_BYTES):
                yield self._join(first, parts)
                parts, first, size = [], row, 0
            start = row if is_full else start
            parts.append((table, piece))
            row, size = end, size + piece.num_bytes
        if parts:
            yield self._join(first, parts)

    def _pieces(self, rows: int) -> Iterator[tuple[TableFile, Piece]]:
        divided = all(isinstance(table, JsonLines | ParquetTable | ArrowTable) for table in self._tables)
        begun = self._map(partial(_begin, rows), self._tables, _REQUESTS if divided else _PARSED)
        for table, pieces in zip(self._tables, begun, strict=True):
            for piece in pieces:
                yield table, piece

    def _join(self, first: int, parts: Sequence[tuple[TableFile, Piece]]) -> Piece:
        identity = [(table.address, piece.fingerprint) for table, piece in parts]
        return Piece(
            first,
            sum(piece.num_rows for _, piece in parts),
            row_digest(first, identity).hexdigest(),
            num_bytes=sum(piece.num_bytes for _, piece in parts),
            parts=tuple(parts),
        )

    def read(self, piece: Piece) -> list[NumberedRow | BadRow]:
        """Return the rows of a piece. Raise `DataError` if a file has changed."""
        wanted: list[tuple[TableFile, Piece]] = []
        left = piece.num_rows
        for table, part in piece.parts:
            count = min(left, part.num_rows)
            if count:
                wanted.append((table, replace(part, num_rows=count, entries=part.entries[:count])))
            left -= count
        rows: list[NumberedRow | BadRow] = []
        number = piece.first_row
        # A Parquet file goes on in this thread where the last piece ended, so few large files are not given to others.
        mapped = self._map if len(wanted) > _LARGE_PARTS else _map_here
        read = mapped(lambda pair: pair[0].read(pair[1]), wanted, _REQUESTS)
        for (_, part), some in zip(wanted, read, strict=True):
            shift = number - part.first_row
            for row in some:
                moved = replace(row, row=row.row + shift) if isinstance(row, BadRow) else (row[0] + shift, row[1])
                rows.append(moved)
            number += part.num_rows
        return rows

    def files_of(self, piece: Piece) -> list[tuple[str, int, int]]:
        """Return the files of a piece, as `records.name_file` takes them."""
        names = (split_options(full_address(table.address))[0].removeprefix(self.folder) for table, _ in piece.parts)
        names = (name.encode("utf-8", "backslashreplace").decode() for name in names)  # a disk has names of any bytes
        return [(name, part.first_row, part.num_rows) for name, (_, part) in zip(names, piece.parts, strict=True)]


def folder_of(addresses: Sequence[str]) -> str:
    """Return the folder of files, the deepest one with all of them if they lie in several; empty if only the root of a
    disk has them, or nothing, as of two buckets."""
    folders = sorted({split_address(address)[0] for address in addresses})
    if len(folders) == 1:
        return folders[0]
    (first, options), (last, _) = (split_options(folder) for folder in (folders[0], folders[-1]))
    parts = list(takewhile(lambda pair: pair[0] == pair[1], zip(first.split("/"), last.split("/"), strict=False)))
    shared = "/".join(part for part, _ in parts)
    return "" if shared in ("", first.partition("://")[0] + ":/") else shared + options


def _begin(rows: int, table: TableFile) -> Iterator[Piece]:
    """Return the pieces of a file, of which the first is there already."""
    pieces = table.pieces(rows)
    first = list(islice(pieces, 1))
    return chain(first, pieces)


def _map_here(function: Callable[[_T], _R], items: Iterable[_T], threads: int) -> Iterator[_R]:
    return map(function, items)


def _map_ahead(function: Callable[[_T], _R], items: Iterable[_T], threads: int) -> Iterator[_R]:
    """Yield results in order, while threads work on the next items."""
    pool, pending = ThreadPoolExecutor(threads), deque[Future[_R]]()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check_columns(first: TableFile, other: TableFile) -> None:
    """Raise `DataError` if the columns of two files differ, with both files and the columns."""
    start = f"{other.address}: its columns are not those of {first.address}, so they are not shards of one source: "
    fix = ". Write them alike, or give each kind an entry of data.mix."
    if first.columns is None or other.columns is None:
        if first.columns is not other.columns:
            jsons, tables = (other, first) if other.columns is None else (first, other)
            raise DataError(
                f"{jsons.address} and {tables.address}: files of JSON and tables with columns are not shards of one "
                "source. Give each kind an entry of data.mix."
            )
        return
    texts = []
    for names, table in (
        (set(first.columns) - set(other.columns), other),
        (set(other.columns) - set(first.columns), first),
    ):
        if names:
            texts.append(f"{table.address} has no {_listed(sorted(names))}")
    if texts:
        raise DataError(start + "; ".join(texts) + fix)
    kinds, others = (getattr(table, "kinds", None) for table in (first, other))
    if kinds is None or others is None or kinds == others:
        return
    if different := [name for name in kinds if not kinds[name].agrees(others[name])]:
        raise DataError(start + _listed([f"{n} ({others[n]}, there {kinds[n]})" for n in different]) + fix)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
