"""Who sees which row when: pure arithmetic on (number of rows, seed, epoch, world size, batch sizes, step).

Step k of an epoch takes one contiguous stretch of that epoch's order, whatever the number of workers; ranks share
the stretch out in order. Every rank runs the same number of micro-batches in every step; one that would be left
without rows runs a filler, a row whose tokens are not trained. Nothing here reads data or keeps state, so any step
can be computed without those before it.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class MicroBatch:
    """What one rank runs at a time: positions in the index. `filler`: run it for company, train none of it."""

    rows: tuple[int, ...]
    filler: bool = False


@dataclass(frozen=True)
class Plan:
    """Order and split of `num_rows` rows. `global_batch_size` counts rows over all ranks in one optimizer step."""

    num_rows: int
    global_batch_size: int
    micro_batch_size: int
    world_size: int
    num_epochs: float = 1.0
    max_steps: int | None = None
    shuffle: bool = True
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.global_batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the whole run."""
        return self.max_steps or max(1, math.ceil(round(self.steps_per_epoch * self.num_epochs, 6)))

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in one step."""
        return math.ceil(math.ceil(self.global_batch_size / self.world_size) / self.micro_batch_size)

    def step_rows(self, step: int) -> np.ndarray:
        """Positions in the index that step `step` (0-based, over the whole run) trains, over all ranks."""
        epoch, k = divmod(step, self.steps_per_epoch)
        start = k * self.global_batch_size
        return epoch_order(self.num_rows, self.shuffle, self.seed, epoch)[start : start + self.global_batch_size]

    def rank_step(self, step: int, rank: int) -> list[MicroBatch]:
        """The micro-batches of one rank in one step, always `accumulation` of them."""
        rows = self.step_rows(step)
        mine = np.array_split(rows, self.world_size)[rank]
        parts = np.array_split(mine, self.accumulation)
        return [
            MicroBatch(tuple(int(r) for r in part)) if len(part) else MicroBatch((int(rows[0]),), filler=True)
            for part in parts
        ]

    def micro_batch(self, number: int, rank: int) -> MicroBatch:
        """Micro-batch `number` of a rank, counted from the start of the run."""
        step, part = divmod(number, self.accumulation)
        return self.rank_step(step, rank)[part]


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, shuffle: bool, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, `int64 [num_rows]`; file order without shuffling."""
    order = np.random.default_rng([seed, epoch]).permutation(num_rows) if shuffle else np.arange(num_rows)
    order.setflags(write=False)  # shared by all who ask
    return order


def plan_sample(num_rows: int, count: int | None) -> list[int]:
    """`count` positions evenly spaced over the rows, for validation; all of them for None."""
    if count is None or count >= num_rows:
        return list(range(num_rows))
    return [i * num_rows // count for i in range(count)]
