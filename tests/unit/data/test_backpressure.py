"""Loaders wait for the trainer, and never for a trainer that waits for them."""

import asyncio
import threading
import time
from typing import Any

import pytest

from ray_vlm.data import backpressure
from ray_vlm.data.backpressure import PrefetchGate, keep_fed, start_gate, wait_for


def _waits(number: int, then: str, *arguments: int) -> bool:
    """Whether a loader that asks for `number` still waits after `then` was told."""

    async def ask() -> bool:
        one = PrefetchGate(first=10)
        waiting = asyncio.create_task(one.wait_for(number))
        await asyncio.sleep(0.01)
        assert waiting.done() == (number <= 10)
        await getattr(one, then)(*arguments)
        await asyncio.sleep(0.01)
        return not waiting.done()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("number", "reached", "waits"), [(5, 1, False), (20, 19, True), (20, 20, False), (20, 7, True)]
)
def test_a_loader_waits_until_the_trainer_is_there(number: int, reached: int, waits: bool) -> None:
    assert _waits(number, "reach", reached) == waits


def test_those_that_wait_are_let_go_and_the_next_ones_are_not() -> None:
    assert not _waits(1000, "release")

    async def later() -> bool:
        one = PrefetchGate(first=10)
        await one.release()
        waiting = asyncio.create_task(one.wait_for(20))
        await asyncio.sleep(0.01)
        return not waiting.done()

    assert asyncio.run(later())


class _Counted:
    """Stands in for the actor: records when it releases the loaders."""

    def __init__(self) -> None:
        self.release, self.released = self, list[float]()

    def remote(self) -> None:
        self.released.append(time.monotonic())


@pytest.mark.parametrize(("slow", "lowest", "most"), [("loader", 2, 4), ("trainer", 0, 0)])
def test_only_a_trainer_without_batches_lets_loaders_go(
    slow: str, lowest: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 0.1, 0.2, 0.4 and 0.8 s without one: not each 0.1 s."""
    monkeypatch.setattr(backpressure, "_STARVED_S", 0.1)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    actor: Any = _Counted()

    def make() -> Any:
        for number in range(3):
            time.sleep(1.0 if slow == "loader" and number == 1 else 0.0)
            yield number

    taken = []
    for number in keep_fed(make(), actor):
        time.sleep(0.3 if slow == "trainer" else 0.0)
        taken.append(number)
    assert taken == [0, 1, 2]
    assert lowest <= len(actor.released) <= most
    assert not [t for t in threading.enumerate() if t.name == "ray-vlm-pace"]


@pytest.mark.cluster
def test_a_loader_does_not_wait_where_nobody_can_tell(ray_cluster) -> None:
    import ray

    actor = start_gate(0)
    ray.get(actor.reach.remote(3))
    wait_for(actor, 3)
    threading.Timer(0.5, lambda: ray.kill(actor)).start()
    started = time.monotonic()
    wait_for(actor, 4)
    assert time.monotonic() - started > 0.3
    wait_for(actor, 5)
