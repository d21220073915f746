"""The files of the index: Arrow files with the rows of a source and with their token ids, mapped into memory.

A *row shard* holds consecutive rows of a source as they were read and checked, good and bad ones: a record's fields,
the sizes of its images, and its tags. A *token shard* holds the token ids of the same rows for one base and task.
Nothing is written twice under one name with another content, so files are shared by runs and never locked.
"""

import ctypes
import io
import json
import mmap
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_vlm.data.records import (
    BadRow,
    Image,
    ImageCell,
    ImageRange,
    InnerImage,
    LocatedBytes,
    PreferenceRecord,
    PromptRecord,
    Record,
    SftRecord,
    hash_bytes,
)
from ray_vlm.data.spec import EncodedRow
from ray_vlm.data.suspicions import ShardSummary
from ray_vlm.errors import DataError
from ray_vlm.storage import Store, copy_folder, replacing

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 2  # of the files; files of another version are not read
_OPEN = 4096  # shards that a process keeps mapped
_DAMAGED = (  # what bytes raise that are no pickle
    *(pickle.PickleError, ArithmeticError, AttributeError, EOFError, ImportError, LookupError, MemoryError),
    *(TypeError, ValueError),
)
_VALUES = ("datetime.", "decimal.Decimal", "uuid.UUID", "zoneinfo.", "pandas._libs.tslibs.")  # types of cells


class IndexFolder:
    """The files of indices under one address. Files of an object store are copied once to this machine, when they are
    needed. Pickles as its address."""

    def __init__(self, address: str):
        self.address, self.store = address, Store(address)
        self._copies = self.store.local or copy_folder(address)

    def __reduce__(self) -> tuple[type["IndexFolder"], tuple[str]]:
        return IndexFolder, (self.address,)

    def __eq__(self, other: object) -> bool:  # so that a process maps a shard once
        return isinstance(other, IndexFolder) and other.address == self.address

    def __hash__(self) -> int:
        return hash(self.address)

    def path(self, name: str) -> Path:
        """Return the path of a file on this machine. Raise `OSError` if it does not exist or cannot be fetched."""
        path = self._copies / name
        if self.store.local is None and not path.exists():
            if (data := self.store.read(name)) is None:
                raise FileNotFoundError(f"{self.address}/{name} does not exist")
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(data)
        return path

    def folder(self, name: str) -> Path:
        """Return a folder on this machine for files that its processes share; it is made if it does not exist."""
        path = self._copies / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def names(self, folder: str) -> set[str]:
        """Return the names of the files in a folder."""
        if self.store.local is None:
            return {name for name in self.store.files(folder) if "/" not in name}
        path = self.store.local / folder
        return {file.name for file in path.iterdir()} if path.is_dir() else set()

    def publish(self, folder: str, names: Iterable[str]) -> None:
        """Copy files that this machine has into the object store, if the index lies in one. Raise `OSError`."""
        if self.store.local is None:
            for name in names:
                self.store.write(f"{folder}/{name}", (self._copies / folder / name).read_bytes())

    def fetch(self, folder: str, names: Iterable[str]) -> Path:
        """Return the folder on this machine with these files. Raise `OSError` if one cannot be fetched."""
        for name in names:
            self.path(f"{folder}/{name}")
        return self.folder(folder)

    def write(self, name: str, data: "bytes | pa.Buffer") -> None:
        """Write a file, whole or not at all. Raise `OSError`."""
        if self.store.local is None:
            return self.store.write(name, memoryview(data).tobytes())
        path = self.store.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:  # not flushed: a torn file is made again
            file.write(data)


@dataclass(frozen=True)
class IndexedRow:
    """A row for `pack_rows`: the record or bad row as it was read, and as it was checked.

    `checked` is a record with sizes, or the reason why it cannot be used."""

    read: Record | BadRow
    checked: Record | BadRow
    tags_read: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    num_regions: int = 0


