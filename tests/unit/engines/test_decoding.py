"""The loop answers for every known family, in one arithmetic, and in the portions that a trainer asks for."""

import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_vlm.config.method import GrpoMethod
from ray_vlm.config.schema import Model
from ray_vlm.engines import decoding, own
from ray_vlm.engines.decoding import decode_greedy
from ray_vlm.engines.interface import Sampling
from ray_vlm.engines.own import OwnEngine, generate_greedy, needs_generate
from ray_vlm.engines.sampling import sample_groups
from ray_vlm.models.load import load_model
from ray_vlm.models.precision import autocast
from tests.support.rollouts import SEEDS, adapted_model, fresh_model, prompt_builder, prompt_rows
from tests.support.tiny_families import write_tiny


def test_llama_4_is_answered_by_the_loop_beyond_a_chunk_of_its_attention(tmp_path: Path) -> None:
    folder = str(write_tiny(tmp_path / "llama4", "llama4"))
    builder, model = prompt_builder(folder), fresh_model(folder).eval()
    assert not needs_generate(builder)
    rows, length = prompt_rows(builder), 80
    with torch.no_grad():
        tokens, expected = (f(model, rows, builder, length, "cpu") for f in (decode_greedy, generate_greedy))
    assert tokens == expected
    assert max(map(len, tokens)) == length > model.config.text_config.attention_chunk_size


def test_an_unknown_family_keeps_generate(tmp_path: Path) -> None:
    assert needs_generate(prompt_builder(str(write_tiny(tmp_path / "internvl", "internvl"))))


def test_answers_are_the_same_with_and_without_accelerate_s_wrapper(tiny_models: dict[str, str]) -> None:
    from peft import LoraConfig, get_peft_model

    base = load_model(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), precision="bf16")
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "up_proj", "qkv"], init_lora_weights=False))
    builder = prompt_builder(tiny_models["qwen3_vl"])
    rows, sampling = prompt_rows(builder), Sampling(2, 12, temperature=0.7)
    plain = sample_groups(model, rows, builder, sampling, SEEDS, "cpu")
    inner = model.forward

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with autocast("bf16", "cpu"):
            return inner(*args, **kwargs)

    model.forward = wrapped
    assert sample_groups(model, rows, builder, sampling, SEEDS, "cpu") == plain


@pytest.mark.parametrize("group_batch", [None, 1])
def test_grpo_samples_in_portions_of_group_batch(
    group_batch: int | None, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_vlm.methods.grpo import PlannedGRPOTrainer

    builder, model = prompt_builder(tiny_models["qwen2_5_vl"]), adapted_model(tiny_models["qwen2_5_vl"])
    rows = [replace(row, number=number) for number, row in enumerate(prompt_rows(builder))]
    portions = []

    def sample(*args: Any) -> Any:
        portions.append(args[6])
        return sample_groups(*args)

    monkeypatch.setattr(own, "sample_groups", sample)

    def answers(group_batch: int | None) -> list[list[int]]:
        method = GrpoMethod(num_generations=2, max_completion_tokens=8)
        trainer = SimpleNamespace(
            method=method,
            rows=[row for row in rows for _ in range(2)],
            inputs=SimpleNamespace(seed=3),
            engine=OwnEngine(model, builder, "cpu", group_batch),
            state=SimpleNamespace(global_step=5),
            accelerator=SimpleNamespace(unwrap_model=lambda model: model),
            model=model,
            prompt_pixels=None,
            ahead=None,
        )
        return [answer.ids for answer in PlannedGRPOTrainer._sample_answers(trainer)]  # type: ignore[arg-type]

    assert answers(group_batch) == answers(3)
    assert portions == [group_batch, 3]


@pytest.mark.parametrize(("device", "stock"), [("cpu", None), ("cuda:0", object())])
def test_plain_steps_where_a_graph_does_not_serve(device: str, stock: Any, tiny_models: dict[str, str]) -> None:
    builder: Any = SimpleNamespace(stock=stock)
    assert decoding.build_static_steps(fresh_model(tiny_models["qwen3_vl"]), builder, device, 100) is None
