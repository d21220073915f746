"""Each fault of an engine of other processes ends the run in its own words, and no healthy engine does."""

import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from ray_vlm.data.spec import Sample
from ray_vlm.distributed import DistributedContext
from ray_vlm.engines.actors import Answered, SamplerPool
from ray_vlm.engines.adapter_check import CheckedEngine, Schedule
from ray_vlm.engines.adapter_evidence import Answers, Evidence, judge, proves, resolution_of, shared_context
from ray_vlm.engines.interface import Completion, Engine, Pixels, Sampling
from ray_vlm.engines.server import ServerEngine
from ray_vlm.errors import RunError
from tests.support.engines import RecordingEngine

VOCABULARY, PROMPT = 24, Sample(np.arange(5, dtype=np.int64), np.zeros(0, np.int64), ())
SAMPLING, SEEDS = Sampling(2, 8), [(3, 0)]
GAPS = {"fp32": 1e-3, "bf16": 0.1}


@cache
def _drawn(context: bytes) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(context)).normal(size=(2, VOCABULARY))


def _logprobs(ids: Sequence[int], adapter: float, noise: float = 0.0, machine: int = 0) -> np.ndarray:
    """The next token's log-probabilities by a model whose adapter is one number. `noise`: of the arithmetic, which
    depends on the machine and on every bit of the input."""
    base, change = _drawn(bytes(map(int, ids)))
    logits = base + adapter * change
    if noise:
        bits = zlib.crc32(logits.tobytes(), machine)
        logits += noise * np.random.default_rng(bits).normal(size=VOCABULARY)
    return logits - np.log(np.exp(logits).sum())


@dataclass
class Model:
    """What trains: its adapter, and the noise of its arithmetic."""

    adapter: float
    noise: float = 0.0


def _score(model: Any, row: Sample, ids: Sequence[int], with_adapter: bool) -> np.ndarray:
    tokens = [*row.input_ids, *ids]
    start, adapter = len(row.input_ids), model.adapter if with_adapter else 0.0
    return np.stack([_logprobs(tokens[: start + i], adapter, model.noise) for i in range(len(ids))])


