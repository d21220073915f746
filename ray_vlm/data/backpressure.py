"""Hand planned rows to loaders, and limit how far these run ahead of the trainer that they work for.

A loader has no plan. The trainer's process works out which rows each micro-batch holds, for a window ahead, and gives
them to an actor beside it, the gate; a loader asks there for the micro-batches of its task, and waits until it may
begin.

Without a limit, Ray Data's loaders run ahead until its budget of the object store is used up: a gigabyte or more that
no trainer waits for. From then on Ray Data's scheduler, a thread of the trainer's process, takes a whole core: blocks
that it may not fetch are always ready, so it never sleeps.
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ray_vlm.data.plan import MicroBatch
from ray_vlm.errors import RunError

if TYPE_CHECKING:
    from pyarrow import Table
    from ray import ObjectRef
    from ray.actor import ActorHandle

_T = TypeVar("_T")
_STARVED_S = 2.0  # after so long without a batch, the trainer releases the loaders that wait for it
_POLL_S = 0.5  # how often the gate is asked what it lacks
AT_ONCE = 1024  # micro-batches that one call carries


class GateState(NamedTuple):
    """What a gate says of itself: the micro-batch that the trainer has reached, and the stretches [first, last) that
    loaders wait for and that it does not have."""

    reached: int
    missing: tuple[tuple[int, int], ...]


class PrefetchGate:
    """A Ray actor beside the trainer: holds the number of the micro-batch that the trainer has reached, and the rows of
    the micro-batches around it.

    `planned`: the micro-batches from `first` on. A loader may begin a task up to `ahead` micro-batches before the
    trainer needs it. If the actor dies, Ray starts it again with these arguments, and `WindowFeeder` brings it up to
    date.
    """

    def __init__(self, first: int, ahead: int, planned: Sequence[MicroBatch] = ()):
        self.reached, self.ahead, self.releases = first, ahead, 0
        self.planned = dict(enumerate(planned, first))
        self.requests: list[tuple[int, int]] = []  # of loaders that may begin
        self.moved = asyncio.Condition()

    async def advance(self, reached: int, first: int, planned: Sequence[MicroBatch]) -> None:
        """Record that the trainer has reached micro-batch `reached`, and keep `planned`, the micro-batches from `first`
        on. Drop those that are long past."""
        async with self.moved:
            self.reached = max(self.reached, reached)
            self.planned.update(enumerate(planned, first))
            # The task of a loader that died is made again from its beginning, which the trainer may have passed.
            past = [number for number in self.planned if number < self.reached - self.ahead]
            for number in past:
                if not any(start <= number < end for start, end in self.requests):
                    del self.planned[number]
            self.moved.notify_all()

    async def release(self) -> None:
        """Release every loader that waits now.

        The tasks of a loader that died may come to the next one in another order. The task that the trainer needs then
        lies behind one that waits for the trainer.
        """
        async with self.moved:
            self.releases += 1
            self.moved.notify_all()

    async def take(self, first: int, last: int, begun: bool = False) -> list[MicroBatch]:
        """Return micro-batches `first` up to (not including) `last` of a task, once the loader may begin it.

        `begun`: they continue a task, so the loader does not wait for the trainer.
        """
        async with self.moved:
            before = self.releases
            if not begun:
                await self.moved.wait_for(lambda: self.reached >= first - self.ahead or self.releases > before)
            self.requests.append((first, last))
            try:
                await self.moved.wait_for(lambda: self._has(first, last))
                return [self.planned[number] for number in range(first, last)]
            finally:
                self.requests.remove((first, last))

    def _has(self, first: int, last: int) -> bool:
        return all(number in self.planned for number in range(first, last))

    async def state(self) -> GateState:
        """Return what the trainer must know of the gate."""
        missing = dict.fromkeys(request for request in self.requests if not self._has(*request))
        return GateState(self.reached, tuple(missing))


def start_gate(first: int, ahead: int, planned: Sequence[MicroBatch] = ()) -> "ActorHandle":
    """Start the gate's actor on the caller's node. It ends with the caller's process, or earlier by `keep_fed`.

    A call that its death interrupts is made again by Ray.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = ray.remote(PrefetchGate)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return actor.options(**options).remote(first, ahead, planned)


