"""Plan which rank trains which row at which step: pure arithmetic on (repeat factors, token costs, seed, epoch, world
size, batch sizes, step).

Step k of an epoch takes one contiguous stretch of that epoch's order for any number of workers, and the ranks share it.
Every rank runs the same number of micro-batches in every step; a rank without rows runs a padding micro-batch, a
row whose tokens are not trained. Nothing here reads data or keeps state, so any step can be computed without those
before it.

A row's factor is how often it is shown in an epoch: always its whole part, and once more with the probability of its
fraction. Fractions are drawn by systematic sampling (Madow 1949) over a shuffled order. So each is exact in
expectation, an epoch's length is fixed to within one row, and the same seed gives the same rows.
"""

import heapq
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_STEPS = 64  # steps of one rank that a plan keeps in memory


@dataclass(frozen=True)
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
    `max_tokens_per_micro_batch`, also when padded to its longest row, replaces `micro_batch_size`.
    """

    num_rows: int
    global_batch_size: int
    micro_batch_size: int
    world_size: int
    num_epochs: float = 1.0
    max_steps: int | None = None
    shuffle: bool = True
    seed: int = 0
    repeat_factors: np.ndarray | None = None
    token_costs: np.ndarray | None = None
    whole_steps: bool = False
    tokens: np.ndarray | None = None
    max_tokens_per_micro_batch: int = 0

    @cached_property
    def rows_per_epoch(self) -> int:
        """Rows shown in an epoch, repeats counted; some epochs have one more."""
        factors = self.repeat_factors
        return self.num_rows if factors is None else max(1, math.floor(_round_sum(factors.sum())))

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows_per_epoch / self.global_batch_size)

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
        most = 1
        for step in range(self.num_steps):
            for rows in deal(self.step_rows(step), self.token_costs, self.world_size):
                most = max(most, min_parts(self.tokens[rows], self.max_tokens_per_micro_batch))
        return most

    @property
    def rows_at_once(self) -> int:
        """Rows of a micro-batch; approximate if tokens are counted."""
        return math.ceil(math.ceil(self.global_batch_size / self.world_size) / self.accumulation)

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """Return positions in the index in the order of an epoch, `int64 [rows shown]`."""
        if epoch not in self._orders:
            most = self.steps_per_epoch * self.global_batch_size
            self._orders.clear()
            self._orders[epoch] = epoch_order(self.num_rows, self.shuffle, self.seed, epoch, self.repeat_factors, most)
        return self._orders[epoch]

    @cached_property
    def _orders(self) -> dict[int, np.ndarray]:
        return {}  # of the last epoch only: its steps are requested one after another

    def step_rows(self, step: int) -> np.ndarray:
        """Return the positions that step `step` (0-based, over the whole run) trains, over all ranks."""
        epoch, k = divmod(step, self.steps_per_epoch)
        start = k * self.global_batch_size
        order = self.epoch_rows(epoch)
        rows = order[start : start + self.global_batch_size]
        missing = self.global_batch_size - len(rows)
        return np.concatenate([rows, np.resize(order, missing)]) if self.whole_steps and missing else rows

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
            if len(self._steps) > _STEPS:
                self._steps.clear()
            self._steps[step, rank] = micro_batches
        return micro_batches

    def _deal_step(self, step: int) -> list[np.ndarray]:
        """Return the rows of each rank in one step, dealt once for a caller that asks for those of all ranks."""
        dealt = self._dealt.get(step)
        if dealt is None:
            dealt = deal(self.step_rows(step), self.token_costs, self.world_size)
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


def epoch_order(
    num_rows: int, shuffle: bool, seed: int, epoch: int, factors: np.ndarray | None = None, most: int | None = None
) -> np.ndarray:
    """Return the order of an epoch, `int64 [rows shown]`; without shuffling, file order with repeats adjacent.

    `most`: the largest number of rows. Only fractions whose sum is not a whole number can exceed it, by one row.
    """
    rng = np.random.default_rng([seed, epoch])
    if factors is None:
        return rng.permutation(num_rows) if shuffle else np.arange(num_rows)
    times = np.floor(factors).astype(np.int64)
    fraction = factors - times
    candidates = rng.permutation(np.flatnonzero(fraction))
    if len(candidates):
        reach = np.cumsum(fraction[candidates])
        reach[-1] = _round_sum(reach[-1])
        start = rng.random()
        if most is not None and times.sum() + math.floor(reach[-1] + start) > most:
            start = 0.0
        times[candidates] += np.diff(np.floor(reach + start), prepend=0.0).astype(np.int64)
    order = np.repeat(np.arange(num_rows), times)
    return rng.permutation(order) if shuffle else order


def _round_sum(total: float) -> float:
    """Return `total`, or the whole number that it would be without the rounding errors of the sum."""
    near = round(total)
    return float(near) if abs(total - near) < 1e-6 else float(total)


def deal(rows: np.ndarray, costs: np.ndarray | None, world_size: int) -> list[np.ndarray]:
    """Return the rows of each rank, equally many to within one.

    With costs, the most expensive row goes to the rank with the least cost so far that has room (Graham's LPT rule with
    capacities). Each rank's rows are sorted by cost: micro-batches hold rows of similar length, and the k-th of every
    rank take about as long.
    """
    if costs is None:
        return np.array_split(rows, world_size)
    ranked = rows[np.argsort(-costs[rows], kind="stable")]
    room = [len(part) for part in np.array_split(rows, world_size)]
    loads = [(0.0, rank) for rank in range(world_size) if room[rank]]
    rows_of: list[list[int]] = [[] for _ in range(world_size)]
    for row, cost in zip(ranked.tolist(), costs[ranked].tolist(), strict=True):
        total, rank = heapq.heappop(loads)
        rows_of[rank].append(row)
        if len(rows_of[rank]) < room[rank]:
            heapq.heappush(loads, (total + cost, rank))
    return [np.array(part, np.int64) for part in rows_of]


def min_parts(sizes: np.ndarray, budget: int) -> int:
    """Return the fewest groups of `sizes` such that none, padded to its longest, exceeds `budget` tokens."""
    ranked, parts, first = np.sort(sizes)[::-1], 0, 0
    while first < len(ranked):
        first += max(1, budget // max(1, int(ranked[first])))
        parts += 1
    return max(1, parts)


def group_alike(sizes: np.ndarray, parts: int, budget: int) -> list[np.ndarray]:
    """Return positions of `sizes` in `parts` groups of similar sizes with the least padding, each within `budget`
    tokens when padded to its longest.

    `parts`: at least `min_parts`; some groups are empty if there are fewer sizes.
    """
    ranked, count = np.argsort(-sizes, kind="stable"), len(sizes)
    used = min(parts, count)
    # Dynamic programming over the sorted sizes: `cost[end]` is the fewest padded tokens of ranked[:end] so far.
    first, end = np.ogrid[:count, : count + 1]
    padded = (end - first) * np.append(sizes[ranked], 0)[:count, None].astype(float)  # of ranked[first:end] as a group
    padded[(end <= first) | ((padded > budget) & (end - first > 1))] = np.inf
    cost, starts = np.full(count + 1, np.inf), []
    cost[0] = 0.0
    for _ in range(used):
        total = cost[:count, None] + padded
        starts.append(total.argmin(axis=0))
        cost = total.min(axis=0)
    groups, end_of = [], count
    for start in reversed(starts):
        groups.append(np.sort(ranked[start[end_of] : end_of]))
        end_of = int(start[end_of])
    return groups[::-1] + [np.array([], np.int64)] * (parts - used)


def plan_sample(num_rows: int, count: int | None) -> list[int]:
    """Return `count` positions for validation, always the same: one from each of `count` equal stretches; all for None.

    The position within a stretch is random: rows that repeat with a period, such as the steps of tasks, would otherwise
    be sampled at one phase only.
    """
    if count is None or count >= num_rows:
        return list(range(num_rows))
    edges = np.arange(count + 1) * num_rows // count
    return np.random.default_rng([num_rows, count]).integers(edges[:-1], edges[1:]).tolist()
