"""A real vLLM answers as this package's own loop: the same tokens, and log-probabilities that the trainer computes.

In float32, on vLLM's build for CPUs. Engines are started in this process, which takes seconds and not minutes.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
pytest.importorskip("vllm")

from vllm.distributed import cleanup_dist_env_and_memory

from ray_vlm.config.schema import Lora, Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data.collate import collate
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import Sample, SampleSpec
from ray_vlm.engines.interface import Completion, Sampling
from ray_vlm.engines.sampling import sample_groups
from ray_vlm.engines.vllm import EngineLimits, EngineSettings, build_sampler
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.load import load_model
from ray_vlm.models.lora import lora_config
from tests.support.rollouts import PROMPTS, SEEDS, prompt_rows

pytestmark = pytest.mark.slow
GAP = 2e-5  # of a log-probability
ANSWERS = Sampling(num_generations=4, max_new_tokens=24, temperature=0.7)
GREEDY = replace(ANSWERS, num_generations=1, temperature=0.0)
# Limits of the images' areas: those of the base's processor (None), and two that are outside them.
LIMITS: tuple[tuple[int | None, int | None], ...] = ((None, None), (50_000, 65_536), (1_024, 2_048))


def _builder(folder: str, limits: tuple[int | None, int | None]) -> SampleBuilder:
    spec = SampleSpec(Model(name=folder, load_in_4bit=False), ChatTask(), (), *limits, kind="prompt")
    return load_sample_builder(spec)


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def folder(request: Any, tiny_models: dict[str, str]) -> str:
    """The folder of a tiny base."""
    return tiny_models[request.param]


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    """The base with an adapter whose B is not zero, as training has it."""
    from peft import get_peft_model

    base = load_model(Model(name=folder, load_in_4bit=False), precision="fp32")
    torch.manual_seed(0)
    model = get_peft_model(
        base, lora_config(Lora(rank=4, alpha=8, target=["language"]), FAMILIES[base.config.model_type])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def sample(folder: str, model: Any) -> Iterator[Any]:
    """The sampler of a real engine."""
    settings = EngineSettings(Model(name=folder, load_in_4bit=False), "fp32", 0)
    args = SimpleNamespace(vllm_gpu_memory_utilization=0.05)
    yield build_sampler(settings, EngineLimits(1024, 2), model, args)
    gc.collect()
    cleanup_dist_env_and_memory()


def _score(model: Any, row: Sample, answer: Completion, builder: SampleBuilder, temperature: float) -> torch.Tensor:
    """Return the log-probabilities of an answer's tokens as the trainer computes them."""
    import numpy as np

    ids = np.concatenate([row.input_ids, answer.ids])
    batch = collate([Sample(ids, ids, row.images)], builder)
    batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[0, len(row.input_ids) - 1 : -1] / temperature
    return logits.log_softmax(dim=-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]


def _gap(
    model: Any, rows: Sequence[Sample], groups: list[list[Completion]], builder: SampleBuilder, heat: float
) -> float:
    gaps = [
        (_score(model, row, answer, builder, heat) - torch.tensor(answer.logprobs)).abs().max()
        for row, group in zip(rows, groups, strict=True)
        for answer in group
    ]
    return float(max(gaps))


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_answers_are_those_of_our_loop(limits: Any, folder: str, model: Any, sample: Any) -> None:
    builder = _builder(folder, limits)
    rows = prompt_rows(builder, PROMPTS)
    own = sample_groups(model, rows, builder, GREEDY, SEEDS, "cpu")
    other = sample(model, rows, builder, GREEDY, SEEDS, "cpu")
    assert [[answer.ids for answer in group] for group in other] == [[answer.ids for answer in group] for group in own]
    assert _gap(model, rows, other, builder, 1.0) < GAP
    sampled = sample(model, rows, builder, ANSWERS, SEEDS, "cpu")
    assert len({tuple(answer.ids) for group in sampled for answer in group}) > len(rows), "answers of a group differ"
    assert _gap(model, rows, sampled, builder, 0.7) < GAP


def test_each_push_is_the_adapter_as_it_is(folder: str, model: Any, sample: Any) -> None:
    builder = _builder(folder, (None, None))
    rows = prompt_rows(builder, PROMPTS)
    before = sample(model, rows, builder, GREEDY, SEEDS, "cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1.5)
    after = sample(model, rows, builder, GREEDY, SEEDS, "cpu")
    assert _gap(model, rows, after, builder, 1.0) < GAP
    assert _gap(model, rows, before, builder, 1.0) > 100 * GAP, "a stale adapter would show"
