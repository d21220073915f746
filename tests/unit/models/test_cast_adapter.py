"""An adapter that is cast once gives PEFT's numbers under autocast, and its float32 weights are not touched."""

from typing import Any

import pytest
import torch

from ray_vlm.config.schema import Lora, Model
from ray_vlm.models.cast_adapter import adapter_cast_once
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.fused_adapter import fuse_adapters
from ray_vlm.models.load import load_model
from ray_vlm.models.lora import lora_config
from ray_vlm.models.precision import autocast
from tests.unit.models.test_selective import Operations

IDS = torch.arange(20, 50).reshape(2, 15)


def _adapted(folder: str, load_in_4bit: bool, alpha: float) -> Any:
    from peft import get_peft_model

    base = load_model(Model(name=folder, load_in_4bit=load_in_4bit), precision="bf16")
    torch.manual_seed(0)
    model = get_peft_model(base, lora_config(Lora(rank=4, alpha=alpha), FAMILIES[base.config.model_type]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) / 10
    return model.eval()


def _changed(model: Any) -> int:
    return sum("forward" in m.__dict__ and hasattr(m, "lora_A") for m in model.modules())


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("alpha", [8, 6])  # the second is no power of two times the rank
def test_same_as_peft_under_autocast(load_in_4bit: bool, alpha: float, tiny_models: dict[str, str]) -> None:
    model = _adapted(tiny_models["qwen3_vl"], load_in_4bit, alpha)
    weights = {
        name: (p, p._version, p.data_ptr(), p.clone()) for name, p in model.named_parameters() if "lora_" in name
    }
    with torch.no_grad(), autocast("bf16", "cpu"):
        expected = model(input_ids=IDS).logits
        with adapter_cast_once(model):
            assert _changed(model) == len(weights) // 2
            assert torch.equal(model(input_ids=IDS).logits, expected)
        assert _changed(model) == 0
        assert torch.equal(model(input_ids=IDS).logits, expected)
    for name, p in model.named_parameters():
        if name in weights:
            before, version, address, values = weights[name]
            assert p is before
            assert (p._version, p.data_ptr(), p.dtype) == (version, address, torch.float32)
            assert torch.equal(p, values)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_fused_layers_are_cast_once_too(load_in_4bit: bool, tiny_models: dict[str, str]) -> None:
    """Those of training on GPUs. Under autocast alone B, which they transpose, is cast in every forward."""
    model = _adapted(tiny_models["qwen3_vl"], load_in_4bit, 6)
    layers = fuse_adapters(model)
    with torch.no_grad(), autocast("bf16", "cpu"):
        expected = model(input_ids=IDS).logits
        with adapter_cast_once(model), Operations() as operations:
            assert _changed(model) == layers
            assert torch.equal(model(input_ids=IDS).logits, expected)
        assert operations.counts["aten::addmm"] >= layers
        assert _changed(model) == 0
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_other_layers_stay_as_they_are(tiny_models: dict[str, str]) -> None:
    from peft import LoraConfig, get_peft_model

    base = load_model(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), precision="bf16")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], use_dora=True))
    with adapter_cast_once(model):
        assert _changed(model) == 0
    plain = _adapted(tiny_models["qwen3_vl"], False, 8)
    with plain.disable_adapter(), adapter_cast_once(plain):
        assert _changed(plain) == 0
    single = load_model(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), precision="fp32")
    with adapter_cast_once(get_peft_model(single, LoraConfig(target_modules=["q_proj"]))):
        assert _changed(single) == 0
