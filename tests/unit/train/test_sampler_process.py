"""The process of a sampler: whose weights it answers with, and what a call of a guest leaves behind."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_vlm.engines.actors import Answered, Missing
from ray_vlm.engines.weights import Weights
from ray_vlm.errors import RunError
from ray_vlm.train import sampler_process
from ray_vlm.train.sampler_process import Sampler, _Loaded


class Engine:
    """An engine that halves its portions for many rows, and ends at a row of length 0."""

    def __init__(self) -> None:
        self.portion, self.has_ended, self.weight = 8, False, 0.0

    def update(self, model: torch.nn.Linear) -> None:
        self.weight = float(model.weight)

    def answer(self, rows: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        if self.has_ended:
            raise RunError("the engine has ended")
        if 0 in rows:
            self.has_ended = True
            raise RunError("a row that the engine does not take")
        if len(rows) > self.portion:
            self.portion = self.portion // 2
        return [[self.portion, int(self.weight)] for _ in rows]


def _model(weight: float) -> torch.nn.Linear:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, weight)
    return model


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Sampler:
    def load(spec: object, number: int, resources: tuple[float, float]) -> _Loaded:
        engine: Any = Engine()
        return _Loaded(_model(0.0), engine, engine if number else Engine())  # type: ignore[arg-type]

    monkeypatch.setattr(sampler_process, "_load", load)
    spec: Any = SimpleNamespace()
    sampler = Sampler(spec, 0, (1.0, 0.0))
    sampler.push(("run", 1), Weights.read(_model(1.0)))
    sampler.lend(("guest", 1), Weights.read(_model(2.0)))
    return sampler


def _ask(sampler: Sampler, who: str, rows: Sequence[int]) -> list[Any]:
    answered = sampler.answer((who, 1), rows, 4)  # type: ignore[arg-type]
    assert isinstance(answered, Answered)
    return list(answered.answers)


def test_a_guest_changes_neither_weights_nor_portions_of_the_run(sampler: Sampler) -> None:
    assert _ask(sampler, "run", [1]) == [[8, 1]]
    assert _ask(sampler, "guest", range(1, 10))[0] == [4, 2]
    assert _ask(sampler, "run", [1]) == [[8, 1]]
    assert sampler.answer(("run", 2), [], 4) == Missing(("run", 2))


@pytest.mark.parametrize("shared", [False, True])
def test_an_engine_that_a_guest_has_ended_is_started_again(sampler: Sampler, shared: bool) -> None:
    """The run must not get the error of the guest."""
    sampler._number = int(shared)
    assert _ask(sampler, "run", [1]) == [[8, 1]]
    with pytest.raises(RunError, match="does not take"):
        _ask(sampler, "guest", [0])
    assert _ask(sampler, "run", [1]) == [[8, 1]]
    assert _ask(sampler, "guest", [1]) == [[8, 2]]
