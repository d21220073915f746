"""The archives: patterns apply as Ray applies them, the package is complete whatever is excluded, sizes are checked.

What a submitted command names is found on the cluster, or refused before submitting with the fix.
"""

import argparse
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.cli import add_computing_verbs
from ray_vlm.cluster.package import (
    MAX_UPLOAD_BYTES,
    PACKAGE_FOLDER,
    READ,
    SENT,
    WRITTEN,
    Archive,
    PathReport,
    check_job,
    check_results,
    check_size,
    check_words,
    describe_archive,
    plan_package,
    plan_working_folder,
    write_archive,
)
from ray_vlm.config.load import load_job
from ray_vlm.errors import ConfigError

VERBS = ("train", "tune", "evaluate", "pairs", "predict", "export")
NO_PATHS = {  # options that name no file
    *("overrides", "dry_run", "overwrite", "resume", "base_unquantised", "both_memories", "part", "merged", "weights"),
    "engine",
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


def _write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_each_file_is_sent_or_left_out_by_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, "job.yaml", "data/train.csv", "data/raw/1.png", "outputs/run/x", ".git/config", "sub/data/a.csv")
    _write(
        tmp_path, "notes/a.txt", "notes/keep.txt", "sub/secret.txt", "ray_vlm/__init__.py", "ray_vlm/data/samples.py"
    )
    (tmp_path / ".gitignore").write_text("/data/raw/\nnotes/*\n!notes/keep.txt\n")
    (tmp_path / "sub" / ".rayignore").write_text("# not for others\nsecret.txt\n")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    archive = plan_working_folder(tmp_path, ["/outputs/"], "env.yaml")
    sent = {"job.yaml", "data/train.csv", "sub/data/a.csv", "notes/keep.txt", ".gitignore", "sub/.rayignore"}
    assert set(archive.files) == sent
    assert archive.files["job.yaml"] == len("job.yaml")
    assert archive.why_left_out("outputs/run/x") == "env.yaml"
    assert archive.why_left_out("./data/raw/1.png") == ".gitignore"
    assert archive.why_left_out("notes/a.txt") == ".gitignore"
    assert archive.why_left_out("sub/secret.txt") == "sub/.rayignore"
    assert archive.why_left_out("data/train.csv") is None
    assert {"loop/", "gone", ".git/", "ray_vlm/"} <= set(archive.left_out)
    assert archive.holds("data")
    assert not archive.holds("dat")
    description = describe_archive(archive)
    assert f"{tmp_path}: 6 files," in description
    assert "left out by env.yaml: outputs/" in description
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    assert plan_working_folder(tmp_path, [], "env.yaml").holds("data/raw/1.png")


def test_patterns_mean_what_they_mean_to_ray(tmp_path: Path) -> None:
    """Every file that Ray's own walk sends is sent, and no other."""
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    patterns = ["*.pt", "/top/", "deep/**/x.bin", "!deep/b/x.bin", "a?c", "with space/", "**/cache/", "#no", "star/*"]
    _write(tmp_path, "m.pt", "m.pth", "top/a", "in/top/a", "deep/a/x.bin", "deep/b/x.bin", "deep/b/y.bin", "abc", "ac")
    _write(tmp_path, "with space/a", "q/cache/z", "cache/z", "#no", "star/a", "star/b/c", "star.txt")
    sent: set[str] = set()

    def keep(path: Path) -> None:
        if path.is_file():
            sent.add(path.relative_to(tmp_path).as_posix())

    _dir_travel(tmp_path, [_get_excludes(tmp_path, patterns)], keep, include_gitignore=True)
    assert set(plan_working_folder(tmp_path, patterns, "x").files) == sent
    assert "deep/b/x.bin" in sent


def test_the_limit_is_that_of_ray_s_job_server() -> None:
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    assert MAX_UPLOAD_BYTES == DASHBOARD_CLIENT_MAX_SIZE


def test_a_folder_of_2_gb_is_refused_by_its_names_and_sizes(tmp_path: Path) -> None:
    _write(tmp_path, "job.yaml")
    (tmp_path / "photos").mkdir()
    with open(tmp_path / "photos" / "all.bin", "wb") as file:
        file.truncate(2 * 10**9)  # a hole: it takes no room, and would take long if it were read
    archive = plan_working_folder(tmp_path, [], "x")
    with pytest.raises(ConfigError, match=r"2 files of 2\.0 GB .* The largest: photos/ 2\.0 GB.*\.rayignore"):
        check_size(archive)
    check_size(plan_working_folder(tmp_path, ["photos/"], "x"))


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        plan_working_folder(tmp_path, [], "x")


