"""DeepSpeed's ZeRO on two workers: what is learned, saved and gone on from is what it is without."""

from pathlib import Path
from typing import Any

import pytest

from ray_vlm.errors import RunError
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.runs.paths import RunPaths
from tests.cluster.test_recovery import _at_step, _steps, _train
from tests.support.parity import write_pairs
from tests.support.ray_processes import kill_process
from tests.support.tiny_families import write_tiny

pytestmark = pytest.mark.cluster
TWO = "cluster.num_workers=2"


def _saved(paths: RunPaths, name: str = "final") -> dict[str, Any]:
    from safetensors.torch import load_file

    (file,) = (paths.root / name).glob("*model.safetensors")
    return load_file(str(file))


def _same(one: RunPaths, other: RunPaths, near: float) -> None:
    """Both learned the same, step by step and in the end."""
    for a, b in zip(_steps(one), _steps(other), strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    a, b = _saved(one), _saved(other)
    assert a.keys() == b.keys()
    assert all(float((a[name].float() - b[name].float()).abs().max()) < near for name in a)


@pytest.mark.slow
def test_cut_up_4bit_weights_learn_the_same(ray_cluster, job_file) -> None:
    path = job_file(train={"max_steps": 3, "micro_batch_size": 2, "gradient_checkpointing": True})
    options = ("model.load_in_4bit=true", "lora.target=[language,vision]")
    alone = _train(path, "run.name=alone", *options)
    _same(alone, _train(path, "run.name=cut", TWO, "cluster.deepspeed=zero3", *options), 1e-4)


@pytest.mark.slow
def test_cut_up_experts_in_4bit_learn_the_same(ray_cluster, job_file, tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "qwen3_vl_moe")
    train = {"max_steps": 3, "micro_batch_size": 2, "gradient_checkpointing": True}
    path = job_file(train=train, model={"name": str(base), "load_in_4bit": True})
    options = ("lora.target=[language,experts]",)
    alone = _train(path, "run.name=alone", *options)
    _same(alone, _train(path, "run.name=cut", TWO, "cluster.deepspeed=zero3", *options), 1e-4)


@pytest.mark.slow
def test_a_killed_worker_and_another_number_of_them(ray_cluster, job_file, tmp_path: Path) -> None:
    """Each rank wrote its part of the optimizer: two workers go on from them, one cannot."""
    path = job_file(train={"max_steps": 6, "micro_batch_size": 2}, checkpoint={"every_steps": 2})
    options = (TWO, "cluster.deepspeed=zero2", "model.load_in_4bit=true")
    undisturbed = _train(path, "run.name=whole", TWO, "model.load_in_4bit=true")
    paths = RunPaths(tmp_path / "runs" / "hurt")
    _at_step(paths, 3, lambda: kill_process("RayTrainWorker", 1))
    _same(undisturbed, _train(path, "run.name=hurt", *options), 1e-5)
    for other, workers in (("cluster.num_workers=1", "1 under zero2"), ("cluster.deepspeed=zero1", "2 under zero1")):
        with pytest.raises(RunError, match=rf"written by 2 workers under cluster.deepspeed=zero2.*there are {workers}"):
            _train(path, "run.name=hurt", *options, "train.max_steps=8", other, resume=True)


@pytest.mark.slow
def test_zero3_cuts_4bit_weights_validates_and_goes_on(ray_cluster, job_file, scenes: Path, tmp_path: Path) -> None:
    """Five rows to validate on two workers: one goes through the model once more than it has batches for."""
    data = {"train": {"path": str(scenes / "train.json")}, "eval": {"path": str(scenes / "eval.json"), "max_rows": 5}}
    evaluate = {"every_steps": 2, "metric": "loss", "batch_size": 2}
    train = {"max_steps": 6, "micro_batch_size": 2, "gradient_checkpointing": True}
    path = job_file(train=train, data=data, evaluate=evaluate, checkpoint={"every_steps": 2})
    options = (TWO, "model.load_in_4bit=true", "lora.target=[language,vision]")
    undisturbed = _train(path, "run.name=whole", *options)
    paths = RunPaths(tmp_path / "runs" / "hurt")
    _at_step(paths, 3, lambda: kill_process("RayTrainWorker", 1))
    _same(undisturbed, _train(path, "run.name=hurt", *options, "cluster.deepspeed=zero3"), 1e-5)
    evals = [[line["loss"] for line in read_metrics(p.metrics) if line["kind"] == "eval"] for p in (undisturbed, paths)]
    assert evals[1] == pytest.approx(evals[0], rel=1e-4)
    assert len(evals[0]) == 3
    best, there = _saved(undisturbed, "best"), _saved(paths, "best")
    assert all(float((best[name] - there[name]).abs().max()) < 1e-5 for name in best)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_fewer_rows_to_validate_than_workers(
    ray_cluster, job_file, tmp_path: Path, tiny_models: dict[str, str], scenes: Path, method: str
) -> None:
    """The worker without a row runs the model with that of the other one, which does not count."""
    data = {"train": {"path": str(scenes / "train.json")}, "eval": {"path": str(scenes / "eval.json"), "max_rows": 1}}
    if method == "dpo":
        pairs = write_pairs(tmp_path, tiny_models["qwen3_vl"])
        (tmp_path / "one.jsonl").write_text(pairs.read_text().splitlines()[0] + "\n")
        data = {
            part: {"path": str(path), "format": "preference"}
            for part, path in (("train", pairs), ("eval", tmp_path / "one.jsonl"))
        }
    sizes = {"max_steps": 2, "global_batch_size": 8, "micro_batch_size": 2}
    path = job_file(method=method, data=data, train=sizes, evaluate={"every_steps": 2, "metric": "loss"})
    losses = []
    for name, options in (("plain", ()), ("cut", ("cluster.deepspeed=zero3",))):
        paths = _train(path, f"run.name={name}", TWO, *options)
        losses.append([line["loss"] for line in read_metrics(paths.metrics) if line["kind"] == "eval"])
    assert len(losses[0]) == 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["zero2", "zero3", "zero3_offload"])
