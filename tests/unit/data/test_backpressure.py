"""Loaders wait for the trainer, and never for a trainer that waits for them. They get the rows that it planned."""

import asyncio
import threading
import time
from typing import Any

import pytest

from ray_vlm.data import backpressure
from ray_vlm.data.backpressure import PrefetchGate, WindowFeeder, keep_fed, start_gate, take_planned
from ray_vlm.data.plan import MicroBatch
from ray_vlm.errors import DataError, RunError


def _micro(number: int) -> MicroBatch:
    return MicroBatch((number, number + 1000))


def _plan(first: int, last: int) -> list[MicroBatch]:
    return [_micro(number) for number in range(first, last)]


def _waits(number: int, then: str, *arguments: Any) -> bool:
    """Whether a loader that asks for a task from `number` on still waits after `then` was called."""

    async def ask() -> bool:
        gate = PrefetchGate(10, 3, _plan(10, 1100))
        waiting = asyncio.create_task(gate.take(number, number + 2))
        await asyncio.sleep(0.01)
        assert waiting.done() == (number <= 13)
        await getattr(gate, then)(*arguments)
        await asyncio.sleep(0.01)
        assert not waiting.done() or waiting.result() == _plan(number, number + 2)
        return not waiting.done()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("number", "reached", "waits"), [(12, 1, False), (23, 19, True), (23, 20, False), (23, 7, True)]
)
def test_a_loader_waits_until_the_trainer_is_there(number: int, reached: int, waits: bool) -> None:
    assert _waits(number, "advance", reached, 0, []) == waits


def test_those_that_wait_are_let_go_and_the_next_ones_are_not() -> None:
    assert not _waits(1000, "release")

    async def later() -> bool:
        gate = PrefetchGate(10, 3, _plan(10, 40))
        await gate.release()
        waiting = asyncio.create_task(gate.take(20, 22))
        await asyncio.sleep(0.01)
        assert await gate.take(30, 31, begun=True) == _plan(30, 31), "the rest of a task does not wait"
        return not waiting.done()

    assert asyncio.run(later())


def test_rows_that_the_gate_lacks_are_named_until_they_come() -> None:
    async def ask() -> None:
        gate = PrefetchGate(0, 4, _plan(0, 8))
        waiting = asyncio.create_task(gate.take(4, 10))
        await asyncio.sleep(0.01)
        assert await gate.state() == (0, ((4, 10),))
        await gate.advance(60, 8, _plan(8, 9))  # 4 is past, but a loader waits for it
        assert await gate.state() == (60, ((4, 10),))
        await gate.advance(60, 9, _plan(9, 10))
        assert await waiting == _plan(4, 10)
        assert (await gate.state()).missing == ()
        await gate.advance(61, 0, [])
        assert not gate.planned, "what is past is dropped"
        again = asyncio.create_task(gate.take(4, 10))  # a loader died, and another makes its task again
        await asyncio.sleep(0.01)
        assert (await gate.state()).missing == ((4, 10),)
        await gate.advance(61, 4, _plan(4, 10))
        assert await again == _plan(4, 10)

    asyncio.run(ask())


def test_a_loader_that_asks_twice_gets_the_same() -> None:
    async def ask() -> None:
        gate = PrefetchGate(0, 4, _plan(0, 8))
        assert await gate.take(2, 6) == await gate.take(2, 6) == _plan(2, 6)

    asyncio.run(ask())


class _Counted:
    """Stands in for the gate and its feeder: records when loaders are released."""

    def __init__(self, error: Exception | None = None) -> None:
        self.gate, self.release, self.released = self, self, list[float]()
        self.moved, self.error = threading.Event(), error

    def remote(self) -> None:
        self.released.append(time.monotonic())

    def feed(self) -> None:
        if self.error is not None:
            raise self.error

    def mend(self) -> None:
        pass


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


def test_what_the_plan_raises_reaches_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = threading.Event()
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.kill", lambda gate: killed.set())

    def make() -> Any:
        assert killed.wait(10)
        raise RunError("micro-batches 0 to 9 cannot be made")
        yield

    with pytest.raises(DataError, match="torn"):
        list(keep_fed(make(), _Counted(DataError("torn"))))  # type: ignore[arg-type]


@pytest.mark.cluster
def test_a_gate_that_starts_again_is_given_what_it_had(ray_cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what loaders ask of it beyond its window, or again."""
    import ray

    monkeypatch.setattr(backpressure, "AT_ONCE", 4)
    feeder = WindowFeeder(_micro, 10, 100, ahead=8, window=12)
    gate = feeder.gate
    assert take_planned(gate, 10, 14) == _plan(10, 14)

    def answer(reference: Any) -> list[MicroBatch]:
        until = time.monotonic() + 60
        while not ray.wait([reference], timeout=0.2)[0] and time.monotonic() < until:
            feeder.feed()
            feeder.mend()
        return ray.get(reference, timeout=1)

    def asked(first: int, last: int) -> list[MicroBatch]:
        return answer(gate.take.remote(first, last))

    assert asked(14, 22) == _plan(14, 22), "the rest of the first window"
    feeder.reach(40)
    assert asked(48, 52) == _plan(48, 52)
    ray.kill(gate, no_restart=False)
    assert asked(48, 52) == _plan(48, 52), "it is told again that the trainer has reached 40"
    assert asked(12, 16) == _plan(12, 16), "a task that is made again from its beginning"
    waiting = gate.take.remote(80, 84)
    assert asked(40, 44) == _plan(40, 44)
    gate.release.remote()
    assert answer(waiting) == _plan(80, 84), "far beyond the window"
    ray.kill(gate)


@pytest.mark.cluster
def test_a_loader_does_not_wait_for_a_trainer_that_has_ended(ray_cluster) -> None:
    import ray

    gate = start_gate(0, 0, _plan(0, 8))
    ray.get(gate.advance.remote(3, 0, []))
    assert take_planned(gate, 3, 5) == _plan(3, 5)
    threading.Timer(0.5, lambda: ray.kill(gate)).start()
    started = time.monotonic()
    with pytest.raises(RunError, match="micro-batches 4 to 5 cannot be made"):
        take_planned(gate, 4, 6)
    assert time.monotonic() - started > 0.3
    with pytest.raises(RunError, match="micro-batches 5 to 6 cannot be made"):
        take_planned(gate, 5, 7)
