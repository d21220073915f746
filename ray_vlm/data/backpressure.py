"""Limit how far loaders run ahead of the trainer that they work for.

Without a limit, Ray Data's loaders run ahead until its budget of the object store is used up: a gigabyte or more that
no trainer waits for. From then on Ray Data's scheduler, a thread of the trainer's process, takes a whole core: blocks
that it may not fetch are always ready, so it never sleeps. Here a loader asks before it begins a task, and waits inside
the task.
"""

import asyncio
import math
import threading
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyarrow import Table
    from ray.actor import ActorHandle
_STARVED_S = 2.0  # after so long without a batch, the trainer releases the loaders that wait for it


class PrefetchGate:
    """A Ray actor beside the trainer: holds the number of the micro-batch that the trainer has reached."""

    def __init__(self, first: int):
        self.reached, self.releases = first, 0
        self.moved = asyncio.Condition()

    async def reach(self, number: int) -> None:
        """Record that the trainer has taken micro-batch `number`."""
        async with self.moved:
            self.reached = max(self.reached, number)
            self.moved.notify_all()

    async def release(self) -> None:
        """Release every loader that waits now.

        The tasks of a loader that died may come to the next one in another order. The task that the trainer needs then
        lies behind one that waits for the trainer.
        """
        async with self.moved:
            self.releases += 1
            self.moved.notify_all()

    async def wait_for(self, number: int) -> None:
        """Return when the trainer has reached micro-batch `number`."""
        async with self.moved:
            before = self.releases
            await self.moved.wait_for(lambda: self.reached >= number or self.releases > before)


def start_gate(first: int) -> "ActorHandle":
    """Start the gate's actor on the caller's node. It ends with the caller's process, or earlier by `keep_fed`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = ray.remote(PrefetchGate)
    return actor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote(first)


def wait_for(gate: "ActorHandle", number: int) -> None:
    """Wait, as a loader, until the trainer has reached micro-batch `number`. Return at once if the gate is gone."""
    import ray

    try:
        ray.get(gate.wait_for.remote(number))
    except ray.exceptions.TaskCancelledError:
        raise
    except ray.exceptions.RayError:  # the actor starts again, or is gone with its trainer
        return


def keep_fed(batches: "Generator[Table]", gate: "ActorHandle") -> "Generator[Table]":
    """Yield the batches of a generator as they come, and end the gate with it.

    While no batch comes, waiting loaders are released at ever longer intervals; each then makes one task beyond the
    limit.
    """
    import ray

    requested_at, ended = [math.inf], threading.Event()

    def watch() -> None:
        pause = _STARVED_S
        while not ended.wait(_STARVED_S / 4):
            waited = time.monotonic() - requested_at[0]
            if waited > pause:
                gate.release.remote()
                pause *= 2
            elif waited < _STARVED_S:
                pause = _STARVED_S

    thread = threading.Thread(target=watch, name="ray-vlm-pace", daemon=True)
    thread.start()
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
        thread.join()
        batches.close()
        if ray.is_initialized():
            ray.kill(gate)