def test_all_weights_are_saved_whole(ray_cluster, job_file, preset: str) -> None:
    from transformers import AutoModelForImageTextToText

    path = job_file(lora=None, train={"max_steps": 2, "micro_batch_size": 2, "learning_rate": 1e-4})
    plain, cut = _train(path, "run.name=plain", TWO), _train(path, "run.name=cut", TWO, f"cluster.deepspeed={preset}")
    _same(plain, cut, 1e-5)
    model, info = AutoModelForImageTextToText.from_pretrained(cut.final, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) == sum(v.numel() for v in _saved(plain).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dpo", ("cluster.deepspeed=zero3", "model.load_in_4bit=true")),
        ("dpo", ("cluster.deepspeed=zero2", "method.precompute_ref_log_probs=true")),
        ("grpo", ("cluster.deepspeed=zero2", "model.load_in_4bit=true")),
        ("grpo", ("cluster.deepspeed=zero1", "train.gradient_checkpointing=true")),
    ],
)
def test_pairs_and_groups(ray_cluster, method: str, options: tuple[str, ...], job_of) -> None:
    path = job_of(method, train={"micro_batch_size": 2})
    plain = [option for option in options if "deepspeed" not in option]
    _same(_train(path, "run.name=plain", TWO, *plain), _train(path, "run.name=cut", TWO, *options), 1e-4)


@pytest.mark.slow
def test_answers_are_measured_beside_zero3(ray_cluster, job_file, scenes: Path) -> None:
    data = {"train": {"path": str(scenes / "train.json")}, "eval": {"path": str(scenes / "eval.json"), "max_rows": 3}}
    evaluate = {"every_steps": 2, "metric": "f1_50", "asynchronous": True, "max_new_tokens": 8}
    path = job_file(train={"max_steps": 4, "micro_batch_size": 2}, data=data, evaluate=evaluate)
    paths = _train(path, TWO, "cluster.deepspeed=zero3")
    lines = [line for line in read_metrics(paths.metrics) if line["kind"] == "eval"]
    assert [line["step"] for line in lines] == [2, 4]
    assert all("f1_50" in line for line in lines)
