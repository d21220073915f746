"""Which sampler answers which prompts, and when: a state machine without processes, threads or clocks.

Prompts are dealt in portions of neighbouring rows, those with the longest expected answers first, and a sampler has one
portion at a time, so that a slow one holds only its own. A portion whose sampler died goes back, and the next free
sampler gets it. `engines/actors.py` carries out what is decided here.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from ray_vlm.errors import RunError

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 10.0  # before a lost sampler is asked whether it is there again


@dataclass(frozen=True)
class Portion:
    """Rows of one call that are answered together. `number`: unique in its dealer. `call`: the call's number; `rows`:
    positions in it, neighbours. `cost`: what is expected of it, in tokens. `only`: the sampler that is to answer it,
    None for any."""

    number: int
    call: int
    rows: range
    cost: float
    only: int | None = None


def cut(costs: Sequence[float], size: int) -> list[tuple[range, float]]:
    """Cut rows of these expected costs into portions of `size` neighbours, with the cost of each: its rows are computed
    together, so its longest row decides how long all of them take."""
    bounds = [range(start, min(start + size, len(costs))) for start in range(0, len(costs), size)]
    return [(rows, max(costs[row] for row in rows) * len(rows)) for rows in bounds]


class Lengths:
    """Expected tokens of the answers to a row: as many as last time, or the mean of all."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._sum = 0

    def expect(self, row: int) -> float:
        """Return the expected tokens of the longest answer to the row with this number."""
        known = self._known.get(row)
        return known if known is not None else self._sum / max(1, len(self._known))

    def learn(self, row: int, tokens: int) -> None:
        """Record the tokens of the longest answer to a row."""
        self._sum += tokens - self._known.get(row, 0)
        self._known[row] = tokens


_Answer = TypeVar("_Answer")


@dataclass
class _Sampler:
    portion: Portion | None = None  # that it answers now
    alive: bool = False
    doubted: bool = False  # another one is gone, and this one has not said since that it is there
    losses: int = 0  # since it was last there
    joins: int = 0  # how often it has come
    asked_at: float = 0.0  # when it is next asked whether it is there; inf while such a question is under way

    @property
    def is_free(self) -> bool:
        return self.alive and not self.doubted and self.portion is None

    @property
    def is_asked(self) -> bool:
        return not self.alive or self.doubted


@dataclass
class _Call(Generic[_Answer]):
    answers: list[_Answer | None]
    missing: int
    deaths: dict[int, int] = field(default_factory=dict)  # of samplers, by the portion that each had
    short: set[int] = field(default_factory=set)  # portions with too few answers, which are asked once more


