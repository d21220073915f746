"""A worker's pool of samplers, which threads play: versions, deaths, failures, order, and the cost of the dealing."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from ray_vlm.distributed import DistributedContext
from ray_vlm.engines import actors
from ray_vlm.engines.actors import SamplerFailed, SamplerLost, SamplerPool
from ray_vlm.engines.interface import Sampling
from ray_vlm.engines.ray_samplers import RaySamplers
from ray_vlm.engines.weights import Weights
from ray_vlm.errors import ModelError, RunError
from tests.support.played_samplers import PlayedSampler, PlayedSamplers, expected_group, row
from tests.support.twins import slow_but

SAMPLING = Sampling(num_generations=2, max_new_tokens=4)


def _model(value: float) -> torch.nn.Module:
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.tensor([value]))
    model.frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    return model


class Rank(DistributedContext):
    """A rank whose broadcasts need no process group."""

    def broadcast(self, value: Any) -> Any:
        return "token"


_pools: list[SamplerPool] = []


@pytest.fixture(autouse=True)
def close_pools() -> Iterator[None]:
    """Close the pools of a test: their threads would log into the next ones."""
    yield
    while _pools:
        _pools.pop().close()


def _pool(samplers: PlayedSamplers, rank: int = 0, portion: int | None = 1, max_deaths: int = 3) -> SamplerPool:
    _pools.append(SamplerPool(samplers, Rank(rank, 2), portion, max_deaths))
    return _pools[-1]


def _sample(pool: SamplerPool, numbers: range, step: int = 0) -> list:
    return pool.sample([row(n) for n in numbers], SAMPLING, [(step, n) for n in numbers])


def _due(weight: float, numbers: range, step: int = 0) -> list:
    return [expected_group(weight, (step, n), 2) for n in numbers]


@pytest.mark.parametrize("portion", [1, 3, None])
@pytest.mark.parametrize("count", [1, 3])
def test_groups_come_in_order_with_the_newest_weights(count: int, portion: int | None) -> None:
    samplers = PlayedSamplers(count)
    pool = _pool(samplers, portion=portion)
    for step in range(3):
        pool.update(_model(step / 2))
        assert _sample(pool, range(7), step) == _due(step / 2, range(7), step)
    assert len(samplers.shared) == 3
    pool.update(_model(1.0))  # equal weights are not sent again
    assert len(samplers.shared) == 3
    assert pool.answer([row(n) for n in range(5)], 2) == [[n, n] for n in range(5)]
    assert pool.answer([], 2) == []
    sizes = {len(asked) for sampler in samplers.samplers for asked in sampler.asked}
    assert max(sizes) == (portion or -(-7 // count))


def test_a_call_keeps_its_weights_while_newer_ones_are_pushed() -> None:
    gate = threading.Event()
    pool = _pool(PlayedSamplers(1, lambda sampler: gate.wait(5)))
    pool.update(_model(1.0))
    old = pool.submit([row(n) for n in range(3)], SAMPLING, [(0, n) for n in range(3)])
    pool.update(_model(2.0))
    new = pool.submit([row(n) for n in range(3)], SAMPLING, [(0, n) for n in range(3)])
    gate.set()
    assert pool.collect(new) == _due(2.0, range(3))
    assert pool.collect(old) == _due(1.0, range(3))


def test_another_rank_brings_the_weights_that_rank_0_has_not_sent() -> None:
    samplers = PlayedSamplers(2)
    pool = _pool(samplers, rank=1)
    pool.update(_model(0.5))
    assert _sample(pool, range(4)) == _due(0.5, range(4))
    assert not samplers.shared


@pytest.mark.parametrize("again_after", [0.0, 0.6])
def test_killed_samplers_lose_nothing(again_after: float) -> None:
    count = Counter[str]()

    def before(sampler: PlayedSampler) -> None:
        count["portions"] += 1
        if count["portions"] % 5 == 3:
            samplers.kill(samplers.samplers.index(sampler), again_after)

    samplers = PlayedSamplers(2, before)
    pool = _pool(samplers)
    for step in range(3):
        pool.update(_model(float(step)))
        assert _sample(pool, range(6), step) == _due(float(step), range(6), step)
    assert count["portions"] > 18


def test_others_answer_while_a_sampler_is_absent_and_it_joins_later() -> None:
    samplers = PlayedSamplers(2)
    samplers.absent.add(1)
    pool = _pool(samplers)
    pool.update(_model(1.0))
    assert _sample(pool, range(4)) == _due(1.0, range(4))
    assert not samplers.samplers[1].asked
    samplers.absent.discard(1)
    end = time.monotonic() + 10
    while not samplers.samplers[1].asked and time.monotonic() < end:
        assert _sample(pool, range(4)) == _due(1.0, range(4))
        time.sleep(0.02)
    assert samplers.samplers[1].asked


def test_a_sampler_that_came_again_has_another_name() -> None:
    """So that it is proved anew to answer with the adapter."""
    samplers = PlayedSamplers(2)
    pool = _pool(samplers)
    pool.update(_model(1.0))
    _sample(pool, range(4))
    assert [str(part) for part in pool.parts()] == ["sampler 0", "sampler 1"]
    samplers.kill(1, again_after=0.05)
    end = time.monotonic() + 10
    while pool.take_times().samplers != 1 and time.monotonic() < end:
        assert _sample(pool, range(4)) == _due(1.0, range(4))
    while len(pool.parts()) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert [str(part) for part in pool.parts()] == ["sampler 0", "sampler 1 (start 2)"]


class Actor:
    """What Ray returns for an actor's name; a call of its method ends as `result` says."""

    def __init__(self, result: object):
        self.ping = SimpleNamespace(remote=lambda: SimpleNamespace(future=lambda: self.reply))
        self.reply: Future[object] = Future()
        if isinstance(result, BaseException):
            self.reply.set_exception(result)
        else:
            self.reply.set_result(result)


