"""Faults between a real vLLM and the trainer, planted one at a time: each ends the run and is named.

One engine, in this process, on vLLM's build for CPUs. Each test wraps it anew.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
pytest.importorskip("vllm")

from ray_vlm.config.method import GrpoMethod
from ray_vlm.config.schema import Lora, Model
from ray_vlm.data.spec import Sample
from ray_vlm.engines.adapter_check import CheckedEngine
from ray_vlm.engines.interface import Sampling
from ray_vlm.engines.vllm import VllmEngine, build_training_engine
from ray_vlm.engines.vllm_start import EngineLimits, EngineSettings
from ray_vlm.errors import RunError
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.load import load_model
from ray_vlm.models.lora import lora_config
from ray_vlm.train.build import check_engine
from tests.support.rollouts import SEEDS, prompt_builder, prompt_rows

pytestmark = pytest.mark.slow
SAMPLING = Sampling(2, 8)
BASE, STALE = "answers with the base alone", "with the adapter of an earlier push"
APART = r"log-probabilities of the engine and of the trainer are .* apart .* other pixels, another chat template"


@pytest.fixture(scope="module")
def folder(tiny_models: dict[str, str]) -> str:
    """The folder of a tiny base."""
    return tiny_models["qwen3_vl"]


@pytest.fixture(scope="module")
def builder(folder: str) -> Any:
    """What makes its prompts."""
    return prompt_builder(folder)


@pytest.fixture(scope="module")
def trained(folder: str) -> Any:
    """The base with an adapter, in training mode."""
    from peft import get_peft_model

    base = load_model(Model(name=folder, load_in_4bit=False), precision="fp32")
    torch.manual_seed(0)
    config = lora_config(Lora(rank=4, alpha=8, target=["language"]), FAMILIES[base.config.model_type])
    return get_peft_model(base, config).train()


@pytest.fixture(scope="module")
def started(folder: str, trained: Any, builder: Any) -> Iterator[VllmEngine]:
    """A real engine."""
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = EngineSettings(Model(name=folder, load_in_4bit=False), "fp32", 0)
    args: Any = SimpleNamespace(vllm_gpu_memory_utilization=0.1)
    engine = build_training_engine(settings, EngineLimits(1024, 2), trained, builder, args)
    yield engine
    engine.close()
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture
def model(trained: Any) -> Any:
    """The model with an adapter that has learned something."""
    _learn(trained, seed=1)
    return trained


def _learn(model: Any, seed: int, step: float = 0.05) -> None:
    """Set B of every layer, as steps with this seed would have done; `step` 0: as before the first one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(step * torch.randn(parameter.shape, generator=generator))


