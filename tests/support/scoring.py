"""The log-probabilities of sampled answers as the trainer computes them, and how far an engine's are from them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ray_vlm.data.collate import collate
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.engines.interface import Completion


def score_answer(
    model: Any, row: Sample, answer: Completion, builder: SampleBuilder, temperature: float
) -> torch.Tensor:
    """Return the log-probabilities of an answer's tokens, `[tokens]`, by a forward over the whole sequence."""
    ids = np.concatenate([row.input_ids, answer.ids])
    batch = collate([Sample(ids, ids, row.images)], builder)
    batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[0, len(row.input_ids) - 1 : -1] / temperature
    return logits.log_softmax(dim=-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]


def largest_gap(
    model: Any, rows: Sequence[Sample], groups: list[list[Completion]], builder: SampleBuilder, temperature: float
) -> float:
    """Return the largest difference of a log-probability between an engine's and the trainer's."""
    gaps = [
        (score_answer(model, row, answer, builder, temperature) - torch.tensor(answer.logprobs)).abs().max()
        for row, group in zip(rows, groups, strict=True)
        for answer in group
    ]
    return float(max(gaps))
