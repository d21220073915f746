"""Presets: every configuration builds, and has as many weights as its publisher states."""

import pytest
import torch

from ray_vlm.errors import ModelError
from ray_vlm.models.architectures import build_empty, choose_attention, family_of, load_preset, read_presets
from tests.support.tiny_families import BUILDERS

# Of a checkpoint: its weights as published, and those that transformers leaves out. Qwen3.5's next-token head is a
# layer with full attention, a projection of two hidden states to one, five norms of its width and two of a head. Of
# Gemma 4, keys and values of 18 layers (15 sliding, 3 full) that use those of others, with their norms, and 42 scalars.
_LEFT_OUT = {
    "Qwen/Qwen3.5-9B": (
        9_653_104_368,
        4096 * (8192 + 2 * 1024 + 4096) + 3 * 4096 * 12288 + 2 * 4096 * 4096 + 5 * 4096 + 2 * 256,
    ),
    "google/gemma-4-E4B-it": (
        7_996_156_490,
        15 * (2 * 2560 * 512 + 256) + 3 * (2 * 2560 * 1024 + 512) + 42,
    ),
}


@pytest.mark.parametrize("name", list(_LEFT_OUT))
def test_counts_are_the_published_ones_without_what_is_left_out(name: str) -> None:
    published, left_out = _LEFT_OUT[name]
    count = sum(parameter.numel() for parameter in build_empty(load_preset(name)).parameters())
    assert count == published - left_out


def test_an_audio_encoder_attends_without_sdpa() -> None:
    from transformers import AutoModelForImageTextToText

    assert choose_attention(load_preset("Qwen/Qwen3-VL-8B-Instruct")) == "sdpa"
    config = load_preset("google/gemma-4-E4B-it")
    config.text_config.num_hidden_layers, config.text_config.num_kv_shared_layers = 6, 0
    config.text_config.layer_types = config.text_config.layer_types[:6]
    with torch.device("meta"):
        chosen = choose_attention(config)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=chosen)  # type: ignore[arg-type]
    text, vision, audio = model.config.text_config, model.config.vision_config, model.config.audio_config
    assert [part._attn_implementation for part in (model.config, text, vision, audio)] == ["sdpa"] * 3 + ["eager"]


@pytest.mark.parametrize("name", list(read_presets()))
def test_counts_are_those_that_are_published(name: str) -> None:
    config = load_preset(name)
    assert family_of(config).model_type == config.model_type
    published = read_presets()[name]["parameters"]
    count = sum(parameter.numel() for parameter in build_empty(config).parameters())  # shared ones once
    assert count > 1e9
    if published is not None:
        assert abs(count - published) <= 0.005 * published


def test_short_names_and_near_misses() -> None:
    assert load_preset("Qwen3-VL-8B-Instruct").model_type == "qwen3_vl"
    with pytest.raises(ModelError, match=r"no preset\. The nearest: .*Qwen/Qwen3-VL-8B-Instruct"):
        load_preset("Qwen/Qwen3-VL-9B")


def test_a_family_that_is_not_listed_is_described_under_zero3() -> None:
    """Every worker of such a run describes it while transformers is told to partition what it builds."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

    config = BUILDERS["qwen3_vl_moe"]()[1]
    held = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        assert family_of(config).experts == ("mlp.experts.down_proj", "mlp.experts.gate_up_proj")
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()
        del held