def test_the_package_is_complete_and_the_same_archive_each_time(tmp_path: Path) -> None:
    package = plan_package()
    for number in (1, 2):
        write_archive(package, tmp_path / f"{number}.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    assert (tmp_path / "1.zip").stat().st_size <= package.archive_bytes < 2 * package.num_bytes
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        names = set(archive.namelist())
        assert archive.testzip() is None
    assert {f"ray_vlm/{path.relative_to(PACKAGE_FOLDER).as_posix()}" for path in PACKAGE_FOLDER.rglob("*.py")} <= names
    assert "ray_vlm/data/__init__.py" in names
    assert not [name for name in names if "__pycache__" in name]


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
    add_computing_verbs(verbs)
    return verbs.choices


def test_every_word_of_every_verb_is_known_to_name_a_path_or_none() -> None:
    """A new option must be listed as naming something that is sent, read or written, or none of these."""
    assert set(_computing()) == set(VERBS)
    words = {action.dest for parser in _computing().values() for action in parser._actions} - {"help"}
    assert words - {*SENT, *READ, *WRITTEN, *NO_PATHS} == set()


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


@pytest.mark.parametrize(
    "path",
    ["data/s-*.csv", "data/s-{0..2}.csv", "[data/s-0.csv, data/s-1.csv, data/s-2.csv]", "data/**/s-*.csv", "shards"],
)
def test_every_file_of_a_pattern_a_list_or_a_folder_is_sent(folder: Path, path: str) -> None:
    _write(folder, *(f"{base}/s-{i}.csv" for base in ("data", "shards") for i in range(3)))
    setting = f"data.train.path={path}"
    assert _job(folder, _archive(folder), setting).problems == []
    (problem,) = _job(folder, _archive(folder, "s-1.csv"), setting).problems
    assert re.search(r"s-1\.csv.* by env\.yaml\. Change that, or give", problem), problem
    if not path.startswith("["):
        assert f"data.train.path={path!r}: 1 of its 3 files are left out, such as " in problem
    (folder / ".gitignore").write_text("/data/s-*.csv\n/shards/\n")
    problems = _job(folder, _archive(folder), setting).problems
    assert problems
    assert all("left out" in problem and "RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1" in problem for problem in problems)


def test_no_file_of_a_pattern_is_outside_the_folder(folder: Path) -> None:
    _write(folder, "data/s-0.csv", "../there/s-1.csv")
    (problem,) = _job(folder, _archive(folder), "data.train.path='{data,../there}/s-*.csv'").problems
    assert f"{folder}/../there/s-1.csv is not in {folder}, which is what the cluster gets" in problem
    (problem,) = _job(folder, _archive(folder), "data.train.path=../there/*.csv").problems
    assert f"data.train.path='../there/*.csv' is not in {folder}" in problem


def test_of_a_folder_with_splits_only_what_is_read_must_be_sent(folder: Path) -> None:
    _write(folder, "rows/train/a.csv", "rows/test/b.csv")
    archive = _archive(folder, "/rows/test/")
    assert _job(folder, archive, "data.train.path=rows").problems == []
    (problem,) = _job(folder, archive, "data.train.path=rows", "data.train.split=test").problems
    assert "1 of its 1 files are left out, such as rows/test/b.csv by env.yaml" in problem


def test_patterns_beside_the_job_file_and_data_sets_on_the_hub_are_fine(folder: Path) -> None:
    _write(folder, "jobs/shards/a.csv", "jobs/shards/b.csv")
    paths = "data.train.path=[shards/*.csv, someone/data-set, s3://b/*.csv, /shared/*.csv]"
    report = check_job(load_job(folder / "job.yaml", [paths]), "jobs/job.yaml", _archive(folder))
    assert report.problems == []
    assert report.expected == ["/shared/*.csv (data.train.path)"]
    (missing,) = _job(folder, _archive(folder), "data.train.path=none/*.csv").problems
    assert "data.train.path='none/*.csv' is not in" in missing


def test_a_tar_of_images_is_sent_like_a_folder(folder: Path) -> None:
    (folder / "data" / "photos.tar").write_text("x")
    setting = "data.train.image_root=data/photos.tar"
    report = _job(folder, _archive(folder), setting)
    assert report.problems == []
    assert report.notes == []
    (problem,) = _job(folder, _archive(folder, "*.tar"), setting).problems
    assert "data.train.image_root='data/photos.tar' is left out by env.yaml" in problem
    (missing,) = _job(folder, _archive(folder), "data.train.image_root=data/none.tar").problems
    assert "data.train.image_root='data/none.tar' is not in" in missing
    _, words = check_words({"image_root": str(folder / "data" / "photos.tar")}, _archive(folder))
    assert words.problems == []


def test_rows_beside_the_job_file_and_on_all_nodes_are_fine(folder: Path) -> None:
    (folder / "jobs").mkdir()
    (folder / "data").rename(folder / "jobs" / "data")
    job = load_job(
        folder / "job.yaml", ["data.test={path: /shared/t.csv, format: image_csv}", "data.train.image_root=s3://b"]
    )
    report = check_job(job, "jobs/job.yaml", _archive(folder))
    assert report.problems == []
    assert report.expected == ["/shared/t.csv (data.test.path)"]


def test_results_must_be_written_outside_the_copy() -> None:
    shared, own = "/shared/outputs", "outputs"
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
