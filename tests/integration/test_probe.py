"""The batch that runs before the first step, and jobs that are fitted to a card."""

import json
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.load import load_job
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.models.load import load_config
from ray_vlm.models.memory import GIB, RowSize, StepSettings, group_bytes
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.driver import train
from ray_vlm.train.memory_plan import heaviest_rows, micro_batch_sizes
from ray_vlm.train.prepare import prepare
from tests.support.parity import write_pairs


def _train(path: Path, *overrides: str) -> RunPaths:
    return train(load_job(path, overrides), path.read_text())


def _lines(paths: RunPaths) -> list[dict[str, Any]]:
    timed = ("time", "tokens_per_s", "peak_memory_gib")
    lines = [line for line in read_metrics(paths.metrics) if line["kind"] == "train"]
    return [{k: v for k, v in line.items() if k not in timed and not k.endswith("_s")} for line in lines]


@pytest.fixture
def job_of(job_file, tmp_path: Path, tiny_models: dict[str, str]) -> Any:
    def write(method: str) -> Path:
        lora = {"rank": 4, "alpha": 8, "dropout": 0.1}
        if method == "sft":
            return job_file(lora=lora)
        if method == "dpo":
            data = {"train": {"path": str(write_pairs(tmp_path, tiny_models["qwen3_vl"])), "format": "preference"}}
            return job_file(method="dpo", lora=lora, data=data)
        options = {"num_generations": 4, "max_completion_tokens": 10, "beta": 0.05}
        rewards = {"rewards": {"tests.integration.test_alignment:even_tokens": 1.0}}
        return job_file(method={"name": "grpo", **options, **rewards}, evaluate={"metric": "reward"})

    return write


@pytest.mark.parametrize("method", ["sft", pytest.param("dpo", marks=pytest.mark.slow), "grpo"])
def test_a_probe_leaves_no_trace_and_is_told(method: str, job_of, capsys: pytest.CaptureFixture) -> None:
    """With dropout, so random state counts too; and what it took is near what was predicted."""
    path = job_of(method)
    plain = _train(path, "run.name=plain")
    capsys.readouterr()
    probed = _train(path, "run.name=probed", "train.probe=true")
    assert _lines(probed) == _lines(plain)
    output = capsys.readouterr().out
    took, predicted = output.split("took ")[1].split(" GiB above the model, predicted ")
    assert float(predicted.split()[0]) == pytest.approx(float(took), rel=0.2, abs=0.0015)
    if method == "grpo":
        job, tokens = load_job(path), int(output.split(" rows of up to ")[1].split()[0])
        settings = StepSettings(job.method, job.train, job.cluster, job.lora, job.model.load_in_4bit)
        expected = 2 * group_bytes(settings, load_config(job.model), RowSize(0, tokens, 0)) / GIB
        sampled = output.split("the answers to 2 prompts sampled at a time: ")[1].split(" GiB above the model")[0]
        assert float(sampled) == pytest.approx(expected, rel=0.35)
    weights = [(paths.final / "adapter_model.safetensors").read_bytes() for paths in (plain, probed)]
    assert weights[0] == weights[1]


def test_the_heaviest_batch_is_found(job_file) -> None:
    prepared = prepare(load_job(job_file(train={"max_steps": 2, "micro_batch_size": 2})))
    tokens, plan = prepared.train.tokens, prepared.plan
    batches = [plan.micro_batch(number, 0).rows for number in range(plan.num_steps * plan.accumulation)]
    heaviest = heaviest_rows(prepared.job.method, prepared.job.train, plan, prepared.train.tokens)
    assert heaviest in batches
    assert max(tokens[list(heaviest)]) * len(heaviest) == max(max(tokens[list(b)]) * len(b) for b in batches)


def test_what_does_not_fit_ends_the_run_at_once(job_of, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from ray_vlm.methods.sft import WeightedSFTTrainer

    def burst(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(WeightedSFTTrainer, "heaviest_batch", burst)
    with pytest.raises(RunError, match=r"heaviest batch of the plan \(4 rows.*CUDA out of memory\. Lower train.micro"):
        _train(job_of("sft"), "train.probe=true")


def test_a_job_is_fitted_to_a_card(job_file, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Enough for 4 of the rows at a time with what is kept; then for none with nothing kept."""
    path = job_file(train={"max_steps": 1})
    paths = _train(path, "train.memory=auto", "cluster.gpu_memory_gib=1")
    output = capsys.readouterr().out
    assert "train.memory=auto: micro_batch_size 8, 0 of 4 layers recompute" in output
    resolved = json.loads(paths.resolved.read_text())["train"]
    assert (resolved["micro_batch_size"], resolved["gradient_checkpointing"], resolved["memory"]) == (8, False, None)
    with pytest.raises(ConfigError, match="not even 1 at a time, with every layer recomputed"):
        prepare(load_job(path, ["train.memory=auto", "cluster.gpu_memory_gib=0.001"]))
    with pytest.raises(ConfigError, match=r"gpu_memory_gib=0.001: weights and optimizer take 0\.0 GiB"):
        prepare(load_job(path, ["train.probe=true", "cluster.gpu_memory_gib=0.001"]))


def test_micro_batches_hold_whole_groups(job_of, job_file) -> None:
    def sizes(path: Path, *overrides: str) -> list[int]:
        job = load_job(path, overrides)
        return micro_batch_sizes(StepSettings(job.method, job.train, job.cluster, job.lora, job.model.load_in_4bit))

    assert sizes(job_file()) == [1, 2, 4, 8]
    assert sizes(job_of("grpo"), "train.global_batch_size=24") == [1, 2, 4, 8, 12, 24]


@pytest.mark.parametrize("count", [1, 2])
def test_some_layers_recompute(count: int, job_file) -> None:
    """The same numbers whichever layers keep their activations, and less is alive the more recompute."""
    path = job_file(model={"load_in_4bit": False}, train={"max_steps": 2})
    plain = _lines(_train(path, "run.name=plain"))
    some = _lines(_train(path, "run.name=some", f"train.gradient_checkpointing={count}"))
    for a, b in zip(plain, some, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
    job = load_job(path, ["train.probe=true", f"train.gradient_checkpointing={count}"])
    probe, whole = prepare(job).probe, prepare(load_job(path, ["train.probe=true"])).probe
    assert probe is not None
    assert whole is not None
    assert probe.predicted < whole.predicted
    assert probe.predicted < GIB
