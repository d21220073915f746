"""On the same rows our SFT loss and LoRA gradients are stock TRL's; float32, both tiny architectures."""

from pathlib import Path

import pytest

from benchmarks.parity import compare_with_stock, make_job
from tests.conftest import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_equals_stock_trl(family: str, tmp_path: Path, tiny_models: dict[str, str]) -> None:
    loss, gradients = compare_with_stock(make_job(tmp_path, tiny_models[family], steps=1))
    assert loss <= 1e-5
    assert gradients <= 1e-5
