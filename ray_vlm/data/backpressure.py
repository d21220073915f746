"""How far loaders may be ahead of the trainer that they work for.

Left alone, Ray Data's loaders run ahead until its budget of the object store is used up: a gigabyte and more that no
trainer waits for. From then on its scheduler, a thread of the trainer's process, takes a whole core: blocks that it may
not fetch are always ready, so it never sleeps. Here a loader asks before it begins a task, and waits inside of it.
"""

import asyncio
import math
import threading
import time
from collections.abc import Generator
from typing import Any

_STARVED_S = 2.0  # without a batch for so long, the trainer lets the loaders go that wait for it


class PrefetchGate:
    """A Ray actor beside the trainer: holds the number of the micro-batch that the trainer has reached."""

    def __init__(self, first: int):
        self.reached, self.releases = first, 0
        self.moved = asyncio.Condition()

    async def reach(self, number: int) -> None:
        """The trainer has taken micro-batch `number`."""
        async with self.moved:
            self.reached = max(self.reached, number)
            self.moved.notify_all()

    async def release(self) -> None:
        """Let all go that wait now.

        Tasks of a loader that died may come to the next one in another order; the one that the trainer needs then
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


def start_pace(first: int) -> Any:
    """The actor, on the caller's node; it ends with the caller's process, or before by `keep_fed`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = ray.remote(PrefetchGate)
    return actor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote(first)


def wait_for(pace: Any, number: int) -> None:
    """Wait, as a loader, until the trainer has reached micro-batch `number`; not where nobody can tell."""
    import ray

    try:
        ray.get(pace.wait_for.remote(number))
    except ray.exceptions.TaskCancelledError:
        raise
    except ray.exceptions.RayError:  # the actor starts again, or is gone with its trainer
        return


def keep_fed(batches: Any, pace: Any) -> Generator[Any]:
    """The batches of a generator as they come. At the end nobody waits any more.

    While none comes, loaders that wait are let go, at ever longer intervals: each makes a task beyond the bound then.
    """
    import ray

    asked, ended = [math.inf], threading.Event()

    def watch() -> None:
        pause = _STARVED_S
        while not ended.wait(_STARVED_S / 4):
            waited = time.monotonic() - asked[0]
            if waited > pause:
                pace.release.remote()
                pause *= 2
            elif waited < _STARVED_S:
                pause = _STARVED_S

    thread = threading.Thread(target=watch, name="ray-vlm-pace", daemon=True)
    thread.start()
    try:
        while True:
            asked[0] = time.monotonic()
            batch = next(batches, None)
            asked[0] = math.inf
            if batch is None:
                return
            yield batch
    finally:
        ended.set()
        thread.join()
        batches.close()
        if ray.is_initialized():
            ray.kill(pace)
