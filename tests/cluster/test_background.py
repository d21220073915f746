"""Validation beside training: the numbers, the best weights and the trained ones of validation between steps."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.load import load_job
from ray_vlm.errors import DataError
from ray_vlm.runs.checkpoints import replace_folder
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.storage import Store
from tests.cluster.test_alignment import _eval
from tests.cluster.test_recovery import _train, _weights

pytestmark = pytest.mark.cluster
_BESIDE = "evaluate.asynchronous=true"


@pytest.fixture
def sft_job(job_file: Any, scenes: Path) -> Path:
    """Eight steps of SFT with a validation at every other one."""
    data = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "eval")}
    evaluate = {"every_steps": 2, "num_samples": 6, "max_new_tokens": 8, "metric": "f1_50", "at_start": True}
    model = {"load_in_4bit": True}
    more = {"checkpoint": {"every_steps": 2, "keep": 9}, "cluster": {"num_workers": 1}}
    return job_file(data=data, evaluate=evaluate, model=model, train={"max_steps": 6}, **more)


def _measured(paths: RunPaths) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k != "background_s"} for line in _eval(paths)]


def _copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


def _left(paths: RunPaths) -> list[str]:
    return [p.name for p in paths.root.iterdir() if "validate" in p.name]


@pytest.mark.slow
def test_it_equals_validation_between_steps(ray_cluster: None, sft_job: Path) -> None:
    between = _train(sft_job, "run.name=between", "cluster.num_workers=0")
    beside = _train(sft_job, "run.name=beside", _BESIDE)
    assert [line["step"] for line in _measured(beside)] == [0, 2, 4, 6]
    assert _measured(beside) == _measured(between)
    assert _weights(beside) == _weights(between)
    best = [(paths.best / "adapter_model.safetensors").read_bytes() for paths in (between, beside)]
    assert best[0] == best[1]
    assert (beside.best / "preprocessing.json").is_file()
    assert not _left(beside)
    results = [json.loads(paths.run.read_text())["result"]["best"]["step"] for paths in (between, beside)]
    assert results[0] == results[1]


@pytest.mark.slow
def test_what_a_cut_off_run_left_is_measured_by_the_next(ray_cluster: None, sft_job: Path) -> None:
    cut = _train(sft_job, "run.name=cut", _BESIDE, "train.max_steps=4")
    before = _measured(cut)
    lines = cut.metrics.read_text().splitlines(keepends=True)
    last = [line for line in lines if json.loads(line)["kind"] == "eval"][-1]
    assert json.loads(last)["step"] == 4
    cut.metrics.write_text("".join(line for line in lines if line != last))
    store = Store(cut.root)
    for step in (2, 4):  # that of step 2 was measured, and not yet deleted
        replace_folder(store, f".validate-{step}", lambda folder: _copy(cut.final, folder), step)
    shutil.copytree(cut.root / ".validate-4", cut.root / ".validate-3")
    (cut.root / ".validate-3" / "adapter_model.safetensors").write_bytes(b"cut")  # a machine lost its power
    _train(sft_job, "run.name=cut", _BESIDE, resume=True)
    after = _measured(cut)
    assert [line["step"] for line in after] == [0, 2, 4, 6]
    assert after[2] == before[2] | {"attempt": 2}
    assert not _left(cut)


@pytest.mark.slow
def test_early_stopping_ends_all_workers(ray_cluster: None, sft_job: Path) -> None:
    more = ["cluster.num_workers=2", "train.early_stopping_patience=1", "train.learning_rate=1.0e-12"]
    paths = _train(sft_job, "run.name=early", _BESIDE, "train.max_steps=60", *more)
    steps = [line["step"] for line in read_metrics(paths.metrics) if line["kind"] == "train"]
    assert 2 <= steps[-1] < 60
    assert json.loads(paths.run.read_text())["status"] == "finished"
    assert not _left(paths)


@pytest.mark.slow
def test_what_the_validator_refuses_ends_the_run(
    ray_cluster: None, sft_job: Path, scenes: Path, tmp_path: Path
) -> None:
    from ray_vlm.train import driver

    folder = tmp_path / "data"
    shutil.copytree(scenes, folder)
    job = load_job(sft_job, [_BESIDE, f"data.eval.path={folder / 'eval.json'}", "run.name=refused"])
    prepared = driver.prepare(job)
    shutil.rmtree(folder / "eval")
    paths = driver.claim_run(str(tmp_path / "runs"), "refused", "x")
    driver.start_manifest(paths, {}, "", [], rows_version=2)
    with pytest.raises(DataError, match="eval"):
        driver._run(prepared, paths)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_it_equals_validation_between_steps_of_every_method(
    ray_cluster: None,
    method: str,
    job_of: Any,
) -> None:
    path = job_of(method, cluster={"num_workers": 2}, train={"micro_batch_size": 2})
    between = _train(path, "run.name=between", "evaluate.every_steps=2")
    beside = _train(path, "run.name=beside", "evaluate.every_steps=2", _BESIDE)
    assert _weights(beside) == _weights(between)
    for one, other in zip(_measured(between), _measured(beside), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
