"""Cached features are those of the encoder; nothing stale is read, and no damaged file ends a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_vlm.config.load import load_job
from ray_vlm.config.schema import Lora, Model
from ray_vlm.data.spec import hash_images
from ray_vlm.errors import ModelError
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.frozen_encoder import (
    DiskFeatureCache,
    StepFeatureCache,
    cache_features,
    fingerprint,
    run_without_autograd,
)
from ray_vlm.models.load import load_model
from ray_vlm.models.lora import lora_config
from ray_vlm.models.vision_inputs import ImagePlan, encoder_shape, plan_images, register_plan
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.train.driver import train
from tests.conftest import QWEN

GRIDS = [(1, 4, 6), (1, 2, 2), (1, 4, 6)]
KEYS = ("a", "b", "a")  # of images that the tests show, the third of which is the first one
_GIB = 2**30


def _model(folder: str, cache: Path | None = None, limit: float = _GIB) -> tuple[Any, list[int]]:
    """Return the base, and a list of the patches of each run of its encoder's blocks."""
    base = load_model(Model(name=folder, load_in_4bit=False), precision="fp32")
    base.requires_grad_(False)
    run_without_autograd(base)
    encoded: list[int] = []
    tower = base.get_encoder(modality="image")
    tower.patch_embed.register_forward_hook(lambda module, args, out: encoded.append(len(args[0])))
    if cache is not None:
        cache_features(base, StepFeatureCache(), DiskFeatureCache(cache, limit, base))
    return base, encoded


def _plan(base: Any, keys: Sequence[str] = KEYS) -> ImagePlan:
    shape = encoder_shape(base.config)
    assert shape is not None
    return plan_images(shape, GRIDS, keys)


def _pixels(base: Any, seed: int = 0) -> torch.Tensor:
    values = base.get_encoder(modality="image").patch_embed.proj.weight[0].numel()
    pixels = torch.randn(52, values, generator=torch.Generator().manual_seed(seed))
    pixels[28:] = pixels[:24]
    return pixels


def _features(base: Any, pixels: torch.Tensor, plan: ImagePlan | None = None) -> list[torch.Tensor]:
    grids = torch.tensor(GRIDS)
    register_plan(grids, plan or _plan(base))
    output = base.get_image_features(pixels, grids)
    layers = getattr(output, "deepstack_features", None) or []
    return [torch.cat(list(part)) for part in (output.pooler_output, *layers)]


@pytest.mark.parametrize("family", QWEN)
def test_features_are_the_encoders(family: str, tiny_models: dict[str, str], tmp_path: Path) -> None:
    plain, _ = _model(tiny_models[family])
    pixels = _pixels(plain)
    expected = _features(plain, pixels)
    base, encoded = _model(tiny_models[family], tmp_path)
    for again in range(2):
        for cached, computed in zip(_features(base, pixels), expected, strict=True):
            assert torch.allclose(cached, computed, atol=1e-6), again
    assert encoded == [52], "nothing in the second call"
    _features(base, pixels, _plan(base, ()))
    assert encoded == [52, 52], "without keys, as of a caller of another kind"
    assert len(list(tmp_path.glob("*/*"))) == 2
    other, encoded = _model(tiny_models[family], tmp_path)
    _features(other, pixels)
    assert encoded == [], "another run reads them"


def test_another_image_or_encoder_is_another_file(tiny_models: dict[str, str], tmp_path: Path) -> None:
    base, encoded = _model(tiny_models["qwen3_vl"], tmp_path)
    pixels = _pixels(base)
    _features(base, pixels)
    _features(base, pixels, _plan(base, ("a", "c", "a")))
    assert encoded == [52, 4]
    with torch.no_grad():
        base.get_encoder(modality="image").merger.linear_fc1.weight[0, 0] += 1e-6
    DiskFeatureCache(tmp_path, _GIB, base)
    assert len(list(tmp_path.iterdir())) == 2, "a folder for each encoder"


@pytest.mark.parametrize("broken", [b"", b"not a tensor", None])
def test_a_damaged_file_is_written_again(broken: bytes | None, tiny_models: dict[str, str], tmp_path: Path) -> None:
    base, encoded = _model(tiny_models["qwen3_vl"], tmp_path)
    pixels = _pixels(base)
    expected = _features(base, pixels)
    for path in tmp_path.glob("*/*"):
        path.write_bytes(path.read_bytes()[:-5] if broken is None else broken)
    features = _features(base, pixels)
    assert all(torch.equal(part, expected_part) for part, expected_part in zip(features, expected, strict=True))
    _features(base, pixels)
    assert encoded == [52, 52]


