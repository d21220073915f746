"""Plan which rank trains which row at which step: pure arithmetic on (repeat factors, token costs, seed, epoch, world
size, batch sizes, step).

Step k of an epoch takes one contiguous stretch of that epoch's order for any number of workers, and the ranks share it.
Every rank runs the same number of micro-batches in every step; a rank without rows runs a padding micro-batch, a
row whose tokens are not trained. Nothing here reads data or keeps state, so any step can be computed without those
before it. Arrays as long as the data may be files that all processes of a node map (`Plan.store`): a process then holds
little of them.

A row's factor is how often it is shown in an epoch: always its whole part, and once more with the probability of its
fraction. Fractions are drawn by systematic sampling (Madow 1949) over a shuffled order. So each is exact in
expectation, an epoch's length is fixed to within one row, and the same seed gives the same rows.

A *unit* is rows that are read together (`read_order.py`). An order in windows takes the units in random order, cuts
that order every so many rows, so that each unit belongs to the window in which it begins, and shuffles the rows of each
window. A process then reads a unit once if it keeps the units of one window.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ray_vlm.data.balance import deal, group_alike, min_parts
from ray_vlm.data.plan_files import Column, MappedArray, PlanFolder, hash_values, holds_array, values_of, write_array
from ray_vlm.errors import RunError

_STEPS = 64  # steps of one rank that a plan keeps in memory
_ROWS_KEPT = 2**18  # loaders are ahead of a trainer by fewer rows, and need later epochs than it does
_ROWS_AT_ONCE = 2**20  # of a pass over all rows, which then needs little memory beside its result
_PATIENCE_S = 60.0  # with a file that another process makes, and a second more for so many rows:
_ROWS_A_SECOND = 100_000
_ORDER_LOCK = threading.Lock()  # the trainer and the thread that feeds its loaders ask the same plan


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rows that one rank runs at a time, as positions in the index. `padding`: the row is run but not trained."""

    rows: tuple[int, ...]
    padding: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """Order and split of `num_rows` rows. `global_batch_size` counts rows over all ranks in one optimizer step.

    `repeat_factors`: `float64 [rows]`, how often each row is shown in an epoch; None: once. `token_costs`: `[rows]`,
    work of each row, which is shared evenly; None: rows are dealt in order. `whole_steps`: rows from the beginning of
    an epoch complete its last step, so that every rank always has as many. `tokens`: `int64 [rows]`; with them
    `max_tokens_per_micro_batch`, also when padded to its longest row, replaces `micro_batch_size`. `folder`: of a plan
    whose arrays are files. `unit_starts`: `int [units]`, the first row of each unit, which all rows from there to the
    next one belong to; with them the order is one in windows of about `window` rows.
    """

    num_rows: int
    global_batch_size: int
    micro_batch_size: int
    world_size: int
    num_epochs: float = 1.0
    max_steps: int | None = None
    shuffle: bool = True
    seed: int = 0
    repeat_factors: Column | None = None
    token_costs: Column | None = None
    whole_steps: bool = False
    tokens: Column | None = None
    max_tokens_per_micro_batch: int = 0
    folder: PlanFolder | None = None
    unit_starts: Column | None = None
    window: int = 0

    def store(self, folder: Path, address: str = "", local_copy: Callable[[str], Path] = Path) -> "Plan":
        """Write the arrays of the plan into `folder`, and return the same plan with mapped arrays. It is small where it
        is pickled, and its orders are made once a node.

        `address`: of the folder for nodes that do not share its disk, on which `local_copy` returns a folder with the
        same files. Raise `RunError` if the folder cannot be written.
        """
        arrays = {name: values_of(getattr(self, name)) for name in _ARRAYS if getattr(self, name) is not None}
        names = {name: f"{name}-{hash_values(array)}.npy" for name, array in arrays.items()}
        folder = folder.absolute()
        stored = PlanFolder(folder, address or str(folder), tuple(names.values()), local_copy)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, array in arrays.items():
                if not holds_array(folder / names[name], array):
                    write_array(folder / names[name], array)
        except OSError as error:
            raise RunError(
                f"{folder}: the plan cannot be written ({error}). Free some space there, or choose another folder."
            ) from error
        mapped: dict[str, Any] = {
            name: MappedArray(stored, names[name], len(array), float(array.sum())) for name, array in arrays.items()
        }
        plan = replace(self, folder=stored, **mapped)
        known = vars(self).get("accumulation")  # every process would compute it again
        vars(plan)["accumulation"] = plan.accumulation if known is None else known
        return plan

    @cached_property
    def rows_per_epoch(self) -> int:
        """Rows shown in an epoch, repeats counted; some epochs have one more."""
        factors = self.repeat_factors
        if factors is None:
            return self.num_rows
        total = factors.total if isinstance(factors, MappedArray) else factors.sum()
        return max(1, math.floor(_round_sum(total)))

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows_per_epoch / self.global_batch_size)

    @property
    def _most_shown(self) -> int:  # rows of an epoch, so that it has no more steps than others
        return self.steps_per_epoch * self.global_batch_size

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the whole run."""
        return self.max_steps or max(1, math.ceil(round(self.steps_per_epoch * self.num_epochs, 6)))

    @cached_property
    def accumulation(self) -> int:
        """Micro-batches of one rank in one step, equal for all ranks and steps; with `tokens`, as many as the largest
        step needs."""
        if self.tokens is None:
            return math.ceil(math.ceil(self.global_batch_size / self.world_size) / self.micro_batch_size)
        if self.folder is None:
            return self._most_parts()
        about = (self.folder.names, self.world_size, self.global_batch_size, self.num_steps, self.whole_steps)
        name = f"accumulation-{hash_values(self._order_key, about, self.max_tokens_per_micro_batch)}.npy"
        patience_s = self._patience_s * (1 + self.num_epochs)
        return int(self.folder.make_once(name, lambda: np.array([self._most_parts()]), patience_s)[:1][0])

    def _most_parts(self) -> int:
        """Return the fewest micro-batches that are enough for every rank and step, under the budget of tokens."""
        assert self.tokens is not None
        most = 1
        for step in reversed(range(self.num_steps)):  # so that the order of the first epoch is the last one made
            for rows in self._deal(self.step_rows(step)):
                most = max(most, min_parts(self.tokens[rows], self.max_tokens_per_micro_batch))
        return most

    @property
    def rows_at_once(self) -> int:
        """Rows of a micro-batch; approximate if tokens are counted."""
        return math.ceil(math.ceil(self.global_batch_size / self.world_size) / self.accumulation)

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """Return positions in the index in the order of an epoch, `int32 [rows shown]`; `int64` from 2**31 rows on."""
        return values_of(self._order(epoch))

    def _order(self, epoch: int) -> Column:
        """Return the order of an epoch; that of a stored plan is made by the first process of the node."""
        if (known := self._orders.get(epoch)) is not None:
            return known
        with _ORDER_LOCK:
            if epoch not in self._orders:
                if self.folder is None:
                    order: Column = self._make_order(epoch)
                else:
                    name = f"order-{self._order_key}-{epoch}.npy"
                    order = self.folder.make_once(name, lambda: self._make_order(epoch), self._patience_s)
                for other in [other for other in self._orders if abs(other - epoch) > 1]:
                    del self._orders[other]
                self._orders[epoch] = order
            return self._orders[epoch]

    def _make_order(self, epoch: int) -> np.ndarray:
        factors = self.repeat_factors
        values = None if factors is None else values_of(factors)
        windows = None if self.unit_starts is None else (self.window, values_of(self.unit_starts))
        order = epoch_order(self.num_rows, self.shuffle, self.seed, epoch, values, self._most_shown, windows)
        for column in (factors, self.unit_starts):
            if isinstance(column, MappedArray):
                column.drop_pages()
        if self.folder is not None:  # a run of many epochs would fill the disk
            kept = 1 + _ROWS_KEPT // self.rows_per_epoch
            for path in self.folder.here.glob(f"order-{self._order_key}-*.npy"):
                if abs(int(path.stem.rpartition("-")[2]) - epoch) > kept:
                    with suppress(OSError):
                        path.unlink(missing_ok=True)
        return order

    @cached_property
    def _order_key(self) -> str:
        factors = self.repeat_factors.name if isinstance(self.repeat_factors, MappedArray) else None
        windows = (self.window, self.unit_starts.name) if isinstance(self.unit_starts, MappedArray) else ()
        return hash_values(self.num_rows, self.shuffle, self.seed, factors, factors and self._most_shown, *windows)

    @property
    def _patience_s(self) -> float:
        return _PATIENCE_S + self.rows_per_epoch / _ROWS_A_SECOND

    @cached_property
    def _orders(self) -> dict[int, Column]:
        return {}  # of an epoch and its neighbours: loaders may be in the next one already

    def step_rows(self, step: int) -> np.ndarray:
        """Return the positions that step `step` (0-based, over the whole run) trains, over all ranks, `int64`."""
        epoch, k = divmod(step, self.steps_per_epoch)
        start = k * self.global_batch_size
        order = self._order(epoch)
        rows = order[start : start + self.global_batch_size].astype(np.int64)
        missing = self.global_batch_size - len(rows)
        if not self.whole_steps or not missing:
            return rows
        return np.concatenate([rows, np.resize(order[:missing].astype(np.int64), missing)])

    def _deal(self, rows: np.ndarray) -> list[np.ndarray]:
        return deal(rows, None if self.token_costs is None else self.token_costs[rows], self.world_size)

    def rank_step(self, step: int, rank: int) -> list[MicroBatch]:
        """Return the micro-batches of one rank in one step, always `accumulation` of them."""
        micro_batches = self._steps.get((step, rank))
        if micro_batches is None:
            rows = self.step_rows(step)
            rank_rows = self._deal_step(step)[rank]
            if self.tokens is None:
                parts = np.array_split(rank_rows, self.accumulation)
            else:
                groups = group_alike(self.tokens[rank_rows], self.accumulation, self.max_tokens_per_micro_batch)
                parts = [rank_rows[group] for group in groups]
            micro_batches = [
                MicroBatch(tuple(int(r) for r in part)) if len(part) else MicroBatch((int(rows[0]),), padding=True)
                for part in parts
            ]
            for past in list(self._steps)[:-_STEPS]:
                self._steps.pop(past, None)
            self._steps[step, rank] = micro_batches
        return micro_batches

    def _deal_step(self, step: int) -> list[np.ndarray]:
        """Return the rows of each rank in one step, dealt once for a caller that asks for those of all ranks."""
        dealt = self._dealt.get(step)
        if dealt is None:
            dealt = self._deal(self.step_rows(step))
            self._dealt.clear()
            self._dealt[step] = dealt
        return dealt

    def micro_batch(self, number: int, rank: int) -> MicroBatch:
        """Return micro-batch `number` of a rank, counted from the start of the run."""
        step, part = divmod(number, self.accumulation)
        return self.rank_step(step, rank)[part]

    @cached_property
    def _steps(self) -> dict[tuple[int, int], list[MicroBatch]]:
        return {}  # the last steps: the loader and the trainer request micro-batches one after another

    @cached_property
    def _dealt(self) -> dict[int, list[np.ndarray]]:
        return {}  # of the last step only

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_orders", "_steps", "_dealt")}


_ARRAYS = ("repeat_factors", "token_costs", "tokens", "unit_starts")


def epoch_order(
    num_rows: int,
    shuffle: bool,
    seed: int,
    epoch: int,
    factors: np.ndarray | None = None,
    most: int | None = None,
    windows: tuple[int, np.ndarray] | None = None,
) -> np.ndarray:
    """Return the order of an epoch, `int32 [rows shown]` or, from 2**31 rows on, `int64`; without shuffling, file order
    with repeats adjacent. It needs about as much memory again as the order itself.

    `most`: the largest number of rows. Only fractions whose sum is not a whole number can exceed it, by one row.
    `windows`: of a shuffle in windows, their rows and the first row of each unit, `int [units]`.
    """
    rng, dtype = np.random.default_rng([seed, epoch]), np.dtype(np.int32 if num_rows < 2**31 else np.int64)
    times = None
    if factors is None:
        order = np.arange(num_rows, dtype=dtype)
    else:
        times = _draw_times(rng, factors, dtype, most)
        order, end = np.empty(int(times.sum()), dtype), 0
        for part in _stretches(num_rows):
            rows = np.repeat(np.arange(part.start, part.stop, dtype=dtype), times[part])
            order[end : end + len(rows)] = rows
            end += len(rows)
    if shuffle and windows is not None:
        size, starts = windows
        counts = np.diff(starts, append=num_rows) if times is None else np.add.reduceat(times, starts)
        return _shuffle_in_windows(rng, order, counts.astype(dtype), size)
    if shuffle:
        rng.shuffle(order)  # in place; the same order as `permutation` of integers of any size
    return order


def _shuffle_in_windows(rng: np.random.Generator, order: np.ndarray, counts: np.ndarray, size: int) -> np.ndarray:
    """Return rows in file order, `order`, in windows of about `size` rows. `counts`: of the rows of each unit."""
    units = np.arange(len(counts), dtype=order.dtype)
    rng.shuffle(units)
    ends = np.cumsum(counts)
    before = (ends - counts)[units]  # where each unit begins in file order
    counts = counts[units]
    np.cumsum(counts, out=ends)
    mixed, some = np.empty_like(order), max(1, _ROWS_AT_ONCE * len(units) // len(order))
    for first in range(0, len(units), some):
        part = slice(first, first + some)
        begin, end = int(ends[first] - counts[first]), int(ends[part][-1])
        offsets = np.repeat(before[part] - ends[part] + counts[part], counts[part])
        mixed[begin:end] = order[offsets + np.arange(begin, end)]
    begins = ends - counts
    edges = begins[np.flatnonzero(np.diff(begins // size, prepend=-1))]
    for begin, end in pairwise([*edges.tolist(), len(order)]):
        rng.shuffle(mixed[begin:end])
    return mixed


def _stretches(length: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS_AT_ONCE, length)) for start in range(0, length, _ROWS_AT_ONCE))


def _draw_times(rng: np.random.Generator, factors: np.ndarray, dtype: np.dtype, most: int | None) -> np.ndarray:
    """Draw how often each row is shown: the whole part of its factor, and once more for some fractions (`int [rows]`).

    `dtype`: of row numbers.
    """
    times = np.empty(len(factors), np.int32)
    count = 0
    for part in _stretches(len(factors)):
        times[part] = np.floor(factors[part])
        count += int(np.count_nonzero(factors[part] != times[part]))
    candidates, end = np.empty(count, dtype), 0
    for part in _stretches(len(factors)):
        rows = np.flatnonzero(factors[part] != times[part])
        candidates[end : end + len(rows)] = rows + part.start
        end += len(rows)
    rng.shuffle(candidates)
    if not count:
        return times
    last = _round_sum([reach[-1] for _, reach in _sum_fractions(factors, candidates)][-1])
    start = rng.random()
    if most is not None and times.sum() + math.floor(last + start) > most:
        start = 0.0
    before = 0.0
    for part, reach in _sum_fractions(factors, candidates):
        if part.stop == count:
            reach[-1] = last
        whole = np.floor(reach + start)
        times[candidates[part]] += np.diff(whole, prepend=before).astype(np.int32)
        before = whole[-1]
    return times


def _sum_fractions(factors: np.ndarray, rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the running sum of the fractions of these rows' factors, a stretch of `rows` at a time."""
    total = 0.0
    for part in _stretches(len(rows)):
        fractions = factors[rows[part]]
        fractions -= np.floor(fractions)
        fractions[0] += total
        reach = np.cumsum(fractions)
        total = reach[-1]
        yield part, reach


def _round_sum(total: float) -> float:
    """Return `total`, or the whole number that it would be without the rounding errors of the sum."""
    near = round(total)
    return float(near) if abs(total - near) < 1e-6 else float(total)


def plan_sample(num_rows: int, count: int | None) -> list[int]:
    """Return `count` positions for validation, always the same: one from each of `count` equal stretches; all for None.

    The position within a stretch is random: rows that repeat with a period, such as the steps of tasks, would otherwise
    be sampled at one phase only.
    """
    if count is None or count >= num_rows:
        return list(range(num_rows))
    edges = np.arange(count + 1) * num_rows // count
    return np.random.default_rng([num_rows, count]).integers(edges[:-1], edges[1:]).tolist()
