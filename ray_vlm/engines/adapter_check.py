"""The proof that an engine of other processes (vLLM, a server) answers with the trainer's adapter as it is now.

One fixed prompt is answered by the engine with the adapter and without it, and the trainer scores the same tokens
(`scoring.py`). `adapter_evidence.py` decides. A check takes one or two requests of a few tokens and two forwards of
one row. Nothing here is collective: each worker checks its own engine.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_vlm.data.spec import Sample
from ray_vlm.engines.adapter_evidence import Answers, Evidence, Resolution, judge, proves, shared_context
from ray_vlm.engines.interface import Completion, Engine, Pixels, Sampling
from ray_vlm.engines.scoring import Scorer
from ray_vlm.errors import RunError

if TYPE_CHECKING:
    from torch.nn import Module

logger = logging.getLogger(__name__)
_TOKENS = 16  # that are compared: of one answer, or where answers are short of a few
_ANSWERS = 8
_SEED = (1, 1, 1)  # of its random numbers: in every check the same


@dataclass(frozen=True)
class Schedule:
    """When checks are due. `every`: pushes between two checks. `due`: the next push that is checked in full, with the
    base; `pair`: the push whose numbers are compared with those of the push before it; `failed`: checks in a row that
    could prove nothing."""

    every: int
    due: int = 1
    pair: int | None = None
    failed: int = 0

    def asks(self, push: int) -> str | None:
        """Return which check is due after this many pushes: `full`, `pair`, or None."""
        if push >= self.due:
            return "full"
        return "pair" if self.pair is not None and push >= self.pair else None

    def after(self, push: int, kind: str, proved: bool) -> "Schedule":
        """Return the schedule after a check. Until a check proves the adapter, the next ones come after 1, 2, 4, ...
        pushes: an adapter that starts as zero has no effect before its first step."""
        if kind != "full":
            return Schedule(self.every, self.due, None, self.failed)
        if proved:
            return Schedule(self.every, push + self.every, push + 1)
        return Schedule(self.every, push + min(self.every, 2**self.failed), push + 1, self.failed + 1)


_Scores = dict[tuple[int, ...], np.ndarray]  # tokens of an answer -> `float32 [tokens, vocabulary]`


@dataclass(frozen=True)
class _Check:
    """What a check keeps for the next one. `scores`: the trainer's log-probabilities, with the adapter."""

    push: int
    answers: Answers
    scores: _Scores


@dataclass
class _State:
    """Of a part of the engine: when its checks are due, the push that was checked last, what that check keeps, and
    whether any has proved the adapter."""

    schedule: Schedule
    checked: int = 0
    last: _Check | None = None
    proved: bool = False


