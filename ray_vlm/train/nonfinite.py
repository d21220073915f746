"""A step whose gradient is not finite changes nothing: its rows are written down, and the run stops, goes on, or goes
back to its last checkpoint and trains none of the rows that led there.

One NaN in the weights is in every weight a step later, and a run that goes on with it trains nothing for days. A loss
that jumps is only told: some jumps are the data's.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.plan import Plan
from ray_vlm.errors import RunError
from ray_vlm.runs.monitor import Monitor, whole_lines
from ray_vlm.runs.paths import RunPaths

_WINDOW, _LEAST = 50, 20  # losses that a new one is compared with, and how many there must be
_NAMED = 8  # rows in a sentence; the file has all


def is_finite(norms: Mapping[str, float]) -> bool:
    """Whether every part's gradient is. All ranks see the same norms, so all decide alike."""
    return all(math.isfinite(norm) for norm in norms.values())


def describe_step(plan: Plan, step: int, ids: Callable[[int], str]) -> dict[str, Any]:
    """A line for `bad_steps.jsonl`: the step (from 1) and the rows of every rank's micro-batches. `step`: from 0;
    `ids`: the id of a row by its position. Clipping makes all gradients NaN where one is, so no part is named."""
    ranks = [
        [[ids(row) for row in batch.rows] for batch in plan.rank_step(step, rank) if not batch.filler]
        for rank in range(plan.world_size)
    ]
    return {"step": step + 1, "rows": ranks}


def explain(told: Mapping[str, Any], policy: str) -> str:
    """A sentence on such a line, by `train.nonfinite`."""
    rows = [row for of_rank in told["rows"] for batch in of_rank for row in batch]
    named = ", ".join(rows[:_NAMED]) + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")
    found = f"step {told['step']}: the gradient is not finite. Rows: {named}"
    if policy == "skip":
        return f"{found}. They change nothing; see bad_steps.jsonl"
    if policy == "rewind":
        return f"{found}. Going back to the last checkpoint, and training no rows from there to this step"
    return (
        f"{found}. Nothing of the step was kept, and bad_steps.jsonl has all its rows. Look at them, lower "
        "train.learning_rate, or set train.nonfinite=skip and go on with --resume."
    )


def drop_gradients(model: Any) -> None:
    """Let the optimizer find nothing to do, in this step, for any weight."""
    for parameter in model.parameters():
        parameter.grad = None


class RewindToCheckpoint(RunError):
    """The run is to go on from its last checkpoint, without the rows from there to the step that failed."""


def read_bad_steps(paths: RunPaths) -> list[int]:
    """The steps (from 1) that `bad_steps.jsonl` names."""
    paths.refresh(paths.bad_steps)
    data = paths.bad_steps.read_bytes() if paths.bad_steps.is_file() else b""
    return [line["step"] for line in whole_lines(data) if isinstance(line, dict) and "step" in line]


class Spikes:
    """Tells of losses far above those before."""

    def __init__(self) -> None:
        self.last: deque[float] = deque(maxlen=_WINDOW)

    def look(self, step: int, loss: float) -> str | None:
        """A sentence where `loss` is over the median of the last ones by ten times their median deviation, and by half
        of it. Nothing is told while there are few."""
        before = list(self.last)
        self.last.append(loss if math.isfinite(loss) else (statistics.median(before) if before else 0.0))
        if len(before) < _LEAST or not math.isfinite(loss):
            return None
        middle = statistics.median(before)
        spread = statistics.median(abs(value - middle) for value in before)
        if middle > 0 and loss > middle + 10 * spread and loss > 1.5 * middle:
            return f"step {step}: loss {loss:.4g}, where the median of the last {len(before)} is {middle:.4g}"
        return None


def watch_steps(
    job: JobConfig,
    paths: RunPaths,
    plan: Plan,
    monitor: Monitor | None,
    ids: Callable[[int], str],
    begun: tuple[int, Sequence[int]] = (0, ()),
    overflowed: Callable[[], str | None] = lambda: None,
) -> Callable[[Any, int, Mapping[str, float]], bool]:
    """A function that is called with the model, the step (from 0) and its gradient's norms before the optimizer moves.

    Where they are not finite it raises `RunError`, or drops the gradients and says so. `monitor`: of rank 0, which
    writes down. `begun`: the step that this attempt goes on from, and the steps that were bad before it; with
    `train.nonfinite=rewind` none between them is trained. `overflowed`: why a gradient that is not finite is the
    business of float16's scaler, which leaves the step out by itself, or None.
    """
    policy = job.train.nonfinite
    until = max([step for step in begun[1] if step > begun[0]], default=0) if policy == "rewind" else 0

    def check(model: Any, step: int, norms: Mapping[str, float]) -> bool:
        if step < until:
            if monitor is not None and step == begun[0]:
                found = f"the gradient of step {until} was not finite"
                monitor.note(step, f"{found}: the steps from {step + 1} to it change nothing")
            drop_gradients(model)
            return True
        if is_finite(norms):
            return False
        if (scaled := overflowed()) is not None:
            if monitor is not None:
                monitor.note(step + 1, scaled)
            return False
        told = describe_step(plan, step, ids)
        if monitor is not None:
            with suppress(OSError):  # a store that stumbles must not end what goes on, nor hide why it does not
                paths.refresh(paths.bad_steps)
                _add_line(paths.bad_steps, json.dumps(told, ensure_ascii=False))
                paths.publish(paths.bad_steps)
        if policy != "skip":
            raise (RewindToCheckpoint if policy == "rewind" else RunError)(explain(told, policy))
        if monitor is not None:
            monitor.note(step + 1, explain(told, policy))
        drop_gradients(model)
        return True

    return check


def _add_line(path: Path, line: str) -> None:
    """Append it; once, however often the step is run again."""
    there = path.read_text("utf-8").splitlines() if path.exists() else []
    if line not in there:
        path.write_text("".join(f"{each}\n" for each in [*there, line]), "utf-8")