def test_a_full_folder_ends_the_writing(
    tiny_models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y.features").write_bytes(b"12345")
    base, encoded = _model(tiny_models["qwen3_vl"], tmp_path, 5)
    pixels = _pixels(base)
    _features(base, pixels)
    _features(base, pixels)
    assert encoded == [52, 52]
    assert len(list(tmp_path.glob("*/*"))) == 1
    assert capsys.readouterr().out.count("no more is written") == 1


def test_a_disk_that_refuses_ends_the_writing(
    tiny_models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base, encoded = _model(tiny_models["qwen3_vl"], tmp_path)
    next(tmp_path.iterdir()).rmdir()  # writing then fails, as on a full disk
    pixels = _pixels(base)
    _features(base, pixels)
    _features(base, pixels)
    assert encoded == [52, 52]
    assert capsys.readouterr().out.count("no more is written") == 1


def test_an_encoder_that_changes_is_refused(tiny_models: dict[str, str], tmp_path: Path) -> None:
    from peft import get_peft_model

    base = load_model(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), precision="fp32")
    with pytest.raises(ModelError, match="adapter's or learns"):
        cache_features(base, StepFeatureCache(), None)
    model = get_peft_model(base, lora_config(Lora(rank=2, target=["vision"]), FAMILIES["qwen3_vl"]))
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="lora_A"):
        cache_features(model, StepFeatureCache(), None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be used as a folder"):
        _model(tiny_models["qwen3_vl"], tmp_path / "file")


def test_features_that_were_read_ahead_are_read_once(
    tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, encoded = _model(tiny_models["qwen3_vl"])
    cache = DiskFeatureCache(tmp_path, _GIB, base)
    cache_features(base, StepFeatureCache(), cache)
    pixels, first = _pixels(base), _plan(base)
    cache.read_ahead(first)
    assert not first.features, "before the first forward it is not known how the encoder sees pixels"
    expected = _features(base, pixels, first)
    plan = _plan(base, ("a", "other", "a"))
    cache.read_ahead(plan)
    assert len(plan.features) == 1, "the first image, which is shown twice"
    assert plan.to("meta", non_blocking=True).features is plan.features, "on the host until the encoder runs"
    monkeypatch.setattr(cache, "read", lambda image, device="cpu": None)  # not in the forward
    for part, other in zip(_features(base, pixels, plan), expected, strict=True):
        assert torch.allclose(part, other, atol=1e-6)
    assert encoded == [52, 4]
    with torch.autocast("cpu", torch.bfloat16):  # a forward of another kind than the last one, as after a validation
        _features(base, pixels, plan)
    assert encoded == [52, 4, 52]


def test_keys_of_images() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    other = image.copy()
    other[3, 5, 2] ^= 1
    variants = [image, other, image.reshape(6, 4, 3), image[:2], image.transpose(1, 0, 2)]
    keys = hash_images(variants, "mean")
    assert len({*keys, *hash_images([image], "another mean")}) == len(variants) + 1
    assert hash_images([image[:, ::-1][:, ::-1]], "mean") == keys[:1]


def test_fingerprints() -> None:
    words = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    swapped = words.clone()
    swapped[0, :2] = words[0, [1, 0]]
    variants = [words, words[:, :-1], swapped, words.bfloat16(), -words, words * 2, torch.zeros(3), torch.zeros(4)]
    assert len({fingerprint(values) for values in variants}) == len(variants)
    assert fingerprint(words) == fingerprint(words.clone().t().contiguous().t())


def test_training_learns_the_same(
    job_file: Any, unplanned: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = job_file(lora={"target": ["language"]}, train={"max_steps": 4})
    cache = f"train.vision_cache={tmp_path / 'features'}"
    losses, written, write = [], list[str](), DiskFeatureCache.write
    monkeypatch.setattr(
        DiskFeatureCache, "write", lambda self, image, parts: written.append(image) or write(self, image, parts)
    )  # type: ignore[func-returns-value]
    for name, *more in (("plain",), ("first", cache), ("second", cache)):
        result = train(load_job(path, [f"run.name={name}", *more]), "")
        losses.append([line["loss"] for line in read_metrics(result.metrics) if line["kind"] == "train"])
    assert len(losses[0]) >= 4
    assert not unplanned
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)
    # Each image is encoded once in all epochs and runs.
    assert len(list((tmp_path / "features").glob("*/*"))) == len(set(written)) == len(written) > 0
