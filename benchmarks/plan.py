"""Planning of a large data set: ten million rows on one core; balance, split, plan, order and share of steps.

A process of its own, held to one core, makes the codes of the rows' tags, their balance (`oversample: auto`), a split
with 1 % for eval and 1 % for test by the rarest tag, a plan with factors and costs that is stored in a folder, the
orders of epochs 0 and 1, 100 random steps of 8 ranks in each, and the order of epoch 0 in windows of 1,024 rows over
groups of 50. The caller's data (codes of tags and groups, costs) counts as memory; the time to make it does not count.
Another process maps the stored plan and takes 100 random steps: what it then holds beyond its imports, shared pages by
its share (PSS). Bars: 30 s, 1.5 GB at the peak of the process that plans, 20 MB in the other.
"""

import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import figure, report
from ray_vlm.config.data import Data
from ray_vlm.data.balance import plan_balance
from ray_vlm.data.plan import Plan
from ray_vlm.data.splits import plan_split, rarest_tags

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


def held_bytes() -> int:
    """Return the memory of this process, shared pages by its share."""
    line = next(x for x in Path("/proc/self/smaps_rollup").read_text().splitlines() if x.startswith("Pss:"))
    return int(line.split()[1]) * 1024


def make_rows(num_rows: int) -> tuple[list[tuple[str, ...]], np.ndarray, np.ndarray]:
    """Build the kinds of tags that rows have, the kind of each row, and costs like token counts."""
    rng = np.random.default_rng(0)
    share = TYPES | CONDITIONS
    kinds = [(first, second) for first in TYPES for second in CONDITIONS]
    kind_of = rng.choice(len(kinds), num_rows, p=[share[a] * share[b] for a, b in kinds]).astype(np.int32)
    return kinds, kind_of, rng.lognormal(6.0, 0.6, num_rows).astype(np.float32)


def take_steps(plan: Plan, epoch: int) -> None:
    """Take random steps of an epoch, of all ranks."""
    first, rng = epoch * plan.steps_per_epoch, np.random.default_rng(1 + epoch)
    for step in (first + rng.integers(0, plan.steps_per_epoch, STEPS)).tolist():
        for rank in range(WORLD):
            plan.rank_step(step, rank)


def plan_all(num_rows: int, folder: Path) -> dict[str, tuple[float, int]]:
    """Run every stage of planning once, and leave the stored plan in `folder`."""
    clock = Clock()
    with clock.stage("rows"):
        kinds, kind_of, costs = make_rows(num_rows)
        groups = np.full(num_rows, -1)
    with clock.stage("balance"):
        balance = plan_balance(kinds, kind_of, np.ones(num_rows), Data(oversample="auto"))
    assert balance.repeat_factors is not None
    with clock.stage("split"):
        parts = plan_split(groups, rarest_tags(kinds, kind_of), {"eval": 0.01, "test": 0.01}, 0)
    assert sum(len(part) for part in parts.values()) == num_rows
    del parts
    with clock.stage("plan"):
        plan = Plan(num_rows, 256, 4, WORLD, num_epochs=2, repeat_factors=balance.repeat_factors, token_costs=costs)
        plan = plan.store(folder)
    del balance, costs
    for epoch in (0, 1):
        with clock.stage(f"order_{epoch}"):
            plan.epoch_rows(epoch)
        with clock.stage(f"steps_{epoch}"):
            take_steps(plan, epoch)
    with clock.stage("order_windows"):
        starts = np.arange(0, num_rows, 50, dtype=np.int32)
        replace(plan, unit_starts=starts, window=1024, folder=None).store(folder / "windows").epoch_rows(0)
    (folder / "plan").write_bytes(pickle.dumps(plan))
    return clock.stages


def run_inner(num_rows: int, folder: Path) -> None:
    """Hold this process to one core, plan, and print the stages as JSON."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    before = peak_bytes()
    print(json.dumps({"imports": (0.0, before), **plan_all(num_rows, folder)}))


def run_other(folder: Path) -> None:
    """Load the stored plan, take steps, and print the bytes that this process then holds beyond its imports, and the
    bytes of the plan where it is pickled."""
    take_steps(Plan(4096, 256, 4, WORLD, num_epochs=2, token_costs=np.ones(4096)), 0)  # what the first call allocates
    before, data = held_bytes(), (folder / "plan").read_bytes()
    plan = pickle.loads(data)
    take_steps(plan, 0)
    print(json.dumps([held_bytes() - before, len(data)]))


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return all figures."""
    num_rows = 1_000_000 if quick else 10_000_000
    with tempfile.TemporaryDirectory() as folder:
        stages = _run("--inner", str(num_rows), folder)
        held, pickled = _run("--other", folder)
    planning = {name: seconds for name, (seconds, _) in stages.items() if name not in ("imports", "rows")}
    return [
        figure("plan.rows", num_rows, "rows"),
        *(figure(f"plan.{name}", seconds, "s") for name, seconds in planning.items()),
        *(figure(f"plan.peak_after_{name}", peak, "bytes") for name, (_, peak) in stages.items()),
        figure("plan.total", sum(planning.values()), "s", 30),
        figure("plan.peak_memory", max(peak for _, peak in stages.values()), "bytes", 1.5e9),
        figure("plan.held_elsewhere", held, "bytes", 20e6),
        figure("plan.pickled", pickled, "bytes", 5000),
    ]


def _run(*arguments: str) -> Any:
    """Return what a process of this module prints as JSON."""
    command = [sys.executable, "-m", "benchmarks.plan", *arguments]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(out.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    if "--inner" in sys.argv:
        run_inner(int(sys.argv[2]), Path(sys.argv[3]))
    elif "--other" in sys.argv:
        run_other(Path(sys.argv[2]))
    else:
        report(measure)