def _move(model: Any, share: float) -> None:
    """Change B by a share of itself, as a small step does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1 + share)


def _checked(engine: VllmEngine, builder: Any, every: int = 3) -> CheckedEngine:
    method = GrpoMethod(name="grpo", rollouts="vllm", check_sampler_every=every)
    return check_engine(engine, method, "fp32", builder, "cpu")


def _steps(checked: CheckedEngine, model: Any, rows: Sequence[Sample], steps: int = 4, share: float = 0.05) -> None:
    """Push, sample and learn as training does."""
    for _ in range(steps):
        checked.update(model)
        checked.sample(rows, SAMPLING, SEEDS[: len(rows)])
        _move(model, share)


def test_a_healthy_engine_is_proved_once_and_serves(
    started: VllmEngine, model: Any, builder: Any, lines: list[str]
) -> None:
    _steps(_checked(started, builder), model, prompt_rows(builder)[:2], steps=5)
    (line,) = [line for line in lines if "method.rollouts=vllm" in line]
    assert "push 1 of the adapter is proved to be in use: gap" in line
    assert float(line.partition("gap ")[2].split()[0]) < 2e-5


@pytest.mark.parametrize("share", [0.0, 1e-3, -2.0])
def test_small_and_large_steps_and_none_are_no_fault(
    share: float, started: VllmEngine, model: Any, builder: Any
) -> None:
    _steps(_checked(started, builder, every=1), model, prompt_rows(builder)[:1], share=share)


def test_a_fresh_adapter_is_proved_when_it_has_an_effect(
    started: VllmEngine, model: Any, builder: Any, lines: list[str]
) -> None:
    checked, rows = _checked(started, builder), prompt_rows(builder)[:1]
    _learn(model, seed=1, step=0.0)
    _steps(checked, model, rows, steps=1)
    assert "changes too little to prove" in lines[-1]
    _learn(model, seed=1)
    _steps(checked, model, rows, steps=1)
    assert "push 2 of the adapter is proved to be in use" in lines[-1]


def test_a_dropped_adapter_is_named(
    started: VllmEngine, model: Any, builder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(started, "_push", lambda: None)
    with pytest.raises(RunError, match=f"after push 1 .* {BASE}"):
        _steps(_checked(started, builder), model, prompt_rows(builder)[:1])


def test_an_adapter_that_is_dropped_from_its_first_effect_on_is_named(
    started: VllmEngine, model: Any, builder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(started, "_push", lambda: None)
    checked, rows = _checked(started, builder), prompt_rows(builder)[:1]
    _learn(model, seed=1, step=0.0)
    _steps(checked, model, rows, steps=1)
    _learn(model, seed=1, step=1e-3)  # far below what would show in `rollout_gap`
    with pytest.raises(RunError, match=f"after push 2 .* {BASE}"):
        _steps(checked, model, rows, steps=1)


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_a_push_that_is_lost_is_named(
    share: float, started: VllmEngine, model: Any, builder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushes = []
    update = started.update

    def skip_second(model: Any) -> None:
        pushes.append(model)
        if len(pushes) != 2:
            update(model)

    monkeypatch.setattr(started, "update", skip_second)
    with pytest.raises(RunError, match=f"after push 2 .* {STALE}"):
        _steps(_checked(started, builder), model, prompt_rows(builder)[:1], share=share)


def test_an_adapter_that_the_engine_keeps_by_its_number_is_named(
    started: VllmEngine, model: Any, builder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM keeps an adapter of a number that it knows, whatever lies in its folder."""
    from vllm.lora.request import LoRARequest

    def push_by_one_number() -> LoRARequest:
        return LoRARequest("adapter", 10_000, str(started._folder))

    monkeypatch.setattr(started, "_push", push_by_one_number)
    with pytest.raises(RunError, match=f"after push 2 .* {STALE}"):
        _steps(_checked(started, builder), model, prompt_rows(builder)[:1])


@pytest.mark.parametrize("change", ["flipped", "black", "other_size"])
def test_other_pixels_are_named(
    change: str, started: VllmEngine, model: Any, builder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same number of tokens, so that no count shows it."""
    changes = {
        "flipped": lambda image: image[:, ::-1].copy(),
        "black": np.zeros_like,
        "other_size": lambda image: np.ascontiguousarray(image.transpose(1, 0, 2)),  # as many patches, another grid
    }
    _sees(started, monkeypatch, lambda row: replace(row, images=tuple(map(changes[change], row.images))))
    with pytest.raises(RunError, match=APART):
        _steps(_checked(started, builder), model, prompt_rows(builder)[:1])


def test_another_template_of_the_same_length_is_named(
    started: VllmEngine, model: Any, builder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turned(row: Sample) -> Sample:
        ids = row.input_ids.copy()
        ids[-3:] = ids[-3:][::-1]  # what opens the answer, in another order
        return replace(row, input_ids=ids)

    _sees(started, monkeypatch, turned)
    # `check_prompt` compares the tokens that vLLM reports; a template in a server is seen by the numbers alone.
    monkeypatch.setattr("ray_vlm.engines.vllm.check_prompt", lambda *_: None)
    with pytest.raises(RunError, match=APART):
        _steps(_checked(started, builder), model, prompt_rows(builder)[1:2])


def test_another_prompt_is_refused_by_its_tokens(
    started: VllmEngine, model: Any, builder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is without the check of numbers; this closes the engine, so it is the last test of the module."""
    _sees(started, monkeypatch, lambda row: replace(row, input_ids=row.input_ids[::-1].copy()))
    with pytest.raises(RunError, match="other tokens of the prompt of row"):
        _steps(_checked(started, builder), model, prompt_rows(builder)[1:2])


def _sees(started: VllmEngine, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let vLLM see another row than the trainer."""
    from ray_vlm.engines.vllm_requests import prompt_of

    monkeypatch.setattr("ray_vlm.engines.vllm.prompt_of", lambda row, builder: prompt_of(change(row), builder))