class Dealer(Generic[_Answer]):
    """Deals the rows of calls to samplers and collects an answer for each row, each exactly once.

    `first`: the sampler that is asked first, another one on each rank. `max_deaths`: of samplers with the same portion,
    before the run ends. Samplers are absent until `joined`. Times are seconds of any clock.
    """

    def __init__(self, samplers: int, first: int = 0, max_deaths: int = 3):
        self._samplers = [_Sampler() for _ in range(samplers)]
        self._order = [(first + i) % samplers for i in range(samplers)]
        self._max_deaths = max_deaths
        self._waiting: list[tuple[int, float, int, Portion]] = []  # a heap: older calls first, then longer portions
        self._calls: dict[int, _Call[_Answer]] = {}
        self._numbers = 0  # portions so far
        self._next_call = 0

    @property
    def num_alive(self) -> int:
        """Samplers that are there."""
        return sum(sampler.alive for sampler in self._samplers)

    @property
    def num_asked(self) -> int:
        """Samplers that have been asked whether they are there, and have not answered."""
        return sum(sampler.is_asked and sampler.asked_at == float("inf") for sampler in self._samplers)

    def living(self) -> list[int]:
        """Return the samplers that are there."""
        return [number for number, sampler in enumerate(self._samplers) if sampler.alive]

    def joins(self, sampler: int) -> int:
        """Return how often a sampler has come: once, and once more after each loss."""
        return self._samplers[sampler].joins

    @property
    def num_waiting(self) -> int:
        """Portions that no sampler has."""
        return len(self._waiting)

    def add(self, costs: Sequence[float], size: int, only: int | None = None) -> int:
        """Take a call with rows of these expected costs, `size` of them a portion. Return the call's number. `only`:
        the sampler that answers them; if it is gone before it has, any other does."""
        call, self._next_call = self._next_call, self._next_call + 1
        self._calls[call] = _Call([None] * len(costs), len(costs))
        for rows, cost in cut(costs, size):
            self._push(Portion(self._numbers, call, rows, cost, only))
            self._numbers += 1
        if only is not None and not self._samplers[only].alive:
            self._release(only)
        return call

    def deal(self) -> list[tuple[int, Portion]]:
        """Give a portion to each free sampler, as long as there are any: `(sampler, portion)` of each."""
        dealt = []
        for number in self._order:
            sampler = self._samplers[number]
            if sampler.is_free and (portion := self._next_for(number)) is not None:
                sampler.portion = portion
                dealt.append((number, portion))
        return dealt

    def answered(self, sampler: int, portion: Portion, answers: Sequence[_Answer], complete: bool = True) -> bool:
        """Take the answers to a portion, one for each of its rows. Return False, and change nothing, if the sampler has
        not this portion any more. `complete`: whether the answers are all that was asked for; if not, the portion is
        asked once more. Raise `RunError` if that was in vain."""
        state = self._samplers[sampler]
        if state.portion is None or state.portion.number != portion.number:
            return False
        state.portion = None
        call = self._calls[portion.call]
        if not complete or len(answers) != len(portion.rows):
            if portion.number in call.short:
                raise RunError(
                    f"a sampler answered {len(portion.rows)} prompts with fewer completions than asked, twice. Lower "
                    "method.num_generations, or look at the log of the sampler."
                )
            call.short.add(portion.number)
            self._push(portion)
            return True
        for row, answer in zip(portion.rows, answers, strict=True):
            call.answers[row] = answer
        call.missing -= len(portion.rows)
        return True

    def still_has(self, sampler: int, portion: Portion) -> bool:
        """Return whether the sampler has this portion and has not answered it."""
        state = self._samplers[sampler]
        return state.alive and state.portion is not None and state.portion.number == portion.number

    def died(self, sampler: int, now: float, reason: str = "", ended: bool = False) -> None:
        """Record that a sampler is gone, and why if that is known. Its portion is dealt again. Raise `RunError` if more
        died with this portion than may.

        Others may be gone with it, as those of one node are, so the free ones get no portion until they have said that
        they are there: a portion must not count the deaths of samplers that it did not reach. `ended`: on purpose; it
        does not count."""
        state = self._samplers[sampler]
        portion, state.portion, state.alive, state.doubted = state.portion, None, False, False
        self._wait(state, now)
        self._release(sampler)
        for other in self._samplers:
            if other.is_free:
                other.doubted, other.asked_at = True, now
        if portion is None:
            return
        portion = replace(portion, only=None)
        self._push(portion)
        if ended:
            return
        deaths = self._calls[portion.call].deaths
        deaths[portion.number] = deaths.get(portion.number, 0) + 1
        if deaths[portion.number] > self._max_deaths:
            count = deaths[portion.number]
            who = "a sampler" if count == 1 else f"{count} samplers, one after another,"
            raise RunError(
                f"{who} died while answering the same "
                f"{'prompt' if len(portion.rows) == 1 else f'{len(portion.rows)} prompts'}, and "
                f"cluster.max_failures={self._max_deaths}{f'. The last reason: {reason}' if reason else ''}. Lower "
                "method.sampling_batch, method.num_generations or data.max_pixels, or look at the log of a sampler; if "
                "its node was lost, raise cluster.max_failures."
            )

    def absent(self, sampler: int, now: float) -> None:
        """Record that a sampler has not said that it is there."""
        state = self._samplers[sampler]
        if state.doubted:
            state.alive, state.doubted = False, False
            self._release(sampler)
        self._wait(state, now)

    def joined(self, sampler: int) -> None:
        """Record that a sampler is there."""
        state = self._samplers[sampler]
        state.joins += not state.alive
        state.alive, state.doubted, state.losses = True, False, 0

    def due(self, now: float) -> list[int]:
        """Return the absent and the doubted samplers that are to be asked now whether they are there; each only
        once."""
        due = [n for n, state in enumerate(self._samplers) if state.is_asked and state.asked_at <= now]
        for number in due:
            self._samplers[number].asked_at = float("inf")
        return due

    def next_due(self) -> float:
        """Return when `due` is next worth a call; infinity if no sampler is absent or all of these have been asked."""
        return min((state.asked_at for state in self._samplers if state.is_asked), default=float("inf"))

    def is_done(self, call: int) -> bool:
        """Return whether all rows of a call are answered."""
        return self._calls[call].missing == 0

    def take(self, call: int) -> list[_Answer]:
        """Return the answers of a call that is done, in order of its rows, and forget it."""
        answers = [answer for answer in self._calls[call].answers if answer is not None]
        assert self.is_done(call)
        del self._calls[call]
        return answers

    def drop(self, call: int) -> None:
        """Forget a call: its portions are not dealt any more, and answers that still come are ignored."""
        self._calls.pop(call, None)
        self._waiting = [entry for entry in self._waiting if entry[0] != call]
        heapq.heapify(self._waiting)
        for state in self._samplers:
            if state.portion is not None and state.portion.call == call:
                state.portion = None

    def held(self) -> Mapping[int, Portion]:
        """Return the portion that each busy sampler has."""
        return {n: state.portion for n, state in enumerate(self._samplers) if state.portion is not None}

    def _next_for(self, sampler: int) -> Portion | None:
        """Take the next portion that the sampler may answer; None if there is none."""
        held = []  # portions that only others may answer: few, and rare
        while self._waiting and self._waiting[0][-1].only not in (None, sampler):
            held.append(heapq.heappop(self._waiting))
        portion = heapq.heappop(self._waiting)[-1] if self._waiting else None
        for entry in held:
            heapq.heappush(self._waiting, entry)
        return portion

    def _release(self, sampler: int) -> None:
        """Let any sampler answer what only this one was to answer."""
        self._waiting = [
            (call, cost, number, replace(portion, only=None) if portion.only == sampler else portion)
            for call, cost, number, portion in self._waiting
        ]

    def _push(self, portion: Portion) -> None:
        heapq.heappush(self._waiting, (portion.call, -portion.cost, portion.number, portion))

    def _wait(self, state: _Sampler, now: float) -> None:
        state.asked_at = now + min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(state.losses, 10))
        state.losses += 1
