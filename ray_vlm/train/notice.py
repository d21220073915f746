"""A notice that machines will be taken away: the workers write a checkpoint and leave while there is time.

Ray tells of a node that is drained, as cloud providers drain spot machines, through `ray.train.get_preemption_info`,
for which all workers wait for one another. So they agree after which steps they ask.
"""

import time
from collections.abc import Callable
from typing import Any

EVERY_S = 3.0  # between two looks; one takes 26 ms with two workers, and a notice is 30 s or more in most clouds


class Notice:
    """Asks now and then. `ask` gives what Ray knows, or None."""

    def __init__(self, ask: Callable[[], Any], every_s: float = EVERY_S):
        self._ask, self._every_s = ask, every_s
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether this worker would ask now."""
        return time.monotonic() - self._last >= self._every_s

    def look(self) -> str | None:
        """Why to leave, or None. Called by all workers after the same step."""
        self._last = time.monotonic()
        info = self._ask()
        if info is None:
            return None
        ranks = ", ".join(map(str, info.preempted_ranks))
        left = f" in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s" if info.deadline_ms else ""
        return f"the machine of worker {ranks} will be taken away{left}"


def watch_notice() -> Notice:
    """Of the node that any worker is on, inside Ray Train."""
    import ray.train

    return Notice(ray.train.get_preemption_info)