def pack_rows(rows: Sequence[IndexedRow], summary: ShardSummary) -> "pa.Buffer":
    """Return the bytes of a row shard."""
    import pyarrow as pa

    checked = [row.checked for row in rows]
    good = [None if isinstance(row, BadRow) else row for row in checked]
    images = [() if row is None else row.images for row in good]
    paths = [[image if isinstance(image, str) else None for image in row_images] for row_images in images]
    columns = {
        "row": pa.array([row.row for row in checked], pa.int64()),
        "id": pa.array([row.id for row in checked], pa.string()),
        "group": pa.array([getattr(row.read, "group", "") for row in rows], pa.string()),
        "reason": pa.array([row.reason if isinstance(row, BadRow) else None for row in checked], pa.string()),
        "unread": pa.array([isinstance(row.read, BadRow) for row in rows], pa.bool_()),
        "tags_read": _dictionary([row.tags_read for row in rows]),
        "tags": _dictionary([row.tags for row in rows]),
        "num_regions": pa.array([row.num_regions for row in rows], pa.int32()),
        "paths": pa.array(paths, pa.list_(pa.string())),
        "image_keys": pa.array([[image_key(i) for i in row_images] for row_images in images], pa.list_(pa.uint64())),
        "sizes": pa.array(
            [[] if row is None else [side for size in row.sizes for side in size] for row in good], pa.list_(pa.int32())
        ),
        "body": pa.array([b"" if row is None else _pack_body(row) for row in good], pa.large_binary()),
        "digest": pa.array([0 if row is None else row_digest(row) for row in good], pa.uint64()),
    }
    if any(_is_held(image) for row_images in images for image in row_images):
        held = [[image if _is_held(image) else None for image in row_images] for row_images in images]
        columns["bytes"] = pa.array(held, pa.large_list(pa.large_binary()))
    cells = [[image for image in getattr(row.read, "images", ()) if _group_of(image)] for row in rows]
    if any(cells):
        keys = [_hash_group(_group_of(row_cells[0])) if row_cells else 0 for row_cells in cells]
        columns["row_group"] = pa.array(keys, pa.uint64())
        sizes = [sum(len(image) for image in row_cells if isinstance(image, bytes)) for row_cells in cells]
        columns["row_group_bytes"] = pa.array(sizes, pa.int64())
    return _write(columns, {"summary": json.dumps(summary.__dict__)})


def pack_tokens(rows: Sequence[EncodedRow | str]) -> "pa.Buffer":
    """Return the bytes of a token shard; a text is the reason why a row has no tokens."""
    import pyarrow as pa

    nothing = np.zeros(0, np.int32)
    encoded = [None if isinstance(row, str) else row for row in rows]
    tags = sorted({tag for row in encoded if row is not None for _, _, tag in row.tagged})
    code = {tag: number for number, tag in enumerate(tags)}
    tagged = [
        nothing if row is None else np.array([v for a, b, tag in row.tagged for v in (a, b, code[tag])], np.int32)
        for row in encoded
    ]
    completions = [() if row is None else row.completions for row in encoded]
    ends = np.cumsum([0, *(len(row_ids) for row_ids in completions)]).astype(np.int32)
    columns = {
        "reason": pa.array([row if isinstance(row, str) else None for row in rows], pa.string()),
        "ids": _lists([nothing if row is None else row.ids for row in encoded]),
        "image_runs": _lists([nothing if row is None else row.image_runs for row in encoded]),
        "prompt_length": pa.array([0 if row is None else row.prompt_length for row in encoded], pa.int32()),
        "trained": _lists([nothing if row is None else row.trained.reshape(-1) for row in encoded]),
        "tagged": _lists(tagged),
        "completions": pa.ListArray.from_arrays(ends, _lists([ids for row_ids in completions for ids in row_ids])),
    }
    for position, name in enumerate(("image_tokens", "prompt_tokens", "answer_tokens")):
        counts = [0 if row is None else row.counts[position] for row in encoded]
        columns[name] = pa.array(counts, pa.int32())
    return _write(columns, {"tags": json.dumps(tags)})


