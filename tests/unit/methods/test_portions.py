"""A rollout that runs out of memory is sampled in smaller portions."""

from typing import Any

import pytest
import torch

from ray_vlm.engines.interface import Sampling
from ray_vlm.errors import RunError
from ray_vlm.methods.portions import sample_in_portions


class _Card:
    """Samples up to `fits` prompts at a time; each answer is its prompt's seed."""

    def __init__(self, fits: int):
        self.fits, self.tried = fits, list[int | None]()

    def __call__(
        self, model: Any, rows: Any, builder: Any, sampling: Any, seeds: Any, device: str, **given: Any
    ) -> Any:
        self.tried.append(given["group_batch"])
        if min(given["group_batch"] or len(rows), len(rows)) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full. More")
        return [[seed] for seed in seeds]


def _sample(card: _Card, model: torch.nn.Module, group_batch: int | None = None) -> Any:
    seeds: Any = [(number,) for number in range(8)]
    return sample_in_portions(card, model, [None] * 8, None, Sampling(4, 16), seeds, "cpu", group_batch)  # type: ignore[arg-type,list-item]


def test_portions_are_halved_until_they_fit(caplog: pytest.LogCaptureFixture) -> None:
    card = _Card(3)
    answers, portion = _sample(card, torch.nn.Linear(1, 1))
    assert (card.tried, portion) == ([None, 4, 2], 2)
    assert answers == [[(number,)] for number in range(8)]
    assert "answers to 8 prompts at a time ran out of GPU memory: CUDA out of memory. Tried to allocate" in caplog.text
    assert "Tried next, and kept: 2 at a time, with the same random numbers" in caplog.text
    assert _sample(card, torch.nn.Linear(1, 1), portion)[1] == 2
    assert card.tried[3:] == [2]
    assert _sample(_Card(8), torch.nn.Linear(1, 1))[1] is None


def test_one_prompt_that_does_not_fit_names_what_to_change() -> None:
    with pytest.raises(RunError, match=r"one prompt ran out of GPU memory.*num_generations \(now 4\).*\(now 16\)"):
        _sample(_Card(0), torch.nn.Linear(1, 1), 2)
    partitioned = torch.nn.Linear(1, 1)
    partitioned.weight.ds_id = 1  # type: ignore[assignment]
    with pytest.raises(RunError, match="8 prompts at a time ran out"):
        _sample(_Card(4), partitioned)


def test_other_errors_pass() -> None:
    def fail(*args: object, **options: object) -> Any:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        _sample(fail, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
