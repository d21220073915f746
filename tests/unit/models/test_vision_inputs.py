"""Encoders take what the host worked out from the grids: the same features, and nothing is read where they run."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ray_vlm.config.schema import Model
from ray_vlm.models import attention
from ray_vlm.models.attention import attend_at_once
from ray_vlm.models.load import load_model
from ray_vlm.models.vision_inputs import (
    _plans,
    add_scattered,
    encoder_shape,
    plan_images,
    plan_of,
    register_plan,
    select_plan,
    use_image_plans,
)
from tests.conftest import QWEN
from tests.support.precision import arithmetic

GRIDS = [(1, 20, 22), (2, 4, 6), (1, 8, 8), (1, 2, 2)]


def _model(folder: str) -> Any:
    return load_model(Model(name=folder, load_in_4bit=False), precision="fp32").requires_grad_(False)


def _pixels(base: Any) -> Tensor:
    values = base.get_encoder(modality="image").patch_embed.proj.weight[0].numel()
    shape = sum(t * h * w for t, h, w in GRIDS), values
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _features(base: Any, pixels: Tensor, grids: Tensor) -> list[Tensor]:
    output = base.get_image_features(pixels, grids)
    return [
        part for parts in (output.pooler_output, *(getattr(output, "deepstack_features", None) or [])) for part in parts
    ]


@pytest.mark.parametrize("family", QWEN)
def test_a_planned_encoder_reads_no_grid(
    family: str, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _model(tiny_models[family])
    attend_at_once(base)
    pixels, grids = _pixels(base), torch.tensor(GRIDS)
    expected = _features(base, pixels, grids)
    assert use_image_plans(base)
    shape = encoder_shape(base.config)
    assert shape is not None
    # Values of a tensor on this device cannot be read.
    elsewhere, plan = grids.to("meta"), plan_images(shape, GRIDS).to("cpu", non_blocking=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        _features(base, pixels, elsewhere)
    register_plan(elsewhere, plan)
    monkeypatch.setattr(attention, "Segments", None)  # lengths are known, and none is read
    features = _features(base, pixels, elsewhere)
    assert len(features) == len(expected) >= len(GRIDS)
    assert all(torch.equal(part, other) for part, other in zip(features, expected, strict=True))
    ids, embedded = torch.zeros(1, 8, dtype=torch.long, device="meta"), torch.zeros(1, 8, 4, device="meta")
    assert base.base_model.get_placeholder_mask(ids, embedded, embedded[0, :3])[0].shape == (1, 8, 1)


def test_features_of_earlier_layers_are_added_without_a_read(tiny_models: dict[str, str]) -> None:
    base = _model(tiny_models["qwen3_vl"])
    use_image_plans(base)
    add = base.get_decoder()._deepstack_process
    hidden, features, mask = torch.randn(2, 6, 8), torch.randn(6, 8), torch.rand(2, 6).argsort().ge(3)
    mask[1, :1] = False
    features = features[: int(mask.sum())]
    expected = add(hidden, mask, features)
    assert torch.equal(add_scattered(hidden, mask, features), expected)
    assert not torch.equal(expected, hidden)
    assert add(hidden.to("meta"), mask.to("meta"), features.to("meta")).shape == hidden.shape


@pytest.mark.parametrize("family", QWEN)
def test_a_plan_is_uploaded_without_a_read(family: str, tiny_models: dict[str, str]) -> None:
    shape = encoder_shape(_model(tiny_models[family]).config)
    assert shape is not None
    plan = plan_images(shape, GRIDS).to("meta", non_blocking=True)
    tensors = [value for value in plan.inputs.values() if isinstance(value, Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    ends = plan.inputs["cu_seqlens"]
    assert isinstance(ends, Tensor)
    assert attention.segments_of(ends).lengths == [440, 24, 24, 64, 4]


def test_a_plan_has_the_default_dtype_also_where_another_was_kept(tiny_models: dict[str, str]) -> None:
    shape = encoder_shape(_model(tiny_models["qwen3_vl"]).config)
    assert shape is not None
    kept = plan_images(shape, GRIDS).inputs["interp_weights"]
    with arithmetic(torch.float64):
        wide = plan_images(shape, GRIDS).inputs["interp_weights"]
    assert isinstance(kept, Tensor)
    assert isinstance(wide, Tensor)
    assert (kept.dtype, wide.dtype) == (torch.float32, torch.float64)


def test_some_images_have_their_part_of_a_plan(tiny_models: dict[str, str]) -> None:
    shape = encoder_shape(_model(tiny_models["qwen2_5_vl"]).config)
    assert shape is not None
    grids, selected, other = torch.tensor(GRIDS), torch.tensor([GRIDS[3], GRIDS[0]]), torch.tensor(GRIDS)
    plan = plan_images(shape, GRIDS, ["a", "b", "c", "d"])
    plan.features["d"] = {"pooled": torch.ones(1, 8)}
    register_plan(grids, plan)
    select_plan(grids, [3, 0], selected)
    part = plan_of(selected)
    assert part is not None
    assert (part.grids, part.keys, list(part.features)) == ((GRIDS[3], GRIDS[0]), ("d", "a"), ["d"])
    assert part.inputs["max_seqlen"] == 440
    assert (part.patches, part.tokens) == ([4, 440], [1, 110])
    select_plan(other, [0], torch.tensor([GRIDS[0]]))
    assert plan_of(other) is None, "an equal tensor, but not this one"
    number = len(_plans())
    del grids, selected, part
    assert len(_plans()) == number - 2, "nothing is kept after the batch"


def test_other_encoders_are_not_planned(tiny_models: dict[str, str]) -> None:
    class Other:
        model_type = "llama4"

    assert encoder_shape(Other()) is None  # type: ignore[arg-type]
