"""A model's forwards are changed where the options ask for it, and nowhere else."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from ray_vlm.config.schema import Lora, Model
from ray_vlm.errors import ModelError
from ray_vlm.models import shared_attention
from ray_vlm.models.backbone import base_of, language_layers, recompute
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.frozen_encoder import DiskFeatureCache, StepFeatureCache
from ray_vlm.models.layouts import PackedGroup, PackedRow, PackingOptions
from ray_vlm.models.load import load_model
from ray_vlm.models.lora import lora_config
from ray_vlm.models.operations import OperationCounter
from ray_vlm.models.self_check import compare_paths
from ray_vlm.models.surgery import ForwardOptions, change_forward, list_switches, prepare_forward
from ray_vlm.models.vision_inputs import encoder_shape, plan_images, register_plan

GRID = torch.tensor([[1, 4, 6]])


def _model(folder: str, *parts: Any) -> Any:
    base = load_model(Model(name=folder, load_in_4bit=False), precision="fp32")
    lora = Lora(rank=4, target=list(parts) or ["language"])
    return get_peft_model(base, lora_config(lora, FAMILIES[base.config.model_type]))


def _encoder(model: Any) -> Any:
    return base_of(model).get_encoder(modality="image")


@pytest.mark.parametrize("count", [True, 1, False])
def test_the_first_layers_recompute(count: bool | int, tiny_models: dict[str, str]) -> None:
    model = _model(tiny_models["qwen3_vl"])
    prepare_forward(model, ForwardOptions(count, PackingOptions()))
    if count:
        recompute(model, {"use_reentrant": False})
    layers = language_layers(base_of(model))
    expected = len(layers) if count is True else int(count)
    assert [layer.gradient_checkpointing for layer in layers] == [i < expected for i in range(len(layers))]


@pytest.mark.parametrize(
    ("packing", "own_processor", "expected"),
    [
        (PackingOptions(share=True), False, {"backbone", "head", "encoder"}),
        (PackingOptions(pack=True), False, {"backbone", "head", "encoder"}),
        (PackingOptions(), False, {"backbone", "head", "encoder"}),  # images that rows share, in `image_spans`
        (PackingOptions(), True, {"backbone", "head", "encoder"}),
    ],
)
def test_forwards_are_changed_as_rows_are_laid_out(
    packing: PackingOptions, own_processor: bool, expected: set[str], tiny_models: dict[str, str]
) -> None:
    model = _model(tiny_models["qwen3_vl"])
    counter = OperationCounter()
    change_forward(model, ForwardOptions(True, packing, own_processor), StepFeatureCache(), counter)
    base = base_of(model)
    modules = {"backbone": base.base_model, "head": base, "encoder": _encoder(model)}
    assert {name for name, module in modules.items() if "forward" in module.__dict__} == expected
    with torch.no_grad():
        model(input_ids=torch.full((2, 8), 30), use_cache=False)
    assert counter.take()[0].tokens == 16


def test_what_is_fused_can_be_switched_off_for_a_comparison(tiny_models: dict[str, str]) -> None:
    model = _model(tiny_models["qwen3_vl"])
    options = ForwardOptions("selective", PackingOptions(), kernels=True, fused_adapters=True)
    prepare_forward(model, options)
    change_forward(model, options, StepFeatureCache(), OperationCounter())
    recompute(model, {"use_reentrant": False})
    layer = language_layers(base_of(model))[0]
    parts = (layer.input_layernorm, layer.mlp.up_proj)
    changed = [type(part) for part in parts], layer._gradient_checkpointing_func.keywords.keys()
    assert changed[1] == {"use_reentrant", "context_fn"}
    switches = list_switches(model, options)
    assert [switch.off for switch in switches] == ["model.kernels=none"] * 2 + ["train.gradient_checkpointing=true"]
    with ExitStack() as plain:
        for switch in switches:
            plain.enter_context(switch.plain())
        assert not {type(part) for part in parts} & {*changed[0]}
        assert layer._gradient_checkpointing_func.keywords.keys() == {"use_reentrant"}
    assert ([type(part) for part in parts], layer._gradient_checkpointing_func.keywords.keys()) == changed
    assert list_switches(model, ForwardOptions(True, PackingOptions())) == []


@pytest.mark.parametrize(
    ("packing", "off"),
    [
        (PackingOptions(pack=True), "train.packing=false"),
        (PackingOptions(share=True, pack=True), "train.packing=false and method.share_prefixes=false"),
    ],
)
def test_wrong_attention_over_packed_rows_is_refused(
    packing: PackingOptions, off: str, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(tiny_models["qwen2_5_vl"])
    options = ForwardOptions(False, packing)
    change_forward(model, options, StepFeatureCache(), OperationCounter())
    row = PackedRow((PackedGroup(0, 9, (5, 4)), PackedGroup(18, 6)))
    ids = torch.arange(20, 44)[None]
    inputs = {"input_ids": ids, "position_ids": torch.arange(24).expand(3, 1, 24), "use_cache": False}

    def run(look: Any) -> None:
        model.zero_grad()
        loss = base_of(model).base_model(**inputs, packed_row=row).last_hidden_state[..., :9].square().mean()
        loss.backward()
        look(loss)

    switches = list_switches(model, options)
    assert "attention over packed rows; loss" in compare_paths(model, switches, run, "fp32")
    exact = shared_attention.attend_in_parts
    monkeypatch.setattr(shared_attention, "attend_in_parts", lambda *given: exact(*given[:-1], 1.1 * given[-1]))
    with pytest.raises(ModelError, match=rf"attention over packed rows: on one batch the loss .* Set {off}, and"):
        compare_paths(model, switches, run, "fp32")


@pytest.mark.parametrize("parts", [["language"], ["language", "vision"]])
@pytest.mark.parametrize("wanted", [True, False])
def test_features_of_a_step_are_kept_of_a_frozen_encoder(
    wanted: bool, parts: list[str], tiny_models: dict[str, str]
) -> None:
    model, recent = _model(tiny_models["qwen3_vl"], *parts), StepFeatureCache()
    change_forward(
        model, ForwardOptions(True, PackingOptions(), cache_step_features=wanted), recent, OperationCounter()
    )
    recent.start(1)
    encoder = _encoder(model)
    pixels = torch.zeros(int(GRID.prod()), encoder.patch_embed.proj.weight[0].numel())
    shape = encoder_shape(base_of(model).config)
    assert shape is not None
    register_plan(GRID, plan_images(shape, [(1, 4, 6)], ["image"]))
    first, second = (encoder(pixels, grid_thw=GRID).pooler_output for _ in range(2))
    assert torch.equal(first, second)
    assert first.requires_grad == ("vision" in parts)
    assert len(recent.entries) == int(wanted and "vision" not in parts)


def test_a_folder_for_features_must_be_usable(tiny_models: dict[str, str], tmp_path: Path) -> None:
    model = _model(tiny_models["qwen3_vl"], "language", "vision")
    options = ForwardOptions(True, PackingOptions(), vision_cache=DiskFeatureCache(tmp_path, 2**20, model))
    with pytest.raises(ModelError, match=r"train\.vision_cache: .* in the image encoder is an adapter's or learns"):
        change_forward(model, options, StepFeatureCache(), OperationCounter())