def pack_renamed(names: Mapping[int, tuple[str, str]]) -> "pa.Buffer":
    """Return the bytes of a file with the (id, group) of rows that share the id of their source, by position."""
    import pyarrow as pa

    positions = sorted(names)
    columns = {
        "position": pa.array(positions, pa.int64()),
        "id": pa.array([names[i][0] for i in positions], pa.string()),
        "group": pa.array([names[i][1] for i in positions], pa.string()),
    }
    return _write(columns, {})


def _lists(parts: Sequence[np.ndarray]) -> "pa.Array":
    """Return an Arrow array of lists of `int32`."""
    import pyarrow as pa

    ends = np.cumsum([0, *map(len, parts)]).astype(np.int32)
    return pa.ListArray.from_arrays(ends, pa.array(np.concatenate([np.zeros(0, np.int32), *parts]), pa.int32()))


def _dictionary(tags: Sequence[tuple[str, ...]]) -> "pa.Array":
    """Return tags as codes of their distinct tuples, each written as a JSON list."""
    import pyarrow as pa

    codes: dict[tuple[str, ...], int] = {}
    numbers = [codes.setdefault(row_tags, len(codes)) for row_tags in tags]
    return pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), pa.array([json.dumps(c) for c in codes]))


def _write(columns: "dict[str, pa.Array]", about: Mapping[str, str]) -> "pa.Buffer":
    import pyarrow as pa

    table = pa.table(columns).replace_schema_metadata({"version": str(VERSION), **about})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


class Shard:
    """A mapped shard. Columns are read where they lie; only the pages that are touched take memory."""

    def __init__(self, path: Path):
        import pyarrow as pa

        self._numbers: dict[str, np.ndarray] = {}  # columns that were asked for; pyarrow takes longer to find one
        self._lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        try:
            with pa.memory_map(str(path)) as file:  # its descriptor is closed, and its memory stays mapped
                self._memory = file.read_buffer()
                reader = pa.ipc.open_file(pa.BufferReader(self._memory))
                if reader.num_record_batches != 1:
                    raise pa.ArrowInvalid(f"it has {reader.num_record_batches} record batches in place of one")
                self.batch: pa.RecordBatch = reader.get_batch(0)
        except (pa.ArrowException, ValueError) as error:
            raise Torn(f"{path}: {error}") from None
        if self._about("version") != str(VERSION):
            raise Torn(f"{path}: written by another version")
        self.drop_pages()

    def __len__(self) -> int:
        return self.batch.num_rows

    def _about(self, name: str) -> str:
        return (self.batch.schema.metadata or {}).get(name.encode(), b"").decode()

    def drop_pages(self) -> None:
        """Give back the pages that this process has read: rows are drawn at random, so it would soon hold all. The
        system keeps them for every process."""
        if (advise := _find_madvise()) is not None and self._memory.address % mmap.PAGESIZE == 0:
            advise(self._memory.address, self._memory.size, mmap.MADV_DONTNEED)

    def column(self, name: str) -> "pa.Array":
        """Return a column."""
        return self.batch.column(name)

    def has(self, name: str) -> bool:
        """Return whether there is a column; those of images inside files are only where there are such images."""
        return name in self.batch.schema.names

    def numbers(self, name: str) -> np.ndarray:
        """Return a column of numbers, not copied."""
        if name not in self._numbers:
            self._numbers[name] = self.batch.column(name).to_numpy(zero_copy_only=False)
        return self._numbers[name]

    def lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a column of lists of numbers as (offsets `[rows + 1]`, all values), not copied."""
        if name not in self._lists:
            column = self.batch.column(name)
            self._lists[name] = column.offsets.to_numpy(), column.values.to_numpy()
        return self._lists[name]

    def list_of(self, name: str, row: int) -> np.ndarray:
        """Return the list of numbers of one row, not copied."""
        offsets, values = self.lists(name)
        return values[offsets[row] : offsets[row + 1]]

    def values_of(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return the values of the lists of some rows, one after another."""
        offsets, values = self.lists(name)
        counts = np.diff(offsets)[rows]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, ... of each list
        return values[np.repeat(offsets[rows], counts) + within]

    def tags(self, name: str = "tags") -> tuple[list[tuple[str, ...]], np.ndarray]:
        """Return the distinct tuples of tags, and the number of each row's, `int32 [rows]`."""
        column = self.batch.column(name)
        return [tuple(json.loads(text)) for text in column.dictionary.to_pylist()], column.indices.to_numpy()

    @cached_property
    def has_completions(self) -> bool:
        """Whether a token shard is of pairs."""
        return len(self.batch.column("completions").values) > 0

    @cached_property
    def tag_names(self) -> list[str]:
        """The names of the tags of a token shard, by their codes."""
        return json.loads(self._about("tags"))

    def summary(self) -> ShardSummary:
        """Return the summary of a row shard."""
        return ShardSummary(**json.loads(self._about("summary")))