class Played(Engine):
    """A healthy engine of another process."""

    ends = 0  # how many tokens of the vocabulary end an answer

    def __init__(self, noise: float = 0.0):
        self.adapter, self.noise, self.asked, self.last_woke = 0.0, noise, [0, 0], False

    def update(self, model: Any) -> None:
        self.adapter = model.adapter

    def _answer(self, row: Sample, sampling: Sampling, seed: Sequence[int], adapter: float) -> Completion:
        rng, tokens, logprobs = np.random.default_rng(list(seed)), [*self.prompt(row)], []
        for _ in range(sampling.max_new_tokens):
            scores = self.scores(tokens, adapter)
            token = min(int(np.searchsorted(np.exp(scores).cumsum(), rng.random())), VOCABULARY - 1)
            tokens.append(token)
            logprobs.append(float(scores[token]))
            if token < self.ends:
                break
        return Completion(tokens[len(row.input_ids) :], logprobs, False)

    def prompt(self, row: Sample) -> Sequence[int]:
        return row.input_ids.tolist()

    def scores(self, tokens: Sequence[int], adapter: float) -> np.ndarray:
        return _logprobs(tokens, adapter, self.noise, machine=1)

    def sample(
        self, rows: Sequence[Sample], sampling: Sampling, seeds: Sequence[Sequence[int]], pixels: Pixels | None = None
    ) -> list[list[Completion]]:
        self.asked[0] += 1
        return [self._group(row, sampling, seed, self.adapter) for row, seed in zip(rows, seeds, strict=True)]

    def sample_base(
        self, rows: Sequence[Sample], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        self.asked[1] += 1
        return [self._group(row, sampling, seed, 0.0) for row, seed in zip(rows, seeds, strict=True)]

    def _group(self, row: Sample, sampling: Sampling, seed: Sequence[int], adapter: float) -> list[Completion]:
        return [self._answer(row, sampling, (*seed, i), adapter) for i in range(sampling.num_generations)]

    def answer(self, rows: Sequence[Sample], max_new_tokens: int) -> list[list[int]]:
        return [[0] for _ in rows]


class BaseAlone(Played):
    def update(self, model: Any) -> None:
        pass


class SkipsSecond(Played):
    pushes = 0

    def update(self, model: Any) -> None:
        self.pushes += 1
        if self.pushes != 2:
            super().update(model)


class OneBehind(Played):
    waiting = 0.4

    def update(self, model: Any) -> None:
        self.adapter, self.waiting = self.waiting, model.adapter


class KeepsFirst(Played):
    pushes = 0

    def update(self, model: Any) -> None:
        self.pushes += 1
        if self.pushes == 1:
            super().update(model)


class OtherPrompt(Played):
    def prompt(self, row: Sample) -> Sequence[int]:
        return row.input_ids.tolist()[::-1]


class OtherTemperature(Played):
    def scores(self, tokens: Sequence[int], adapter: float) -> np.ndarray:
        scores = super().scores(tokens, adapter) / 0.5
        return scores - np.log(np.exp(scores).sum())


class NotANumber(Played):
    def _answer(self, row: Sample, sampling: Sampling, seed: Sequence[int], adapter: float) -> Completion:
        answer = super()._answer(row, sampling, seed, adapter)
        return replace(answer, logprobs=[float("nan")] * len(answer.ids))


class Silent(Played):
    def _answer(self, row: Sample, sampling: Sampling, seed: Sequence[int], adapter: float) -> Completion:
        return Completion([], [], True)


def _train(
    engine: Played, adapters: Sequence[float], precision: str = "fp32", noise: float = 0.0, every: int = 4
) -> int:
    """Push and sample as training does; return how many steps there were."""
    kind = cast("Any", precision)
    checked = CheckedEngine(engine, _score, resolution_of(kind, "cpu"), GAPS[precision], every)
    for adapter in adapters:
        checked.update(cast("Any", Model(adapter, noise)))
        checked.sample([PROMPT], SAMPLING, SEEDS)
    return len(adapters)


BASE, STALE, APART = "answers with the base alone", "with the adapter of an earlier push", "of the trainer are .* apart"
GROWING = [0.5 + 0.05 * step for step in range(20)]
FRESH = [0.0, 1e-3, *GROWING]  # a new adapter changes nothing before its first step


@pytest.mark.parametrize(
    ("engine", "adapters", "problem"),
    [
        (BaseAlone, GROWING, f"after push 1 .*{BASE}"),
        (BaseAlone, FRESH, f"after push 2 .*{BASE}"),
        (SkipsSecond, GROWING, f"after push 2 .*{STALE}: from push 1 to push 2"),
        (OneBehind, GROWING, f"after push [12] .*{APART}|{STALE}"),
        (KeepsFirst, GROWING, f"after push 2 .*{STALE}"),
        (OtherPrompt, GROWING, APART),
        (OtherTemperature, GROWING, APART),
        (NotANumber, GROWING, "nan apart"),
        (Silent, GROWING, "no token at all"),
    ],
)
def test_a_fault_ends_the_run_and_is_named(engine: type[Played], adapters: Sequence[float], problem: str) -> None:
    with pytest.raises(RunError, match=rf"method\.rollouts: {problem if problem[:5] == 'after' else '.*' + problem}"):
        _train(engine(), adapters)


class Adapted(torch.nn.Module):
    """What trains, as a model whose weights are sent to samplers."""

    noise = 0.0

    def __init__(self, adapter: float):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([adapter], dtype=torch.float64))

    @property
    def adapter(self) -> float:
        return self.w.item()


