"""A worker in which nothing moves is named with its rows, everyone's stacks are kept, and the run goes on or ends."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from ray_vlm.config.load import load_job
from ray_vlm.errors import RunError
from ray_vlm.runs.monitor import current_lines, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.driver import train
from tests.support.ray_processes import processes

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
LIMIT = 1.0  # minutes


def hang_once(completion_ids: list, hang: list, **columns: Any) -> list[float]:
    """A reward that never comes, for the first worker that meets a row with a `hang`: a file that is made then."""
    for name in filter(None, hang):
        try:
            Path(name).touch(exist_ok=False)
        except FileExistsError:
            continue
        time.sleep(600)
    return [float(len(ids)) for ids in completion_ids]


def _grpo(job_file: Any, tmp_path: Path, scenes: Path, **cluster: Any) -> tuple[Path, str]:
    """A job of four steps in whose third step one prompt hangs; that prompt's id."""
    rows = [
        {"id": f"row{i}", "prompt": "<image>What is it?", "images": [str(path)], "hang": ""}
        for i, path in enumerate(sorted(scenes.rglob("*.jpg"))[:8])
    ]
    rows[5]["hang"] = str(tmp_path / "hung")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"num_generations": 2, "max_completion_tokens": 4}
    options |= {"rewards": {"tests.cluster.test_stall:hang_once": 1.0}}
    source = {"path": str(tmp_path / "rows.jsonl"), "format": "prompt", "image_root": str(scenes)}
    path = job_file(
        method={"name": "grpo", **options},
        task={"name": "chat"},
        data={"train": source, "shuffle": False},
        train={"max_steps": 4, "global_batch_size": 4, "micro_batch_size": 2},
        checkpoint={"every_steps": 1},
        cluster={"num_workers": 2, "stall_minutes": LIMIT, **cluster},
    )
    return path, "row5"


def _train(path: Path) -> RunPaths:
    return train(load_job(path), path.read_text())


def test_a_reward_that_never_comes(ray_cluster, job_file, tmp_path: Path, scenes: Path, capsys) -> None:
    path, row = _grpo(job_file, tmp_path, scenes)
    paths = _train(path)
    output = capsys.readouterr().out
    assert f"hangs for {LIMIT:g} minutes: sampling answers, step 3" in output
    assert row in output.split("rows ")[1].splitlines()[0]
    lines = [line for line in current_lines(read_metrics(paths.metrics)) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    attempts = json.loads(paths.run.read_text())["attempts"]
    assert [a["status"] for a in attempts] == ["failed", "finished"]
    stacks = {p.name: p.read_text() for p in (paths.root / "stalls").glob("*.txt")}
    assert sorted(stacks) == ["attempt-1-rank-0.txt", "attempt-1-rank-1.txt"]
    assert sum("in hang_once" in text for text in stacks.values()) == 1
    named = attempts[0]["error"].split("worker ")[1][0]
    assert "in hang_once" in stacks[f"attempt-1-rank-{named}.txt"], "the one that is named is the one that hangs"
    stalled = attempts[0]["ended"] - max(line["time"] for line in read_metrics(paths.metrics) if line["attempt"] == 1)
    assert stalled < 60 * LIMIT + 25


def test_a_stopped_process_and_a_job_that_ends_there(ray_cluster, job_file, tmp_path: Path) -> None:
    """It can say nothing itself; the other one says so, and Ray has to get rid of it."""
    path = job_file(
        train={"max_steps": 400, "global_batch_size": 4, "micro_batch_size": 2},
        cluster={"num_workers": 2, "stall_minutes": LIMIT, "on_stall": "stop"},
    )
    paths, stopped = RunPaths(tmp_path / "runs" / "run"), []

    def stop() -> None:
        until = time.monotonic() + 200
        while time.monotonic() < until and not any(x["kind"] == "train" for x in read_metrics(paths.metrics)):
            time.sleep(0.05)
        stopped.append(processes("RayTrainWorker")[-1].pid)
        os.kill(stopped[0], signal.SIGSTOP)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(RunError, match=r"worker [01] said nothing for 1 minutes while the others waited"):
        _train(path)
    until = time.monotonic() + 60
    while psutil.pid_exists(stopped[0]) and time.monotonic() < until:
        time.sleep(0.5)
    left = psutil.pid_exists(stopped[0])
    if left:
        os.kill(stopped[0], signal.SIGKILL)
    assert not left, "a process that holds a card must not stay"
    assert len(list((paths.root / "stalls").glob("*.txt"))) == 1
