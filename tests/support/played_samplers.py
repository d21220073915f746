"""Samplers that threads play, for tests of what deals prompts to them: they die, are slow, and answer too little."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import numpy as np

from ray_vlm.data.spec import Sample
from ray_vlm.engines.actors import Answered, Missing, SamplerFailed, SamplerLost, Version
from ray_vlm.engines.interface import Completion, Sampling
from ray_vlm.engines.weights import Weights


def row(number: int, tokens: int = 3) -> Sample:
    return Sample(np.arange(tokens, dtype=np.int32), np.zeros(0, np.int32), (), number=number)


def expected_group(weight: float, seeds: Sequence[int], group: int) -> list[Completion]:
    """What a played sampler with this weight answers to a row with these seeds."""
    rng = np.random.default_rng(list(seeds))
    return [Completion([int(rng.integers(50)), i], [weight, -1.0], True) for i in range(group)]


class PlayedSampler:
    """The process of a sampler: a thread that works off what it is asked, in that order."""

    busy_s = 0.0  # that each portion is said to take

    def __init__(self, before: Callable[["PlayedSampler"], None]):
        self.versions: dict[Version, Weights] = {}
        self.lent: set[Version] = set()  # of `versions`, those of guests
        self.asked: list[Sequence[int]] = []  # rows of each portion
        self.deepest = 0  # of its queue
        self.alive = True
        self._before = before
        self.queue: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def put(self, future: "Future[Any]", method: str, args: Sequence[Any]) -> None:
        self.queue.put((future, method, args))
        self.deepest = max(self.deepest, self.queue.qsize())

    def _work(self) -> None:
        while (asked := self.queue.get()) is not None:
            future, method, args = asked
            try:
                if not self.alive:
                    raise SamplerLost("killed")
                value = getattr(self, method)(*args)
                if not self.alive:  # killed meanwhile
                    raise SamplerLost("killed")
                future.set_result(value)
            except BaseException as error:
                future.set_exception(error)

    def ping(self) -> None:
        pass

    def push(self, version: Version, weights: Weights) -> None:
        self.versions[version] = weights

    def lend(self, version: Version, weights: Weights) -> None:
        self.lent.add(version)
        self.versions[version] = weights

    def sample(
        self, version: Version, rows: Sequence[Sample], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> Answered | Missing:
        if version not in self.versions:
            return Missing(version)
        self.asked.append([sample.number for sample in rows])
        self._before(self)
        data = self.versions[version].values["w"][0]
        weight = float(data.view(np.float32)[0])
        return Answered([expected_group(weight, own, sampling.num_generations) for own in seeds], self.busy_s, 0.0)

    def answer(self, version: Version, rows: Sequence[Sample], max_new_tokens: int) -> Answered | Missing:
        return Answered([[sample.number] * max_new_tokens for sample in rows], 0.0, 0.0)


class PlayedSamplers:
    """`Samplers` of threads. `before`: called by a sampler before it answers a portion."""

    def __init__(self, count: int, before: Callable[[PlayedSampler], None] = lambda sampler: None):
        self.count, self._before = count, before
        self.shared: list[object] = []
        self.samplers = [PlayedSampler(before) for _ in range(count)]
        self.absent: set[int] = set()
        self.restarts = 0

    def ask(self, sampler: int, method: str, *args: object) -> "Future[Any]":
        future: Future[Any] = Future()
        if sampler in self.absent:
            future.set_exception(SamplerLost("not there"))
        else:
            self.samplers[sampler].put(future, method, args)
        return future

    def share(self, value: object) -> object:
        self.shared.append(value)
        return value

    def kill(self, sampler: int, again_after: float = 0.0) -> None:
        """End a sampler, and start it again after some seconds."""
        self.absent.add(sampler)
        self.samplers[sampler].alive = False

        def start() -> None:
            time.sleep(again_after)
            self.samplers[sampler] = PlayedSampler(self._before)
            self.absent.discard(sampler)

        threading.Thread(target=start, daemon=True).start()

    def restart(self, sampler: int) -> None:
        self.restarts += 1
        self.kill(sampler)


__all__ = ["PlayedSampler", "PlayedSamplers", "SamplerFailed", "SamplerLost", "expected_group", "row"]
