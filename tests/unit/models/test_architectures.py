"""Presets: every configuration builds, and has as many weights as its publisher states."""

import pytest

from ray_vlm.errors import ModelError
from ray_vlm.models.architectures import build_empty, family_of, load_preset, read_presets


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
