"""Steps whose gradient is not finite: their rows are recorded, the weights stay as they are, and by `train.nonfinite`
the run stops, skips the step, or rewinds to its last checkpoint and skips all rows from there to the step.

One NaN in the weights spreads to all of them within a step, and such a run learns nothing more. Jumps of the loss are
only reported, because some come from the data.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ray_vlm.data.plan import Plan
from ray_vlm.errors import RunError
from ray_vlm.methods.loss_scale import LossScale
from ray_vlm.runs.monitor import whole_lines
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.callbacks.gradient_norms import GradientNormsCallback
from ray_vlm.train.restarts import RewindToCheckpoint
from ray_vlm.train.run_context import RunContext

logger = logging.getLogger(__name__)
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
        [[ids(row) for row in batch.rows] for batch in plan.rank_step(step, rank) if not batch.padding]
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


def read_bad_steps(paths: RunPaths) -> list[int]:
    """Return the steps (from 1) in `bad_steps.jsonl`."""
    paths.refresh(paths.bad_steps)
    data = paths.bad_steps.read_bytes() if paths.bad_steps.is_file() else b""
    return [line["step"] for line in whole_lines(data) if isinstance(line, dict) and "step" in line]


class NonfiniteCallback(TrainerCallback):
    """Checks the gradient before every optimizer step, and records and handles one that is not finite.

    `policy`: `train.nonfinite`. `bad_steps`: those of earlier attempts (from 1). With the policy `rewind` the steps
    from the one that this attempt resumes from to the last of them are skipped. `row_id` returns the id of a training
    row by its position. `checks_loss`: check the loss, after the step, because the gradients cannot be seen. All ranks
    see the same norms, so they act alike.
    """

    def __init__(
        self,
        run: RunContext,
        policy: str,
        norms: GradientNormsCallback,
        loss_scale: LossScale,
        row_id: Callable[[int], str],
        bad_steps: Sequence[int] = (),
        checks_loss: bool = False,
    ):
        self.skipped = False  # whether the current step changes nothing
        self._run, self._policy, self._norms, self._loss_scale = run, policy, norms, loss_scale
        self._row_id, self._checks_loss, self._resumed_at = row_id, checks_loss, run.attempt.step
        later = [step for step in bad_steps if step > self._resumed_at]
        self._skip_until = max(later, default=0) if policy == "rewind" else 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the norms that `GradientNormsCallback` has measured. Raise `RunError` if the run should stop."""
        self.skipped = self._check(kwargs["model"], state.global_step, self._norms.norms)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the loss where the gradients cannot be seen."""
        loss = kwargs["logs"].get("loss")
        if self._checks_loss and loss is not None and not math.isfinite(loss):
            self._check(kwargs["model"], state.global_step - 1, {"the loss": loss})

    def _check(self, model: torch.nn.Module, step: int, norms: Mapping[str, float]) -> bool:
        """Return whether the step (from 0) is skipped."""
        if step < self._skip_until:
            if step == self._resumed_at:
                reason = f"the gradient of step {self._skip_until} was not finite"
                logger.info(f"{reason}: the steps from {step + 1} to it are skipped", extra={"step": step})
            model.zero_grad()  # so that the optimizer changes no weight
            return True
        if is_finite(norms):
            return False
        if (scaled := self._loss_scale.explain_overflow(self._run.distributed)) is not None:
            logger.info(scaled, extra={"step": step + 1})
            return False
        bad_step = describe_step(self._run.plan, step, self._row_id)
        if self._run.distributed.rank == 0:
            with suppress(OSError):  # a failing store must neither end the run nor hide the message below
                self._run.paths.refresh(self._run.paths.bad_steps)
                _add_line(self._run.paths.bad_steps, json.dumps(bad_step, ensure_ascii=False))
                self._run.paths.publish(self._run.paths.bad_steps)
        if self._policy != "skip":
            error = RewindToCheckpoint if self._policy == "rewind" else RunError
            raise error(explain(bad_step, self._policy))
        logger.info(explain(bad_step, self._policy), extra={"step": step + 1})
        model.zero_grad()
        return True


def _add_line(path: Path, line: str) -> None:
    """Append the line unless it is there already from an earlier attempt at this step."""
    there = path.read_text("utf-8").splitlines() if path.exists() else []
    if line not in there:
        path.write_text("".join(f"{each}\n" for each in [*there, line]), "utf-8")
