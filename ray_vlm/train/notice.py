"""Preemption notices: the workers write a checkpoint and exit before their machine is taken away.

Ray reports a node that is drained, such as a spot machine, through `ray.train.get_preemption_info`. That call is a
barrier of all workers, so they agree on the steps after which they call it.
"""

import time
from collections.abc import Callable
from typing import Any

EVERY_S = 3.0  # between two calls; one takes 26 ms with two workers, and most clouds give 30 s or more of notice


class Notice:
    """Checks for a preemption every few seconds. `ask`: returns Ray's preemption info, or None."""

    def __init__(self, ask: Callable[[], Any], every_s: float = EVERY_S):
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
