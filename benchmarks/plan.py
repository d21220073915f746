"""Planning of a large data set: ten million rows on one core; balance, split, order and share of steps.

A process of its own, held to one core, makes the tags, their balance (`oversample: auto`), a split with 1 % for eval
and 1 % for test, a plan with factors and costs, the orders of epochs 0 and 1, and 100 random steps of 8 ranks in each.
The caller's data (tags, groups, strata, costs) counts as memory; the time to make it does not count. Bars: 60 s, 2 GB
at the peak of the process.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.figures import figure, report
from ray_vlm.config.data import Data
from ray_vlm.data.balance import plan_balance
from ray_vlm.data.plan import Plan
from ray_vlm.data.splits import plan_split

TYPES = {"type=grate": 0.7, "type=manhole": 0.2, "type=catch_basin": 0.1}
CONDITIONS = {
    "condition=clear": 0.6,
    "condition=partly_blocked": 0.3,
    "condition=blocked": 0.09,
    "condition=broken": 0.01,
}
WORLD, STEPS = 8, 100


class Clock:
    """The seconds of each stage and the peak of memory at its end."""

    def __init__(self) -> None:
        self.stages: dict[str, tuple[float, int]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block."""
        started = time.perf_counter()
        yield
        self.stages[name] = (time.perf_counter() - started, peak_bytes())


def peak_bytes() -> int:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_rows(num_rows: int) -> tuple[list[tuple[str, ...]], list[str], np.ndarray]:
    """Build tags of rows (tuples shared by all rows of a kind), the class by which each is split, and costs like token
    counts."""
    rng = np.random.default_rng(0)
    share = TYPES | CONDITIONS
    kinds = [(first, second) for first in TYPES for second in CONDITIONS]
    picks = rng.choice(len(kinds), num_rows, p=[share[a] * share[b] for a, b in kinds]).astype(np.int8)
    rarest = [min(kind, key=lambda tag: share[tag]) for kind in kinds]
    costs = rng.lognormal(6.0, 0.6, num_rows).astype(np.float32)
    return [kinds[i] for i in picks], [rarest[i] for i in picks], costs


def plan_all(num_rows: int) -> dict[str, tuple[float, int]]:
    """Run every stage of planning once."""
    clock = Clock()
    with clock.stage("rows"):
        tags, strata, costs = make_rows(num_rows)
        groups = [""] * num_rows
    with clock.stage("balance"):
        balance = plan_balance(tags, np.ones(num_rows), Data(oversample="auto"))
    assert balance.repeat_factors is not None
    with clock.stage("split"):
        parts = plan_split(groups, strata, {"eval": 0.01, "test": 0.01}, 0)
    assert sum(len(part) for part in parts.values()) == num_rows
    plan = Plan(num_rows, 256, 4, WORLD, num_epochs=2, repeat_factors=balance.repeat_factors, token_costs=costs)
    rng = np.random.default_rng(1)
    for epoch in (0, 1):
        with clock.stage(f"order_{epoch}"):
            plan.epoch_rows(epoch)
        first = epoch * plan.steps_per_epoch
        steps = (first + rng.integers(0, plan.steps_per_epoch, STEPS)).tolist()
        with clock.stage(f"steps_{epoch}"):
            for step in steps:
                for rank in range(WORLD):
                    plan.rank_step(step, rank)
    return clock.stages


def run_inner(num_rows: int) -> None:
    """Hold this process to one core, plan, and print the stages as JSON."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    before = peak_bytes()
    print(json.dumps({"imports": (0.0, before), **plan_all(num_rows)}))


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return all figures."""
    num_rows = 1_000_000 if quick else 10_000_000
    command = [sys.executable, "-m", "benchmarks.plan", "--inner", str(num_rows)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    stages = json.loads(out.stdout.strip().splitlines()[-1])
    planning = {name: seconds for name, (seconds, _) in stages.items() if name not in ("imports", "rows")}
    return [
        figure("plan.rows", num_rows, "rows"),
        *(figure(f"plan.{name}", seconds, "s") for name, seconds in planning.items()),
        *(figure(f"plan.peak_after_{name}", peak, "bytes") for name, (_, peak) in stages.items()),
        figure("plan.total", sum(planning.values()), "s", 60),
        figure("plan.peak_memory", max(peak for _, peak in stages.values()), "bytes", 2e9),
    ]


if __name__ == "__main__":
    if "--inner" in sys.argv:
        run_inner(int(sys.argv[2]))
    else:
        report(measure)
