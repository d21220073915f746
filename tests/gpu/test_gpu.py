"""On one NVIDIA card: a step of real size against the planner. Without a card: that the benchmark's jobs run at all."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import build_job, compare, measure, write_random, write_rows
from ray_vlm.demo.tiny import build_config, build_processor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
def test_a_step_of_real_size_takes_what_was_planned() -> None:
    found = {figure["name"]: figure for figure in measure(quick=True)}
    assert all(figure["ok"] for figure in found.values())
    assert any("planned against measured" in name for name in found)


@pytest.mark.parametrize(
    "method", ["grpo", pytest.param("sft", marks=pytest.mark.slow), pytest.param("dpo", marks=pytest.mark.slow)]
)
def test_the_jobs_of_the_benchmark_run_without_a_card(method: str, tmp_path: Path) -> None:
    """Tiny shapes in place of the presets', in float32."""
    config = build_config(build_processor("qwen3_vl").tokenizer, "qwen3_vl")
    write_rows(tmp_path / "rows", 128, 6)
    model = write_random(config, tmp_path / "model", "cpu")
    found = compare(build_job(tmp_path, model, method, gpu=False), "tiny", gpu=False)
    told = {figure["name"]: figure["value"] for figure in found}
    assert told["tiny: step"] > 0
    assert (told["tiny: rollout"] > 0.01) == (method == "grpo")