def test_an_actor_that_is_started_later_is_reached_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    actors: dict[str, Actor] = {}

    def get_actor(name: str, namespace: str) -> Actor:
        if name not in actors:
            raise ValueError(f"Failed to look up actor with name '{name}'.")
        return actors[name]

    monkeypatch.setattr("ray.get_actor", get_actor)
    samplers = RaySamplers(["a", "b"], "ray_vlm")
    assert samplers.count == 2
    assert samplers.are_gone
    for method in ("ping", "push"):
        with pytest.raises(SamplerLost, match="not started") as absent:
            samplers.ask(0, method).result(5)
        assert absent.value.ended, "no prompt is the reason"
    actors["a"] = Actor(ActorDiedError())
    with pytest.raises(SamplerLost, match="ActorDiedError") as ended:
        samplers.ask(0, "ping").result(5)
    assert ended.value.ended
    actors["a"] = Actor("another process")
    assert samplers.ask(0, "ping").result(5) == "another process"
    assert not samplers.are_gone
    actors["b"] = Actor(ActorUnavailableError("for now", None))
    with pytest.raises(SamplerLost, match="ActorUnavailableError") as away:
        samplers.ask(1, "ping").result(5)
    assert not away.value.ended
    again = actors["b"] = Actor("under the same name")
    with pytest.raises(SamplerLost, match="ActorUnavailableError"):  # the handle of an actor that comes back stays
        samplers.ask(1, "ping").result(5)
    assert again.reply.result() == "under the same name"


def test_a_head_that_does_not_answer_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()

    def get_actor(name: str, namespace: str) -> Actor:
        if not answers.wait(1.0):
            raise GetTimeoutError("There was timeout in getting the actor handle")
        return Actor("here")

    monkeypatch.setattr("ray.get_actor", get_actor)
    samplers = RaySamplers(["a"], "ray_vlm")
    started = time.monotonic()
    reply = samplers.ask(0, "ping")
    assert time.monotonic() - started < 0.8
    with pytest.raises(SamplerLost, match="not started"):
        reply.result(5)
    answers.set()
    assert samplers.ask(0, "ping").result(5) == "here"


def test_any_error_of_a_look_up_is_a_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = [ValueError("no such name"), RuntimeError("the cluster is odd"), Actor("here")]

    def get_actor(name: str, namespace: str) -> Actor:
        found_or_not = actors.pop(0)
        if isinstance(found_or_not, Exception):
            raise found_or_not
        return found_or_not

    monkeypatch.setattr("ray.get_actor", get_actor)
    samplers = RaySamplers(["a"], "ray_vlm")
    with pytest.raises(SamplerLost, match="RuntimeError: the cluster is odd"):
        samplers.ask(0, "ping").result(5)
    assert samplers.ask(0, "ping").result(5) == "here"