def take_planned(gate: "ActorHandle", first: int, last: int, begun: bool = False) -> list[MicroBatch]:
    """Take micro-batches from the gate, as a loader (`PrefetchGate.take`). Raise `RunError` if the gate has ended."""
    import ray

    try:
        return ray.get(gate.take.remote(first, last, begun))
    except ray.exceptions.RayActorError as error:
        raise RunError(
            f"micro-batches {first} to {last - 1} cannot be made: the process that trains them has ended, and with it "
            "the actor that knows their rows. Look for the error of that process."
        ) from error


class WindowFeeder:
    """The trainer's side of the gate: gives it the micro-batches of a window ahead of the trainer.

    `micro_batch` returns a micro-batch by its number; the plan has those from `first` up to (not including) `last`.
    """

    def __init__(self, micro_batch: Callable[[int], MicroBatch], first: int, last: int, ahead: int, window: int):
        self._micro_batch = micro_batch
        self._window, self._last = window, last
        self._reached, self._sent = first, first  # by the trainer, and as the gate was told
        self._given = min(last, first + min(window, AT_ONCE))  # the gate got the micro-batches before it
        self._state: tuple[int, ObjectRef] | None = None  # what it had been sent when it was asked, and its answer
        self.moved = threading.Event()
        self.gate = start_gate(first, ahead, self._plan(first, self._given))

    def reach(self, number: int) -> None:
        """Record that the trainer has reached micro-batch `number`. `feed`, in another thread, does the work."""
        self._reached = number
        self.moved.set()

    def feed(self) -> None:
        """Tell the gate where the trainer is, and give it the micro-batches of the window that it does not have."""
        reached = self._reached
        end = min(self._last, reached + self._window)
        if reached != self._sent or end > self._given:
            self._give(reached, min(self._given, end), end)
            self._sent, self._given = reached, max(self._given, end)

    def mend(self) -> None:
        """Give the gate what it lacked when it was last asked, and ask it again.

        It lacks all after a restart. It lacks a task beyond the window if a loader was released.
        """
        import ray

        if self._state is not None:
            sent, answer = self._state
            if not ray.wait([answer], timeout=0)[0]:
                return
            with suppress(ray.exceptions.RayError):  # it ends
                state: GateState = ray.get(answer)
                if state.reached < sent:
                    self._give(self._sent, self._sent, self._given)
                for first, last in state.missing:
                    self._give(self._sent, first, min(last, self._last))
        self._state = self._sent, self.gate.state.remote()

    def _give(self, reached: int, first: int, last: int) -> None:
        for start in range(first, max(last, first + 1), AT_ONCE):
            self.gate.advance.remote(reached, start, self._plan(start, min(last, start + AT_ONCE)))

    def _plan(self, first: int, last: int) -> list[MicroBatch]:
        return [self._micro_batch(number) for number in range(first, last)]


def start_thread(function: Callable[[], _T], name: str) -> "Future[_T]":
    """Call a function in a thread that does not keep the process alive, and return the future of its result."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised by whoever takes the result
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def keep_fed(batches: "Generator[Table]", feeder: WindowFeeder) -> "Generator[Table]":
    """Yield the batches of a generator as they come, feed the gate meanwhile, and end it with the generator.

    While no batch comes, waiting loaders are released at ever longer intervals; each then makes one task beyond the
    limit. Raise what the plan raises.
    """
    import ray

    requested_at, ended, gate = [math.inf], threading.Event(), feeder.gate

    def watch() -> None:
        pause = _STARVED_S
        while not ended.is_set():
            feeder.feed()
            feeder.mend()
            waited = time.monotonic() - requested_at[0]
            if waited > pause:
                gate.release.remote()
                pause *= 2
            elif waited < _STARVED_S:
                pause = _STARVED_S
            feeder.moved.wait(min(_POLL_S, _STARVED_S / 4))
            feeder.moved.clear()

    def fail_loaders(watching: "Future[None]") -> None:
        if watching.exception() is not None:
            ray.kill(gate)  # they would wait for rows that will not come

    watching = start_thread(watch, "ray-vlm-pace")
    watching.add_done_callback(fail_loaders)
    try:
        while True:
            requested_at[0] = time.monotonic()
            batch = next(batches, None)
            requested_at[0] = math.inf
            if batch is None:
                return
            yield batch
    finally:
        ended.set()
        feeder.moved.set()
        wait([watching])
        batches.close()
        if ray.is_initialized():
            ray.kill(gate)
        watching.result()  # an error of the plan comes before those of the loaders that followed from it
