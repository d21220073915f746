"""Evaluation by replicas: the same answers in the same order for any number of them, and what a replica refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.cli import main
from ray_vlm.errors import ModelError, RunError
from ray_vlm.evaluate import actors
from ray_vlm.evaluate.actors import InferenceJob, InferenceWorker, run_batches

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("counts", [(0, 2), pytest.param((0, 1, 3), marks=pytest.mark.slow)], ids=str)
def test_any_number_of_replicas_gives_the_same_predictions(
    counts: tuple[int, ...], job_file, scenes: Path, tmp_path: Path, ray_cluster
) -> None:
    data = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "test")}
    job = str(job_file(data=data, evaluate={"max_new_tokens": 6, "batch_size": 2}, cluster={"cpus_per_worker": 1}))
    assert main(["train", job]) == 0
    final = str(tmp_path / "runs" / "run" / "final")
    texts = []
    for count in counts:
        out = tmp_path / str(count)
        words = [f"evaluate.num_replicas={count}", "--adapter", final, "--output", str(out)]
        assert main(["evaluate", job, *words]) == 0
        texts.append((out / "predictions.jsonl").read_text())
    assert set(texts) == {texts[0]}
    assert [json.loads(line)["id"] for line in texts[0].splitlines()] == [str(i) for i in range(12)]
    assert main(["evaluate", job, *words]) == 0, "all answers are there: nothing is left for the replicas"
    assert (out / "predictions.jsonl").read_text() == texts[0]


@pytest.mark.parametrize("task", ["gui_steps", pytest.param("detection", marks=pytest.mark.slow)])
def test_any_number_of_replicas_predicts_the_same(
    task: str, job_file, scenes: Path, tmp_path: Path, ray_cluster
) -> None:
    """GUI steps above all, whose memory is what was answered before: a task stays with one replica."""
    from ray_vlm.config.load import load_job
    from ray_vlm.evaluate.predict import predict_files
    from ray_vlm.evaluate.predictor import Predictor

    shutil.copytree(scenes / "test", tmp_path / "photos")
    photos = sorted((tmp_path / "photos").iterdir())
    table = tmp_path / "photos" / "steps.csv"
    rows = [f"{name},{photo.name},go" for name in ("a", "b", "c") for photo in photos[:3]]
    table.write_text("\n".join(["Task_id,Image_id,Instruction", *rows]))
    inputs = {"gui_steps": str(table), "detection": str(scenes / "test")}[task]
    options = {"labels": ["circle"]} if task == "detection" else {}
    path = job_file(task={"name": task, **options}, evaluate={"max_new_tokens": 6, "batch_size": 2})
    job = load_job(path, ["data.train=null"])
    predictor, texts = Predictor(job), []
    for count in (0, 2):
        out = tmp_path / f"{count}.jsonl"
        predict_files(predictor, [inputs], str(out), num_replicas=count)
        texts.append(out.read_text())
    assert texts[0] == texts[1]
    assert all("answer" in json.loads(line) for line in texts[0].splitlines())


def _refuse(worker: InferenceWorker, records: Any, positions: Any) -> Any:
    if 3 in positions:
        raise ModelError("no such model. Give another.")
    return list(positions)


def _break(worker: InferenceWorker, records: Any, positions: Any) -> Any:
    raise KeyError("what")


def _inference(job_file: Any) -> InferenceJob:
    from ray_vlm.config.load import load_job

    job = load_job(job_file())
    return InferenceJob(job, None, tuple(range(6)), None, tuple((i,) for i in range(6)))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_a_replica_refuses_arrives_as_it_was_said(job_file, count: int, ray_cluster) -> None:
    inference = _inference(job_file)
    with pytest.raises(ModelError, match="no such model"):
        list(run_batches(inference, _refuse, range(6), count))
    assert [number for number, _ in run_batches(inference, _refuse, [5, 1], count)] == [5, 1]


def test_an_unknown_failure_names_itself(job_file, ray_cluster) -> None:
    inference = _inference(job_file)
    with pytest.raises(RunError, match="a worker failed: KeyError: 'what"):
        list(run_batches(inference, _break, range(6), 1))
    assert actors.build_actor_demand(inference.job, 3).cluster.num_workers == 3
