"""A worker in which nothing moves any more: told with its rows and everyone's stacks, then ended or left.

Each worker has a thread that looks at its clock. When nothing began or ended for `cluster.stall_minutes`, it writes
down where it stands and the stacks of its threads into `stalls/` of the run. The others wait for the one that hangs,
so they write too, a moment earlier or later; the first of those that did reads them all and says who is behind. Then
they end themselves, since nobody can raise an error in a thread that waits inside a library, and the driver finds the
sentence. A process that is stopped writes nothing: it is the one that is missing.
"""

import json
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
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.plan import Plan
from ray_vlm.runs.store import Store
from ray_vlm.train.attempt import Attempt
from ray_vlm.train.clock import Clock
from ray_vlm.train.context import DistributedContext

FOLDER = "stalls"
SENTENCE = ".stall.json"  # what the driver finds
_NAMED = 8  # rows in a sentence
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
    """Where a worker stands: its phase, how often it began a batch and a micro-batch's step, the step that it is in
    (from 1), the ids of the rows at hand, and whether it is seen to wait for the other workers."""

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
        """The same for workers side by side; less for one that is behind."""
        return self.batches, self.steps, _ORDER.index(self.phase), self.waits


def find_phase(inside: Sequence[str]) -> str:
    """The innermost phase of a clock that has a meaning here."""
    return next((name for name in reversed(inside) if name in PHASE_LABELS), "between")


def describe_stall(told: Sequence[WorkerStatus], world_size: int, limit_s: float) -> str:
    """A sentence: who hangs, where, with which rows. `told`: of every worker that could still say something. The same
    stall twice is the same sentence."""
    limit = f"{limit_s / 60:g} minutes"
    silent = sorted(set(range(world_size)) - {one.rank for one in told})
    if silent:
        who = f"worker {', '.join(map(str, silent))}"
        return f"{who} said nothing for {limit} while the others waited: stopped, or its machine is gone or overloaded"
    least = min(one.reached for one in told)
    behind = [one for one in told if one.reached == least]
    held = [row for one in behind for row in one.rows]
    more = f" and {len(held) - _NAMED} more" if len(held) > _NAMED else ""
    rows = f", rows {', '.join(held[:_NAMED])}{more}" if held else ""
    where = f"{PHASE_LABELS[behind[0].phase]}, step {behind[0].step}{rows}"
    if len(behind) == world_size and world_size > 1:
        return f"all workers hang for {limit} in the same place: {where}"
    who = ", ".join(f"{one.rank} on {one.host}" for one in behind)
    return f"worker {who} hangs for {limit}: {where}"


def is_waiting(thread: int) -> bool:
    """Whether a thread of this process is in an exchange between workers; in a backward pass it cannot be seen."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if "torch/distributed/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def describe_stacks() -> str:
    """What every thread of this process does now."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return "\n".join(f"thread {names.get(i, i)}\n{''.join(traceback.format_stack(frame))}" for i, frame in frames)


class Watchdog:
    """A context in which this worker is watched. `stand` says where it is; `end` is called after a stall is told."""

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
                self.tell()
                return self.end()

    def tell(self) -> None:
        """Write down where this worker stands; the first of those that did also says who is behind."""
        mine = self.stand()
        name = f"{FOLDER}/attempt-{self.attempt.number}-rank-{mine.rank}"
        with suppress(OSError):  # where nothing can be written, ending still helps
            self.store.write(f"{name}.txt", f"{mine}\n\n{describe_stacks()}".encode())
            self.store.write(f"{name}.json", json.dumps(asdict(mine)).encode())
            # the others looked at their clocks within the time that lies between two looks
            told = self._read_all(time.monotonic() + 2 + min(10.0, self.limit_s / 2))
            if mine.rank == min([one.rank for one in told], default=mine.rank):
                text = describe_stall(told or [mine], self.world_size, self.limit_s)
                self.store.write(SENTENCE, json.dumps({"attempt": self.attempt.number, "text": text}).encode())

    def _read_all(self, until: float) -> list[WorkerStatus]:
        while True:
            names = [f"{FOLDER}/attempt-{self.attempt.number}-rank-{rank}.json" for rank in range(self.world_size)]
            found = [json.loads(data) for name in names if (data := self.store.read(name)) is not None]
            if len(found) == self.world_size or time.monotonic() > until:
                return [WorkerStatus(**{**one, "rows": tuple(one["rows"])}) for one in found]
            time.sleep(0.2)


def watch_worker(
    job: JobConfig,
    store: Store,
    context: DistributedContext,
    attempt: Attempt,
    trainer: Any,
    plan: Plan,
    ids: Callable[[int], str],
) -> Watchdog:
    """The watchdog of this rank. In the command's own process it only tells: whoever sits there can press Ctrl-C."""
    clock, batches = trainer.clock, trainer.planned_batches
    # a long validation moves with every batch and token that goes into the model
    trainer.model.get_input_embeddings().register_forward_pre_hook(lambda *_: clock.tick())

    def stand() -> WorkerStatus:
        phase, step = find_phase(clock.inside), min(trainer.state.global_step, plan.num_steps - 1)
        if phase in ("data", "collate"):
            rows: Sequence[int] = plan.micro_batch(batches.number, context.rank).rows
        else:
            rows = [row for batch in plan.rank_step(step, context.rank) for row in batch.rows]
        named = () if phase in ("validation", "checkpoint") else tuple(ids(row) for row in rows)
        begun, waits = (clock.entered["data"], clock.entered["step"]), is_waiting(clock.thread)
        return WorkerStatus(context.rank, platform.node(), os.getpid(), phase, *begun, step + 1, named, waits)

    def end() -> None:
        if context.ray:
            time.sleep(1.0)  # the sentence is read by the driver once this process is gone
            os.kill(os.getpid(), signal.SIGKILL)
        print(f"\n{describe_stall([stand()], 1, limit_s)}. See {store.address}/{FOLDER}/", file=sys.stderr, flush=True)

    limit_s = 60 * job.cluster.stall_minutes
    return Watchdog(clock, stand, store, attempt, context.world_size, limit_s, end)


def take_sentence(store: Store, attempt: int) -> str | None:
    """What the workers of that attempt, or of one that Ray began after it, said before they ended themselves."""
    with suppress(OSError, ValueError):
        found: Mapping[str, Any] = json.loads(store.read(SENTENCE) or b"{}")
        if found.get("attempt", -1) >= attempt:
            store.remove(SENTENCE)
            return f"{found['text']}. Stacks of all workers: {FOLDER}/attempt-{found['attempt']}-rank-*.txt"
    return None
