"""Time of each phase of a step. On a GPU it is measured by CUDA events, which do not synchronise."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Clock:
    """Adds up the seconds of named phases until `take` is called, and knows the current phase.

    `inside`: the current phases, outermost first; `entered`: how often each was entered; `moved`: the
    `time.monotonic()` of the last start or end of a phase; `thread`: the thread in which that happened.
    """

    def __init__(self, device: str):
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] | None = (
            [] if device.startswith("cuda") else None
        )
        self._seconds: dict[str, float] = {}
        self.inside: list[str] = []
        self.entered: Counter[str] = Counter()
        self.tick()

    def tick(self) -> None:
        """Record that the process has made progress."""
        self.moved, self.thread = time.monotonic(), threading.get_ident()

    @contextmanager
    def phase(self, name: str, host: bool = False) -> Iterator[None]:
        """Count the time of the body for `name`. `host`: the body is work of the CPU, such as waiting for data."""
        self.inside.append(name)
        self.entered[name] += 1
        self.tick()
        try:
            with self._timed(name, host):
                yield
        finally:
            self.inside.pop()
            self.tick()

    @contextmanager
    def _timed(self, name: str, host: bool) -> Iterator[None]:
        if self._events is None or host:
            started = time.perf_counter()
            try:
                yield
            finally:
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started
            return
        import torch

        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        try:
            yield
        finally:
            last.record()
            self._events.append((name, first, last))

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call. On a GPU this waits for the phases to end."""
        seconds, self._seconds = self._seconds, {}
        for name, first, last in self._events or ():
            last.synchronize()
            seconds[name] = seconds.get(name, 0.0) + first.elapsed_time(last) / 1000
        if self._events:
            self._events.clear()
        return seconds


def split_time(phases: dict[str, float]) -> dict[str, float]:
    """Return `data_s` (waiting for rows, making tensors), `rollout_s` (sampling answers), `forward_s` and `backward_s`.

    Phases are nested: `batch` contains `data` and `collate`, `step` contains `forward`. `pixels` stands alone.
    """
    data = phases.get("data", 0.0) + phases.get("collate", 0.0)
    rollout = max(0.0, phases.get("batch", 0.0) - data)
    data += phases.get("pixels", 0.0)
    forward = phases.get("forward", 0.0)
    backward = max(0.0, phases.get("step", 0.0) - forward)
    return {"data_s": data, "rollout_s": rollout, "forward_s": forward, "backward_s": backward}
