"""Progress lines of long work: how much is done, the speed, the time left. Work of a few seconds prints nothing.

Lines go to the logger `ray_vlm.progress`, which prints them to stderr and leaves stdout to a command's output. A run
sends them to its `metrics.jsonl` (`send_progress`), which its driver prints.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from ray_vlm.runs.text import format_duration

LOGGER = logging.getLogger("ray_vlm.progress")
_FIRST_S = 5.0  # shorter work prints no line
_EVERY_S = 10.0  # between lines, later a tenth of the time so far: about 30 lines for an hour
_T = TypeVar("_T")


class _Handler(logging.Handler):
    """A logging handler that calls a function with each line."""

    def __init__(self, write: Callable[[str], None]):
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a line that cannot be written must not end the work
            self._write(record.getMessage())


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False
LOGGER.addHandler(_Handler(_print))


@contextmanager
def send_progress(write: Callable[[str], None]) -> Iterator[None]:
    """While the body runs, lines go to `write` and nowhere else."""
    before = LOGGER.handlers
    LOGGER.handlers = [_Handler(write)]
    try:
        yield
    finally:
        LOGGER.handlers = before


class Progress:
    """The progress of work of `total` units. `what`: the start of each line; `clock`: returns seconds."""

    def __init__(self, what: str, total: int, unit: str = "rows", clock: Callable[[], float] = time.monotonic):
        self._what, self._total, self._unit, self._clock = what, total, unit, clock
        self._started = clock()
        self._due = self._started + _FIRST_S
        self._shown = False

    def reach(self, done: int) -> None:
        """Record that `done` units are done; print a line if one is due, and at the end if there were lines before."""
        now = self._clock()
        spent = now - self._started
        if done >= self._total:
            if self._shown:
                LOGGER.info(f"{self._what}: {done:,} {self._unit} in {format_duration(spent)}")
            self._shown = False
        elif now >= self._due:
            rate = done / spent
            speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
            left = f", {format_duration((self._total - done) / rate)} left" if done else ""
            LOGGER.info(f"{self._what}: {done:,} of {self._total:,} {self._unit}, {speed} a second{left}")
            self._shown = True
            self._due = now + max(_EVERY_S, spent / 10)


def track(items: Iterable[_T], what: str, total: int, unit: str = "rows") -> Iterator[_T]:
    """Yield the items, with progress lines on how many of the `total` were taken."""
    progress = Progress(what, total, unit)
    for number, item in enumerate(items):
        progress.reach(number)
        yield item
    progress.reach(total)


@contextmanager
def lasting(what: str, look: Callable[[], str] = lambda: "", over: threading.Event | None = None) -> Iterator[None]:
    """While the body runs, print lines on the time so far, for work of unknown length.

    `look`: returns more text for a line, or ''. `over`: set it if the work ends before the body does.
    """
    over, started = over or threading.Event(), time.monotonic()

    def tell() -> None:
        pause = _FIRST_S
        while not over.wait(pause):
            spent = time.monotonic() - started
            more = look()
            LOGGER.info(f"{what}: {format_duration(spent)} so far{', ' if more else ''}{more}")
            pause = max(_EVERY_S, spent / 10)

    thread = threading.Thread(target=tell, name="ray-vlm-lasting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
