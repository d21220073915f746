"""The driver of a run: a running run is not deleted, and a driver that was replaced writes nothing more."""

import json
import os
import platform
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from ray_vlm.errors import RunError
from ray_vlm.runs.drivers import check_own, is_alive, this_process
from ray_vlm.runs.manifest import last_attempt, start_attempt, start_manifest
from ray_vlm.runs.paths import RunPaths, claim_run
from ray_vlm.runs.store import Store
from ray_vlm.train import attempt as attempts
from ray_vlm.train import context
from ray_vlm.train.attempt import begin_attempt
from ray_vlm.train.driver import _end
from ray_vlm.tune.space import Space
from ray_vlm.tune.sweep import SWEEP, _check_sweep_folder

PARENT = {
    "host": platform.node(),
    "pid": os.getppid(),
    "started": psutil.Process(os.getppid()).create_time(),
}
ELSEWHERE = {"host": "another-machine", "pid": 7, "started": 5.0}


def _run(folder: Path, driver: dict[str, Any] | None, **attempt: Any) -> RunPaths:
    """A run of one attempt that `driver` started."""
    paths = claim_run(str(folder), "run", "sft")
    start_manifest(paths, {"seed": 1}, "", ["train"])
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
    alone = context.DistributedContext(0, 1, "cpu", ray=False)
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
