"""What runs out of memory is sampled and answered in smaller portions."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_vlm.engines import own
from ray_vlm.engines.interface import Completion, Sampling
from ray_vlm.engines.own import OwnEngine
from ray_vlm.errors import RunError

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full. More"
ROWS: Any = [SimpleNamespace(number=number, input_ids=range(3)) for number in range(8)]
SEEDS = [(number,) for number in range(8)]


class _Card:
    """Runs up to `fits` prompts at a time; each answer is its prompt's number or seed."""

    def __init__(self, fits: int):
        self.fits, self.tried = fits, list[int | None]()

    def sample(self, model: Any, rows: Any, builder: Any, sampling: Any, seeds: Any, *rest: Any) -> Any:
        portion = rest[1]
        self.tried.append(portion)
        self._check(min(portion or len(rows), len(rows)))
        return [[Completion(list(seed), [0.0], True)] for seed in seeds]

    def answer(self, model: Any, rows: Any, *rest: Any) -> list[list[int]]:
        self.tried.append(len(rows))
        self._check(len(rows))
        return [[row.number] for row in rows]

    def _check(self, prompts: int) -> None:
        if prompts > self.fits:
            raise torch.OutOfMemoryError(FULL)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[..., OwnEngine]:
    """A function that builds the own engine of a card."""

    def of(card: _Card, model: torch.nn.Module | None = None, group_batch: int | None = None) -> OwnEngine:
        monkeypatch.setattr(own, "sample_groups", card.sample)
        monkeypatch.setattr(own, "decode_greedy", card.answer)
        monkeypatch.setattr(own, "needs_generate", lambda builder: False)
        monkeypatch.setattr(own, "answering", lambda *_: torch.no_grad())
        return OwnEngine(model or torch.nn.Linear(1, 1), None, "cpu", group_batch)  # type: ignore[arg-type]

    return of


def _partitioned() -> torch.nn.Module:
    model = torch.nn.Linear(1, 1)
    model.weight.ds_id = 1  # type: ignore[assignment]
    return model


def test_portions_of_sampling_are_halved_until_they_fit(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    card = _Card(3)
    engine = build(card)
    answers = engine.sample(ROWS, Sampling(1, 16), SEEDS)
    assert (card.tried, engine.group_batch) == ([None, 4, 2], 2)
    assert [group[0].ids for group in answers] == [[number] for number in range(8)]
    assert "answers to 8 prompts at a time ran out of GPU memory: CUDA out of memory. Tried to allocate" in caplog.text
    assert "Tried next, and kept: 2 at a time, with the same random numbers" in caplog.text
    engine.sample(ROWS, Sampling(1, 16), SEEDS)
    assert card.tried[3:] == [2]
    engine = build(_Card(8))
    engine.sample(ROWS, Sampling(1, 16), SEEDS)
    assert engine.group_batch is None


def test_portions_of_greedy_answers_are_halved_apart(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    card = _Card(3)
    engine = build(card)
    assert engine.answer(ROWS[:7], 16) == [[number] for number in range(7)]
    assert card.tried == [7, 3, 3, 1]
    assert (engine.group_batch, engine.answer_batch) == (None, 3)
    assert "answering 7 prompts at a time ran out of GPU memory: " in caplog.text
    assert caplog.text.strip().endswith("Tried next, and kept: 3 at a time")
    card.tried.clear()
    assert engine.answer(ROWS[:2], 16) == [[0], [1]]
    assert card.tried == [2]
    assert engine.answer([], 16) == []


def test_memory_that_is_held_shrinks_with_the_portion(build: Any) -> None:
    engine = build(_Card(4))
    assert engine.try_sampling(ROWS, Sampling(4, 2), SEEDS, None, 1000) == 4
    assert build(_Card(8)).try_sampling(ROWS, Sampling(4, 2), SEEDS, None, 1000) == 8


def test_one_prompt_that_does_not_fit_names_what_to_change(build: Any) -> None:
    with pytest.raises(RunError, match=r"one prompt ran out of GPU memory.*num_generations \(now 4\).*\(now 16\)"):
        build(_Card(0), group_batch=2).sample(ROWS, Sampling(4, 16), SEEDS)
    engine = build(_Card(0))
    engine._keys = ("pairs.num_samples", "evaluate.max_new_tokens")
    with pytest.raises(RunError, match=r"Lower pairs\.num_samples \(now 4\), evaluate\.max_new_tokens \(now 16\)"):
        engine.sample(ROWS, Sampling(4, 16), SEEDS)
    with pytest.raises(RunError, match=r"answering one prompt ran out.*Lower evaluate\.max_new_tokens \(now 16\)"):
        build(_Card(0)).answer(ROWS, 16)


def test_nothing_is_halved_under_zero_3(build: Any) -> None:
    with pytest.raises(RunError, match="8 prompts at a time ran out"):
        build(_Card(4), _partitioned()).sample(ROWS, Sampling(4, 16), SEEDS)
    with pytest.raises(RunError, match=r"answering 8 prompts at a time ran out.*Lower evaluate\.batch_size"):
        build(_Card(4), _partitioned()).answer(ROWS, 16)


def test_other_errors_pass(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> Any:
        raise RuntimeError("shapes differ")

    engine = build(_Card(8))
    monkeypatch.setattr(own, "sample_groups", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        engine.sample(ROWS, Sampling(4, 16), SEEDS)
