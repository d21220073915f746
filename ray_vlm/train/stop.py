"""Ctrl-C and SIGTERM: the first signal requests a checkpoint and an orderly end, the second ends the run at once.
Before the first step there is nothing to save, so there the first signal ends the run at once.

Without Ray the trainer reads the `StopRequest` itself. Under Ray the driver gets the signal and writes a file into the
run folder, which rank 0 checks; the ranks agree on the step after which they stop.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from ray_vlm.storage import Store

logger = logging.getLogger(__name__)
STOP_FILE = ".stop"
_REMOTE_S = 5.0  # between checks of an object store; a disk is checked at every step


class StopRequest:
    """A context in which the first signal is a request, stored in `signal`, and the second raises `KeyboardInterrupt`.

    `should_stop`: another reason to stop, such as a sweep that prunes the trial. While `trained` is False the first
    signal raises `KeyboardInterrupt` too, and sets `left_early`.
    """

    def __init__(self, should_stop: Callable[[], bool] | None = None, trained: bool = True) -> None:
        self.signal: int | None = None
        self.trained = trained
        self.left_early = False
        self._should_stop = should_stop
        self._old: dict[int, Any] = {}

    @property
    def wanted(self) -> bool:
        return self.signal is not None or (self._should_stop is not None and self._should_stop())

    def __enter__(self) -> "StopRequest":
        self.listen()
        return self

    def listen(self) -> None:
        """Install the handlers, again if another library, such as Ray, has replaced them."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                old = signal.signal(number, self._handle)
                self._old.setdefault(number, old)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        if not self.trained:
            self.left_early = True
            raise KeyboardInterrupt
        logger.info("\nstopping: a checkpoint is written after this step. A second signal ends the run at once.")


def ask_workers(store: Store) -> None:
    """Ask the workers of a run to write a checkpoint and stop."""
    store.write(STOP_FILE, b"")


def watch(store: Store, rank: int) -> Callable[[], bool]:
    """Return a function that returns on rank 0 whether `ask_workers` was called, and False on the other ranks.

    The ranks agree after every step (`callbacks/preemption.py`), so one of them is enough to ask the storage.
    """
    if rank > 0:
        return lambda: False
    last, requested = 0.0, False

    def wanted() -> bool:
        nonlocal last, requested
        if not requested and (store.local is not None or time.monotonic() - last > _REMOTE_S):
            last = time.monotonic()
            requested = (store.local / STOP_FILE).exists() if store.local else store.read(STOP_FILE) is not None
        return requested

    return wanted
