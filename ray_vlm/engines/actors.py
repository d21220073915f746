"""Answers by samplers: processes beside the trainer, each with an engine of its own on its own card or cores.

A `SamplerPool` is a worker's view of all samplers of the run. Prompts and images travel to a sampler with their
portion, adapters once a version, both through Ray's object store. `engines/dealing.py` decides who answers what, and
this module carries it out. A thread takes what samplers answer, so that they work on while the worker trains.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from ray_vlm.distributed import DistributedContext
from ray_vlm.engines.dealing import Dealer, Lengths, Portion
from ray_vlm.engines.interface import Completion, Engine, Pixels, Sampling
from ray_vlm.engines.weights import Weights
from ray_vlm.errors import RunError

if TYPE_CHECKING:
    from torch.nn import Module

    from ray_vlm.data.spec import Sample

logger = logging.getLogger(__name__)
_MISSING_WAIT_S, _MISSING_TRIES = 0.05, 5  # for the push of another rank, before this one pushes the adapter itself
_PUSH_TRIES = 5  # of this rank, for one portion
_GUEST_WAIT_S = 20.0  # that a guest waits while no sampler is there: one that was killed is there again in less
_ALONE_S = 60.0  # after so long without any sampler a line says so, also while the first ones start

Version = tuple[str, int]  # of an adapter: the token of a pool, and how many it has pushed
Answer = list[Completion] | list[int]  # to one row: its group, or the tokens of its greedy answer


@dataclass(frozen=True)
class Answered:
    """A sampler's answers to a portion, the seconds that they took, and those that it had nothing to do before."""

    answers: list[Answer]
    busy_s: float
    idle_s: float


@dataclass(frozen=True)
class Missing:
    """A sampler's reply if it has not the adapter of the version that is asked for."""

    version: Version


class SamplerLost(Exception):
    """A sampler's process is gone, or cannot be reached for now. `ended`: on purpose, or it was not there: no prompt is
    the reason."""

    def __init__(self, reason: str, ended: bool = False):
        super().__init__(reason)
        self.ended = ended


class SamplerFailed(Exception):
    """A sampler failed with an error that is no `RayVlmError`."""


class Samplers(Protocol):
    """The samplers of a run, by number. They answer what one asker asks in that order."""

    count: int

    def ask(self, sampler: int, method: str, *args: object) -> "Future[Any]":
        """Call a method of a sampler. The future raises `SamplerLost`, `SamplerFailed` or the sampler's
        `RayVlmError`."""

    def share(self, value: object) -> object:
        """Store a value once, and return what stands for it in `ask`."""

    def restart(self, sampler: int) -> None:
        """End a sampler's process; another takes its number."""


@dataclass(frozen=True)
class _Request:
    """A call: its rows, the method of the sampler that answers them, and the further arguments of each row. `timed`:
    whether it counts in the times of the pool."""

    rows: Sequence["Sample"]
    method: str
    version: Version
    shared: tuple[object, ...]
    seeds: Sequence[Sequence[int]] | None
    group: int | None  # completions of a row
    timed: bool = False

    def arguments(self, portion: Portion) -> tuple[object, ...]:
        """Return the arguments of the sampler's method for a portion."""
        rows = [self.rows[i] for i in portion.rows]
        seeds = () if self.seeds is None else ([list(self.seeds[i]) for i in portion.rows],)
        return (self.version, rows, *self.shared, *seeds)

    def is_complete(self, answers: Sequence[Answer]) -> bool:
        """Whether each row of a portion has as many completions as were asked for."""
        return self.group is None or all(len(answer) == self.group for answer in answers)


@dataclass
class PoolTimes:
    """Seconds of the calls of `submit`: `waited` that this worker waited for answers; of the mean sampler, `busy` with
    portions, and `idle` before them. This worker knows those of its own portions, and takes the other workers' for
    equal. `samplers`: that are there."""

    waited: float = 0.0
    busy: float = 0.0
    idle: float = 0.0
    samplers: int = 0


