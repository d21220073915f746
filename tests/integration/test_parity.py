"""On the same rows our losses and LoRA gradients are stock TRL's, both tiny architectures: exactly in float64, and in
float32 as near as rounding lets them be."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_vlm.config.schema import JobConfig
from tests.conftest import FAMILIES
from tests.support import stock
from tests.support.parity import BARS, compare_with_stock, make_method_job

CASES = [*product(FAMILIES, [("sft", 0.0), ("dpo", 0.5), ("grpo", 0.04)]), (FAMILIES[0], ("grpo", 0.0))]


@pytest.mark.parametrize(("family", "method", "beta"), [(family, *method) for family, method in CASES])
def test_equals_stock_trl_in_float64(
    family: str, method: str, beta: float, tmp_path: Path, tiny_models: dict[str, str]
) -> None:
    job, answers = make_method_job(tmp_path, tiny_models[family], method, beta)
    loss, gradients = compare_with_stock(job, 2 if answers else 3, answers)
    assert loss <= BARS[torch.float64]
    assert gradients <= BARS[torch.float64]


def test_equals_stock_trl_in_float32(tmp_path: Path, tiny_models: dict[str, str]) -> None:
    job, _ = make_method_job(tmp_path, tiny_models["qwen3_vl"], "dpo", 0.5)
    loss, gradients = compare_with_stock(job, 6, dtype=torch.float32)
    assert loss <= BARS[torch.float32]
    assert gradients <= BARS[torch.float32]


def test_float64_sees_a_fault_that_float32_does_not(
    tmp_path: Path, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One matrix of our model is off by 1e-7 of itself."""
    build = stock.our_trainer

    def faulty(job: JobConfig, batches: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> tuple[Any, list]:
        trainer, made = build(job, batches, answers)
        with torch.no_grad():
            trainer.model.get_decoder().layers[0].mlp.down_proj.base_layer.weight.mul_(1 + 1e-7)
        return trainer, made

    monkeypatch.setattr(stock, "our_trainer", faulty)
    job, _ = make_method_job(tmp_path, tiny_models["qwen3_vl"], "sft", 0.0)
    wide, narrow = (max(compare_with_stock(job, 2, dtype=dtype)) for dtype in (torch.float64, torch.float32))
    assert wide > 3 * BARS[torch.float64]
    assert narrow <= BARS[torch.float32] / 10
