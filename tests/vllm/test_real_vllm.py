"""A real vLLM answers as this package's own loop: the same tokens, and log-probabilities that the trainer computes.

In float32, on vLLM's build for CPUs. Engines are started in this process, which takes seconds and not minutes.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
pytest.importorskip("vllm")

from vllm.distributed import cleanup_dist_env_and_memory

from ray_vlm.config.schema import Lora, Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import Sample, SampleSpec
from ray_vlm.engines.interface import Completion, Sampling
from ray_vlm.engines.sampling import sample_groups
from ray_vlm.engines.vllm import VllmEngine, build_answering_engine, build_training_engine
from ray_vlm.engines.vllm_start import EngineLimits, EngineSettings
from ray_vlm.errors import RunError
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.load import load_model
from ray_vlm.models.lora import lora_config
from tests.support.rollouts import PROMPTS, SEEDS, prompt_rows
from tests.support.scoring import score_answer

pytestmark = pytest.mark.slow
GAP = 2e-5  # of a log-probability
ANSWERS = Sampling(num_generations=4, max_new_tokens=12, temperature=0.7)
GREEDY = replace(ANSWERS, num_generations=1, temperature=0.0)
# Limits of the images' areas: those of the base's processor (None), and two that are outside them.
LIMITS: tuple[tuple[int | None, int | None], ...] = ((None, None), (50_000, 65_536), (1_024, 2_048))
CASES = [
    (family, parts)
    for family in ("qwen3_vl", "qwen2_5_vl")
    for parts in (("language",), ("language", "connector", "vision"))
]
ARGS: Any = SimpleNamespace(vllm_gpu_memory_utilization=0.1)


def make_builder(folder: str, limits: tuple[int | None, int | None] = (None, None)) -> SampleBuilder:
    spec = SampleSpec(Model(name=folder, load_in_4bit=False), ChatTask(), (), *limits, kind="prompt")
    return load_sample_builder(spec)


def make_model(folder: str, parts: Sequence[str], rank: int = 4) -> Any:
    """Return the base with an adapter whose B is not zero, as training has it."""
    from peft import get_peft_model

    base = load_model(Model(name=folder, load_in_4bit=False), precision="fp32")
    torch.manual_seed(0)
    lora = Lora(rank=rank, alpha=2 * rank, target=list(parts))
    model = get_peft_model(base, lora_config(lora, FAMILIES[base.config.model_type]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def start(folder: str, model: Any) -> VllmEngine:
    settings = EngineSettings(Model(name=folder, load_in_4bit=False), "fp32", 0)
    return build_training_engine(settings, EngineLimits(1024, 2, 16), model, make_builder(folder), ARGS)


def end(engine: VllmEngine) -> None:
    engine.close()
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'+'.join(case[1])}")
def case(request: Any) -> tuple[str, tuple[str, ...]]:
    """A family, and the parts of it that are adapted."""
    return request.param


@pytest.fixture(scope="module")
def folder(case: Any, tiny_models: dict[str, str]) -> str:
    """The folder of a tiny base."""
    return tiny_models[case[0]]


@pytest.fixture(scope="module")
def model(case: Any, folder: str) -> Any:
    """The model that trains."""
    return make_model(folder, case[1])


@pytest.fixture(scope="module")
def engine(folder: str, model: Any) -> Iterator[VllmEngine]:
    """A real engine with that model's adapter."""
    engine = start(folder, model)
    yield engine
    end(engine)


def gap(
    model: Any,
    rows: Sequence[Sample],
    groups: list[list[Completion]],
    builder: SampleBuilder,
    heats: float | tuple[float, ...],
) -> float:
    """Return the largest difference between log-probabilities of the engine and the trainer. `heats`: the temperature
    of all completions, or of each of a group."""
    gaps = [
        (score_answer(model, row, answer, builder, heat or 1.0) - torch.tensor(answer.logprobs)).abs().max()
        for row, group in zip(rows, groups, strict=True)
        for answer, heat in zip(group, np.resize(heats, len(group)).tolist(), strict=True)
    ]
    return float(max(gaps))


def tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[answer.ids for answer in group] for group in groups]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_answers_are_those_of_our_loop(limits: Any, folder: str, model: Any, engine: VllmEngine) -> None:
    builder = make_builder(folder, limits)
    engine._builder = builder
    rows = prompt_rows(builder, PROMPTS)
    assert len({image.shape for row in rows for image in row.images}) > 1, "images of several sizes"
    assert max(len(row.images) for row in rows) == 2
    engine.update(model)
    own = sample_groups(model, rows, builder, GREEDY, SEEDS, "cpu")
    other = engine.sample(rows, GREEDY, SEEDS)
    assert tokens(other) == tokens(own)
    assert engine.answer(rows, GREEDY.max_new_tokens) == [group[0].ids for group in own]
    assert gap(model, rows, other, builder, 1.0) < GAP
    sampled = engine.sample(rows, ANSWERS, SEEDS)
    assert len({tuple(answer.ids) for group in sampled for answer in group}) > len(rows), "answers of a group differ"
    assert gap(model, rows, sampled, builder, 0.7) < GAP
    assert tokens(engine.sample(rows[2:3], ANSWERS, SEEDS[2:3])) == tokens(sampled[2:3]), "alone as in a batch"


def test_a_temperature_for_each_completion(folder: str, model: Any, engine: VllmEngine) -> None:
    builder, heats = make_builder(folder), (0.0, 0.7, 0.7, 1.8)
    rows = prompt_rows(builder, PROMPTS)
    engine._builder = builder
    engine.update(model)
    groups = engine.sample(rows, replace(ANSWERS, temperature=heats), SEEDS)
    assert [group[0].ids for group in groups] == engine.answer(rows, ANSWERS.max_new_tokens)
    assert any(group[1].ids != group[2].ids for group in groups), "completions have seeds of their own"
    assert gap(model, rows, groups, builder, heats) < GAP
    cut = engine.sample(rows, replace(ANSWERS, temperature=heats, top_p=0.9, top_k=20), SEEDS)
    assert [group[0].ids for group in cut] == [group[0].ids for group in groups]
    assert not any(answer.logprobs for group in cut for answer in group)


