"""On the same rows our losses and LoRA gradients are stock TRL's; float32, both tiny architectures."""

from pathlib import Path

import pytest

from benchmarks.parity import compare_with_stock, make_alignment_job, make_job
from tests.conftest import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_equals_stock_trl(family: str, tmp_path: Path, tiny_models: dict[str, str]) -> None:
    loss, gradients = compare_with_stock(make_job(tmp_path, tiny_models[family], steps=1))
    assert loss <= 1e-5
    assert gradients <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "beta"), [("dpo", 0.1), ("grpo", 0.0), ("grpo", 0.04)])
def test_dpo_and_grpo_equal_stock_trl(
    family: str, method: str, beta: float, tmp_path: Path, tiny_models: dict[str, str]
) -> None:
    job, answers = make_alignment_job(tmp_path, tiny_models[family], method, beta)
    loss, gradients = compare_with_stock(job, 2 if answers else 6, answers)
    assert loss <= 1e-5
    assert gradients <= 1e-5
