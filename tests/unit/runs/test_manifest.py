"""`run.json`: the outcome of each attempt; a running run is not deleted, and a replaced driver writes nothing more."""

import json
import os
import platform
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from ray_vlm.distributed import DistributedContext
from ray_vlm.errors import RunError
from ray_vlm.runs.manifest import (
    check_own,
    claim_run,
    complete,
    is_alive,
    last_attempt,
    start_attempt,
    start_manifest,
    tell_attempts,
    this_process,
)
from ray_vlm.runs.paths import RunPaths
from ray_vlm.storage import Store
from ray_vlm.train import attempt as attempts
from ray_vlm.train.attempt import begin_attempt
from ray_vlm.train.driver import _end
from ray_vlm.tune.space import Space
from ray_vlm.tune.sweep import SWEEP, _check_sweep_folder


def _start(attempt: int, step: int, workers: int = 2) -> dict[str, Any]:
    return {"kind": "start", "attempt": attempt, "step": step, "num_workers": workers, "time": 100.0 + attempt}


def _steps(attempt: int, first: int, last: int) -> list[dict[str, Any]]:
    return [{"kind": "train", "attempt": attempt, "step": step} for step in range(first, last + 1)]


def test_an_attempt_that_ends_between_checkpoints_loses_steps() -> None:
    listed = [
        {"attempt": 1, "status": "failed", "error": "worker 1 died", "ended": 5.0},
        {"attempt": 2, "status": "finished", "ended": 9.0},
    ]
    lines = [_start(1, 0), *_steps(1, 1, 7), _start(2, 4), *_steps(2, 5, 10)]
    attempts = complete(listed, lines)
    assert [(a["from_step"], a["to_step"], a.get("lost_steps")) for a in attempts] == [(0, 7, 3), (4, 10, None)]
    assert tell_attempts(attempts) == (
        "2 attempts: worker 1 died at step 7 (3 steps done again). 3 of 10 steps done twice."
    )
    assert complete(attempts, lines) == attempts, "writing it down again changes nothing"


def test_attempts_that_ray_began_by_itself_are_found() -> None:
    """Ray changed the number of workers twice; the run's final status belongs to the last attempt."""
    listed = [{"attempt": 1, "status": "finished", "ended": 300.0, "driver": {"pid": 1}}]
    lines = [_start(1, 0, 2), *_steps(1, 1, 6), _start(2, 4, 1), *_steps(2, 5, 8), _start(3, 8, 2), *_steps(3, 9, 9)]
    attempts = complete(listed, lines)
    assert [a["status"] for a in attempts] == ["resized", "resized", "finished"]
    assert [a["workers"] for a in attempts] == [2, 1, 2]
    assert [a["ended"] for a in attempts] == [102.0, 103.0, 300.0]
    assert tell_attempts(attempts) == (
        "3 attempts: went on with 1 worker at step 6 (2 steps done again); went on with 2 workers at step 8. "
        "2 of 9 steps done twice."
    )


def test_one_that_never_trained_and_one_that_was_stopped() -> None:
    listed = [
        {"attempt": 1, "status": "failed", "error": "ControllerError: no room\nmore"},
        {"attempt": 2, "status": "interrupted"},
        {"attempt": 3, "status": "running"},
        {"attempt": 4, "status": "preempted", "error": "the machine of worker 0 will be taken away in 12 s"},
        {"attempt": 5, "status": "finished"},
    ]
    lines = [_start(2, 0), *_steps(2, 1, 3), _start(3, 3), *_steps(3, 4, 5), _start(4, 3), *_steps(4, 4, 6)]
    lines += [_start(5, 6), *_steps(5, 7, 8)]
    assert tell_attempts(complete(listed, lines)) == (
        "5 attempts: ControllerError: no room before its first step; stopped by a signal at step 3; ended without "
        "a message at step 5 (2 steps done again); the machine of worker 0 will be taken away in 12 s at step 6. "
        "2 of 8 steps done twice."
    )


@pytest.mark.parametrize(
    ("status", "extension"), [("finished", "was extended to step 10"), ("interrupted", "was extended")]
)
def test_an_extension_is_no_fault(status: str, extension: str) -> None:
    listed = [{"attempt": 1, "status": "finished"}, {"attempt": 2, "status": status}]
    lines = [_start(1, 0), *_steps(1, 1, 6), _start(2, 6), *_steps(2, 7, 10)]
    assert tell_attempts(complete(listed, lines)) == f"2 attempts: finished at step 6 and {extension}."


def test_a_run_that_went_through_at_once_says_nothing() -> None:
    assert tell_attempts(complete([{"attempt": 1, "status": "finished"}], [_start(1, 0), *_steps(1, 1, 4)])) is None


