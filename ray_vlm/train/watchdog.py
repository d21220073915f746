"""Detection of stalled workers: report them with their rows and the stacks of all workers, then end the workers.

A thread in each worker checks the worker's clock. If no phase started or ended for `cluster.stall_minutes`, it writes
the worker's status and the stacks of its threads into `stalls/` of the run. The other workers wait for the stalled one,
so they write theirs at about the same time; the lowest rank among them reads all statuses and writes a message on who
is behind, for which the others wait. Then the workers kill themselves, because no error can be raised in a thread that
waits inside a library, and the driver reads the message. A stopped process writes no status and is reported as silent.
"""

import json
import logging
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ray_vlm.data.plan import Plan
from ray_vlm.distributed import DistributedContext
from ray_vlm.methods.clock import Clock
from ray_vlm.storage import Store
from ray_vlm.train.attempt import Attempt

if TYPE_CHECKING:
    from ray_vlm.methods.trainer import PlannedTrainer

logger = logging.getLogger(__name__)
FOLDER = "stalls"
SENTENCE = ".stall.json"  # the message for the driver
_NAMED = 8  # rows in a message
_POLL_S = 0.2  # between looks for other workers' files
_READ_S = 10.0  # for the lowest rank to read the statuses of all
PHASE_LABELS = {
    "data": "waiting for rows",
    "collate": "making a batch",
    "batch": "sampling answers",
    "forward": "the forward pass",
    "step": "the backward pass, or waiting for other workers' gradients",
    "between": "between two steps",
    "validation": "validation",
    "checkpoint": "writing a checkpoint",
}
_ORDER = list(PHASE_LABELS)


@dataclass(frozen=True)
class WorkerStatus:
    """The position of a worker: its phase, how many batches and micro-batch steps it has started, its current step
    (from 1), the ids of its current rows, and whether it is known to wait for other workers."""

    rank: int
    host: str
    pid: int
    phase: str
    batches: int
    steps: int
    step: int
    rows: tuple[str, ...] = ()
    waits: bool = False

    @property
    def reached(self) -> tuple[int, int, int, bool]:
        """Return a key that is equal for workers at the same position and lower for one that is behind."""
        return self.batches, self.steps, _ORDER.index(self.phase), self.waits


def find_phase(inside: Sequence[str]) -> str:
    """Return the innermost phase of a clock that `PHASE_LABELS` names, or `between`."""
    return next((name for name in reversed(inside) if name in PHASE_LABELS), "between")


def describe_stall(statuses: Sequence[WorkerStatus], world_size: int, limit_s: float) -> str:
    """Return a message: which worker hangs, in which phase and with which rows.

    `statuses`: of the workers that wrote one. The text is the same if the same stall repeats, by which `restarts.py`
    recognises it.
    """
    limit = f"{limit_s / 60:g} minutes"
    silent = sorted(set(range(world_size)) - {status.rank for status in statuses})
    if silent:
        who = f"worker {', '.join(map(str, silent))}"
        return f"{who} said nothing for {limit} while the others waited: stopped, or its machine is gone or overloaded"
    earliest = min(status.reached for status in statuses)
    behind = [status for status in statuses if status.reached == earliest]
    held = [row for status in behind for row in status.rows]
    more = f" and {len(held) - _NAMED} more" if len(held) > _NAMED else ""
    rows = f", rows {', '.join(held[:_NAMED])}{more}" if held else ""
    where = f"{PHASE_LABELS[behind[0].phase]}, step {behind[0].step}{rows}"
    if len(behind) == world_size and world_size > 1:
        return f"all workers hang for {limit} in the same place: {where}"
    who = ", ".join(f"{status.rank} on {status.host}" for status in behind)
    return f"worker {who} hangs for {limit}: {where}"


def is_waiting(thread: int) -> bool:
    """Return whether a thread of this process is in `torch.distributed`; collectives of a backward pass do not show."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if "torch/distributed/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def describe_stacks() -> str:
    """Return the stacks of all threads of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return "\n".join(f"thread {names.get(i, i)}\n{''.join(traceback.format_stack(frame))}" for i, frame in frames)


