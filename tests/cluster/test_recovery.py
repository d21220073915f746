"""Workers, controllers and drivers that die: the run goes on by itself, or by the same command, to the same end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.load import load_job
from ray_vlm.errors import RunError
from ray_vlm.runs.monitor import current_lines, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.runs.read import read_run
from ray_vlm.train.driver import train
from ray_vlm.train.worker_spec import WorkerSpec
from tests.support.ray_processes import kill_process

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]


def _steps(paths: RunPaths) -> list[tuple[int, float, float]]:
    lines = current_lines(read_metrics(paths.metrics))
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"]


def _weights(paths: RunPaths) -> bytes:
    return (paths.final / "adapter_model.safetensors").read_bytes()


def _at_step(paths: RunPaths, step: int, do: Callable[[], Any], attempt: int | None = None) -> threading.Thread:
    """Call `do` as soon as `metrics.jsonl` has that step, of that attempt: workers outlive a killed driver a little."""

    def wait() -> None:
        until = time.monotonic() + 500
        while time.monotonic() < until:
            lines = [line for line in read_metrics(paths.metrics) if attempt in (None, line["attempt"])]
            if any(line["step"] == step and line["kind"] == "train" for line in lines):
                return do()
            time.sleep(0.02)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def small(job_file, tmp_path: Path) -> Path:
    return job_file(
        train={"max_steps": 10, "global_batch_size": 6, "micro_batch_size": 3},
        checkpoint={"every_steps": 3},
        cluster={"num_workers": 2, "max_failures": 2},
    )


def _train(path: Path, *overrides: str, resume: bool = False) -> RunPaths:
    return train(load_job(path, overrides), path.read_text(), resume=resume)


@pytest.fixture
def losing(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings under which three images go as soon as the rows were checked; they are back for the next run."""
    from ray_vlm.train import driver

    copy, launch = tmp_path / "scenes", driver.launch
    shutil.copytree(scenes, copy)
    gone = [image["file_name"] for image in json.loads((copy / "train.json").read_text())["images"]][::20]

    def lose(*args: Any, **kwargs: Any) -> Any:
        for name in gone:
            (copy / name).unlink()
        try:
            return launch(*args, **kwargs)
        finally:
            for name in gone:
                shutil.copy(scenes / name, copy / name)

    monkeypatch.setattr(driver, "launch", lose)
    return [f"data.train={{path: {copy / 'train.json'}}}", "data.eval=null", "data.on_bad_row=quarantine"]


@pytest.mark.parametrize(
    ("workers", "kills"),
    [(1, ["RayTrainWorker"]), pytest.param(2, ["RayTrainWorker", "TrainController"], marks=pytest.mark.slow)],
)
def test_killed_processes_change_nothing(
    workers: int, kills: list[str], ray_cluster, small: Path, tmp_path: Path, losing: list[str]
) -> None:
    """A worker dies right after a checkpoint, which Ray would have lost; Ray never retries a controller that dies.
    The run ends like the undisturbed one, bit for bit, and loses the same rows. One worker's numbers are those of a run
    in this process."""
    undisturbed_run = _train(small, *losing, "run.name=whole", f"cluster.num_workers={workers if workers > 1 else 0}")
    paths = RunPaths(tmp_path / "runs" / "hurt")
    _at_step(paths, 4, lambda: kill_process("RayTrainWorker", workers - 1))
    if "TrainController" in kills:
        _at_step(paths, 8, lambda: kill_process("TrainController"))
    _train(small, *losing, "run.name=hurt", f"cluster.num_workers={workers}")
    assert _steps(paths) == _steps(undisturbed_run)
    assert _weights(paths) == _weights(undisturbed_run)
    lost, undisturbed = (sorted(json.loads(p.run.read_text())["result"]["lost_rows"]) for p in (paths, undisturbed_run))
    assert len(lost) >= 3
    assert lost == undisturbed
    attempts = json.loads(paths.run.read_text())["attempts"]
    assert [a["status"] for a in attempts] == [*["failed"] * len(kills), "finished"]
    assert "died" in attempts[0]["error"]
    # A kill that came late finds a later checkpoint, never an older one.
    assert all(a["from_step"] >= earliest for a, earliest in zip(attempts, (0, 3, 6), strict=False))


@pytest.mark.slow
def test_failures_beyond_the_budget_end_the_run_with_the_cause(ray_cluster, small: Path, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "runs" / "run")
    _at_step(paths, 2, lambda: kill_process("RayTrainWorker", 0))
    with pytest.raises(RunError, match=r"training failed: worker .* died"):
        _train(small, "cluster.max_failures=0")
    assert json.loads(paths.run.read_text())["status"] == "failed"
    _train(small, "cluster.num_workers=1", resume=True)  # on another number of workers
    assert [step for step, _, _ in _steps(paths)] == list(range(1, 11))