class PlayedProcesses:
    """Samplers, each with an engine of its own."""

    def __init__(self, *engines: Played):
        self.engines, self.count = engines, len(engines)

    def ask(self, sampler: int, method: str, *args: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        engine = self.engines[sampler]
        if method == "push":
            future.set_result(engine.update(Model(float(args[1].values["w"][0].view(np.float64)[0]))))
        else:
            future.set_result(None if method == "ping" else Answered(getattr(engine, method)(*args[1:]), 0.0, 0.0))
        return future

    def share(self, value: object) -> object:
        return value

    def restart(self, sampler: int) -> None: ...


@pytest.mark.parametrize("stale", [None, 0, 1])
def test_each_sampler_of_a_pool_is_checked_and_the_stale_one_is_named(stale: int | None) -> None:
    samplers = PlayedProcesses(*(KeepsFirst() if number == stale else Played() for number in range(2)))
    pool = SamplerPool(samplers, DistributedContext(), 1)
    checked = CheckedEngine(pool, _score, resolution_of("fp32", "cpu"), 1e-3, 4)
    try:
        checked.update(Adapted(0.5))
        while len(pool.parts()) < 2:
            time.sleep(0.01)
        checked.check([PROMPT], 8)
        assert [engine.asked for engine in samplers.engines] == [[1, 1], [1, 1]]
        checked.update(Adapted(0.7))
        if stale is None:
            checked.check([PROMPT], 8)
            assert [engine.asked for engine in samplers.engines] == [[2, 1], [2, 1]]
            return
        with pytest.raises(RunError, match=rf"method\.rollouts, sampler {stale}: after push 2 .*{STALE}"):
            checked.check([PROMPT], 8)
    finally:
        pool.close()


def test_a_sampler_that_was_started_again_leaves_nothing_of_its_earlier_starts() -> None:
    """What a check keeps has the size of the vocabulary for each token."""

    class Parts(Played):
        name = "sampler 0"

        def parts(self) -> list[Any]:
            return [self]

        def __str__(self) -> str:
            return self.name

    pool = Parts()
    checked = CheckedEngine(
        SimpleNamespace(parts=lambda: [pool, pool], update=pool.update, awake=pool.awake),
        _score,
        resolution_of("fp32", "cpu"),
        1e-3,
        4,
    )  # type: ignore[arg-type]
    for start in range(1, 4):
        pool.name = f"sampler 0 (start {start})"
        checked.update(Adapted(0.5 + start))
        checked.check([PROMPT], 8)
        assert list(checked._states) == [pool.name]


def test_an_engine_one_push_behind_is_named_so_within_a_loose_bound() -> None:
    checked = CheckedEngine(OneBehind(), _score, resolution_of("fp32", "cpu"), 10.0, 4)
    checked.update(cast("Any", Model(0.5)))
    checked.sample([PROMPT], SAMPLING, SEEDS)
    checked.update(cast("Any", Model(0.7)))
    with pytest.raises(RunError, match=rf"{STALE}: .* from the trainer's of push 1, and .* of push 2"):
        checked.sample([PROMPT], SAMPLING, SEEDS)


@pytest.mark.parametrize(
    ("engine", "problem"), [(BaseAlone, BASE), (KeepsFirst, STALE), (OtherPrompt, APART), (SkipsSecond, STALE)]
)
def test_faults_are_named_in_16_bit_too(engine: type[Played], problem: str) -> None:
    with pytest.raises(RunError, match=problem):
        _train(engine(noise=0.02), GROWING, "bf16", noise=0.02)


@pytest.mark.parametrize(("precision", "noise"), [("fp32", 0.0), ("fp32", 1e-6), ("bf16", 0.02), ("bf16", 0.04)])
@pytest.mark.parametrize("ends", [0, 8], ids=["long", "short"])
@pytest.mark.parametrize(
    "adapters", [FRESH, [0.0] * 20, [0.3] * 20, [1e-3 * s for s in range(30)], [1.0, -2.0, 3.0, -0.5, 0.01, 5.0]]
)
def test_a_healthy_engine_is_never_refused(adapters: Sequence[float], ends: int, precision: str, noise: float) -> None:
    """Fresh adapters, a learning rate of 0, small and large steps; rounding as of 16 bit; answers of a few tokens."""
    engine = Played(noise)
    engine.ends = ends
    assert _train(engine, adapters, precision, noise, every=1) == len(adapters)


def test_the_first_proof_is_logged_with_its_numbers_once(lines: list[str]) -> None:
    _train(Played(), FRESH)
    assert [line.split(":")[1].split(" of the adapter")[0] for line in lines if "method.rollouts" in line][1:] == [
        " push 2"
    ]
    assert "changes too little to prove" in lines[0]
    assert "gap 0.0e+00 (bound 1.0e-03), effect of the adapter" in lines[1]


def _asked(engine: Played, pushes: int, every: int) -> list[tuple[int, int]]:
    """How often each push asked for an answer with the adapter, beside the step's own, and without it."""
    checked = CheckedEngine(engine, _score, resolution_of("fp32", "cpu"), 1e-3, every)
    counts = []
    for step in range(pushes):
        engine.asked = [0, 0]
        checked.update(cast("Any", Model(0.5 + 0.05 * step)))
        checked.sample([PROMPT], SAMPLING, SEEDS)
        checked.answer([PROMPT], 4)  # the same push is not checked again
        counts.append((engine.asked[0] - 1, engine.asked[1]))
    return counts


def test_checks_come_at_the_first_push_the_next_and_every_so_many() -> None:
    full, pair, none = (1, 1), (1, 0), (0, 0)
    assert _asked(Played(), 11, 4) == [full, pair, none, none, full, pair, none, none, full, pair, none]


def test_answers_of_an_engine_that_has_woken_up_are_checked() -> None:
    class Wakes(Played):
        def sample(self, *args: Any, **kwargs: Any) -> list[list[Completion]]:
            self.last_woke = self.asked[0] == 0
            return super().sample(*args, **kwargs)

    assert _asked(Wakes(), 6, 100)[2:] == [(1, 0)] * 4, "once a push"


def test_a_wake_that_loses_the_adapter_ends_the_run() -> None:
    class Forgets(Played):
        calls = 0

        def sample(self, *args: Any, **kwargs: Any) -> list[list[Completion]]:
            self.calls += 1
            if self.calls > 6:
                self.adapter, self.last_woke = 0.0, True
            return super().sample(*args, **kwargs)

    with pytest.raises(RunError, match=BASE):
        _asked(Forgets(), 10, 100)


def test_a_second_wake_of_one_push_is_checked_too() -> None:
    """As in a validation that answers greedily, and then samples."""

    class Forgets(Played):
        def answer(self, rows: Sequence[Sample], max_new_tokens: int) -> list[list[int]]:
            self.adapter, self.last_woke = 0.0, True
            return super().answer(rows, max_new_tokens)

        def sample(self, *args: Any, **kwargs: Any) -> list[list[Completion]]:
            self.last_woke = False
            return super().sample(*args, **kwargs)

    checked = CheckedEngine(Forgets(), _score, resolution_of("fp32", "cpu"), 1e-3, 100)
    checked.update(cast("Any", Model(0.4)))
    assert checked.sample([PROMPT], SAMPLING, SEEDS)
    with pytest.raises(RunError, match=BASE):
        checked.answer([PROMPT], 4)


def test_the_schedule_backs_off_while_nothing_can_be_proved() -> None:
    schedule, pushes = Schedule(every=10), []
    for push in range(1, 40):
        if schedule.asks(push) == "full":
            pushes.append(push)
            schedule = schedule.after(push, "full", proved=False)
    assert pushes == [1, 2, 4, 8, 16, 26, 36]


def test_an_engine_is_not_checked_before_a_push_nor_without_a_row() -> None:
    engine = Played()
    checked = CheckedEngine(engine, _score, resolution_of("fp32", "cpu"), 1e-3, 4)
    checked.sample([PROMPT], SAMPLING, SEEDS)
    checked.sample([], SAMPLING, [])
    assert engine.asked == [2, 0]
    checked.update(cast("Any", Model(0.5)))
    checked.sample([], SAMPLING, [])  # the prompt of the first call serves
    assert engine.asked == [4, 1]


def _evidence(engine: Sequence[float], trainer: Sequence[float], base: Sequence[float], **more: Any) -> Evidence:
    ids = (tuple(range(len(engine))),)
    arrays = (np.asarray(values, np.float64) for values in (engine, trainer, base))
    logprobs, on, off = arrays
    return Evidence(2, Answers(ids, logprobs), on, off, resolution_of("fp32", "cpu"), **more)


def test_the_nearer_of_base_and_earlier_push_is_named() -> None:
    """The step has gone past the base: what is an earlier push is nearer to the base than to the present adapter."""
    earlier = np.array([-1.0, -2.0])
    evidence = _evidence([-1.0, -2.0], [-5.0, -9.0], [-1.5, -3.0])
    evidence = replace(evidence, previous_push=1, previous_engine=Answers(((0, 1),), earlier), previous_trainer=earlier)
    assert [STALE in problem for problem in judge(evidence, 1.0)] == [True]
    base = replace(evidence, engine=Answers(((0, 1),), evidence.trainer_base))
    assert [BASE in problem for problem in judge(base, 1.0)] == [True]


def test_nothing_is_proved_while_the_two_are_as_near() -> None:
    between = _evidence([-1.5, -1.5], [-1.0, -1.0], [-2.0, -2.0])
    assert judge(between, 1.0) == []
    assert not proves(between)
    assert proves(_evidence([-1.1, -1.1], [-1.0, -1.0], [-2.0, -2.0]))


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [((1, 2, 3), (1, 2, 3), 3), ((1, 2, 3), (1, 9, 3), 2), ((1,), (2, 3), 1), ((), (1,), 0), ((1, 2), (1, 2, 3), 2)],
)
def test_positions_with_the_same_tokens_before_them(first: tuple, second: tuple, count: int) -> None:
    assert shared_context(first, second) == count


def test_a_server_is_asked_for_the_base_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    client: Any = SimpleNamespace(stop_waiting=lambda _: None, close=lambda: None)
    engine = ServerEngine(client, "base", cast("Any", None), (), None, processed=True, scored=True)
    engine.adapter, asked = "adapter-7", []
    monkeypatch.setattr(engine, "_for_each", lambda *_: asked.append(engine.adapter or engine._base) or [])
    for sample in (engine.sample, engine.sample_base, engine.sample):
        sample([], SAMPLING, [])
    assert asked == ["adapter-7", "base", "adapter-7"]


def test_an_engine_that_cannot_answer_without_the_adapter_says_so() -> None:
    with pytest.raises(NotImplementedError, match="RecordingEngine does not answer without the adapter"):
        RecordingEngine().sample_base([PROMPT], SAMPLING, SEEDS)