PARENT = {
    "host": platform.node(),
    "pid": os.getppid(),
    "started": psutil.Process(os.getppid()).create_time(),
}
ELSEWHERE = {"host": "another-machine", "pid": 7, "started": 5.0}


def _run(folder: Path, driver: dict[str, Any] | None, **attempt: Any) -> RunPaths:
    """A run of one attempt that `driver` started."""
    paths = claim_run(str(folder), "run", "sft")
    start_manifest(paths, {"seed": 1}, "", ["train"], rows_version=2)
    _driven_by(paths, driver, **attempt)
    return paths


def _driven_by(paths: RunPaths, driver: dict[str, Any] | None, **attempt: Any) -> None:
    run = json.loads(paths.run.read_text())
    run["attempts"][-1] |= attempt | ({} if driver is None else {"driver": driver})
    paths.run.write_text(json.dumps(run))


def test_a_run_that_another_process_trains_is_not_deleted(tmp_path: Path) -> None:
    paths = _run(tmp_path, PARENT)
    with pytest.raises(RunError, match=rf"--overwrite: .*/run is being trained by process {os.getppid()} on"):
        claim_run(str(tmp_path), "run", "sft", overwrite=True)
    assert paths.run.is_file()


@pytest.mark.parametrize(
    ("driver", "attempt"),
    [
        (None, {}),  # this process itself
        (PARENT, {"ended": 9.0, "status": "failed"}),
        (PARENT | {"started": PARENT["started"] - 100}, {}),  # another process has the id now
        (ELSEWHERE, {}),
        ({"pid": "x"}, {}),
    ],
)
def test_a_run_that_nobody_here_trains_is_deleted(tmp_path: Path, driver: Any, attempt: dict[str, Any]) -> None:
    _run(tmp_path, driver, **attempt)
    claim_run(str(tmp_path), "run", "sft", overwrite=True)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_process_stays_itself_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = this_process()
    real = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 1.0)
    assert this_process() == before
    assert is_alive(before)
    assert not is_alive(before | {"started": before["started"] - 60})


@pytest.mark.parametrize("other", [ELSEWHERE, PARENT])
def test_a_driver_that_was_overtaken_writes_nothing(tmp_path: Path, other: dict[str, Any]) -> None:
    """Of another machine nothing is known: it may have resumed the run, or deleted it and begun one of that name, whose
    attempt then has the same number."""
    paths = _run(tmp_path, other)
    there = paths.run.read_bytes()
    with pytest.raises(RunError, match=f"no longer this driver's run: process {other['pid']} on {other['host']}"):
        _end(paths, "failed", None, "a worker died")
    assert paths.run.read_bytes() == there
    assert not paths.training_log.exists()
    paths.run.unlink()
    with pytest.raises(RunError, match="it was deleted"):
        _end(paths, "finished", {"best": None}, "")
    assert sorted(p.name for p in paths.root.iterdir()) == ["job.yaml", "resolved.json"]


def test_a_driver_writes_into_its_own_run(tmp_path: Path) -> None:
    paths = _run(tmp_path, None)
    check_own(paths.store)
    _driven_by(paths, ELSEWHERE, ended=1.0, status="failed")
    start_attempt(paths)  # --resume
    assert last_attempt(paths) == 2
    _end(paths, "finished", {"best": None, "num_steps": 0}, "")
    run = json.loads(paths.run.read_text())
    assert (run["status"], [a["status"] for a in run["attempts"]]) == ("finished", ["failed", "finished"])


def test_workers_that_ray_starts_anew_do_not_take_a_run_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = _run(tmp_path, None)
    alone = DistributedContext(0, 1, "cpu", ray=False)
    assert begin_attempt(paths.store, alone, 1, this_process()).number == 1
    _driven_by(paths, ELSEWHERE)
    owner = (paths.root / ".attempt.json").read_bytes()
    monkeypatch.setattr(attempts, "_check_driver", partial(attempts._check_driver, wait_s=0.0))
    with pytest.raises(RunError, match="process 7 on another-machine drives it now"):
        begin_attempt(paths.store, alone, 1, this_process())
    assert (paths.root / ".attempt.json").read_bytes() == owner


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_sweep_that_another_process_drives_is_left_alone(tmp_path: Path, flag: str) -> None:
    sweep = {"job": {}, "space": [], "trials": [], "driver": PARENT}
    Store(tmp_path).write(SWEEP, json.dumps(sweep).encode())
    with pytest.raises(RunError, match=rf"--{flag}: .* is being trained by process {os.getppid()}"):
        _check_sweep_folder(str(tmp_path), {}, Space(()), flag == "resume", flag == "overwrite")
