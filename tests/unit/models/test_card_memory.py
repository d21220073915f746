"""What is planned with of a card, and how each process lets torch manage it. The card is a stand-in."""

import os
from typing import Any

import pytest
import torch

from ray_vlm.config.schema import JobConfig
from ray_vlm.machine import GIB
from ray_vlm.models.card_memory import (
    ALLOCATOR_VARIABLES,
    CardMemory,
    prepare_gpu,
    read_card,
    release_memory,
    set_allocator,
    usable_gib,
)
from ray_vlm.models.memory import RowSize, StepSettings, count_groups, cuda_parts, fit_groups, group_bytes
from ray_vlm.train.memory_plan import Probe, fit_rollout, fit_to_card, plan_room


def _settings(**sections: Any) -> StepSettings:
    job = JobConfig.model_validate({"model": {"name": "x"}, "data": {"train": {"path": "a"}}, **sections})
    return StepSettings(job.method, job.train, job.cluster, job.lora, job.model.load_in_4bit)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend a card of 39.4 GiB of which others hold some."""

    def pretend(free: float, reserved: float = 0.0, allocated: float = 0.0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (int(free * GIB), int(39.4 * GIB)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: int(reserved * GIB))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: int(allocated * GIB))

    return pretend


def test_a_nominal_size_stands_for_what_torch_has_of_it() -> None:
    assert [usable_gib(size) for size in (40, 80, 24, 39.5, 12)] == [39.4, 79.1, 22.0, 39.5, 12]


def test_what_others_hold_is_not_planned_with(card: Any) -> None:
    assert read_card("cpu") is None
    card(free=25, reserved=4)
    memory = read_card("cuda:0")
    assert memory is not None
    assert memory.room(40) == memory.room(None) == 29 * GIB
    assert memory.room(24) == 22 * GIB, "a job may ask for less than the card has"
    assert str(memory.describe_others()).startswith("of the GPU's 39.4 GiB other processes and CUDA's own context hold")
    assert CardMemory(40 * GIB, 39.6 * GIB, 0, 0).describe_others() is None
    in_process = {"num_workers": 0, "gpus_per_worker": 1, "gpu_memory_gib": 40}
    assert _room(in_process | {"num_workers": 2}) == 39.4 * GIB, "not this process's card"
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert _room(in_process) == 29 * GIB
    assert "PYTORCH_ALLOC_CONF" in os.environ, "set before CUDA is asked"


def _room(cluster: dict[str, Any]) -> float:
    settings = _settings(cluster=cluster)
    return plan_room(settings.method, settings.cluster)


def test_a_plan_that_others_leave_no_room_for_recomputes_all(card: Any, caplog: pytest.LogCaptureFixture) -> None:
    settings = _settings(train={"gradient_checkpointing": 3}, cluster={"gpus_per_worker": 1, "gpu_memory_gib": 40})
    probe = Probe((0,), 10, 1.0, peak=30 * GIB)
    card(free=39)
    assert fit_to_card(settings.train, settings.cluster, probe, "cuda:0") is settings.train
    assert not caplog.records
    card(free=20)
    assert fit_to_card(settings.train, settings.cluster, probe, "cuda:0").gradient_checkpointing is True
    assert "20.0 GiB are planned with, and the job takes 30.0. Tried next: every layer recomputes" in caplog.text
    assert fit_to_card(settings.train, settings.cluster, probe, "cpu") is settings.train


def test_portions_are_whole_groups_and_even() -> None:
    assert [fit_groups(room, 2.0, 8) for room in (0, 1.9, 2, 5, 10.1, 14, 16, 99)] == [1, 1, 1, 2, 4, 4, 8, 8]
    assert fit_groups(1.0, 0.0, 5) == 5


def test_sampling_takes_what_its_cache_takes_and_more() -> None:
    from ray_vlm.models.architectures import load_preset

    config = load_preset("Qwen/Qwen3-VL-8B-Instruct")  # 36 layers, 8 heads of keys of 128 numbers
    method = {"name": "grpo", "num_generations": 8, "max_completion_tokens": 256}
    settings = _settings(method=method, train={"global_batch_size": 64})
    cache = 2 * 36 * 8 * 128 * 2 * (1024 + 128 + 256) * 8
    assert cache < group_bytes(settings, config, RowSize(1024, 128, 0)) < 1.15 * cache
    assert count_groups(settings) == 8
    assert group_bytes(_settings(method=method | {"rollouts": "vllm"}), config, RowSize(1, 1, 0)) == 0
    assert group_bytes(_settings(), config, RowSize(1, 1, 0)) == 0


def test_a_worker_samples_as_many_prompts_as_its_card_has_room_for(card: Any) -> None:
    from ray_vlm.models.architectures import load_preset

    model: Any = torch.nn.Linear(2, 2)
    model.config = load_preset("Qwen/Qwen3-VL-8B-Instruct")
    settings = _settings(
        method={"name": "grpo", "num_generations": 8, "max_completion_tokens": 256},
        train={"global_batch_size": 64},
        cluster={"gpus_per_worker": 1, "gpu_memory_gib": 40},
    )
    assert fit_rollout(settings, model, 1152, "cpu") is None
    card(free=31, reserved=8, allocated=7)  # a group takes 1.7 GiB
    assert fit_rollout(settings, model, 1152, "cuda:0") is None
    card(free=8, reserved=8, allocated=7)
    assert fit_rollout(settings, model, 1152, "cuda:0") == 4
    card(free=0.5, reserved=8, allocated=7)
    assert fit_rollout(settings, model, 1152, "cuda:0") == 1


def test_terms_that_torch_does_not_allocate() -> None:
    cluster = {"gpus_per_worker": 1, "gpu_memory_gib": 40, "num_workers": 8}
    parts = cuda_parts(_settings(cluster=cluster))
    assert 0.3 * GIB <= parts["NCCL's buffers"] <= 1.2 * GIB
    assert parts["NCCL's buffers"] < cuda_parts(_settings(cluster=cluster | {"num_workers": 64}))["NCCL's buffers"]
    assert list(cuda_parts(_settings(cluster=cluster | {"num_workers": 1}))) == ["CUDA's own"]
    assert cuda_parts(_settings()) == {}


def test_segments_grow_unless_the_user_has_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus, gpus = _settings(), _settings(cluster={"gpus_per_worker": 1})
    vllm = _settings(method={"name": "grpo", "rollouts": "vllm"})
    prepare_gpu(cpus.cluster, cpus.method)
    prepare_gpu(gpus.cluster, vllm.method)
    assert not any(name in os.environ for name in ALLOCATOR_VARIABLES)
    prepare_gpu(gpus.cluster, gpus.method)
    assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    set_allocator()
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_memory_is_released_only_where_there_is_a_gpu_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    release_memory()
    assert calls == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    release_memory()
    assert calls == ["emptied"]
