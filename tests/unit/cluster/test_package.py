"""The archives: patterns apply as Ray applies them, the package is complete whatever is excluded, sizes are checked."""

import os
import zipfile
from pathlib import Path

import pytest

from ray_vlm.cluster.package import (
    MAX_UPLOAD_BYTES,
    PACKAGE_FOLDER,
    check_size,
    describe_archive,
    plan_package,
    plan_working_folder,
    write_archive,
)
from ray_vlm.errors import ConfigError


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