class CheckedEngine(Engine):
    """An engine whose answers are proved to be those of the adapter that was pushed last, each of its parts by itself.

    The check runs before the first answers after the first push, after every push on which it is due, after the push
    that follows, and after answers for which the engine has woken up. It raises `RunError` with the numbers.
    """

    def __init__(
        self,
        engine: Engine,
        score: Scorer,
        resolution: Resolution,
        max_gap: float,
        every: int,
        name: str = "method.rollouts",
    ):
        """`score`: the trainer's log-probabilities. `max_gap`: the largest mean difference to them that is no fault.
        `every`: pushes between two checks. `name`: the setting that chose the engine, for messages."""
        self.engine, self.max_gap, self.name = engine, max_gap, name
        self._score, self._resolution, self._every = score, resolution, every
        self._model: Module | None = None
        self._prompt: tuple[Sample, Sampling] | None = None  # the first row of the first call, and how it is answered
        self._pushes = 0
        self._states: dict[str, _State] = {}  # of each part of the engine

    def update(self, model: "Module") -> None:
        """Send the adapter to the engine, and count it."""
        self._model = model
        self.engine.update(model)
        self._pushes += 1

    def sample(
        self,
        rows: Sequence[Sample],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        pixels: Pixels | None = None,
    ) -> list[list[Completion]]:
        """Sample as the engine does. Raise `RunError` if it does not answer with the adapter of the last push."""
        with self.awake():
            self._check_if_due(rows, sampling.max_new_tokens)
            groups = self.engine.sample(rows, sampling, seeds, pixels)
            self._check_if_woken()
        return groups

    def answer(self, rows: Sequence[Sample], max_new_tokens: int) -> list[list[int]]:
        """Answer as the engine does. Raise `RunError` if it does not answer with the adapter of the last push."""
        with self.awake():
            self._check_if_due(rows, max_new_tokens)
            answers = self.engine.answer(rows, max_new_tokens)
            self._check_if_woken()
        return answers

    def sample_base(
        self, rows: Sequence[Sample], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """Sample without the adapter, unchecked."""
        return self.engine.sample_base(rows, sampling, seeds)

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()
        self._model = None

    def awake(self) -> AbstractContextManager[None]:
        """Return the engine's own context."""
        return self.engine.awake()

    def check(self, rows: Sequence[Sample], max_new_tokens: int) -> None:
        """Do a check that is due, for a caller that asks the engine itself. Raise `RunError` as `sample` does."""
        self._check_if_due(rows, max_new_tokens)

    def _check_if_due(self, rows: Sequence[Sample], max_new_tokens: int) -> None:
        if self._prompt is None and rows:
            self._prompt = rows[0], Sampling(_ANSWERS, min(_TOKENS, max_new_tokens), 1.0)
        if self._prompt is None or self._model is None:
            return
        parts = self.engine.parts()
        names = {part: str(part) if len(parts) > 1 or part is not self.engine else "" for part in parts}
        # Samplers that were started again have other names.
        self._states = {name: state for name, state in self._states.items() if name in names.values()}
        for part, name in names.items():
            state = self._states.setdefault(name, _State(Schedule(self._every)))
            kind = state.schedule.asks(self._pushes)
            if kind is not None and self._pushes > state.checked:
                self._check(part, name, kind)

    def _check_if_woken(self) -> None:
        """Check answers for which the engine has woken up since the last check: a wake reads weights again, and loses
        adapters in some versions. It is done before the answers are used."""
        if getattr(self.engine, "last_woke", False) and "" in self._states:
            self._check(self.engine, "", "wake")

    def _check(self, part: Engine, name: str, kind: str) -> None:
        """Ask a part of the engine, score its tokens, and raise `RunError` for what is wrong."""
        assert self._prompt is not None
        assert self._model is not None
        (row, sampling), model, state = self._prompt, self._model, self._states[name]
        who = f"{self.name}, {name}" if name else self.name
        answers = _ask(part.sample, row, sampling)
        base = _ask(part.sample_base, row, sampling) if kind == "full" else None
        scores, plain = ({ids: self._score(model, row, ids, on) for ids in set(answers.ids)} for on in (True, False))
        evidence = self._compare(state.last, answers, base, scores, plain)
        problems = judge(evidence, self.max_gap)
        if problems:
            raise RunError([f"{who}: after push {self._pushes} of the adapter {p}. {_FIX}" for p in problems])
        first = state.last is None
        state.checked, state.last = self._pushes, _Check(self._pushes, answers, scores)
        proved = proves(evidence)
        self._report(evidence, proved, state, first, who)
        state.schedule = state.schedule.after(self._pushes, kind, proved)

    def _compare(
        self, last: _Check | None, answers: Answers, base: Answers | None, scores: _Scores, plain: _Scores
    ) -> Evidence:
        """Return the numbers of a check. `scores`, `plain`: of the trainer, with the adapter and without."""
        return Evidence(
            push=self._pushes,
            engine=answers,
            trainer=_pick(scores, answers.ids),
            trainer_base=_pick(plain, answers.ids),
            resolution=self._resolution,
            base=base,
            previous_push=None if last is None else last.push,
            previous_engine=None if last is None else last.answers,
            previous_trainer=None if last is None else _pick_earlier(last, answers.ids),
        )

    def _report(self, evidence: Evidence, proved: bool, state: _State, first: bool, who: str) -> None:
        """Log the first proof, and once that there is none yet; later ones only for those who ask for details."""
        numbers = f"gap {evidence.gap:.1e} (bound {self.max_gap:.1e}), effect of the adapter {evidence.effect:.1e}"
        if proved:
            log = logger.debug if state.proved else logger.info
            log(f"{who}: push {evidence.push} of the adapter is proved to be in use: {numbers}")
            state.proved = True
        elif first:
            logger.info(
                f"{who}: the adapter changes too little to prove that it is in use: {numbers}. The next pushes "
                "are checked until it does"
            )


_FIX = (
    "Its answers are not the policy's, so the run ends. Find out why the engine differs (docs/methods.md, GRPO), or "
    "set method.rollouts=transformers and resume from the last checkpoint."
)


def _ask(sample: Callable[..., list[list[Completion]]], row: Sample, sampling: Sampling) -> Answers:
    """Return answers to `row`, with the same random numbers at every call: as many of them as have enough tokens."""
    ids: list[tuple[int, ...]] = []
    logprobs: list[float] = []
    for completion in sample([row], sampling, [_SEED])[0]:
        if completion.ids and len(logprobs) < _TOKENS:
            ids.append(tuple(completion.ids))
            logprobs += completion.logprobs
    return Answers(tuple(ids), np.asarray(logprobs, np.float64))


def _pick(scores: _Scores, answers: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return the scores of the tokens of all answers, `float64 [tokens]`."""
    return np.concatenate([np.zeros(0), *(scores[ids][np.arange(len(ids)), list(ids)] for ids in answers)])


def _pick_earlier(last: _Check, answers: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return the scores of an earlier check of the tokens of these answers, `float64 [tokens]`: NaN where the tokens
    before were others."""
    parts = [np.full(len(ids), np.nan) for ids in answers]
    for part, ids in zip(parts, answers, strict=True):
        nearest = max(last.scores, key=lambda earlier: shared_context(ids, earlier))
        count = shared_context(ids, nearest)
        part[:count] = last.scores[nearest][np.arange(count), list(ids[:count])]
    return np.concatenate([np.zeros(0), *parts])