class Watchdog:
    """A context in which this worker is watched. `stand`: returns its status; `end`: called after a stall."""

    def __init__(
        self,
        clock: Clock,
        stand: Callable[[], WorkerStatus],
        store: Store,
        attempt: Attempt,
        world_size: int,
        limit_s: float,
        end: Callable[[], None],
    ):
        self.clock, self.stand, self.store, self.attempt = clock, stand, store, attempt
        self.world_size, self.limit_s, self.end = world_size, limit_s, end
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray-vlm-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.clock.tick()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.limit_s / 10)):
            if time.monotonic() - self.clock.moved > self.limit_s:
                self.report()
                return self.end()

    def report(self) -> None:
        """Write this worker's status; the lowest rank that wrote one also writes the message on who is behind."""
        status = self.stand()
        with suppress(OSError):  # ending the worker helps even if nothing can be written
            name = self._name(status.rank)
            self.store.write(f"{name}.txt", f"{status}\n\n{describe_stacks()}".encode())
            self.store.write(f"{name}.json", json.dumps(asdict(status)).encode())
            # the other workers write within the interval of their checks
            until = time.monotonic() + 2 + min(10.0, self.limit_s / 2)
            if status.rank > 0 and self._wait_for_message(until):
                return
            ranks = self._wait_for_statuses(until)
            if status.rank > min(ranks, default=status.rank):
                self._wait_for_message(time.monotonic() + _READ_S)
                return
            text = describe_stall(self._read_all(ranks) or [status], self.world_size, self.limit_s)
            self.store.write(SENTENCE, json.dumps({"attempt": self.attempt.number, "text": text}).encode())

    def _name(self, rank: int) -> str:
        return f"{FOLDER}/attempt-{self.attempt.number}-rank-{rank}"

    def _read_all(self, ranks: Sequence[int]) -> list[WorkerStatus]:
        contents = [self.store.read(f"{self._name(rank)}.json") for rank in ranks]
        entries = [json.loads(data) for data in contents if data is not None]
        return [WorkerStatus(**{**entry, "rows": tuple(entry["rows"])}) for entry in entries]

    def _wait_for_message(self, until: float) -> bool:
        """Return whether a lower rank has written the message by then: it alone reads all statuses, and if this worker
        ended before, the driver would end that one too."""
        while True:
            with suppress(ValueError):
                if json.loads(self.store.read(SENTENCE) or b"{}").get("attempt") == self.attempt.number:
                    return True
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_S)

    def _wait_for_statuses(self, until: float) -> list[int]:
        """Return the ranks that have written a status, once all have or the time is over."""
        while True:
            listed = {f"{FOLDER}/{name}" for name in self.store.files(FOLDER)}
            ranks = [rank for rank in range(self.world_size) if f"{self._name(rank)}.json" in listed]
            if len(ranks) == self.world_size or time.monotonic() > until:
                return ranks
            time.sleep(_POLL_S)


def watch_worker(
    trainer: "PlannedTrainer",
    plan: Plan,
    store: Store,
    attempt: Attempt,
    context: DistributedContext,
    limit_s: float,
) -> Watchdog:
    """Return the watchdog of this rank. Without Ray it only prints the message: the user can press Ctrl-C."""
    clock, batches = trainer.clock, trainer.inputs.batches
    # Now, because the object store may not answer in a stall.
    records = trainer.inputs.rows
    # Each forward pass is progress, so a long validation is no stall.
    trainer.model.get_input_embeddings().register_forward_pre_hook(lambda *_: clock.tick())

    def stand() -> WorkerStatus:
        phase, step = find_phase(clock.inside), min(trainer.state.global_step, plan.num_steps - 1)
        if phase in ("data", "collate"):
            rows: Sequence[int] = plan.micro_batch(batches.number, context.rank).rows
        else:
            rows = [row for batch in plan.rank_step(step, context.rank) for row in batch.rows]
        named = () if phase in ("validation", "checkpoint") else tuple(str(records[row].id) for row in rows)
        begun, waits = (clock.entered["data"], clock.entered["step"]), is_waiting(clock.thread)
        return WorkerStatus(context.rank, platform.node(), os.getpid(), phase, *begun, step + 1, named, waits)

    def end() -> None:
        if context.ray:
            # Time for the lowest rank to write the message, which the driver reads once this process is gone.
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGKILL)
        logger.error(f"\n{describe_stall([stand()], 1, limit_s)}. See {store.address}/{FOLDER}/")

    return Watchdog(clock, stand, store, attempt, context.world_size, limit_s, end)


def take_sentence(store: Store, attempt: int) -> str | None:
    """Return and remove the stall message of this attempt or of a later one that Ray started, or None."""
    with suppress(OSError, ValueError):
        stall: Mapping[str, Any] = json.loads(store.read(SENTENCE) or b"{}")
        if stall.get("attempt", -1) >= attempt:
            store.remove(SENTENCE)
            return f"{stall['text']}. Stacks of all workers: {FOLDER}/attempt-{stall['attempt']}-rank-*.txt"
    return None