class SamplerPool(Engine):
    """A worker's samplers. All ranks call `update` at the same steps, with equal weights.

    `portion`: prompts whose answers a sampler samples at a time; None: all of a call in equal shares. `max_deaths`: of
    samplers with the same portion before the run ends. `guest`: the pool is not of a worker of the run; its weights
    never replace those of the workers, and its calls raise `RunError` once no sampler is there.
    `on_progress`: called in the thread that waits for a call, for each of its answers.
    """

    def __init__(
        self,
        samplers: Samplers,
        context: DistributedContext,
        portion: int | None,
        max_deaths: int = 3,
        guest: bool = False,
        on_progress: Callable[[], None] = lambda: None,
    ):
        self._samplers, self._context, self._portion = samplers, context, portion
        share = samplers.count * context.rank // context.world_size  # where this rank begins
        self._dealer: Dealer[Answer] = Dealer(samplers.count, share, max_deaths)
        self._lengths, self._times = Lengths(), PoolTimes()
        self._answering: set[int] = set()  # samplers that have answered within `_times`
        self._token, self._pushed = context.broadcast(uuid4().hex), 0
        self._weights: dict[Version, Weights] = {}  # those that a call still asks for, and the newest
        self._requests: dict[int, _Request] = {}
        self._lock = threading.Condition()  # of all of these
        self._error: BaseException | None = None
        self._shared: tuple[Version, object] | None = None  # what rank 0 has sent last
        self._on_progress, self._answered_portions = on_progress, 0
        self._alone_since, self._alone_told = float("inf"), False  # that portions wait and no sampler is there
        self._guest, self._gone_since = guest, float("inf")
        self._tries: dict[int, int] = {}  # of portions, for an adapter that was missing
        self._brought: dict[int, Future[Any]] = {}  # the last push of the adapter for such a portion
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()  # what to do when something was answered
        self._thread = threading.Thread(target=self._work, name="ray-vlm-samplers", daemon=True)
        self._thread.start()

    @property
    def num_samplers(self) -> int:
        """Samplers of the run, also those that are absent."""
        return self._samplers.count

    def portion_size(self, rows: int) -> int:
        """Return how many of that many prompts a sampler samples at a time."""
        return self._portion or max(1, -(-rows // self._samplers.count))

    def update(self, model: "Module") -> None:
        """Let further calls be answered with the trained weights of `model` as they are now. Rank 0 sends them."""
        weights = Weights.read(model)
        with self._lock:
            if weights.equals(self._weights.get(self._version)):
                return
            self._pushed += 1
            asked = {request.version for request in self._requests.values()}
            self._weights = {v: known for v, known in self._weights.items() if v in asked} | {self._version: weights}
        if self._context.rank == 0:
            shared = self._samplers.share(weights)
            with self._lock:
                self._shared = self._version, shared
                # Ray would keep each adapter in memory for a sampler that has no place yet.
                for sampler in self._dealer.living():
                    self._push_shared(sampler)

    def sample(
        self,
        rows: Sequence["Sample"],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        pixels: Pixels | None = None,
    ) -> list[list[Completion]]:
        """Sample as every engine does. `pixels` is not used: a sampler makes its own."""
        return self.collect(self._submit(rows, sampling, seeds, timed=False))

    def submit(self, rows: Sequence["Sample"], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> int:
        """Begin to sample for a step, with the weights of the last `update`. Return a number for `collect`."""
        return self._submit(rows, sampling, seeds, timed=True)

    def _submit(self, rows: Sequence["Sample"], sampling: Sampling, seeds: Sequence[Sequence[int]], timed: bool) -> int:
        assert len(rows) == len(seeds)
        size, group = self.portion_size(len(rows)), sampling.num_generations
        return self._call("sample", rows, (sampling,), seeds, group, size, timed=timed)

    def collect(self, call: int) -> list[list[Completion]]:
        """Wait for the groups of a call of `submit`, and return them in order of its rows.

        Raise the `RayVlmError` of a sampler, or `RunError` if samplers died again and again with the same prompts."""
        request = self._requests[call]
        groups: list[Any] = self._wait(call)
        for row, group in zip(request.rows, groups, strict=True):
            self._lengths.learn(row.number, max(len(completion.ids) for completion in group))
        return groups

    def sample_base(
        self, rows: Sequence["Sample"], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """Sample without the adapter, if the samplers' engines can."""
        shared, size = (sampling,), self.portion_size(len(rows))
        groups: list[Any] = self._wait(self._call("sample_base", rows, shared, seeds, sampling.num_generations, size))
        return groups

    def parts(self) -> "Sequence[Engine]":
        """Return each sampler that is there as an engine of its own; wait until one is."""
        with self._lock:
            self._go_on()
            while not self._dealer.num_alive:
                if self._error is not None:
                    raise self._error
                self._lock.wait()
            return [_OneSampler(self, sampler, self._dealer.joins(sampler)) for sampler in self._dealer.living()]

    def sample_by(
        self,
        sampler: int,
        rows: Sequence["Sample"],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        base: bool = False,
    ) -> list[list[Completion]]:
        """Sample by this sampler, or by another if it is gone. `base`: without the adapter."""
        method, size, group = "sample_base" if base else "sample", len(rows), sampling.num_generations
        groups: list[Any] = self._wait(self._call(method, rows, (sampling,), seeds, group, size, sampler))
        return groups

    def answer(self, rows: Sequence["Sample"], max_new_tokens: int) -> list[list[int]]:
        if not rows:
            return []
        size = max(1, -(-len(rows) // self._samplers.count))
        answers: list[Any] = self._wait(self._call("answer", rows, (max_new_tokens,), None, None, size))
        return answers

    def take_times(self) -> PoolTimes:
        """Return the times since the last call."""
        with self._lock:
            times, self._times = self._times, PoolTimes()
            alive, answered, self._answering = self._dealer.num_alive, len(self._answering), set()
        share = self._context.world_size / max(1, alive, answered)  # one that answered may be gone since
        return PoolTimes(times.waited, times.busy * share, times.idle * share, alive)

    def drop(self, call: int) -> None:
        """Forget a call of `submit`."""
        with self._lock:
            self._dealer.drop(call)
            self._requests.pop(call, None)

    def close(self) -> None:
        """End the thread. The samplers stay, for the workers that come after these."""
        self._events.put(None)
        self._thread.join(5.0)

    @property
    def _push(self) -> str:
        return "lend" if self._guest else "push"

    @property
    def _version(self) -> Version:
        return self._token, self._pushed

    def _call(
        self,
        method: str,
        rows: Sequence["Sample"],
        shared: tuple[object, ...],
        seeds: Sequence[Sequence[int]] | None,
        group: int | None,
        size: int,
        only: int | None = None,
        timed: bool = False,
    ) -> int:
        costs = [len(row.input_ids) + self._lengths.expect(row.number) for row in rows]
        with self._lock:
            call = self._dealer.add(costs, size, only)
            self._requests[call] = _Request(rows, method, self._version, shared, seeds, group, timed)
            self._go_on()
            if not self._dealer.num_alive:
                self._events.put(lambda: None)  # the thread waits no longer than until a line is due
        return call

    def _wait(self, call: int) -> list[Answer]:
        started, seen = time.monotonic(), self._answered_portions
        with self._lock:
            while not self._dealer.is_done(call):
                if self._error is not None:
                    raise self._error
                self._lock.wait()
                if self._answered_portions != seen:
                    seen = self._answered_portions
                    self._on_progress()
            if self._requests.pop(call).timed:
                self._times.waited += time.monotonic() - started
            return self._dealer.take(call)

    def _work(self) -> None:
        """Take the answers of samplers until `close`."""
        while True:
            with self._lock:
                due = min(self._dealer.next_due(), self._tell_alone_at())
            try:
                event = self._events.get(timeout=None if due == float("inf") else max(0.0, due - time.monotonic()))
                if event is None:
                    return
            except queue.Empty:
                event = lambda: None  # noqa: E731  (a sampler is due)
            with self._lock:
                try:
                    event()
                    self._go_on()
                except BaseException as error:  # raised in the thread that waits
                    self._error = error
                self._lock.notify_all()

    def _go_on(self) -> None:
        """Ask absent samplers whether they are there, and give portions to free ones."""
        for sampler in self._dealer.due(time.monotonic()):
            self._ask(sampler, "ping", (), partial(self._joined, sampler))
        for sampler, portion in self._dealer.deal():
            self._send(sampler, portion)
        if self._dealer.num_alive or not self._dealer.num_waiting:
            self._alone_since, self._alone_told = float("inf"), False
        else:
            self._alone_since = min(self._alone_since, time.monotonic())
        if time.monotonic() >= self._tell_alone_at():
            self._alone_told = True
            logger.warning("no sampler is there; prompts wait until one has been started")

    def _tell_alone_at(self) -> float:
        """Return when a line is due that no sampler is there: at once, but for the first ones, which are starting."""
        return float("inf") if self._alone_told else self._alone_since + (_ALONE_S if self._pushed <= 1 else 0.0)

    def _send(self, sampler: int, portion: Portion) -> None:
        request = self._requests[portion.call]
        self._ask(sampler, request.method, request.arguments(portion), partial(self._answered, sampler, portion))

    def _ask(self, sampler: int, method: str, args: Sequence[object], take: Any) -> None:
        """Call a method of a sampler, and let the thread call `take` with its future when that is done."""
        future = self._samplers.ask(sampler, method, *args)
        future.add_done_callback(lambda done: self._events.put(partial(take, done)))

    def _joined(self, sampler: int, future: "Future[object]") -> None:
        try:
            future.result()
        except (SamplerLost, SamplerFailed) as error:
            now = time.monotonic()
            self._dealer.absent(sampler, now)
            self._gone_since = float("inf") if self._dealer.num_alive else min(self._gone_since, now)
            # One that has been asked may be busy with a portion: it answers the question after that.
            if self._guest and now - self._gone_since > _GUEST_WAIT_S and not self._dealer.num_asked:
                raise RunError(
                    f"no sampler of the run has been there for {now - self._gone_since:.0f} s ({error}). Ask "
                    "again while the run goes on, or use evaluate.engine=transformers."
                ) from None
            return
        before = self._dealer.joins(sampler)
        self._dealer.joined(sampler)
        if self._dealer.joins(sampler) != before:  # not one that was only in doubt
            self._push_shared(sampler)
        self._gone_since = float("inf")

    def _push_shared(self, sampler: int) -> None:
        """Send what this rank has sent last to a sampler. Whether it arrives is seen when it is used."""
        if self._shared is not None:
            self._samplers.ask(sampler, self._push, *self._shared)

    def _answered(self, sampler: int, portion: Portion, future: "Future[Answered | Missing]") -> None:
        if not self._dealer.still_has(sampler, portion):  # the portion was dealt to another, or its call was dropped
            return
        try:
            reply = future.result()
        except SamplerLost as error:
            count = len(portion.rows)
            prompts = "its prompt goes" if count == 1 else f"its {count} prompts go"
            logger.warning(f"sampler {sampler} is gone ({error}); {prompts} to another")
            self._tries.pop(portion.number, None)  # the next sampler has tries of its own
            self._dealer.died(sampler, time.monotonic(), str(error), error.ended)
            return
        except SamplerFailed as error:  # its device may be unusable, so the process ends too
            again = "asked" if self._guest else "started"
            logger.warning(f"sampler {sampler} failed ({error}); it is {again} again")
            self._samplers.restart(sampler)
            self._tries.pop(portion.number, None)
            self._dealer.died(sampler, time.monotonic(), str(error))
            return
        if isinstance(reply, Missing):
            self._bring(sampler, portion, reply.version)
            return
        self._tries.pop(portion.number, None)
        self._brought.pop(portion.number, None)
        self._answered_portions += 1
        request = self._requests[portion.call]
        if request.timed:
            self._answering.add(sampler)
            self._times.busy += reply.busy_s
            self._times.idle += reply.idle_s
        complete = request.is_complete(reply.answers)
        if not complete:
            logger.warning(f"sampler {sampler} answered with fewer completions than asked; it is asked once more")
        self._dealer.answered(sampler, portion, reply.answers, complete)

    def _bring(self, sampler: int, portion: Portion, version: Version) -> None:
        """Ask a sampler again that has not the adapter: the push of rank 0 may be under way. After some tries this rank
        sends its own weights, which are equal. Raise `RunError` if that is in vain too."""
        tries = self._tries[portion.number] = self._tries.get(portion.number, 0) + 1
        own_tries = tries - _MISSING_TRIES * (self._context.rank > 0)
        if own_tries <= 0:
            again = partial(self._send_again, sampler, portion)
            timer = threading.Timer(_MISSING_WAIT_S * tries, lambda: self._events.put(again))
            timer.daemon = True
            timer.start()
            return
        if own_tries > _PUSH_TRIES:
            push = self._brought[portion.number]
            reason = push.exception() if push.done() else None
            raise RunError(
                f"sampler {sampler} does not keep the adapter, which it was sent {_PUSH_TRIES} times"
                f"{f'. The last error: {reason}' if reason else ''}. Look at its log, sampler-{sampler}, in the "
                "folder of the run, and at the memory of its node."
            )
        self._brought[portion.number] = self._samplers.ask(sampler, self._push, version, self._weights[version])
        self._send(sampler, portion)

    def _send_again(self, sampler: int, portion: Portion) -> None:
        if self._dealer.still_has(sampler, portion):
            self._send(sampler, portion)


class _OneSampler(Engine):
    """One sampler of a pool. `joins`: how often it has come; a process that was started again has to be proved anew, so
    it has another name."""

    def __init__(self, pool: SamplerPool, sampler: int, joins: int):
        self._pool, self._sampler, self._joins = pool, sampler, joins

    def __str__(self) -> str:
        return f"sampler {self._sampler}{f' (start {self._joins})' if self._joins > 1 else ''}"

    def update(self, model: "Module") -> None:
        self._pool.update(model)

    def sample(
        self,
        rows: Sequence["Sample"],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        pixels: Pixels | None = None,
    ) -> list[list[Completion]]:
        return self._pool.sample_by(self._sampler, rows, sampling, seeds)

    def sample_base(
        self, rows: Sequence["Sample"], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        return self._pool.sample_by(self._sampler, rows, sampling, seeds, base=True)

    def answer(self, rows: Sequence["Sample"], max_new_tokens: int) -> list[list[int]]:
        return self._pool.answer(rows, max_new_tokens)
