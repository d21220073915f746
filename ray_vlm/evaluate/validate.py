"""Validation inside training: the loss on held-out rows, and the task's metrics by generating, over all ranks."""

import time
from collections.abc import Sequence
from typing import Any

from ray_vlm.config.schema import Evaluate
from ray_vlm.data.collate import collate
from ray_vlm.data.records import SftRecord
from ray_vlm.data.rows import Preparer
from ray_vlm.evaluate.metrics import measure
from ray_vlm.evaluate.predict import generate_answers
from ray_vlm.evaluate.prediction import Prediction, build_predictions


def validate(
    model: Any,
    records: Sequence[SftRecord],
    preparer: Preparer,
    options: Evaluate,
    device: str,
    world_size: int,
    generate: bool,
) -> dict[str, float]:
    """Metrics of this rank's `records` joined with those of the other ranks; every rank gets the same numbers."""
    import torch

    started = time.monotonic()
    was_training = model.training
    model.eval()
    total, tokens = _loss(model, records, preparer, options.batch_size, device)
    sums = torch.tensor([total, tokens], dtype=torch.float64, device=device)
    predictions: list[Prediction] = []
    if generate:
        answers = generate_answers(model, records, preparer, options.batch_size, options.max_new_tokens, device)
        predictions = build_predictions(records, answers, preparer)
    if world_size > 1:
        torch.distributed.all_reduce(sums)
        predictions = _gather(predictions, world_size)
    model.train(was_training)
    metrics = {"loss": float(sums[0] / sums[1].clamp(min=1))}
    if generate:
        metrics |= measure(preparer.spec.task.name, predictions)["overall"]
    return metrics | {"validation_s": time.monotonic() - started}


def _loss(model: Any, records: Sequence[SftRecord], preparer: Preparer, batch_size: int, device: str) -> tuple:
    """Sum of the trained tokens' negative log-likelihoods, and their number."""
    import torch

    total, tokens = 0.0, 0
    for start in range(0, len(records), batch_size):
        rows = [preparer.train_row(record) for record in records[start : start + batch_size]]
        batch = collate(rows, preparer, device)
        batch.pop("loss_weights", None)  # held-out rows count alike
        with torch.no_grad():
            out = model(**batch, fused_lm_head=True)
        total -= float(out.log_probs.sum())
        tokens += int(out.label_mask.sum())
    return total, tokens


def _gather(mine: list[Prediction], world_size: int) -> list[Prediction]:
    import torch

    everyone: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everyone, mine)
    return sorted((p for part in everyone for p in part), key=lambda p: p.row)
