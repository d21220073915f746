"""Ctrl-C and SIGTERM: the first asks for a checkpoint and an orderly end, the second ends at once. Before the first
step there is nothing to keep, so the first ends at once too.

In one process the trainer asks the `StopRequest` itself. Under Ray the driver gets the signal and leaves a file in the
run folder that rank 0 looks for; the ranks agree on the step at which they leave.
"""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from ray_vlm.runs.store import Store

STOP_FILE = ".stop"
_REMOTE_S = 5.0  # an object store is asked this often, a disk at every step


class StopRequest:
    """A context in which the first signal is a request, kept in `signal`, and the second a `KeyboardInterrupt`.

    `asked` may want it too: it ends a trial that is behind the others. While nothing was `trained` since the last
    checkpoint or the start, the first signal is a `KeyboardInterrupt` as well, and `left_early` says so.
    """

    def __init__(self, asked: Callable[[], bool] | None = None, trained: bool = True) -> None:
        self.signal: int | None = None
        self.trained = trained
        self.left_early = False
        self._asked = asked
        self._old: dict[int, Any] = {}

    @property
    def wanted(self) -> bool:
        return self.signal is not None or (self._asked is not None and self._asked())

    def __enter__(self) -> "StopRequest":
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals, also where something has put handlers of its own in place meanwhile, as Ray does."""
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
        print("\nstopping: a checkpoint is written after this step. Once more leaves at once.", flush=True)


def ask_workers(store: Store) -> None:
    """Tell the workers of a run to write a checkpoint and leave."""
    store.write(STOP_FILE, b"")


def watch(store: Store) -> Callable[[], bool]:
    """A function that says whether `ask_workers` was called."""
    last, found = 0.0, False

    def wanted() -> bool:
        nonlocal last, found
        if not found and (store.local is not None or time.monotonic() - last > _REMOTE_S):
            last = time.monotonic()
            found = (store.local / STOP_FILE).exists() if store.local else store.read(STOP_FILE) is not None
        return found

    return wanted


def agree(flags: Sequence[bool], world_size: int, device: str) -> list[bool]:
    """For each flag whether any rank has set it; the same answers on all, so that none is left waiting."""
    if world_size == 1:
        return list(flags)
    import torch

    found = torch.tensor([int(flag) for flag in flags], device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]