@lru_cache(maxsize=1)
def _find_madvise() -> Callable[[int, int, int], int] | None:
    """Return the system's function, which Python has only for mappings that keep a file open; None without it."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


class Torn(Exception):
    """A file of the index that cannot be used and is made again."""


def open_shard(folder: IndexFolder, name: str) -> Shard | None:
    """Return a shard, or None if it does not exist or is damaged. Raise `OSError` if the disk or the store fails."""
    try:
        return Shard(folder.path(name))
    except (FileNotFoundError, Torn):
        return None


@lru_cache(maxsize=_OPEN)
def load_shard(folder: IndexFolder, name: str) -> Shard:
    """Map a shard, once in a process. Raise `DataError` if it cannot be used."""
    if (shard := open_shard(folder, name)) is None:
        raise DataError(
            f"{folder.address}/{name}: this file of the index is gone or damaged. Start again, or go on with --resume: "
            "it is made again."
        )
    return shard


def read_record(shard: Shard, position: int, source: int = 0) -> Record:
    """Make the record at `position` of a row shard. It must not be a bad row."""
    kind, *fields = _unpack_body(shard.batch.column("body")[position].as_buffer())
    fields[2] = _read_images(fields[2], shard, position)
    make: Callable[..., Record] = _KINDS[kind]
    return make(*fields, source)


def read_records(shard: Shard, start: int, end: int) -> Iterator[Record]:
    """Make the records from `start` up to (not including) `end` of a row shard. None of them may be a bad row."""
    for position, body in enumerate(shard.batch.column("body").slice(start, end - start).to_pylist(), start):
        kind, *fields = _unpack_body(body)
        fields[2] = _read_images(fields[2], shard, position)
        make: Callable[..., Record] = _KINDS[kind]
        yield make(*fields)


def read_images(shard: Shard, position: int) -> tuple[str, tuple[Image, ...], tuple[tuple[int, int], ...]]:
    """Return a row's name for messages, its images, and their sizes (width, height)."""
    _, name, row, images, sizes, *_ = _unpack_body(shard.batch.column("body")[position].as_buffer())
    return f"row {row} (id {name})", _read_images(images, shard, position), sizes


def _is_held(image: Image) -> bool:
    """Return whether the index holds the bytes of an image."""
    return isinstance(image, bytes) and not isinstance(image, LocatedBytes)


def _group_of(image: Image) -> tuple[str, tuple[int, int], int] | None:
    """Return the row group of a Parquet file that an image is read with: address, version, number."""
    cell = image.location if isinstance(image, LocatedBytes) else image
    return (cell.address, cell.version, cell.group) if isinstance(cell, ImageCell) else None


@lru_cache(maxsize=64)
def _hash_group(group: object) -> int:
    text = repr(group).encode("utf-8", "surrogateescape")
    return hash_bytes(text) or 1


def _pack_image(image: Image) -> str | tuple[Any, ...] | None:
    """Return where an image is, in plain values; None for one whose bytes the index holds."""
    if isinstance(image, str):
        return image
    location = image.location if isinstance(image, LocatedBytes) else image
    return None if isinstance(location, bytes) else (_INNER.index(type(location)), *astuple(location))


