"""Mixtures of experts in 4 bit train by each method, and their adapters are evaluated and merged."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_vlm.cli import main
from ray_vlm.config.load import load_job
from ray_vlm.demo.shapes import DOMAINS
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.train.driver import train
from tests.support.parity import write_pairs
from tests.support.tiny_families import write_tiny

pytestmark = pytest.mark.slow

CASES = [("sft", "qwen3_vl_moe"), ("dpo", "qwen3_vl_moe"), ("grpo", "qwen3_vl_moe"), ("sft", "llama4")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("mixtures")
    return {family: str(write_tiny(root / family, family)) for family in ("qwen3_vl_moe", "llama4")}


@pytest.mark.parametrize(("method", "family"), CASES)
def test_each_method_trains_experts_in_4bit(
    method: str, family: str, folders: dict[str, str], job_file: Any, scenes: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"model": {"name": folders[family], "load_in_4bit": True}, "method": {"name": method}}
    sections["task"] = {"name": "detection", "labels": list(DOMAINS["studio"].classes)}
    sections["lora"] = {"rank": 4, "alpha": 8, "target": ["language", "experts"]}
    sections["data"] = {"test": {"path": str(scenes / "test.json"), "max_rows": 3}}
    sections["train"] = {"gradient_checkpointing": "selective" if method == "sft" else True}
    sections["evaluate"] = {"max_new_tokens": 8, "batch_size": 2}
    asked = job_file(**sections | {"method": "sft"}).rename(tmp_path / "asked.yaml")
    path = job_file(**sections)
    if method == "dpo":
        pairs = write_pairs(tmp_path, folders[family])
        path = job_file(**sections | {"data": {"train": {"path": str(pairs), "format": "preference"}}})
    if method == "grpo":
        sections["method"] |= {"num_generations": 4, "max_completion_tokens": 8}
        sections["method"] |= {"rewards": {"tests.integration.test_alignment:even_tokens": 1.0}}
        path = job_file(**sections)
    paths = train(load_job(path, ["train.max_steps=2"]), path.read_text())
    lines = [line for line in read_metrics(paths.metrics) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    if method == "grpo":  # sampled with a cache, scored without one
        assert all(line["rollout_gap"] < 1e-5 for line in lines)
    assert main(["evaluate", str(asked), "--adapter", str(paths.final)]) == 0
    if method == "sft":
        assert main(["export", str(paths.root), "--merged", "--weights", "final"]) == 0


_LOAD = """
import gc, json, sys, threading, time
from ray_vlm.config.schema import Model
from ray_vlm.models.load import load_model

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:")) * 1024

load_model(Model(name=sys.argv[1]), "bf16")  # imports
gc.collect()
before, seen, done = resident(), [0], threading.Event()
watch = threading.Thread(target=lambda: [seen.append(resident()) for _ in iter(lambda: done.wait(0.01), True)])
watch.start()
model = load_model(Model(name=sys.argv[2]), "bf16")
done.set()
watch.join()
print(json.dumps({"peak": max(seen) - before}))
"""


def test_the_host_never_holds_the_base_in_16_bit(folders: dict[str, str], tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "larger", "qwen3_vl_moe", larger=True)
    sizes = [file.stat().st_size for file in base.glob("*.safetensors")]
    assert len(sizes) > 4
    words = [sys.executable, "-c", _LOAD, folders["qwen3_vl_moe"], str(base)]
    ran = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    peak = json.loads(ran.stdout.splitlines()[-1])["peak"]
    assert 0.25 * sum(sizes) < peak < 0.5 * sum(sizes) + max(sizes)
