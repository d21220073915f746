"""Training through a real Ray cluster: the same numbers and the same files as in one process."""

from pathlib import Path

import pytest

from ray_vlm.config.load import load_job
from ray_vlm.errors import DataError, RunError
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.driver import train

pytestmark = pytest.mark.cluster


def file_names(paths: RunPaths) -> set[str]:
    """What a run folder has, without the times in its checkpoints' names."""
    return {p.name.split("-a1-")[0] for p in paths.root.iterdir() if not p.name.startswith(".")}


def _losses(path: Path, *overrides: str) -> tuple[list[float], set[str]]:
    paths = train(load_job(path, [*overrides]), path.read_text(), overwrite=True)
    return [line["loss"] for line in read_metrics(paths.metrics) if line["kind"] == "train"], file_names(paths)


def _job(job_file, scenes: Path) -> Path:
    data = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "eval")}
    evaluate = {"every_steps": 2, "num_samples": 5, "max_new_tokens": 8, "metric": "f1_50"}
    return job_file(data=data, evaluate=evaluate, train={"max_steps": 4, "global_batch_size": 7})


@pytest.mark.slow  # test_mixed_rows.py has the quick one
def test_two_workers_equal_one_process_in_4bit(ray_cluster, job_file, scenes: Path) -> None:
    path = _job(job_file, scenes)
    alone, files_alone = _losses(path, "cluster.num_workers=0", "model.load_in_4bit=true")
    two, files_two = _losses(path, "cluster.num_workers=2", "model.load_in_4bit=true")
    assert len(alone) == 4
    assert two == pytest.approx(alone, rel=1e-4)
    assert files_two == files_alone


@pytest.mark.slow
def test_one_two_and_three_workers_equal_one_process(ray_cluster, tmp_path: Path, tiny_models: dict[str, str]) -> None:
    from tests.support.parity import curves

    losses = curves(tmp_path, tiny_models["qwen3_vl"], 20, (0, 1, 2, 3))
    for number in (1, 2, 3):
        assert losses[number] == pytest.approx(losses[0], rel=1e-4)


def test_a_worker_that_fails_is_reported_with_its_cause(ray_cluster, job_file, scenes: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "data"
    shutil.copytree(scenes, folder)
    path = job_file(data={"train": {"path": str(folder / "train.json")}})
    job = load_job(path, ["cluster.num_workers=1", "data.shuffle=false"])
    from ray_vlm.train import driver

    prepared = driver.prepare(job)
    (folder / "train" / "00005.jpg").unlink()  # gone after the index was made
    paths = driver.claim_run(str(tmp_path / "runs"), "broken", "x")
    driver.start_manifest(paths, {}, "", [], rows_version=2)
    with pytest.raises(DataError, match=r"row 5 \(id 5\).*00005\.jpg"):
        driver._run(prepared, paths)


def test_a_job_too_large_for_the_cluster_is_refused_in_seconds(ray_cluster, job_file) -> None:
    path = job_file()
    with pytest.raises(RunError, match="need 64"):
        train(load_job(path, ["cluster.num_workers=2", "cluster.cpus_per_worker=32"]), "")
