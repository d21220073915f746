"""The samplers of a run that goes on, found for an evaluation, and what refuses them."""

import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ray_vlm.cluster.preflight import cpus_needed, plan_layout
from ray_vlm.config.load import dump_job, load_job
from ray_vlm.config.paths import absolute_paths
from ray_vlm.distributed import DistributedContext
from ray_vlm.engines import actors
from ray_vlm.engines.actors import SamplerPool
from ray_vlm.engines.interface import Sampling
from ray_vlm.errors import ConfigError, ModelError, RunError
from ray_vlm.evaluate.actors import build_actor_demand
from ray_vlm.evaluate.run import num_actors
from ray_vlm.evaluate.samplers import RunningSamplers, find_samplers, join_samplers
from ray_vlm.models.load import build_adapter_alone, family_of, load_adapted, load_config
from ray_vlm.models.lora import fill_adapter
from ray_vlm.runs.read import Run
from tests.support.played_samplers import PlayedSamplers, row

PUBLISHED = {"address": "10.0.0.1:6379", "namespace": "ray_vlm", "names": ["a", "b"]}


def _run(job: Any, status: str = "running", **about: Any) -> Run:
    about = {"status": status, "samplers": PUBLISHED} | about
    return Run("runs/one", dump_job(job), about, (), {}, (), ())


@pytest.fixture
def job(job_file) -> Any:
    method = {"name": "grpo", "samplers": 2}
    path = job_file(
        method=method, cluster={"num_workers": 1}, lora={"target": ["language"]}, train={"global_batch_size": 16}
    )
    return absolute_paths(load_job(path))


def test_samplers_are_those_that_the_run_has_published(job: Any) -> None:
    assert find_samplers(_run(job), job) == RunningSamplers("10.0.0.1:6379", "ray_vlm", ("a", "b"))
    options = job.evaluate.model_copy(update={"engine": "samplers"})
    assert num_actors(options, job.cluster.model_copy(update={"gpus_per_worker": 1})) == 0


def _without(job: Any) -> Run:
    return _run(job.model_copy(update={"method": job.method.model_copy(update={"samplers": 0})}))


def _in_4bit(job: Any) -> Run:
    return _run(job.model_copy(update={"model": job.model.model_copy(update={"load_in_4bit": True})}))


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        (_without, "has no samplers. Start a GRPO run with method.samplers=1"),
        (lambda job: _run(job, "finished"), r"does not go on \(status finished\).*--resume"),
        (lambda job: _run(job, samplers=None), "are not there yet. Wait"),
        (_in_4bit, "have loaded model.load_in_4bit=True, and this job has False. Use a job of that base"),
    ],
)
def test_runs_without_samplers_for_this_are_refused(run: Any, problem: str, job: Any) -> None:
    with pytest.raises(RunError, match=f"^evaluate.engine=samplers: runs/one.*{problem}"):
        find_samplers(run(job), job)


def test_samplers_need_an_adapter(job: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none is given"):
        join_samplers(job, None, cast("Any", None))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="is a whole model"):
        join_samplers(job, str(tmp_path), cast("Any", None))


def test_the_weights_that_are_sent_are_those_of_the_folder(job: Any, tmp_path: Path) -> None:
    family = family_of(load_config(job.model))
    trained = load_adapted(job.model, job.lora, job.train, family, "cpu", 0)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    trained.save_pretrained(str(tmp_path / "adapter"))
    alone = build_adapter_alone(job.model, job.lora, family)
    fill_adapter(alone, str(tmp_path / "adapter"))
    due = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    sent = {name: p for name, p in alone.named_parameters() if p.requires_grad}
    assert due.keys() == sent.keys()
    assert all(torch.equal(due[name], sent[name]) for name in due)
    wider = build_adapter_alone(job.model, job.lora.model_copy(update={"rank": 3}), family)
    with pytest.raises(ModelError, match="of another run"):
        fill_adapter(wider, str(tmp_path / "adapter"))


def _model(value: float) -> torch.nn.Module:
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.tensor([value]))
    return model


def test_a_guest_s_weights_are_beside_those_of_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ask by turns, and each gets answers with its own weights; a guest does not wait for ever."""
    monkeypatch.setattr(actors, "_GUEST_WAIT_S", 0.3)
    samplers, sampling = PlayedSamplers(2), Sampling(num_generations=1, max_new_tokens=4)
    pools = [SamplerPool(samplers, DistributedContext(), 1, guest=guest) for guest in (False, True)]
    try:
        for pool, weight in zip(pools, (1.0, 2.0), strict=True):
            pool.update(_model(weight))
        for _ in range(2):
            for pool, weight in zip(pools, (1.0, 2.0), strict=True):
                groups = pool.sample([row(n) for n in range(4)], sampling, [(n,) for n in range(4)])
                assert {group[0].logprobs[0] for group in groups} == {weight}
        assert all(len(sampler.lent) == 1 and len(sampler.versions) == 2 for sampler in samplers.samplers)
        samplers.absent |= {0, 1}
        with pytest.raises(RunError, match="no sampler of the run has been there"):
            pools[1].answer([row(0)], 4)
    finally:
        for pool in pools:
            pool.close()


def test_a_guest_waits_for_a_sampler_that_is_started_again_also_where_another_never_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(actors, "_GUEST_WAIT_S", 0.6)
    samplers = PlayedSamplers(2)
    samplers.absent.add(1)
    pool = SamplerPool(samplers, DistributedContext(), 1, guest=True)
    try:
        pool.update(_model(1.0))
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            assert pool.answer([row(0)], 4)
            time.sleep(0.05)
        samplers.kill(0, again_after=0.2)
        assert pool.answer([row(0)], 4)
    finally:
        pool.close()


def test_a_guest_waits_for_a_sampler_that_is_busy_where_another_never_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers the question whether it is there only after its portion."""
    monkeypatch.setattr(actors, "_GUEST_WAIT_S", 0.3)
    samplers, free = PlayedSamplers(2), threading.Event()
    samplers.absent.add(1)
    samplers.samplers[0].ping = free.wait  # type: ignore[method-assign]
    threading.Timer(1.5, free.set).start()
    pool = SamplerPool(samplers, DistributedContext(), 1, guest=True)
    try:
        pool.update(_model(1.0))
        assert pool.answer([row(0)], 4)
        assert free.is_set()
    finally:
        pool.close()


@pytest.mark.parametrize("samplers", [2, [1, 4]])
def test_an_evaluation_needs_no_room_for_the_samplers_of_training(samplers: int | list[int], job_file: Any) -> None:
    method = {"name": "grpo", "samplers": samplers, "cpus_per_sampler": 8}
    job = load_job(job_file(method=method, train={"global_batch_size": 64}, cluster={"num_workers": 1}))
    demand = build_actor_demand(job, 2)
    assert (demand.cluster.num_workers, demand.num_samplers, demand.most_samplers) == (2, 0, 0)
    assert cpus_needed(demand) < 8
    assert plan_layout(demand, {"CPU": 4.0}, [{"CPU": 4.0}]).num_loaders == 1
