"""Logits of a merged model are compared in bounded memory, and differences at a row's end are seen."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ray_vlm.evaluate import export
from ray_vlm.models.rehearse import LiveBytes

ROWS, POSITIONS, TOKENS = 3, 512, 8192  # 16 MiB of logits a row in float32
LIMIT = 2**20


class Model:
    """A model whose logits are a number in every place, and another one at the last position."""

    def __init__(self, last: float):
        self.last, self.asked = last, list[int]()

    def get_output_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.empty(TOKENS, 1, device="meta"))

    def __call__(self, input_ids: Tensor, logits_to_keep: int) -> Any:
        self.asked.append(logits_to_keep)
        logits = torch.ones(1, input_ids.shape[1], 1).expand(-1, -1, TOKENS)[:, -logits_to_keep:].clone()
        logits[:, -1] = self.last
        return SimpleNamespace(logits=logits)


def test_logits_are_compared_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_LOGITS_BYTES", LIMIT)
    batches = [{"input_ids": torch.zeros(1, POSITIONS, dtype=torch.long), "labels": None} for _ in range(ROWS)]
    base, merged = Model(1.0), Model(1.5)
    with LiveBytes() as live:
        expected = [export._logits(base, batch) for batch in batches]
        difference = export.compare(expected, (export._logits(merged, batch) for batch in batches))
    assert base.asked == merged.asked == [LIMIT // (4 * TOKENS)] * ROWS
    assert live.peak <= (ROWS + 5) * LIMIT, "the expected rows, one merged one, and the work on it"
    assert (difference["rows"], difference["largest"], difference["scale"]) == (ROWS, 0.5, 1.0)


@pytest.mark.parametrize("place", [0, 40, POSITIONS - 1])
def test_a_number_that_is_none_is_seen_wherever_it_is(place: int) -> None:
    expected = [torch.ones(1, POSITIONS, 4)] * 2
    merged = [part.clone() for part in expected]
    merged[0][0, place, 1] = float("nan")
    assert math.isnan(export.compare(expected, merged)["largest"])
