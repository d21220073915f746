"""Steps whose gradient is not finite: their rows are recorded, the weights stay as they are, and by `train.nonfinite`
the run stops, skips the step, or rewinds to its last checkpoint and skips all rows from there to the step.

One NaN in the weights spreads to all of them within a step, and such a run learns nothing more. Jumps of the loss are
only reported, because some come from the data.
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

_WINDOW, _LEAST = 50, 20  # number of previous losses to compare with, and the minimum
_NAMED = 8  # rows in a message; the file has all


def is_finite(norms: Mapping[str, float]) -> bool:
    """Return whether the norms of all parts are finite. All ranks see the same norms, so they decide alike."""
    return all(math.isfinite(norm) for norm in norms.values())


def describe_step(plan: Plan, step: int, ids: Callable[[int], str]) -> dict[str, Any]:
    """Return a line for `bad_steps.jsonl`: the step (from 1) and the rows of every rank's micro-batches.

    `step`: from 0; `ids`: the id of a row by its position. Clipping turns all gradients into NaN if one is, so the part
    of the model is not known.
    """
    ranks = [
        [[ids(row) for row in batch.rows] for batch in plan.rank_step(step, rank) if not batch.filler]
        for rank in range(plan.world_size)
    ]
    return {"step": step + 1, "rows": ranks}


def explain(bad_step: Mapping[str, Any], policy: str) -> str:
    """Return the message for a line of `describe_step` under the policy `train.nonfinite`."""
    rows = [row for batches in bad_step["rows"] for batch in batches for row in batch]
    named = ", ".join(rows[:_NAMED]) + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")
    problem = f"step {bad_step['step']}: the gradient is not finite. Rows: {named}"
    if policy == "skip":
        return f"{problem}. The step is skipped; see bad_steps.jsonl"
    if policy == "rewind":
        return f"{problem}. Going back to the last checkpoint and skipping all rows from there to this step"
    return (
        f"{problem}. The step was not applied; bad_steps.jsonl lists all its rows. Check them, lower "
        "train.learning_rate, or set train.nonfinite=skip and go on with --resume."
    )


def drop_gradients(model: Any) -> None:
    """Remove all gradients, so that the optimizer changes no weight in this step."""
    for parameter in model.parameters():
        parameter.grad = None


class RewindToCheckpoint(RunError):
    """Raised to continue from the last checkpoint without the rows from there to the step that failed."""


def read_bad_steps(paths: RunPaths) -> list[int]:
    """Return the steps (from 1) in `bad_steps.jsonl`."""
    paths.refresh(paths.bad_steps)
    data = paths.bad_steps.read_bytes() if paths.bad_steps.is_file() else b""
    return [line["step"] for line in whole_lines(data) if isinstance(line, dict) and "step" in line]


class Spikes:
    """Detects losses far above the previous ones."""

    def __init__(self) -> None:
        self.last: deque[float] = deque(maxlen=_WINDOW)

    def look(self, step: int, loss: float) -> str | None:
        """Return a message if `loss` exceeds the median of the previous losses by more than ten times their median
        absolute deviation and by more than half of the median; None otherwise or with too few losses."""
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
    """Return a function of the model, the step (from 0) and its gradient norms, to call before the optimizer's step.

    If the norms are not finite it raises `RunError`, or drops the gradients and returns True. `monitor`: of rank 0,
    which records it. `begun`: the step that this attempt resumes from, and the bad steps of earlier attempts; with
    `train.nonfinite=rewind` the steps from the first to the last of them are skipped. `overflowed`: returns a message
    if float16's scaler handles the gradient and skips the step by itself, else None.
    """
    policy = job.train.nonfinite
    until = max([step for step in begun[1] if step > begun[0]], default=0) if policy == "rewind" else 0

    def check(model: Any, step: int, norms: Mapping[str, float]) -> bool:
        if step < until:
            if monitor is not None and step == begun[0]:
                reason = f"the gradient of step {until} was not finite"
                monitor.note(step, f"{reason}: the steps from {step + 1} to it are skipped")
            drop_gradients(model)
            return True
        if is_finite(norms):
            return False
        if (scaled := overflowed()) is not None:
            if monitor is not None:
                monitor.note(step + 1, scaled)
            return False
        bad_step = describe_step(plan, step, ids)
        if monitor is not None:
            with suppress(OSError):  # a failing store must neither end the run nor hide the message below
                paths.refresh(paths.bad_steps)
                _add_line(paths.bad_steps, json.dumps(bad_step, ensure_ascii=False))
                paths.publish(paths.bad_steps)
        if policy != "skip":
            raise (RewindToCheckpoint if policy == "rewind" else RunError)(explain(bad_step, policy))
        if monitor is not None:
            monitor.note(step + 1, explain(bad_step, policy))
        drop_gradients(model)
        return True

    return check


def _add_line(path: Path, line: str) -> None:
    """Append the line unless it is there already from an earlier attempt at this step."""
    there = path.read_text("utf-8").splitlines() if path.exists() else []
    if line not in there:
        path.write_text("".join(f"{each}\n" for each in [*there, line]), "utf-8")