def test_the_time_of_samplers_is_of_those_that_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those that are gone at the end of the step; those that never came do not count."""
    monkeypatch.setattr(PlayedSampler, "busy_s", 10.0)
    samplers = PlayedSamplers(4, lambda sampler: time.sleep(0.02))
    samplers.absent.add(3)
    pool = _pool(samplers)
    pool.update(_model(1.0))
    pool.collect(pool.submit([row(n) for n in range(3)], SAMPLING, [(0, n) for n in range(3)]))  # each has one
    times = pool.take_times()
    assert (times.busy, times.samplers) == (pytest.approx(2 * 3 * 10.0 / 3), 3), "two ranks ask as much"
    pool.collect(pool.submit([row(n) for n in range(3)], SAMPLING, [(1, n) for n in range(3)]))
    for sampler in range(3):
        samplers.kill(sampler, again_after=60.0)
    call = pool.submit([row(9)], SAMPLING, [(0, 9)])
    end = time.monotonic() + 10
    while pool._dealer.num_alive and time.monotonic() < end:
        time.sleep(0.02)
    times = pool.take_times()
    assert (times.busy, times.samplers) == (pytest.approx(2 * 3 * 10.0 / 3), 0)
    pool.drop(call)


def test_a_validation_is_no_part_of_the_times_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlayedSampler, "busy_s", 10.0)
    pool = _pool(PlayedSamplers(1, lambda sampler: time.sleep(0.05)))
    pool.update(_model(1.0))
    call = pool.submit([row(0)], SAMPLING, [(0, 0)])  # of the step that comes next
    _sample(pool, range(1, 5))
    pool.answer([row(1)], 3)
    pool.collect(call)
    times = pool.take_times()
    assert times.busy == pytest.approx(2 * 10.0)
    assert times.waited < 0.05


def test_each_answer_is_progress_in_the_thread_that_waits() -> None:
    """By it the watchdog sees that a long validation, in which the worker's own model does nothing, is no stall."""
    threads: list[int] = []
    samplers = PlayedSamplers(1, lambda sampler: time.sleep(0.02))
    pool = SamplerPool(samplers, Rank(0, 1), 1, on_progress=lambda: threads.append(threading.get_ident()))
    _pools.append(pool)
    pool.update(_model(1.0))
    _sample(pool, range(4))
    assert len(threads) == 4
    assert set(threads) == {threading.get_ident()}


def test_no_adapter_is_sent_to_a_sampler_that_has_no_place_yet() -> None:
    """Ray keeps what it is to send to an actor that is not placed, so each step would add an adapter. One that comes
    gets the newest."""
    samplers = PlayedSamplers(2)
    waiting, placed = samplers.samplers[1], threading.Event()
    waiting.ping = placed.wait  # type: ignore[method-assign]
    pool = _pool(samplers)
    for step in range(5):
        pool.update(_model(float(step)))
        assert _sample(pool, range(2), step) == _due(float(step), range(2), step)
    assert waiting.queue.empty()
    placed.set()
    end = time.monotonic() + 10
    while not waiting.versions and time.monotonic() < end:
        time.sleep(0.01)
    assert [version[1] for version in waiting.versions] == [5]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_adapter_that_never_arrives_is_said(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "_MISSING_WAIT_S", 0.001)

    def push(self: PlayedSampler, version: object, weights: object) -> None:
        raise SamplerFailed("OSError: no space left on device")

    monkeypatch.setattr(PlayedSampler, "push", push)
    pool = _pool(PlayedSamplers(1), rank)
    pool.update(_model(1.0))
    with pytest.raises(RunError, match=r"sampler 0 does not keep the adapter, .* 5 times\. .*no space left"):
        _sample(pool, range(1))


