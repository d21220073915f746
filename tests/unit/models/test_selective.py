"""Selective checkpointing keeps products: the gradients of other checkpointing, to the bit, from fewer operations."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from ray_vlm.config.schema import Lora, Model
from ray_vlm.models.backbone import base_of, language_layers, recompute
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.load import load_model
from ray_vlm.models.lora import lora_config
from ray_vlm.models.selective import keep_products

IDS = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(0))


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def adapted(folder: str, in_4bit: bool, precision: str = "fp32", **lora: Any) -> Any:
    """Load a tiny model with an adapter that is no longer zero, in training."""
    base = load_model(Model(name=folder, load_in_4bit=in_4bit), precision=precision)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = get_peft_model(base, lora_config(Lora(rank=4, **lora), FAMILIES[base.config.model_type]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.enable_input_require_grads()
    return model.train()


def gradients(model: Any) -> tuple[torch.Tensor, ...]:
    """Return the loss of a batch and all gradients."""
    model.zero_grad()
    loss = model(input_ids=IDS, use_cache=False).logits.float().log_softmax(-1)[..., 7].mean()
    loss.backward()
    return (loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None))


@pytest.mark.parametrize(
    ("family", "in_4bit", "precision"),
    [("qwen3_vl", True, "bf16"), ("qwen2_5_vl", False, "fp32"), ("qwen2_vl", True, "fp32")],
)
def test_gradients_to_the_bit_without_a_third_dequantisation(
    family: str, in_4bit: bool, precision: str, tiny_models: dict[str, str]
) -> None:
    model = adapted(tiny_models[family], in_4bit, precision)
    layers = language_layers(base_of(model))
    outcomes, counts = {}, {}
    for mode in (False, True, "selective"):
        recompute(model, {"use_reentrant": False})
        keep_products(model, mode == "selective")
        for layer in layers:
            layer.gradient_checkpointing = bool(mode)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), Operations() as operations:
            outcomes[mode] = gradients(model)
        counts[mode] = operations.counts
    for mode in (True, "selective"):
        assert all(torch.equal(a, b) for a, b in zip(outcomes[mode], outcomes[False], strict=True))
    linears = 7 * len(layers)
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert [counts[mode][attention] for mode in (False, True, "selective")] == [4, 8, 4]
    if in_4bit:  # the op dequantises in a forward; another one dequantises in a backward
        dequantised = {m: c["bitsandbytes::gemm_4bit"] + c["bitsandbytes::dequantize_4bit"] for m, c in counts.items()}
        assert dequantised == {False: 2 * linears, True: 3 * linears, "selective": 2 * linears}
    assert counts["selective"]["aten::mm"] < counts[True]["aten::mm"]


def test_weights_that_autocast_has_cast_before(tiny_models: dict[str, str]) -> None:
    """Two forwards under one autocast share its casts, so that the second has fewer operations than its repetition."""
    model = adapted(tiny_models["qwen3_vl"], in_4bit=False, precision="bf16")
    recompute(model, {"use_reentrant": False})
    keep_products(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [model(input_ids=ids, use_cache=False).logits.float().mean() for ids in (IDS, IDS.flip(0))]
    sum(losses).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for name, p in model.named_parameters() if ".lora_" in name)
