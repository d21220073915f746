"""The job and the model of a process beside the workers."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_vlm.config.load import dump_job, load_job
from ray_vlm.models.load import build_adapter_alone, family_of, load_adapted, load_config
from ray_vlm.train.beside import job_beside
from ray_vlm.train.sampler_process import count_sequences


def test_a_process_beside_the_workers_is_alone_and_samples_by_itself(job_file) -> None:
    method = {"name": "grpo", "samplers": 2, "max_staleness": 1, "cpus_per_sampler": 3, "rollouts": "vllm"}
    cluster = {"num_workers": 2, "deepspeed": "zero2"}
    train = {"global_batch_size": 32}
    job = load_job(job_file(method=method, cluster=cluster, lora={"target": ["language"]}, train=train))
    spec: Any = SimpleNamespace(job=dump_job(job))
    beside: Any = job_beside(spec, (3, 1))
    assert (beside.method.samplers, beside.method.max_staleness, beside.method.worker_engine) == (0, 0, "vllm")
    alone = beside.cluster
    assert (alone.num_workers, alone.deepspeed, alone.cpus_per_worker, alone.gpus_per_worker) == (1, None, 3, 1)
    assert beside.train == job.train


@pytest.mark.parametrize("target", [["language"], ["language", "vision"]])
def test_an_adapter_without_its_base_has_the_weights_that_workers_train(target: list[str], job_file) -> None:
    job = load_job(job_file(lora={"rank": 4, "target": target, "ranks": {"language": 2}}))
    assert job.lora is not None
    family = family_of(load_config(job.model))
    whole = load_adapted(job.model, job.lora, job.train, family, "cpu", 0)
    alone = build_adapter_alone(job.model, job.lora, family)
    shapes = [
        {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad} for model in (whole, alone)
    ]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) > 4
    trained = [p for p in alone.parameters() if p.requires_grad]
    assert {p.device.type for p in trained} == {"cpu"}
    assert {p.device.type for p in alone.parameters() if not p.requires_grad} == {"meta"}


@pytest.mark.parametrize("target", [["language"], ["language", "vision"], ["vision"]])
def test_an_adapter_that_is_trained_further_has_all_its_weights(target: list[str], job_file, tmp_path: Path) -> None:
    """vLLM gets the parts that are not trained further too. GRPO usually goes on from an adapter of SFT."""
    first = load_job(job_file(lora={"rank": 4, "target": ["language", "vision"]}))
    assert first.lora is not None
    family = family_of(load_config(first.model))
    trained = load_adapted(first.model, first.lora, first.train, family, "cpu", 0)
    for parameter in (p for p in trained.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter)
    trained.peft_config["default"].base_model_name_or_path = "/another/folder/qwen3_vl"
    trained.save_pretrained(str(tmp_path / "start"))
    job = load_job(job_file(lora={"rank": 4, "target": target}, model={"adapter": str(tmp_path / "start")}))
    assert job.lora is not None
    whole = load_adapted(job.model, job.lora, job.train, family, "cpu", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of PEFT, where the base lies elsewhere
        alone = build_adapter_alone(job.model, job.lora, family)
    names = {name for name, _ in whole.named_parameters() if "lora_" in name}
    assert any("visual" in name for name in names)
    for model in (whole, alone):
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trains == {name for name in names if ("vision" if "visual" in name else "language") in target}
    weights, due = dict(alone.named_parameters()), dict(whole.named_parameters())
    assert all(torch.equal(weights[name], due[name]) for name in names)
    assert all(p.is_meta for name, p in weights.items() if name not in names)


@pytest.mark.parametrize(
    ("samplers", "batch", "sequences"),
    [(1, None, 8 * 4), (4, None, 2 * 4), ([1, 4], None, 2 * 4), ([1, 3], None, 3 * 4), ([1, 4], 1, 4)],
)
def test_a_sampler_of_vllm_samples_a_portion_at_a_time(
    samplers: int | list[int], batch: int | None, sequences: int, job_file
) -> None:
    """A portion is the share of each of the most samplers, whatever their number is now."""
    method = {"name": "grpo", "samplers": samplers, "sampling_batch": batch, "num_generations": 4, "rollouts": "vllm"}
    sections = {"lora": {"target": ["language"]}, "train": {"global_batch_size": 32}, "cluster": {"num_workers": 1}}
    job = load_job(job_file(method=method, **sections))
    assert count_sequences(job) == sequences
