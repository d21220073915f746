"""The trainer's scores are the log-probabilities of its own sampling, and scoring leaves no trace in the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_vlm.engines.interface import Sampling
from ray_vlm.engines.sampling import sample_groups
from ray_vlm.engines.scoring import adapter_off, build_scorer
from ray_vlm.models.backbone import base_of
from tests.support.rollouts import SEEDS, adapted_model, fresh_model, prompt_builder, prompt_rows
from tests.support.tiny_families import write_tiny

SAMPLING = Sampling(1, 8)


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl", "llama4"])
def folder(request: Any, tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny base; the last has a processor of its own."""
    if request.param in tiny_models:
        return tiny_models[request.param]
    return str(write_tiny(tmp_path_factory.mktemp("tiny") / request.param, request.param))


def test_scores_are_those_of_sampling_with_and_without_the_adapter(folder: str) -> None:
    builder = prompt_builder(folder)
    rows, score = prompt_rows(builder), build_scorer(builder, "fp32", "cpu")
    for model, on in ((adapted_model(folder), True), (fresh_model(folder).eval(), False)):
        groups = sample_groups(model, rows, builder, SAMPLING, SEEDS, "cpu")
        trained = adapted_model(folder)
        for row, (answer,) in zip(rows, groups, strict=True):
            scores = score(trained, row, answer.ids, on)
            assert scores.dtype == np.float32
            assert scores.shape[0] == len(answer.ids)
            np.testing.assert_allclose(scores[np.arange(len(answer.ids)), answer.ids], answer.logprobs, atol=2e-5)
            other = score(trained, row, answer.ids, not on)
            assert np.abs(other - scores).mean() > 1e-4, "the adapter has an effect"


def test_scoring_leaves_no_trace(tiny_models: dict[str, str]) -> None:
    """Modes, random numbers, `rope_deltas`, weights, what learns, and gradients stay as they are."""
    folder = tiny_models["qwen3_vl"]
    builder, model = prompt_builder(folder), adapted_model(folder)
    row, score = prompt_rows(builder)[0], build_scorer(builder, "fp32", "cpu")
    frozen = [p for name, p in model.named_parameters() if "lora_" in name and "visual" in name]
    for parameter in frozen:  # as the parts of `model.adapter` that are not trained further
        parameter.requires_grad = False
    assert frozen
    next(model.modules()).eval()  # one module whose mode differs from the others'
    inner: Any = base_of(model).model
    inner.rope_deltas = torch.tensor([[5]])

    def state() -> list[Any]:
        return [
            [module.training for module in model.modules()],
            torch.random.get_rng_state().tolist(),
            inner.rope_deltas.tolist(),
            [p.requires_grad for p in model.parameters()],
            [p.grad is None for p in model.parameters()],
            [p.detach().sum().item() for p in model.parameters()],
        ]

    before = state()
    first, plain, second = (score(model, row, [5, 6, 7], on) for on in (True, False, True))
    assert state() == before
    assert np.array_equal(first, second)
    assert not np.array_equal(first, plain)


def test_an_error_within_leaves_the_adapter_on(tiny_models: dict[str, str]) -> None:
    model = adapted_model(tiny_models["qwen3_vl"])
    learns = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), adapter_off(model):
        raise KeyError("within")
    assert model.get_model_status().enabled is True
    assert [p.requires_grad for p in model.parameters()] == learns


def test_features_kept_for_a_step_are_neither_read_nor_written(tiny_models: dict[str, str], tmp_path: Path) -> None:
    """Kept features could hide that the trainer and the engine see different pixels."""
    from dataclasses import replace

    from peft import get_peft_model

    from ray_vlm.config.schema import Lora
    from ray_vlm.models.families import FAMILIES
    from ray_vlm.models.frozen_encoder import StepFeatureCache, cache_features
    from ray_vlm.models.lora import lora_config
    from ray_vlm.models.vision_inputs import use_image_plans

    folder = tiny_models["qwen3_vl"]
    builder, base = prompt_builder(folder), fresh_model(folder)
    config = lora_config(Lora(rank=4, alpha=8, target=["language"]), FAMILIES[base.config.model_type])
    model, recent = get_peft_model(base, config), StepFeatureCache()
    use_image_plans(model)
    cache_features(model, recent, None)
    recent.start(4)
    row = replace(prompt_rows(builder)[0], image_keys=("key",))
    build_scorer(builder, "fp32", "cpu")(model, row, [5, 6], True)
    assert recent.entries == {}
