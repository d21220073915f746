"""Checkpoints are complete or not used: damaged, altered, foreign and newer ones, retention, killed writers."""

import json
import os
import shutil
from pathlib import Path

import pytest

from ray_vlm.errors import RunError
from ray_vlm.runs.checkpoints import (
    MANIFEST,
    Checkpoint,
    checkpoint_name,
    commit,
    open_newest,
    plan_retention,
    prune,
    sweep,
    write_part,
)
from ray_vlm.storage import Store
from tests.support.lines import kept_lines


def _write(store: Store, step: int, attempt: int = 1, score: float | None = None, text: str = "weights") -> str:
    name = checkpoint_name(step, attempt, "ab12")

    def fill(folder: Path) -> None:
        (folder / "a.bin").write_text(f"{text} {step}")
        (folder / "sub").mkdir()
        (folder / "sub" / "b.bin").write_bytes(os.urandom(100))

    commit(store, name, write_part(store, name, "rank0", fill), step, attempt=attempt, score=score, base="x")
    return name


def _newest(store: Store) -> tuple[int | None, list[str]]:
    with kept_lines() as messages:
        newest = open_newest(store)
    return (newest[0].step if newest else None), messages


def test_the_newest_is_found_with_what_it_stores(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert _newest(store) == (None, [])
    _write(store, 5)
    _write(store, 10, score=0.5)
    with kept_lines() as messages:
        checkpoint, folder = open_newest(store) or pytest.fail("none")
    assert messages == []
    assert (checkpoint.step, checkpoint.attempt, checkpoint.score, checkpoint.about["base"]) == (10, 1, 0.5, "x")
    assert (folder / "a.bin").read_text() == "weights 10"
    assert not [name for name in store.names() if name.startswith(".")]


def test_the_later_attempt_of_a_step_wins(tmp_path: Path) -> None:
    store = Store(tmp_path)
    _write(store, 10, attempt=2)
    _write(store, 10, attempt=10)
    with kept_lines() as messages:
        checkpoint, _ = open_newest(store) or pytest.fail("none")
    assert messages == []
    assert checkpoint.attempt == 10


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(bytes(data))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _other_step(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 10', '"step": 99'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "never finished"),
        (lambda folder: (folder / MANIFEST).write_text(""), "manifest is cut off"),
        (lambda folder: _cut(folder / MANIFEST) or _cut(folder / MANIFEST), "manifest is cut off"),
        (lambda folder: (folder / MANIFEST).write_text("[1, 2]"), "manifest is cut off"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), "manifest is cut off"),
        (lambda folder: _folder(folder / MANIFEST), "never finished"),
        (lambda folder: shutil.rmtree(folder) or folder.write_text("x"), "never finished"),
        (lambda folder: _other_step(folder / MANIFEST), "manifest was altered"),
        (lambda folder: (folder / "a.bin").unlink(), "a.bin is missing"),
        (lambda folder: _cut(folder / "a.bin"), "a.bin has 9 bytes instead of 10"),
        (lambda folder: _flip(folder / "sub" / "b.bin"), "sub/b.bin was altered"),
        (lambda folder: (folder / "stale.bin").write_text("x"), "stale.bin does not belong"),
    ],
)
def test_a_damaged_one_is_left_out_with_its_reason(tmp_path: Path, damage, reason: str) -> None:
    store = Store(tmp_path)
    _write(store, 5)
    damage(tmp_path / _write(store, 10))
    step, messages = _newest(store)
    assert step == 5
    assert len(messages) == 1
    assert reason in messages[0]
    sweep(store)
    assert _newest(store)[0] == 5


def test_a_newer_format_stops_instead_of_training_again_from_an_older_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    _write(store, 5)
    manifest = tmp_path / _write(store, 10) / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2, "writer": "ray_vlm 9.0"}))
    with pytest.raises(RunError, match=r"newer version \(ray_vlm 9.0"):
        _newest(store)


def test_a_full_disk_leaves_the_one_before(tmp_path: Path) -> None:
    store = Store(tmp_path)
    _write(store, 5)

    def fill(folder: Path) -> None:
        (folder / "a.bin").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_part(store, checkpoint_name(10, 1, "ab12"), "rank0", fill)
    assert _newest(store) == (5, [])
    assert not [name for name in store.names() if name.startswith(".")]


def _made(*steps_and_scores: tuple[int, float | None]) -> list[Checkpoint]:
    return [Checkpoint(f"c{step}", step, 1, score) for step, score in steps_and_scores]


def test_retention_by_count_and_by_metric() -> None:
    scores = _made((1, 0.1), (2, 0.9), (3, 0.5), (4, None), (5, 0.2))
    assert plan_retention(scores, keep=2, keep_best=0) == ["c1", "c2", "c3"]
    assert plan_retention(scores, keep=2, keep_best=1) == ["c1", "c3"]
    assert plan_retention(scores, keep=1, keep_best=2) == ["c1", "c4"]
    assert plan_retention(_made((1, 0.1)), keep=1, keep_best=0) == []
    assert plan_retention([], keep=1, keep_best=1) == []


def test_damaged_ones_never_count_as_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    _write(store, 1)
    _cut(tmp_path / _write(store, 2) / "a.bin")
    (tmp_path / _write(store, 3) / MANIFEST).unlink()
    prune(store, keep=1, keep_best=0)
    assert _newest(store)[0] == 1


def test_what_killed_writers_left_is_swept_away(tmp_path: Path) -> None:
    store = Store(tmp_path)
    committed = _write(store, 1)
    torn = _write(store, 2)
    (tmp_path / torn / MANIFEST).unlink()
    (tmp_path / ".staging-x").mkdir()
    (tmp_path / "best").mkdir()
    sweep(store)
    assert store.names() == ["best", committed]


def test_writers_killed_at_any_moment_lose_nothing(tmp_path: Path) -> None:
    from tests.support.killing import kill_writers

    counts = kill_writers(tmp_path, 12)
    assert (counts["lost"], counts["torn"]) == (0, 0)
    assert counts["unfinished"] > 0, "no kill hit a write; the test shows nothing"
