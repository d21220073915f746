"""Decide how far rows are shuffled, by where their images lie, and estimate what a step then reads.

An image in a Parquet file is read with all of its row group. A process keeps `CACHE_BYTES` of them: a full shuffle of
more reads a whole group for nearly every row, and one in windows reads each group once in an epoch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ray_vlm.config.data import Shuffle, Window
from ray_vlm.data.inner_images import CACHE_BYTES
from ray_vlm.data.shards import Shard
from ray_vlm.runs.text import plural

_MOST_ROWS = 1024  # of a window that is chosen here
_FEWEST_UNITS = 4  # the same, as far as the cache allows


class Units(NamedTuple):
    """The units of an index: rows that follow each other and whose images lie in one row group; every other row is a
    unit of its own.

    `starts`: the first row of each, `int64 [units]`. `sizes`: bytes of the images in its row group, `int64 [units]`; 0
    for a row whose images are read alone.
    """

    starts: np.ndarray
    sizes: np.ndarray

    def sum_rows(self, values: np.ndarray) -> np.ndarray:
        """Return the sum over the rows of each unit; `values`: `[rows]`."""
        return np.add.reduceat(values, self.starts)


def find_units(shards: Iterable[Shard], used: Iterable[tuple[Shard, np.ndarray]], num_rows: int) -> Units:
    """Return the units of `num_rows` rows. `shards`: all row shards of their sources, so that the bytes of a group
    count rows of other parts too; `used`: of the rows, the shard and the positions in it, in order."""
    groups = [_sum_groups(shard) for shard in shards if shard.has("row_group")]
    if not groups:
        return Units(np.arange(num_rows), np.zeros(num_rows, np.int64))
    keys, inverse = np.unique(np.concatenate([key for key, _ in groups]), return_inverse=True)
    totals = np.bincount(inverse, np.concatenate([size for _, size in groups])).astype(np.int64)
    totals[keys == 0] = 0
    starts, sizes, last, count = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0, 0
    for shard, local in used:
        key = shard.numbers("row_group")[local] if shard.has("row_group") else np.zeros(len(local), np.uint64)
        before = np.concatenate([np.array([last], np.uint64), key[:-1]])
        first = np.flatnonzero((key != before) | (key == 0))
        starts.append(first + count)
        sizes.append(np.where(key[first] == 0, 0, totals[np.searchsorted(keys, key[first]).clip(max=len(keys) - 1)]))
        last, count = int(key[-1]), count + len(key)
    return Units(np.concatenate(starts), np.concatenate(sizes))


def _sum_groups(shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """Return the row group of each stretch of rows of one, and the bytes of its images in that stretch."""
    key, size = shard.numbers("row_group"), shard.numbers("row_group_bytes")
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    return key[starts], np.add.reduceat(size, starts)


def choose_shuffle(units: Units, num_rows: int, cache_bytes: int = CACHE_BYTES) -> Shuffle:
    """Return the shuffle of a job that names none: `full` if it costs no more than another, or else a window whose
    groups fill at most half of a process's cache, so that those of two neighbours fit."""
    total = int(units.sizes.sum())
    if total <= cache_bytes or len(units.starts) == num_rows:
        return "full"
    rows_of_unit = int(np.median(_rows_in_groups(units, num_rows)))
    fitting = cache_bytes // 2 * num_rows // total
    return Window(window=max(2, rows_of_unit, min(fitting, max(_MOST_ROWS, _FEWEST_UNITS * rows_of_unit))))


def _rows_in_groups(units: Units, num_rows: int) -> np.ndarray:
    return np.diff(units.starts, append=num_rows)[units.sizes > 0]


@dataclass(frozen=True)
class Reading:
    """What decides how many bytes a step reads.

    `shown`: rows of each unit that an epoch shows, repeats counted, `[units]`. `step_rows`: rows of a step.
    `processes`: that read images, over all workers; None if that is not known.
    """

    units: Units
    num_rows: int
    shown: np.ndarray
    step_rows: int
    processes: int | None
    cache_bytes: int = CACHE_BYTES


def estimate_bytes(shuffle: Shuffle, reading: Reading) -> float:
    """Return the bytes of row groups that a step reads, over all processes; with an unknown number of them, those of
    one process, or fewer. A full shuffle of groups that a process can keep reads them once in a run, which is not
    counted.

    Rows are dealt to P processes about at random, so those of a unit with r rows meet P (1 - (1 - 1/P)^r) of them. A
    process that has read the share f of a window's groups which its cache holds, after r / P = -ln(1 - f) rows of each,
    reads a group again for 1 - f of the rows that follow.
    """
    sizes, shown, count = reading.units.sizes.astype(float), reading.shown, reading.processes or 1
    rows, total = float(shown.sum()), float(sizes.sum())
    groups = count * (1 - (1 - 1 / count) ** shown)  # how often each is read in an epoch
    if shuffle == "full":
        groups = shown * max(0.0, 1 - reading.cache_bytes / max(total, 1.0))
    elif isinstance(shuffle, Window) and (near := total * min(1.0, shuffle.window / rows)) > reading.cache_bytes:
        share = reading.cache_bytes / near
        more = shown / count + math.log1p(-share)
        groups = np.where(more > 0, count * (share + more * (1 - share)), groups)
    return float((sizes * groups).sum()) / rows * reading.step_rows


def describe_shuffle(shuffle: Shuffle, chosen_here: bool, reading: Reading) -> str:
    """Return a line on the shuffle of a run, why it is that one, and what a step reads with it and with another.
    `chosen_here`: by `choose_shuffle`."""
    units, since = reading.units, ", since" if chosen_here else ";"
    total, grouped = int(units.sizes.sum()), _rows_in_groups(units, reading.num_rows)
    name = f"shuffle: {_name(shuffle)}"
    if not len(grouped):
        return f"{name}{since} no images lie in row groups of Parquet files"
    about = f"{plural(len(grouped), 'row group')} of about {grouped.mean():,.0f} rows and {_mb(total / len(grouped))}"
    if len(units.starts) == reading.num_rows and shuffle != "none":
        return f"{name}{since} no two rows lie in one row group"
    if shuffle != "none" and total <= reading.cache_bytes:
        return f"{name}{since} a process keeps all images that lie in row groups ({about})"
    other = choose_shuffle(units, reading.num_rows, reading.cache_bytes) if shuffle == "full" else "full"
    compared = "" if total <= reading.cache_bytes else f"; {_name(other)} would read {_cost(other, reading)}"
    if other == "full":
        compared = compared.replace("; full", "; a full shuffle")
    step = f"a step of {plural(reading.step_rows, 'row')} reads {_cost(shuffle, reading)}"
    return f"{name}{since} images lie in {about}: {step}{compared}"


def _name(shuffle: Shuffle) -> str:
    return f"windows of {shuffle.window:,} rows" if isinstance(shuffle, Window) else shuffle


def _cost(shuffle: Shuffle, reading: Reading) -> str:
    size = _mb(estimate_bytes(shuffle, reading))
    if reading.processes is not None:
        return f"about {size}"
    return f"about {size} in all" if shuffle == "full" else f"up to {size} in each process that loads images"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 9.95e6 else f"{size / 1e6:.2g} MB"