@pytest.mark.parametrize("own_ray", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_killed_driver_a_torn_snapshot_and_ctrl_c(own_ray: bool, ray_cluster, small: Path, tmp_path: Path) -> None:
    """The second driver goes on where the first was killed, until Ctrl-C: Ray Train's own handler would end it with
    exit code 0 and status "running"."""
    import ray

    paths = RunPaths(tmp_path / "runs" / "run")
    words = ["train", str(small), "--resume", "cluster.num_workers=1", "train.max_steps=2000"]
    env = os.environ if own_ray else os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", "ray_vlm", *words], cwd=ROOT, env=env, start_new_session=True)

    driver = start()
    _at_step(paths, 5, lambda: os.kill(driver.pid, signal.SIGKILL)).join()
    assert driver.wait(timeout=10) == -signal.SIGKILL
    assert json.loads(paths.run.read_text())["status"] == "running"
    snapshot = paths.root / ".ray" / "run-attempt-1"
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / "checkpoint_manager_snapshot.json").write_text("")
    reached = max(step for step, _, _ in _steps(paths))
    driver = start()
    _at_step(paths, reached + 3, lambda: driver.send_signal(signal.SIGINT), attempt=2).join()
    try:
        assert driver.wait(timeout=60) == 130
    finally:
        driver.kill()
    last = _steps(paths)[-1][0]
    assert [step for step, _, _ in _steps(paths)] == list(range(1, last + 1))
    manifest = json.loads(paths.run.read_text())
    assert manifest["status"] == manifest["attempts"][-1]["status"] == "interrupted"
    assert [attempt.get("from_step") for attempt in manifest["attempts"]][1] >= 3
    assert read_run(str(paths.root)).status == "interrupted"
    assert json.loads(paths.training_log.read_text())["training_history"][-1]["step"] == last
    assert not (paths.root / ".ray").exists()


@pytest.mark.slow
def test_ray_may_restart_the_workers_by_itself(ray_cluster, small: Path, tmp_path: Path) -> None:
    """What its elastic and preemption policies do: the worker function finds its own way, and counts a new attempt."""
    from dataclasses import replace

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from ray_vlm.config.load import dump_job
    from ray_vlm.runs.manifest import claim_run, start_manifest
    from ray_vlm.train.launch import run_ray_worker
    from ray_vlm.train.prepare import prepare

    prepared = prepare(load_job(small))
    paths = claim_run(str(tmp_path / "runs"), "own", "x")
    start_manifest(paths, dump_job(prepared.job), "", [], rows_version=2)
    spec = WorkerSpec(dump_job(prepared.job), paths.address, prepared.spec, prepared.plan, (), None)
    spec = replace(spec, train=prepared.train.records)
    run = RunConfig(name="own", storage_path=str(tmp_path / "ray"), failure_config=FailureConfig(max_failures=1))
    trainer = TorchTrainer(
        run_ray_worker,
        train_loop_config={"spec": spec},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=run,
    )
    _at_step(paths, 5, lambda: kill_process("RayTrainWorker", 0))
    trainer.fit()
    lines = read_metrics(paths.metrics)
    assert [(line["attempt"], line["step"]) for line in lines if line["kind"] == "start"] == [(1, 0), (2, 3)]
    assert [step for step, _, _ in _steps(paths)] == list(range(1, 11))


@pytest.mark.slow
def test_a_report_holds_the_workers_for_less_than_a_third_of_a_second(ray_cluster, tmp_path: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from ray_vlm.runs.monitor import as_python_numbers

    times_file = tmp_path / "times.json"

    def work(config: dict[str, Any]) -> None:
        import numpy as np
        import ray.train
        import torch

        times = []
        for step in range(8):
            started = time.monotonic()
            ray.train.report(
                as_python_numbers({"step": step, "a": np.float32(0.5), "b": torch.tensor(0.25), "c": float("nan")})
            )
            times.append(time.monotonic() - started)
        if ray.train.get_context().get_world_rank() == 0:
            Path(config["found"]).write_text(json.dumps(times))

    run = RunConfig(name="reports", storage_path=str(tmp_path / "ray"))
    TorchTrainer(
        work, train_loop_config={"found": str(times_file)}, scaling_config=ScalingConfig(num_workers=2), run_config=run
    ).fit()
    times = sorted(json.loads(times_file.read_text()))
    assert times[len(times) // 2] <= 0.3


@pytest.mark.slow
def test_two_workers_on_an_object_store_survive_a_kill(
    ray_cluster, bucket: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes that have no credentials of their own: these come with the task."""
    from ray_vlm.runs.paths import open_run
    from ray_vlm.storage import Store, join

    undisturbed_run = _train(small, "run.name=whole")
    base = join(bucket, tmp_path.name)
    seen = open_run(join(base, "hurt"))

    def watch() -> None:
        until = time.monotonic() + 500
        while time.monotonic() < until and not seen.store.read("metrics.jsonl"):
            time.sleep(0.2)
        while len([n for n in seen.store.names() if n.startswith("checkpoint-")]) < 1:
            time.sleep(0.05)
        kill_process("RayTrainWorker", 1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    paths = _train(small, "run.name=hurt", f"run.output_dir={base}")
    thread.join()
    store = Store(paths.address)
    assert store.read("final/adapter_model.safetensors") == _weights(undisturbed_run)
    run = json.loads(store.read("run.json") or b"")
    assert [a["status"] for a in run["attempts"]] == ["failed", "finished"]
