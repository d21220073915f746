"""The answers that samplers beside a worker work on for its steps, and for the step that comes next."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ray_vlm.data.spec import Sample
from ray_vlm.engines.actors import SamplerPool
from ray_vlm.engines.interface import Completion, Sampling


def seeds_of(rows: Sequence[Sample], seed: int, step: int) -> list[tuple[int, int, int, int]]:
    """Return the seed of each row's random numbers. It depends only on the run's seed, the step, the row, and how often
    the row was in the step before."""
    seen: Counter[int] = Counter()
    seeds = []
    for row in rows:
        seeds.append((seed, step, row.number, seen[row.number]))
        seen[row.number] += 1
    return seeds


@dataclass(frozen=True)
class _Asked:
    """A call of the pool: its number, the step at which it was made, and its rows."""

    call: int
    at_step: int
    rows: tuple[int, ...]


class SampledAhead:
    """The calls for a step and, with `max_staleness` 1, for the next one, by step."""

    def __init__(self, pool: SamplerPool):
        self._pool = pool
        self._asked: dict[int, _Asked] = {}

    def portion_size(self, rows: int) -> int:
        """Return how many of that many prompts a sampler samples at a time."""
        return self._pool.portion_size(rows)

    def submit(
        self, step: int, now: int, rows: Sequence[Sample], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> None:
        """Ask for the answers to the rows of `step` with the newest weights, which are those of step `now`, unless they
        have been asked for."""
        numbers, asked = tuple(row.number for row in rows), self._asked.get(step)
        if asked is not None and asked.rows == numbers:
            return
        if asked is not None:  # a row was replaced since, for example because its image is gone
            self._pool.drop(asked.call)
        self._asked[step] = _Asked(self._pool.submit(rows, sampling, seeds), now, numbers)

    def collect(self, step: int) -> tuple[list[list[Completion]], dict[str, float]]:
        """Return the groups of `step`, and what is logged of them: `staleness`, the steps between the weights that
        sampled and those that learn; `waiting_s`, that the worker waited; `samplers`, that are there; `sampling_s` and
        `samplers_idle_s`, the mean over these of the seconds in which they sampled, or had nothing to do, for all
        workers."""
        asked = self._asked.pop(step)
        groups = self._pool.collect(asked.call)
        times = self._pool.take_times()
        return groups, {
            "staleness": float(step - asked.at_step),
            "waiting_s": times.waited,
            "sampling_s": times.busy,
            "samplers_idle_s": times.idle,
            "samplers": float(times.samplers),
        }
