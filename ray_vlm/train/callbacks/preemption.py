"""The end of a run before its last step: a signal, a sweep that prunes the trial, or a machine that is taken away.

Ray reports a node that is drained, such as a spot machine, through `ray.train.get_preemption_info`. That call is a
barrier of all workers, so they agree on the steps after which they call it.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ray_vlm.distributed import DistributedContext

if TYPE_CHECKING:
    from ray.train.v2.api.preemption import PreemptionInfo

EVERY_S = 3.0  # between two calls; one takes 26 ms with two workers, and most clouds give 30 s or more of notice


class Notice:
    """Checks for a preemption every few seconds. `ask`: returns Ray's preemption info, or None."""

    def __init__(self, ask: "Callable[[], PreemptionInfo | None]", every_s: float = EVERY_S):
        self._ask, self._every_s = ask, every_s
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Return whether the next check is due on this worker."""
        return time.monotonic() - self._last >= self._every_s

    def look(self) -> str | None:
        """Return the reason to leave, or None. All workers must call this after the same step."""
        self._last = time.monotonic()
        info = self._ask()
        if info is None:
            return None
        ranks = ", ".join(map(str, info.preempted_ranks))
        left = f" in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s" if info.deadline_ms else ""
        return f"the machine of worker {ranks} will be taken away{left}"


def watch_notice() -> Notice:
    """Return a `Notice` for the nodes of all workers of this Ray Train run."""
    import ray.train

    return Notice(ray.train.get_preemption_info)


class PreemptionCallback(TrainerCallback):
    """Ends the run with a checkpoint after a step if any rank should stop.

    `should_stop`: returns after every step whether this rank should. `notice`: under Ray. `stopped`: whether the run
    ends before its last step, `num_steps`; `leaving`: the reason, if a preemption is announced.
    """

    def __init__(
        self, should_stop: Callable[[], bool], notice: Notice | None, num_steps: int, context: DistributedContext
    ):
        self.stopped = False
        self.leaving: str | None = None
        self._should_stop, self._notice, self._num_steps, self._context = should_stop, notice, num_steps, context

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Agree with all ranks on whether to stop."""
        unfinished = state.global_step < self._num_steps
        due = self._notice is not None and unfinished and self._notice.is_due()
        stop, due = self._context.any_rank(self._should_stop(), due)
        if due and self._notice is not None:  # a barrier of all workers
            self.leaving = self._notice.look()
            stop = stop or self.leaving is not None
        if stop and unfinished:
            self.stopped = control.should_save = control.should_training_stop = True
