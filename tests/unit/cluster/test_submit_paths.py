"""What a submitted command names is found on the cluster, or refused before submitting with the fix."""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.cli import _add_computing_verbs, _parser
from ray_vlm.cli.submit import command_words
from ray_vlm.cluster.package import Archive, plan_working_folder
from ray_vlm.cluster.submit_paths import READ, SENT, WRITTEN, PathReport, check_job, check_results, check_words
from ray_vlm.config.load import load_job

VERBS = ("train", "tune", "evaluate", "pairs", "predict", "export")
NO_PATHS = {  # options that name no file
    *("overrides", "dry_run", "overwrite", "resume", "base_unquantised", "both_memories", "part", "merged", "weights"),
    *("question", "device", "num_replicas", "precision"),
}
JOB = """\
task: classification
model: {name: Qwen/Qwen3-VL-2B-Instruct}
data:
  train: {path: data/train.csv, format: image_csv, image_root: data/photos}
  eval: 0.1
run: {output_dir: /shared/outputs}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, which is the current one."""
    for name in ("data/train.csv", "data/photos/1.png", "outputs/run/best/x", "space.yaml", "mine/rewards.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "job.yaml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _archive(folder: Path, *excludes: str) -> Archive:
    return plan_working_folder(folder, ["/outputs/", *excludes], "env.yaml")


def _job(folder: Path, archive: Archive, *overrides: str) -> PathReport:
    return check_job(load_job(folder / "job.yaml", overrides), "job.yaml", archive)


def _computing() -> dict[str, argparse.ArgumentParser]:
    verbs = argparse.ArgumentParser().add_subparsers()
    _add_computing_verbs(verbs)
    return verbs.choices


def test_every_word_of_every_verb_is_known_to_name_a_path_or_none() -> None:
    """A new option must be listed as naming something that is sent, read or written, or none of these."""
    assert set(_computing()) == set(VERBS)
    words = {action.dest for parser in _computing().values() for action in parser._actions} - {"help"}
    assert words - {*SENT, *READ, *WRITTEN, *NO_PATHS} == set()


@pytest.mark.parametrize(
    "words",
    [
        "train job.yaml a=1 b=2 --resume",
        "train job.yaml --dry-run",
        "tune job.yaml --space=space.yaml --overwrite",
        "evaluate job.yaml --adapter=/a/best --adapter=/b/best --base --output=/o --against=/e",
        "pairs job.yaml --output=/o/p.jsonl --adapter=/a --part=eval --overwrite",
        "predict /r /in/1.png /in/2.png --output=/o.csv --draw=/d --question=it's --weights=final --num-replicas=0",
        "export /r --merged --weights=best --output=/o",
    ],
)
def test_a_verb_is_submitted_with_all_of_its_words(words: str) -> None:
    arguments = words.split()
    own = ["--address", "http://h:8265", "--no-wait", "--driver-gpus", "1"]
    for order in (["submit", *own, *arguments], ["submit", *arguments, *own]):
        args = _parser().parse_args(order)
        assert args.submitted_verb == arguments[0]
        assert sorted(command_words(args.submitted_actions, vars(args))) == sorted(arguments[1:])
        assert (args.address, args.no_wait, args.driver_gpus, args.working_dir) == ("http://h:8265", True, 1.0, ".")


def test_what_is_sent_is_named_as_in_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "jobs").mkdir()
    (folder / "job.yaml").rename(folder / "jobs" / "job.yaml")
    monkeypatch.chdir(folder / "jobs")
    words: dict[str, Any] = {
        "job": "job.yaml",
        "space": str(folder / "space.yaml"),
        "inputs": ["../data/photos", "/in"],
    }
    arguments, report = check_words(words, _archive(folder))
    assert arguments == {"job": "jobs/job.yaml", "space": "space.yaml", "inputs": ["data/photos", "/in"]}
    assert report.problems == []
    assert report.expected == ["/in"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({"job": "../job.yaml"}, "lies outside .*, which is what the cluster gets. Give --working-dir"),
        ({"space": "nowhere.yaml"}, "nowhere.yaml: no such file in"),
        ({"space": "space.yaml"}, "space.yaml: the space is left out by env.yaml. Change that, or give"),
        ({"adapter": "outputs/run/best"}, "--adapter outputs/run/best is left out by env.yaml.*s3://"),
        ({"run": "run"}, "run=run is left out by env.yaml"),
        ({"inputs": ["../photos"]}, "inputs=../photos lies outside"),
        ({"against": "some/evaluation"}, "--against some/evaluation: no such file or folder"),
    ],
)
def test_paths_that_the_cluster_would_miss_are_refused(folder: Path, words: dict[str, Any], problem: str) -> None:
    _, report = check_words(words, _archive(folder, "space.yaml"))
    assert len(report.problems) == 1
    assert re.search(problem, report.problems[0]), report.problems


