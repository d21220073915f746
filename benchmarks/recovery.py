"""Recovery from failures, bit for bit: killed workers, changed numbers of workers, killed writers, a killed driver.

Run: python -m benchmarks.recovery [--quick] [--json PATH]. Two workers of one thread each on a tiny random Qwen3-VL in
float32; every disturbed run is compared with the same run undisturbed.
"""

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import figure, report
from ray_vlm.config.load import load_job
from ray_vlm.errors import Interrupted
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.runs.paths import RunPaths
from tests.support.killing import STEPS, at_step, kill_writers, steps_of, train_job, weights_of, write_job
from tests.support.ray_processes import kill_process

ROOT = Path(__file__).parents[1]


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
                seen.update((step // plan.steps_per_epoch, row) for m in micros if not m.padding for row in m.rows)
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
