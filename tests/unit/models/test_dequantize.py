"""Layers with weights that are dequantised once return the same numbers as 4-bit layers, and are restored."""

from typing import get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ray_vlm.config.schema import Model
from ray_vlm.config.train import Precision
from ray_vlm.models import dequantize
from ray_vlm.models.dequantize import dequantised
from ray_vlm.models.load import load_model
from tests.conftest import FAMILIES


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("family", FAMILIES)
def test_same_to_the_bit(family: str, precision: Precision, tiny_models: dict[str, str]) -> None:
    base = load_model(Model(name=tiny_models[family], load_in_4bit=True), precision=precision)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    ids = torch.randint(5, 300, (3, 17), generator=torch.Generator().manual_seed(0))
    model.eval()
    calls = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(dequantize._is_quantised(m)))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with dequantised(model):
            inside = model(input_ids=ids).logits
            changed = [m for m in model.modules() if "forward" in m.__dict__ and dequantize._is_quantised(m)]
        after = model(input_ids=ids).logits
    hook.remove()
    assert len(changed) == sum(calls) // 3 > 0
    assert torch.equal(before, inside)
    assert torch.equal(before, after)
    assert not any("forward" in m.__dict__ and dequantize._is_quantised(m) for m in model.modules())


def test_a_large_model_stays_in_4_bit(tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(Model(name=tiny_models["qwen3_vl"], load_in_4bit=True), precision="fp32")
    monkeypatch.setattr(dequantize, "MOST_BYTES", 1000)
    with dequantised(model):
        assert not any("forward" in m.__dict__ for m in model.modules() if dequantize._is_quantised(m))


@pytest.mark.parametrize(
    ("free_gib", "sequences", "expected"), [(40.0, 64, True), (25.0, 64, False), (40.0, 4, False), (None, 1, False)]
)
def test_a_copy_must_fit_beside_the_answers(free_gib: float | None, sequences: int, expected: bool) -> None:
    free = None if free_gib is None else free_gib * 2**30
    assert dequantize.should_dequantise(14 * 2**30, free, sequences, needed_bytes=12 * 2**30) is expected


def test_gradients_afterwards_are_those_of_4_bit(tiny_models: dict[str, str]) -> None:
    base = load_model(Model(name=tiny_models["qwen3_vl"], load_in_4bit=True), precision="fp32")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids).logits.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    with torch.no_grad(), dequantised(model):
        model(input_ids=ids)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
