"""What each family's forward leaves out or computes once, and that it changes neither log-probabilities nor gradients.

In float64, where another order of summation is about 1e-14 and a fault is not hidden in it.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ray_vlm.config.method import DpoMethod
from ray_vlm.config.schema import Lora, Model
from ray_vlm.data.collate import add_pixels as with_pixels
from ray_vlm.data.collate import host_batch, upload
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import IGNORED, Sample
from ray_vlm.models.backbone import base_of
from ray_vlm.models.frozen_encoder import StepFeatureCache, why_not_cached
from ray_vlm.models.layouts import PackedLayout
from ray_vlm.models.load import load_model
from ray_vlm.models.lora import lora_config
from ray_vlm.models.operations import OperationCounter
from ray_vlm.models.prefix_sharing import build_planner, plan_packing
from ray_vlm.models.surgery import ForwardOptions, change_forward, prepare_forward
from tests.support.family_matrix import FAST, read_results, write_result
from tests.support.precision import arithmetic
from tests.support.rollouts import prompt_builder, prompt_rows
from tests.support.stock import gradients_apart
from tests.support.tiny_families import ALL, REFUSED
from tests.support.twins import slow_but

EXACT = 1e-8  # relative
PROMPTS = (("<image>What is shown?", ((96, 64),)), ("And <image> or <image>?", ((64, 150), (70, 64))))
ANSWERS = ([300, 301, 305, 20], [300, 302])
TRAINED = [family for family in ALL if family not in REFUSED]
QUICK = ["qwen3_vl_moe", "qwen3_5"]


def _adapted(folder: str, builder: SampleBuilder, target: list[str], head: bool) -> Any:
    from peft import get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    model = load_model(Model(name=folder, load_in_4bit=False), precision="fp32")
    if any("experts" in name for name, _ in model.named_parameters()):
        model.set_experts_implementation("eager")  # torch's grouped products have no float64
    if head:
        add_fused_lm_head(model)
    torch.manual_seed(0)
    adapted = get_peft_model(model, lora_config(Lora(rank=4, target=target), builder.family))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return adapted.to(torch.float64).train()


def _pairs(builder: SampleBuilder) -> list[Sample]:
    """Each prompt with the first answer, then each with the other, as DPO has them."""
    rows = []
    for answer in ANSWERS:
        for prompt in prompt_rows(builder, PROMPTS):
            ids = np.concatenate([prompt.input_ids, np.array(answer)])
            labels = np.concatenate([np.full_like(prompt.input_ids, IGNORED), np.array(answer)])
            rows.append(Sample(ids, labels, prompt.images))
    return rows


def _gradients(model: Any, log_probs: torch.Tensor) -> dict[str, torch.Tensor]:
    (log_probs * torch.linspace(0.5, 1.5, log_probs.numel(), dtype=log_probs.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _plain(folder: str, builder: SampleBuilder, target: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The log-probabilities of the answers' tokens by transformers' own forward, and gradients."""
    model = _adapted(folder, builder, target, head=False)
    batch = with_pixels(host_batch(_pairs(builder), builder), builder)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1].log_softmax(-1)
    chosen = logits.gather(2, labels.clamp(min=0)[..., None])[..., 0][labels != IGNORED]
    return chosen.detach(), _gradients(model, chosen)


def _fast(
    folder: str, builder: SampleBuilder, target: list[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, bool]]:
    """The same by the forward that training has, and what of it is on."""
    model = _adapted(folder, builder, target, head=True)
    config = base_of(model).config
    packing = plan_packing(DpoMethod(), Lora(target=target), True, builder.family, config)
    options = ForwardOptions(recompute=False, packing=packing, own_processor=builder.stock is not None)
    prepare_forward(model, options)
    encoder = base_of(model).get_encoder(modality="image")
    change_forward(model, options, StepFeatureCache(), OperationCounter())
    planner = None
    if builder.stock is None:
        planner = build_planner(model, packing, builder.image_token_id, "cpu", "fp32")
    rows = _pairs(builder)
    prompts = [int((row.labels == IGNORED).sum()) for row in rows]
    batch = upload(host_batch(rows, builder, copies=2, planner=planner, prompts=prompts), "cpu")
    batch = with_pixels(batch, builder)
    scored: list[int] = []
    tracked: list[bool] = []
    encoder.register_forward_hook(lambda module, args, out: tracked.append(out[0].requires_grad))
    watched = base_of(model).base_model.forward

    def watch(*args: Any, **inputs: Any) -> Any:
        output = watched(*args, **inputs)
        scored.append(output.last_hidden_state.shape[1])
        return output

    base_of(model).base_model.forward = watch
    output = model(**batch, fused_lm_head=True)
    chosen = output.log_probs[batch["labels"][:, 1:] != IGNORED]
    on = {
        "prefixes": packing.share and isinstance(batch["layout"], PackedLayout),
        "packing": packing.pack,
        "encoder without autograd": "vision" not in target and not tracked[0],
        "cached features": why_not_cached(model) is None,
        "labelled head": scored == [sum(map(len, ANSWERS)) * len(PROMPTS)],
    }
    return chosen.detach(), _gradients(model, chosen), on


@pytest.mark.parametrize("family", slow_but(QUICK, TRAINED))
def test_what_is_left_out_changes_nothing(family: str, family_folder: Callable[[str], str]) -> None:
    folder = family_folder(family)
    builder = prompt_builder(folder)
    for target in (["language"], ["language", "connector", "vision"]):
        target = [part for part in target if part in builder.family.linear]
        with arithmetic(torch.float64):
            expected, expected_gradients = _plain(folder, builder, target)
            actual, actual_gradients, on = _fast(folder, builder, target)
        assert float((actual - expected).abs().max()) < EXACT
        assert gradients_apart(actual_gradients, expected_gradients, least=1e-2) < EXACT
        if target == ["language"]:
            if os.environ.get("WRITE_FAMILIES"):
                write_result(family, FAST, on)
            assert on == read_results()[family][FAST]
