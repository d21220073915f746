"""Recovery from failures, bit for bit: killed workers, changed numbers of workers, killed writers, a killed driver.

Run: python -m benchmarks.recovery [--quick] [--json PATH]. Two workers of one thread each on a tiny random Qwen3-VL in
float32; every disturbed run is compared with the same run undisturbed.
"""

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.figures import figure, report
from ray_vlm.config.load import load_job
from ray_vlm.errors import Interrupted
from ray_vlm.runs.checkpoints import open_newest, sweep
from ray_vlm.runs.monitor import current_lines, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.runs.store import Store

ROOT = Path(__file__).parents[1]
STEPS = 12  # of 6 rows each, over 30 rows: more than two epochs
_WRITER = """
import os, sys
from pathlib import Path
from ray_vlm.runs.checkpoints import checkpoint_name, commit, prune, write_part
from ray_vlm.runs.store import Store
store, attempt = Store(sys.argv[1]), int(sys.argv[2])
def fill(folder):
    for i in range(4):
        (folder / f"{i}.bin").write_bytes(os.urandom(50_000))
for step in range(attempt * 1000, attempt * 1000 + 999):
    name = checkpoint_name(step, attempt, f"{attempt:04x}")
    commit(store, name, write_part(store, name, "rank0", fill), step, attempt=attempt)
    print(step, flush=True)
    prune(store, keep=2, keep_best=0)
"""


