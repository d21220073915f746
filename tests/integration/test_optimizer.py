"""A run with an 8-bit optimizer and selective checkpointing: states, comparison with the plain path, resume."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from ray_vlm.cli import main
from ray_vlm.config.load import load_job
from ray_vlm.config.schema import JobConfig
from ray_vlm.train.build import optimizer_name


@pytest.mark.parametrize(
    ("train", "cluster", "name"),
    [
        ({}, {}, "adamw_torch"),
        ({}, {"gpus_per_worker": 1}, "adamw_torch_fused"),
        ({"precision": "fp16"}, {"gpus_per_worker": 1}, "adamw_torch"),
        ({}, {"gpus_per_worker": 1, "deepspeed": "zero2"}, "adamw_torch"),
        ({"optimizer": "paged_adamw_8bit"}, {"gpus_per_worker": 1}, "paged_adamw_8bit"),
    ],
)
def test_names_in_transformers(train: dict, cluster: dict, name: str) -> None:
    job = JobConfig.model_validate(
        {"model": {"name": "x"}, "data": {"train": {"path": "a"}}, "train": train, "cluster": cluster}
    )
    assert optimizer_name(job.train, job.cluster) == name


def test_a_run_with_moments_in_8_bit_goes_on(
    job_file: Callable, lines: list[str], capsys: pytest.CaptureFixture
) -> None:
    options = {"max_steps": 2, "optimizer": "adamw_8bit", "probe": True, "gradient_checkpointing": "selective"}
    path = job_file(train=options, lora={"rank": 64}, checkpoint={"every_steps": 1}, run={"name": "run"})
    assert main(["train", str(path)]) == 0
    switches = "attention over packed rows, selective checkpointing"
    assert any(f"compared with the plain path on one batch: {switches}" in line for line in lines)
    run = Path(load_job(path).run.output_dir) / "run"
    state = torch.load(next(run.glob("checkpoint-*/optimizer.pt")), weights_only=False)["state"]
    dtypes = {leaf.dtype for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)}
    assert torch.uint8 in dtypes
    assert main(["train", str(path), "--resume", "train.max_steps=3", "train.optimizer=adamw"]) != 0
    assert "`train.optimizer` was 'adamw_8bit' and is now 'adamw'" in capsys.readouterr().err
    assert main(["train", str(path), "--resume", "train.max_steps=3"]) == 0
    assert json.loads((run / "run.json").read_text())["result"]["steps"] == 3
