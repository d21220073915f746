"""The files of a plan: arrays as long as the data, which all processes of a node map and hold little of."""

import hashlib
import json
import logging
import mmap
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from ray_vlm.errors import RunError
from ray_vlm.runs.manifest import is_alive, this_process
from ray_vlm.runs.schema import is_process
from ray_vlm.storage import replacing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanFolder:
    """The folder with the arrays of a plan.

    `path`: on the node that wrote the files `names`. Where they are not, `local_copy` returns the folder of a copy of
    `address` on this node.
    """

    path: Path
    address: str
    names: tuple[str, ...]
    local_copy: Callable[[str], Path] = Path

    @cached_property
    def here(self) -> Path:
        """The folder on this node."""
        complete = self.path.is_dir() and all((self.path / name).is_file() for name in self.names)
        return self.path if complete else self.local_copy(self.address)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "here"}

    def make_once(self, name: str, make: Callable[[], np.ndarray], patience_s: float) -> "Column":
        """Return the array in the file `name`. If there is none, the first process that needs it makes it, and the
        others wait. If it cannot be written, return it in memory.

        Every process makes the same array, and a file appears when it is whole. A wrong claim only costs time; after
        `patience_s` it is ignored.
        """
        path, claim, until = self.here / name, self.here / f".{name}.claim", time.monotonic() + patience_s
        while (array := self._open(name)) is None:
            try:
                if _claim(claim, patience_s) or time.monotonic() > until:
                    try:
                        if self._open(name) is None:
                            write_array(path, make())
                    finally:
                        claim.unlink(missing_ok=True)
                    return self._open(name) or make()
            except OSError as error:
                logger.warning(f"{path} cannot be written ({error}); this process keeps that array in its own memory")
                return make()
            time.sleep(0.05)
        return array

    def _open(self, name: str) -> "MappedArray | None":
        try:
            mapped = map_array(self.here / name)
        except (OSError, ValueError):  # missing, or damaged by the disk: it is made anew
            return None
        array = MappedArray(self, name, len(mapped[1]))
        vars(array)["_mapped"] = mapped  # it stays readable if another process deletes the file
        return array


def _claim(path: Path, patience_s: float) -> bool:
    """Return whether this process now has the claim in a file, which it may take from a process that is gone."""
    with suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
        json.dump(this_process(), file)
        return True
    holder, age = None, 0.0
    with suppress(OSError, ValueError):  # released meanwhile, or not written yet
        age = time.time() - path.stat().st_mtime
        holder = json.loads(path.read_text("utf-8"))
    gone = is_process(holder) and holder["host"] == platform.node() and not is_alive(holder)
    if gone or age > patience_s:
        path.unlink(missing_ok=True)
    return False


@dataclass(frozen=True)
class MappedArray:
    """An array of a plan, in a file that a process maps when it first reads it. `total`: the sum of all values."""

    folder: PlanFolder
    name: str
    length: int
    total: float = 0.0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """Return a copy of the values of some rows. Raise `RunError` if the file is not as it was written."""
        chosen = np.array(self.whole()[rows])
        self.drop_pages()
        return chosen

    def whole(self) -> np.ndarray:
        """Return all values, mapped. Raise `RunError` if the file is not as it was written."""
        return self._mapped[1]

    def drop_pages(self) -> None:
        """Give back the pages that this process has read."""
        drop_pages(self._mapped[0])

    @cached_property
    def _mapped(self) -> tuple[mmap.mmap, np.ndarray]:
        path = self.folder.here / self.name
        try:
            memory, values = map_array(path)
            if len(values) != self.length:
                raise ValueError(f"it has {len(values)} values in place of {self.length}")
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path}: this array of the plan cannot be read ({error}). Start the run again with --resume, which "
                "writes it again."
            ) from error
        return memory, values

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_mapped"}


Column = np.ndarray | MappedArray


def drop_pages(memory: mmap.mmap) -> None:
    """Give back the pages of a mapped file that this process has read; as rows are drawn at random, it would soon hold
    all. The system keeps them for every process."""
    if hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED)


def map_array(path: Path) -> tuple[mmap.mmap, np.ndarray]:
    """Map a `.npy` file with one dimension, and return the mapping and its values. Raise `ValueError` if the file is
    damaged, `OSError` if it cannot be read."""
    with open(path, "rb") as file:
        npy.read_magic(file)
        shape, _, dtype = npy.read_array_header_1_0(file)
        start, size = file.tell(), os.fstat(file.fileno()).st_size
        if len(shape) != 1 or size != start + shape[0] * dtype.itemsize:
            raise ValueError(f"it has {size} bytes, and its header is of an array {dtype} {list(shape)}")
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return memory, np.frombuffer(memory, dtype, shape[0], start)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array as a `.npy` file, atomically."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        npy.write_array(file, np.ascontiguousarray(array), version=(1, 0))


def hash_values(*values: object) -> str:
    """Return a short hash of arrays and of other values."""
    digest = hashlib.blake2b(digest_size=12)
    for value in values:
        if isinstance(value, np.ndarray):
            digest.update(f"{value.dtype.str} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).data)
        else:
            digest.update(f"{value!r};".encode())
    return digest.hexdigest()


def values_of(column: Column) -> np.ndarray:
    """Return the values of an array in memory or in a file."""
    return column.whole() if isinstance(column, MappedArray) else column


def holds_array(path: Path, array: np.ndarray) -> bool:
    """Return whether a file holds an array, undamaged."""
    try:
        return hash_values(map_array(path)[1]) == hash_values(array)
    except (OSError, ValueError):
        return False
