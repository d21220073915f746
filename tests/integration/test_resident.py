"""A base that stays in memory: each run on it is the run that it would have been alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_vlm.config.load import load_job
from ray_vlm.models import load
from ray_vlm.models.load import load_model, load_resident, share_weights
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.train.driver import train
from tests.support.parity import write_pairs


def _curve(path: Path, name: str, *overrides: str) -> list[tuple]:
    job = load_job(path, [f"run.name={name}", *overrides])
    lines = read_metrics(train(job, path.read_text()).metrics)
    keys = ("kind", "step", "loss", "reward", "grad_norm")
    return [tuple(line.get(key) for key in keys) for line in lines if line["kind"] in ("train", "eval")]


@pytest.mark.parametrize(
    ("method", "quantised"),
    [
        ("sft", True),
        pytest.param("sft", False, marks=pytest.mark.slow),
        pytest.param("dpo", True, marks=pytest.mark.slow),
        pytest.param("grpo", True, marks=pytest.mark.slow),
    ],
)
def test_every_run_on_a_kept_base_is_the_run_alone(
    method: str, quantised: bool, job_file: Any, scenes: Path, tmp_path: Path, tiny_models: dict, monkeypatch: Any
) -> None:
    data: dict[str, Any] = {part: {"path": str(scenes / f"{part}.json")} for part in ("train", "eval")}
    if method == "dpo":
        pairs = str(write_pairs(tmp_path, tiny_models["qwen3_vl"]))
        data = {"train": {"path": pairs, "format": "preference"}, "eval": {"ratio": 0.2}}
    method_section: dict[str, Any] = {"name": method}
    if method == "grpo":
        method_section |= {"num_generations": 4, "max_completion_tokens": 8, "beta": 0.04}
        method_section["rewards"] = {"tests.integration.test_alignment:even_tokens": 1.0}
    lora = {"target": ["language", "connector", "vision"]}
    evaluate = {"every_steps": 2, "num_samples": 4, "max_new_tokens": 8}
    path = job_file(method=method_section, data=data, lora=lora, model={"load_in_4bit": quantised}, evaluate=evaluate)
    monkeypatch.setattr(load, "_KEPT", {})
    alone = [_curve(path, "alone_0"), _curve(path, "alone_1", "lora.rank=2", "seed=1")]
    again = [
        _curve(path, "kept_0", "tune.resident=true"),
        _curve(path, "kept_1", "tune.resident=true", "lora.rank=2", "seed=1"),
        _curve(path, "kept_2", "tune.resident=true"),
    ]
    assert len(load._KEPT) == 1
    assert again == [alone[0], alone[1], alone[0]]
    assert alone[0] != alone[1]


def test_a_tree_of_its_own_around_the_same_tensors(job_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_job(job_file(model={"load_in_4bit": True})).model
    monkeypatch.setattr(load, "_KEPT", {})
    one, two = load_resident(spec, "fp32"), load_resident(spec, "fp32")
    assert one is not two
    pairs = list(zip(one.named_parameters(), two.named_parameters(), strict=True))
    assert all(a is b for (_, a), (_, b) in pairs)
    one.forward = None
    assert two.forward is not None
    modules = [m for m in one.modules() if type(m).__name__ == "Linear4bit"]
    assert modules
    assert all(not m.support_avx512bf16_for_cpu for m in modules)
    fresh = load_model(spec, "fp32")
    assert copy.deepcopy(fresh).state_dict().keys() == two.state_dict().keys()
    tree = share_weights(fresh)
    assert all(torch.equal(a, b) for a, b in zip(tree.buffers(), fresh.buffers(), strict=True))