def test_each_push_is_the_adapter_as_it_is(folder: str, model: Any, engine: VllmEngine) -> None:
    builder = make_builder(folder)
    rows = prompt_rows(builder, PROMPTS)
    engine._builder = builder
    engine.update(model)
    before = engine.sample(rows, GREEDY, SEEDS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1.5)
    engine.update(model)
    after = engine.sample(rows, GREEDY, SEEDS)
    assert gap(model, rows, after, builder, 1.0) < GAP
    assert gap(model, rows, before, builder, 1.0) > 100 * GAP, "a stale adapter would show"
    with model.disable_adapter():
        assert gap(model, rows, engine.sample_base(rows, GREEDY, SEEDS), builder, 1.0) < GAP
        assert gap(model, rows, after, builder, 1.0) > 100 * GAP, "a missing adapter would show"


def test_each_part_of_the_adapter_reaches_the_engine(case: Any, folder: str, model: Any, engine: VllmEngine) -> None:
    """Each part alone changes what the engine computes: a part that vLLM drops would not."""
    from ray_vlm.models.families import part_of

    builder = make_builder(folder)
    rows = [row for row in prompt_rows(builder, PROMPTS) if row.images]
    engine._builder = builder
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    try:
        for part in case[1]:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in kept:
                        parameter.copy_(kept[name] if part_of(builder.family, name) == part else 0.0)
            engine.update(model)
            groups = engine.sample(rows, GREEDY, SEEDS[: len(rows)])
            assert gap(model, rows, groups, builder, 1.0) < GAP, part
            with model.disable_adapter():
                assert gap(model, rows, groups, builder, 1.0) > 10 * GAP, part
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])


def test_pushes_leave_nothing_behind(folder: str, model: Any, engine: VllmEngine) -> None:
    """The memory of this process, which holds the engine, is flat, and one folder is kept."""
    builder = make_builder(folder)
    rows = prompt_rows(builder, PROMPTS)
    engine._builder = builder
    before, used = engine.pushes, []
    for _ in range(30):
        engine.update(model)
        engine.sample(rows, replace(ANSWERS, max_new_tokens=4), SEEDS)
        used.append(psutil.Process().memory_info().rss)
    assert engine.pushes == before + 30
    assert max(used[5:]) < 1.05 * used[5]
    assert engine._files._parent is not None
    assert len(list(engine._files._parent.iterdir())) == 1


def test_a_prompt_longer_than_the_context_is_refused_and_the_engine_goes_on(folder: str, engine: VllmEngine) -> None:
    builder = make_builder(folder)
    engine._builder = builder
    rows = prompt_rows(builder, [("yes " * 1100, ())])
    with pytest.raises(RunError, match="vllm was started for 1024 tokens"):
        engine.answer(rows, 8)
    assert engine.answer(prompt_rows(builder, PROMPTS[1:2]), 8)


def test_an_adapter_in_a_folder_answers_as_the_model_that_has_it(tiny_models: Any, tmp_path: Path) -> None:
    base = tiny_models["qwen3_vl"]
    model, builder = make_model(base, ["language", "connector", "vision"]), make_builder(base)
    model.save_pretrained(str(tmp_path / "adapter"))
    settings = EngineSettings(Model(name=base, load_in_4bit=False), "fp32", 0)
    engine = build_answering_engine(settings, str(tmp_path / "adapter"), builder, EngineLimits(1024, 2, 16))
    try:
        rows = prompt_rows(builder, PROMPTS)
        own = sample_groups(model, rows, builder, GREEDY, SEEDS, "cpu")
        assert engine.answer(rows, GREEDY.max_new_tokens) == [group[0].ids for group in own]
        assert gap(model, rows, engine.sample(rows, GREEDY, SEEDS), builder, 1.0) < GAP
    finally:
        end(engine)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file(), "the user's own folder stays"


def test_a_refused_adapter_ends_the_engine(tiny_models: Any) -> None:
    """vLLM would turn for ever on the requests of the failed call, or has ended."""
    base = tiny_models["qwen3_vl"]
    engine, builder = start(base, make_model(base, ["language"], rank=4)), make_builder(base)
    try:
        engine.update(make_model(base, ["language"], rank=16))
        rows = prompt_rows(builder, PROMPTS[:2])
        with pytest.raises(RunError, match=r"LoRA rank 16 is greater than max_lora_rank 8"):
            engine.answer(rows, 8)
        with pytest.raises(RunError, match="the vllm engine has ended"):
            engine.answer(rows, 8)
    finally:
        end(engine)


def test_the_calls_of_sleep_are_those_of_vllm() -> None:
    """They are not run here, as vLLM's CPU build does not sleep."""
    import inspect

    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu_worker import Worker

    assert "level" in inspect.signature(LLM.sleep).parameters
    assert "tags" in inspect.signature(LLM.wake_up).parameters
    assert "method" in inspect.signature(LLM.collective_rpc).parameters
    assert callable(Worker.reload_weights)
    assert callable(LLMEngine.add_lora)
    assert "enable_sleep_mode" in inspect.signature(EngineArgs).parameters
    assert "enable_tower_connector_lora" in inspect.signature(EngineArgs).parameters
    assert {"weights", "kv_cache"} == set(__import__("vllm.v1.executor.abstract", fromlist=["x"]).SLEEP_TAGS)