def _read_images(images: tuple[Any, ...], shard: Shard, position: int) -> tuple[Image, ...]:
    """Return the images of a row from what `_pack_image` returned for each."""
    held = shard.batch.column("bytes")[position].as_py() if None in images else images
    return tuple(
        image if isinstance(image, str) else data if image is None else _INNER[image[0]](*image[1:])
        for image, data in zip(images, held, strict=True)
    )


def read_bad(shard: Shard, position: int, source: int = 0) -> BadRow:
    """Make the bad row at `position` of a row shard."""
    row, name, reason = (shard.batch.column(column)[position].as_py() for column in ("row", "id", "reason"))
    return BadRow(row, name, reason, source)


def read_encoded(shard: Shard, position: int) -> EncodedRow:
    """Return the token ids at `position` of a token shard."""
    tags = shard.tag_names
    ids, runs, trained, tagged = (shard.list_of(name, position) for name in ("ids", "image_runs", "trained", "tagged"))
    spans = tagged.reshape(-1, 3).tolist()
    counts = tuple(int(shard.numbers(f"{name}_tokens")[position]) for name in ("image", "prompt", "answer"))
    completions = shard.column("completions")[position].as_py() if shard.has_completions else ()
    return EncodedRow(
        ids=ids,
        image_runs=runs,
        prompt_length=int(shard.numbers("prompt_length")[position]),
        trained=trained.reshape(-1, 2),
        tagged=tuple((first, last, tags[code]) for first, last, code in spans),
        completions=tuple(np.array(ids, np.int32) for ids in completions),
        counts=(counts[0], counts[1], counts[2]),
    )


_INNER: tuple[type[InnerImage], ...] = (ImageRange, ImageCell)
_KINDS: dict[int, type[SftRecord] | type[PreferenceRecord] | type[PromptRecord]] = {
    0: SftRecord,
    1: PreferenceRecord,
    2: PromptRecord,
}


def _content(record: Record) -> tuple[Any, ...]:
    """Return the fields between the sizes and the group, which differ by the kind of record."""
    if isinstance(record, SftRecord):
        return record.truth, record.context
    if isinstance(record, PreferenceRecord):
        return record.prompt, record.chosen, record.rejected
    return record.prompt, record.columns


def _pack_body(record: Record) -> bytes:
    """Return all of a record but the bytes of its images, so that one place of the file makes it."""
    kind = next(number for number, cls in _KINDS.items() if isinstance(record, cls))
    images = tuple(_pack_image(image) for image in record.images)
    return pickle.dumps((kind, record.id, record.row, images, record.sizes, *_content(record), record.group), 5)


class _Plain(pickle.Unpickler):
    """Reads values, and refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few types that cells may have."""
        if f"{module}.{name}".startswith(_VALUES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not a value")


def _unpack_body(data: Any) -> tuple[Any, ...]:
    try:
        return _Plain(io.BytesIO(data)).load()
    except _DAMAGED as error:
        raise DataError(
            f"a row of the index cannot be read ({error}). Remove data.index_dir; it is made again."
        ) from None


def image_key(image: Image) -> int:
    """Return a hash of an image's path or bytes, by which equal ones are found; of its position, if it has no bytes."""
    name = image if isinstance(image, str) else repr(image)
    data = image if isinstance(image, bytes) else name.encode("utf-8", "surrogateescape")
    return hash_bytes(data)


def content_of(record: Record) -> tuple[Any, ...]:
    """Return what differs by the kind of record, for a hash: the order of keys does not matter."""
    return tuple(sorted(part.items()) if isinstance(part, Mapping) else part for part in _content(record))


def row_digest(record: Record) -> int:
    """Return a hash of what a row teaches: its id, position, names and sizes of images, and content."""
    names = [image_key(i) if isinstance(i, bytes) else os.path.basename(str(i)) for i in record.images]
    text = repr((record.id, record.row, names, record.sizes, list(content_of(record))))
    return hash_bytes(text.encode("utf-8", "surrogateescape"))