@pytest.mark.parametrize(
    "words",
    [{"adapter": "someone/adapter"}, {"run": "someone/model"}, {"run": "tiny"}, {"base": "tiny"}, {"base": True}],
)
def test_a_name_on_the_hub_or_of_the_package_is_left_to_the_verb(folder: Path, words: dict[str, Any]) -> None:
    arguments, report = check_words(words, _archive(folder))
    assert (arguments, report) == (words, PathReport())


def test_rows_images_and_modules_of_a_job_must_be_sent(folder: Path) -> None:
    assert _job(folder, _archive(folder)) == PathReport()
    (left_out,) = _job(folder, _archive(folder, "/data/train.csv")).problems
    assert "data.train.path='data/train.csv' is left out by env.yaml" in left_out
    (folder / ".gitignore").write_text("data/\n")
    rows, images = _job(folder, _archive(folder)).problems
    assert "left out by .gitignore" in rows
    assert "RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1 sends what git ignores" in rows
    assert "data.train.image_root='data/photos'" in images
    (folder / ".gitignore").write_text("data/photos/1.png\nmine/\n")
    (folder / "data" / "photos" / "2.png").write_text("x")
    report = _job(
        folder, _archive(folder), "data.test={path: /shared/t.csv, format: image_csv, create: mine.rewards:f}"
    )
    assert report.notes == [
        "data.train.image_root: 1 of what is in data/photos is left out, such as data/photos/1.png by .gitignore"
    ]
    assert report.problems == ["mine/rewards.py, the module of a function in the job, is left out by .gitignore."]
    (folder / "ray_vlm" / "demo").mkdir(parents=True)  # as in a checkout
    (folder / "ray_vlm" / "demo" / "shapes.py").write_text("")
    shipped = "data.test={path: /shared/t.csv, format: image_csv, create: ray_vlm.demo.shapes:draw_file}"
    assert _job(folder, _archive(folder, "/ray_vlm"), shipped).problems == []
    (missing,) = _job(folder, _archive(folder), "data.test={path: no.csv, format: image_csv}").problems
    assert "data.test.path='no.csv' is not in" in missing
    (adapter,) = _job(folder, _archive(folder), "model.adapter=outputs/run/best").problems
    assert "model.adapter='outputs/run/best' is left out by env.yaml" in adapter


def test_rows_beside_the_job_file_and_on_all_nodes_are_fine(folder: Path) -> None:
    (folder / "jobs").mkdir()
    (folder / "data").rename(folder / "jobs" / "data")
    job = load_job(
        folder / "job.yaml", ["data.test={path: /shared/t.csv, format: image_csv}", "data.train.image_root=s3://b"]
    )
    report = check_job(job, "jobs/job.yaml", _archive(folder))
    assert report.problems == []
    assert report.expected == ["/shared/t.csv (data.test.path)"]


def test_results_must_be_written_outside_the_copy(folder: Path) -> None:
    shared, own = load_job(folder / "job.yaml"), load_job(folder / "job.yaml", ["run.output_dir=outputs"])
    assert check_results("train", {}, shared) == PathReport(written=["/shared/outputs"])
    assert "run.output_dir='outputs' is relative" in check_results("train", {}, own).problems[0]
    assert "--output='p.jsonl' is relative" in check_results("pairs", {"output": "p.jsonl"}, shared).problems[0]
    assert check_results("pairs", {"output": "/p.jsonl"}, shared).written == ["/p.jsonl"]
    assert check_results("evaluate", {"output": "/e", "adapter": []}, own) == PathReport(written=["/e"])
    assert check_results("evaluate", {"adapter": ["/a/best"]}, own).written == ["/a"]
    assert "beside the adapter" in check_results("evaluate", {"adapter": ["a/best"]}, shared).problems[0]
    predicted = check_results("predict", {"output": "/p.csv", "draw": "drawn"}, None)
    assert "--draw='drawn' is relative" in predicted.problems[0]
    assert check_results("export", {"run": "/r"}, None).written == ["/r"]
    assert check_results("export", {"run": "sent"}, None).problems
