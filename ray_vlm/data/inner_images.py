"""Read images that lie inside files with many: a range of bytes of a tar or an Arrow file, a cell of a Parquet file.

A cell cannot be read alone: its column is decoded for the whole row group, which this process then keeps for the rows
that follow, up to `CACHE_BYTES` of groups. A larger group than `LARGEST_GROUP_BYTES` is not read by position; the index
holds a copy of its images.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ray_vlm.data.records import ImageRange, InnerImage
from ray_vlm.storage import describe_file, is_remote, local_path, open_file

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, NativeFile
    from pyarrow.parquet import FileMetaData

CACHE_BYTES = 192 * 2**20  # of decoded row groups that a process keeps
LARGEST_GROUP_BYTES = CACHE_BYTES // 4  # of the images of a row group that is read by position
_DECODING = threading.BoundedSemaphore(4)  # row groups at a time, which are not yet among those that are kept
_RAY_PACKAGE = "/_ray_pkg_"  # in the name of the folder of a working directory
_CHECKED_S = 60.0  # between two looks at a file in an object store, which are requests
_OPEN = 64  # files that a process keeps open
_K = TypeVar("_K")
_V = TypeVar("_V")


def read_inner(image: InnerImage) -> bytes:
    """Return the bytes of an image inside a file. Raise `OSError` or `ValueError` if they cannot be read, also if the
    file has changed since it was indexed. Threads may call it at once."""
    _check_again(image.address, image.version, int(time.monotonic() / _CHECKED_S))
    if isinstance(image, ImageRange):
        data = _open_ranges(image.address, image.version)(image.start, image.length)
        if len(data) != image.length:
            raise ValueError(f"the file ends {image.length - len(data)} bytes before the image does")
        return data
    key = (image.address, image.version, image.group, image.column)
    column = _GROUPS.get(key, lambda: _read_group(*key))
    value: Any = column[image.row]
    value = value.values[image.item] if image.item >= 0 else value
    value = value["bytes"] if hasattr(value, "keys") else value  # a struct {bytes, path}
    return bytes(value.as_buffer())


def read_group_bytes() -> int:
    """Return the bytes of the row groups that this process has read, with those that it has dropped since."""
    return _GROUPS.read_bytes


def forget_groups() -> None:
    """Drop the row groups that this process keeps."""
    _GROUPS.clear()


class _Cache(Generic[_K, _V]):
    """The values that were used last, up to `limit` of their sizes in all. Two threads that need one value wait for the
    one that makes it."""

    def __init__(self, limit: int, size: Callable[[_V], int]):
        self.limit, self.size = limit, size
        self.read_bytes = self._held = 0
        self._lock = threading.Lock()
        self._values: OrderedDict[_K, Future[_V]] = OrderedDict()

    def clear(self) -> None:
        """Drop all values that are made."""
        with self._lock:
            for key in [key for key, future in self._values.items() if future.done()]:
                del self._values[key]
            self._held = 0

    def get(self, key: _K, make: Callable[[], _V]) -> _V:
        """Return the value of a key, which `make` makes if it is not here; its errors are not kept."""
        with self._lock:
            future = self._values.get(key)
            makes = future is None
            if future is None:
                future = self._values[key] = Future()
            self._values.move_to_end(key)
        if not makes:
            return future.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._values[key]
            future.set_exception(error)
            raise
        with self._lock:
            self.read_bytes += self.size(value)
            self._held += self.size(value)
            for other in [k for k, f in self._values.items() if f.done()]:
                if self._held <= self.limit:
                    break
                self._held -= self.size(self._values.pop(other).result())
            future.set_result(value)
        return value


_GROUPS: "_Cache[tuple[str, tuple[int, int], int, str], ChunkedArray]" = _Cache(
    CACHE_BYTES, lambda column: column.get_total_buffer_size()
)


def check_version(address: str, version: tuple[int, int]) -> None:
    """Raise `ValueError` if a file is not the one that was indexed, `OSError` if it is gone."""
    _compare(address, describe_file(address)[1:], version)


def _compare(address: str, now: tuple[int, ...], version: tuple[int, int]) -> None:
    # Ray unpacks a working directory on each node at a time of its own, into a folder that is named by its content.
    if now != version and (now[0] != version[0] or _RAY_PACKAGE not in address):
        raise ValueError("its file has changed since it was indexed")


@lru_cache(maxsize=_OPEN)
def _check_again(address: str, version: tuple[int, int], period: int) -> None:
    """Check a file of an object store once in a period; one of a disk is checked at each read."""
    if is_remote(address):
        check_version(address, version)


@lru_cache(maxsize=_OPEN)
def _open_ranges(address: str, version: tuple[int, int]) -> Callable[[int, int], bytes]:
    """Return a function that reads bytes of a file, given their start and number."""
    if not is_remote(address):
        with open_file(address) as opened:
            file = _Descriptor(os.dup(opened.fileno()), address, version)
        return file.read
    remote: NativeFile = open_file(address)
    return lambda start, length: remote.read_at(length, start)


class _Descriptor:
    """A file that is open as long as this object lives; it has no position that threads could move."""

    def __init__(self, number: int, address: str, version: tuple[int, int]):
        self.number, self.address, self.version = number, address, version

    def read(self, start: int, length: int) -> bytes:
        """Return bytes of the file, fewer where it ends. Raise `ValueError` if it has been written again."""
        now = os.fstat(self.number)
        _compare(self.address, (now.st_size, now.st_mtime_ns), self.version)
        return os.pread(self.number, length, start)

    def __del__(self) -> None:
        os.close(self.number)


def _read_group(address: str, version: tuple[int, int], group: int, column: str) -> "ChunkedArray":
    """Decode a column of a row group."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        if not is_remote(address):
            check_version(address, version)
        source, metadata = _open_parquet(address, version)
        with _DECODING:
            file = ParquetFile(source, metadata=metadata, pre_buffer=is_remote(address))  # each thread needs its own
            return file.read_row_group(group, [column], use_threads=False).column(0)
    except ArrowException as error:
        raise ValueError(f"row group {group} cannot be read ({error})") from None


@lru_cache(maxsize=_OPEN)
def _open_parquet(address: str, version: tuple[int, int]) -> "tuple[str | NativeFile, FileMetaData]":
    """Return what a Parquet file is opened from, which threads may share, and its footer."""
    from pyarrow.parquet import ParquetFile

    source: Any = open_file(address) if is_remote(address) else local_path(address)
    return source, ParquetFile(source).metadata