def kill_writers(folder: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Kill a writer at `count` moments; after each, the newest complete checkpoint must be at least the last one that
    the writer reported. Return how many were lost or torn, and how many kills hit an unfinished one."""
    import random

    moments, store = random.Random(seed), Store(folder)
    lost, torn, hit, last = 0, 0, 0, -1
    for attempt in range(1, count + 1):
        command = [sys.executable, "-c", _WRITER, str(folder), str(attempt)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            first = writer.stdout.readline()
            time.sleep(moments.uniform(0, 0.03))
            os.kill(writer.pid, signal.SIGKILL)
            written = [int(line) for line in (first + writer.stdout.read()).split()]
        last = max([last, *written])
        newest = open_newest(store, lambda text: None)
        if newest is None or newest[0].step < last:
            lost += 1
        else:
            torn += any(len((newest[1] / f"{i}.bin").read_bytes()) != 50_000 for i in range(4))
        before = len(store.names())
        sweep(store)
        hit += len(store.names()) < before
    return {"lost": lost, "torn": torn, "unfinished": hit}


def write_job(folder: Path) -> Path:
    """Write a small job over drawn scenes, on a tiny random model."""
    from ray_vlm.demo.shapes import draw
    from ray_vlm.demo.tiny import write_untrained

    draw(folder / "scenes", "studio", "train", 30)
    job = {
        "model": {"name": str(write_untrained(folder / "model", "qwen3_vl")), "load_in_4bit": False},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": {"path": str(folder / "scenes" / "train.json")}},
        "train": {"global_batch_size": 6, "micro_batch_size": 3, "max_steps": STEPS, "precision": "fp32"},
        "checkpoint": {"every_steps": 3},
        "cluster": {"num_workers": 2},
        "run": {"output_dir": str(folder / "runs")},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def train_job(path: Path, *overrides: str, resume: bool = False) -> RunPaths:
    """Train the job in this process's Ray cluster."""
    from ray_vlm.train.driver import train

    return train(load_job(path, overrides), path.read_text(), resume=resume)


def at_step(run: RunPaths, step: int, do: Callable[[], Any]) -> threading.Thread:
    """Call `do` in a thread as soon as `metrics.jsonl` has that step."""

    def wait() -> None:
        until = time.monotonic() + 200
        while time.monotonic() < until:
            if any(line["kind"] == "train" and line["step"] >= step for line in read_metrics(run.metrics)):
                return do()
            time.sleep(0.02)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def processes(title: str = "") -> list[psutil.Process]:
    """Return the processes of this process's Ray cluster that have this title in Ray, ordered by pid."""
    matching = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                matching.append(process)
    return sorted(matching, key=lambda process: process.pid)


def kill_process(title: str, number: int = 0) -> bool:
    """Send SIGKILL to the `number`-th of those processes; return whether there was one."""
    victims = processes(title)
    if victims:
        victims[number % len(victims)].kill()
    return bool(victims)


def steps_of(run: RunPaths) -> list[tuple[int, float, float]]:
    """Return step, loss and gradient norm of every step that counts."""
    lines = current_lines(read_metrics(run.metrics))
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"]


def weights_of(run: RunPaths) -> bytes:
    """Return the weights of the final adapter."""
    return (run.final / "adapter_model.safetensors").read_bytes()


def kill_workers(path: Path, undisturbed: RunPaths, count: int) -> list[dict[str, Any]]:
    """Kill one of two workers at a random step, repeatedly; count the runs that finish by themselves, and those with
    equal results."""
    moments, ended, equal, killed = random.Random(1), 0, 0, 0
    for number in range(count):
        run = RunPaths(undisturbed.root.parent / f"killed-{number}")
        rank = moments.randrange(2)
        at_step(run, moments.randrange(1, STEPS - 1), lambda rank=rank: kill_process("RayTrainWorker", rank))
        train_job(path, f"run.name={run.name}")
        ended += json.loads(run.run.read_text())["status"] == "finished"
        killed += len(json.loads(run.run.read_text())["attempts"]) > 1
        equal += weights_of(run) == weights_of(undisturbed) and steps_of(run) == steps_of(undisturbed)
    return [
        figure(f"killed workers, {count} runs: kills that hit", killed, "runs", count, most=False),
        figure("  runs that ended by themselves", ended, "runs", count, most=False),
        figure("  final adapters equal bit for bit", equal, "runs", count, most=False),
    ]


def change_world(path: Path, undisturbed: RunPaths, worlds: Sequence[int]) -> list[dict[str, Any]]:
    """Stop and resume on other numbers of workers; check rows once an epoch, and losses equal to the undisturbed
    run's."""
    from ray_vlm.train.prepare import plan_run
    from ray_vlm.train.stop import ask_workers

    run, spans = RunPaths(undisturbed.root.parent / "worlds"), []
    for number, world in enumerate(worlds):
        if number + 1 < len(worlds):
            at_step(run, 4 * (number + 1), lambda: ask_workers(run.store))
        with contextlib.suppress(Interrupted):
            train_job(path, f"run.name={run.name}", f"cluster.num_workers={world}", resume=number > 0)
        attempt = json.loads(run.run.read_text())["attempts"][-1]
        spans.append((world, attempt["from_step"], attempt["to_step"]))
    seen: Counter = Counter()
    for world, first, last in spans:
        plan = plan_run(load_job(path, [f"cluster.num_workers={world}"]), 30)
        for step in range(first, last):
            for rank in range(world):
                micros = plan.rank_step(step, rank)
                seen.update((step // plan.steps_per_epoch, row) for m in micros if not m.filler for row in m.rows)
    wrong = sum(count != 1 for count in seen.values()) + (len(seen) != STEPS * 6)
    worst = max(abs(a[1] - b[1]) / abs(b[1]) for a, b in zip(steps_of(run), steps_of(undisturbed), strict=True))
    name = " -> ".join(map(str, worlds))
    return [
        figure(f"{name} workers: rows not seen exactly once an epoch", wrong, "rows", 0),
        figure("  attempts that trained", sum(last > first for _, first, last in spans), "", len(worlds), most=False),
        figure("  largest relative difference of a loss", worst, "", 1e-4),
    ]


def kill_driver(path: Path, undisturbed: RunPaths, damage: Sequence[str]) -> list[dict[str, Any]]:
    """Kill the driver and damage Ray's own state of the run, then run the same command again."""
    good = 0
    for kind in damage:
        run = RunPaths(undisturbed.root.parent / f"driver-{kind}")
        command = [sys.executable, "-m", "ray_vlm", "train", str(path), "--resume", f"run.name={run.name}"]
        driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        at_step(run, 5, lambda driver=driver: driver.kill()).join()
        driver.wait()
        _damage_snapshots(run.root / ".ray", kind)
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        attempts = json.loads(run.run.read_text())["attempts"]
        good += done.returncode == 0 and attempts[-1]["from_step"] >= 3 and weights_of(run) == weights_of(undisturbed)
    return [
        figure("killed drivers, Ray's snapshot " + "/".join(damage) + ": went on", good, "runs", len(damage), False)
    ]


def _damage_snapshots(folder: Path, kind: str) -> None:
    for state in folder.glob("*/"):
        snapshot = state / "checkpoint_manager_snapshot.json"
        if kind == "deleted":
            snapshot.unlink(missing_ok=True)
        else:
            snapshot.write_text("" if kind == "emptied" else '{"ray_version": "2.6')


def checkpoint_cost(folder: Path) -> list[dict[str, Any]]:
    """Measure the demo's job for an epoch at the default interval: time of a checkpoint over the time of the steps
    between."""
    from ray_vlm.demo.story import demo_job
    from ray_vlm.train.driver import train
    from ray_vlm.train.prepare import plan_run

    job = demo_job(folder, ["train.max_steps=24", "checkpoint.every_steps=4", "data.eval=null", "run.name=cost"])
    run = train(job, "")
    lines = read_metrics(run.metrics)
    writes = [line["checkpoint_s"] for line in lines if line["kind"] == "checkpoint"]
    steps = [line["step_s"] for line in lines if line["kind"] == "train"][4:]
    rows = len(json.loads(Path(job.data.train.path).read_text())["images"]) if job.data.train else 1
    interval = plan_run(job, rows).steps_per_epoch
    share = statistics.median(writes) / (statistics.median(steps) * interval)
    return [
        figure("a checkpoint of the demo (median)", statistics.median(writes), "s"),
        figure(f"  over {interval} steps, the default interval", 100 * share, "%", 3.5),
    ]


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return all figures; `quick`: fewer repetitions of each."""
    import ray

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "writers").mkdir()
        killed = kill_writers(folder / "writers", 20 if quick else 200)
        figures = [
            figure("killed writers: moments", 20 if quick else 200, "kills"),
            figure("  that left an unfinished checkpoint", killed["unfinished"], "kills", 1, most=False),
            figure("  torn checkpoints loaded", killed["torn"], "", 0),
            figure("  newest whole one not found", killed["lost"], "", 0),
        ]
        path = write_job(folder)
        ray.init(num_cpus=8, include_dashboard=True, log_to_driver=False, logging_level="ERROR")
        undisturbed = train_job(path, "run.name=whole")
        figures += kill_workers(path, undisturbed, 1 if quick else 10)
        figures += change_world(path, undisturbed, (2, 1, 3))
        ray.shutdown()
        figures += kill_driver(path, undisturbed, ("emptied",) if quick else ("emptied", "truncated", "deleted"))
        return figures + checkpoint_cost(folder / "demo")


if __name__ == "__main__":
    report(measure)