def test_where_no_sampler_comes_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where all have been asked and none answers, and while the first ones start."""
    monkeypatch.setattr(actors, "_ALONE_S", 0.3)
    samplers, came = PlayedSamplers(1), threading.Event()
    samplers.samplers[0].ping = came.wait  # type: ignore[method-assign]
    pool = _pool(samplers)
    pool.update(_model(1.0))
    call = pool.submit([row(0)], SAMPLING, [(0, 0)])
    time.sleep(0.1)
    assert not caplog.messages
    end = time.monotonic() + 10
    while not caplog.messages and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.5)
    assert caplog.messages == ["no sampler is there; prompts wait until one has been started"]
    came.set()
    pool.collect(call)


def test_a_sampler_that_fails_is_started_again() -> None:
    failed = []

    def before(sampler: PlayedSampler) -> None:
        if not failed:
            failed.append(sampler)
            raise SamplerFailed("RuntimeError: device lost")

    samplers = PlayedSamplers(1, before)
    pool = _pool(samplers)
    pool.update(_model(1.0))
    assert _sample(pool, range(3)) == _due(1.0, range(3))
    assert samplers.restarts == 1
    assert samplers.samplers[0] is not failed[0]


def test_errors_in_words() -> None:
    def refuse(sampler: PlayedSampler) -> None:
        raise ModelError("model.name='x': its weights cannot be loaded")

    pool = _pool(PlayedSamplers(1, refuse))
    pool.update(_model(1.0))
    with pytest.raises(ModelError, match="cannot be loaded"):
        _sample(pool, range(2))

    def die(sampler: PlayedSampler) -> None:
        samplers.kill(samplers.samplers.index(sampler))

    samplers = PlayedSamplers(1, die)
    pool = _pool(samplers, max_deaths=1)
    pool.update(_model(1.0))
    with pytest.raises(RunError, match="2 samplers, one after another, died"):
        _sample(pool, range(2))


def test_short_groups_are_asked_for_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = PlayedSampler.sample

    def short(self: PlayedSampler, *args: Any) -> Any:
        answered = plain(self, *args)
        asked.append(answered)
        if len(asked) in lacking:
            answered.answers[0].pop()
        return answered

    monkeypatch.setattr(PlayedSampler, "sample", short)
    samplers = PlayedSamplers(1)
    lacking = {2}
    pool = _pool(samplers)
    pool.update(_model(1.0))
    samplers.ask(0, "push", ("token", 1), Weights.read(_model(1.0))).result()
    asked.clear()
    assert _sample(pool, range(3)) == _due(1.0, range(3))
    lacking = set(range(100))
    with pytest.raises(RunError, match="fewer completions than asked, twice"):
        _sample(pool, range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_arrive_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    source, target = torch.nn.Linear(3, 5).to(dtype), torch.nn.Linear(3, 5).to(dtype)
    weights = Weights.read(source)
    weights.write(target)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    assert weights.equals(Weights.read(target))
    with torch.no_grad():
        source.weight += 1
    assert not weights.equals(Weights.read(source))
    target.bias.requires_grad_(False)
    with pytest.raises(RunError, match="bias"):
        weights.write(target)


@pytest.mark.parametrize("limit_s", slow_but([0.2], [0.05, 0.2]))  # a machine with nothing else to do keeps 0.05
def test_the_dealing_of_64_workers_and_16_samplers_costs_little(limit_s: float) -> None:
    """Played by threads that sample nothing, so that the time of a step is that of the coordination."""
    samplers, steps, groups = PlayedSamplers(16), 6, 4
    pools = [SamplerPool(samplers, Rank(rank, 64), 1) for rank in range(64)]
    weights, barrier = [_model(float(step)) for step in range(steps)], threading.Barrier(64)
    problems: list[object] = []
    times: list[float] = []

    def work(rank: int) -> None:
        try:
            for step in range(steps):
                pools[rank].update(weights[step])
                barrier.wait(30)
                numbers, started = range(rank * groups, (rank + 1) * groups), time.perf_counter()
                if _sample(pools[rank], numbers, step) != _due(float(step), numbers, step):
                    problems.append((rank, step))
                barrier.wait(30)
                if rank == 0 and step:  # samplers are found in the first
                    times.append(time.perf_counter() - started)
        except BaseException as error:
            problems.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not problems
    assert min(times) < limit_s
    assert max(sampler.deepest for sampler in samplers.samplers) <= 64 + steps + 64  # portions, pushes, pings
    assert all(sampler.queue.empty() for sampler in samplers.samplers)
    for pool in pools:
        pool.close()
