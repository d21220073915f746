"""The long parts of `benchmarks/chaos.py`: useful rows per second while workers are killed, and memory over time.

Each run starts in the Ray cluster of this process and stops after a given number of seconds from its first step.
"""

import contextlib
import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures import figure
from ray_vlm.config.load import load_job
from ray_vlm.errors import Interrupted
from ray_vlm.runs.monitor import current_lines, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.stop import ask_workers
from tests.support.killing import train_job
from tests.support.ray_processes import kill_process, processes, store_mib

KILL_EVERY_S = 30.0
CHECKPOINT_EVERY = 5  # steps: two seconds, as one would choose where a worker dies twice a minute
RESTARTS = 5  # of which the median is what a start takes
NEVER = 40_000  # steps of a run that is to go on until it is stopped
MIB = 2**20
OWN, SEEN = ", own pages", ", with all shared pages that it ever touched"
REST, STORE = "the rest of Ray", "in the object store"
Beside = Callable[[RunPaths, float], None]  # what goes on beside a run, told when its first step was done


def run_for(path: Path, name: str, seconds: float, beside: Beside, *overrides: str) -> RunPaths:
    """Train for `seconds` after the first step, with `beside` in a thread; a checkpoint is written at the end."""
    run = RunPaths(Path(load_job(path, ()).run.output_dir) / name)

    def watch() -> None:
        while not (first := _train_lines(run)):
            time.sleep(0.1)
        started = first[0]["time"]
        try:
            beside(run, started)
            time.sleep(max(0.0, started + seconds - time.time()))
        finally:
            ask_workers(run.store)

    threading.Thread(target=watch, daemon=True).start()
    with contextlib.suppress(Interrupted):
        train_job(path, f"run.name={name}", f"train.max_steps={NEVER}", "cluster.max_failures=1000", *overrides)
    return run


def _train_lines(run: RunPaths) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.metrics) if line["kind"] == "train"]


def _attempts(run: RunPaths) -> list[dict[str, Any]]:
    return json.loads(run.run.read_text())["attempts"]


def useful_steps(run: RunPaths, seconds: float) -> int:
    """Return how many of the steps done within `seconds` after the first one count in the end."""
    until = _train_lines(run)[0]["time"] + seconds
    counting = [line for line in current_lines(read_metrics(run.metrics)) if line["kind"] == "train"]
    return sum(line["time"] <= until for line in counting) - 1


def restarts(path: Path, *overrides: str) -> list[float]:
    """Return the seconds from launch to first step of undisturbed restarts: the next kill comes some steps later."""

    def kill(run: RunPaths, started: float) -> None:
        for number in range(RESTARTS + 1):
            until = time.time() + 120
            while _trained_since(run, number) < 10 and time.time() < until:
                time.sleep(0.1)
            if number < RESTARTS:
                kill_process("RayTrainWorker", number % 2)

    run = run_for(path, "restarts", 0.0, kill, *overrides)
    first: dict[int, float] = {}
    for line in _train_lines(run):
        first.setdefault(line["attempt"], line["time"])
    later = [attempt for attempt in _attempts(run)[1:] if attempt["attempt"] in first]
    return sorted(first[attempt["attempt"]] - attempt["started"] for attempt in later)


def _trained_since(run: RunPaths, failures: int) -> int:
    """Steps of the newest attempt, if so many came before it."""
    lines = _train_lines(run)
    newest = max((line["attempt"] for line in lines), default=0)
    return sum(line["attempt"] == newest for line in lines) if newest > failures else 0


def goodput(path: Path, seconds: float, every: float = KILL_EVERY_S, seed: int = 2) -> list[dict[str, Any]]:
    """Return useful rows per second while a random worker is killed at intervals, against the same job undisturbed."""
    moments = random.Random(seed)
    kills: list[float] = []
    missed: list[float] = []  # no worker was there to be killed

    def kill(run: RunPaths, started: float) -> None:
        for number in range(1, int((seconds - 1) // every) + 1):
            time.sleep(max(0.0, started + number * every - time.time()))
            (kills if kill_process("RayTrainWorker", moments.randrange(2)) else missed).append(time.time())

    keep = f"checkpoint.every_steps={CHECKPOINT_EVERY}"
    calm_s = min(60.0, seconds / 3)
    calm = run_for(path, "calm", calm_s, lambda run, started: None, keep)
    hurt = run_for(path, "hurt", seconds, kill, keep)
    rows = load_job(path, ()).train.global_batch_size
    undisturbed = useful_steps(calm, calm_s) * rows / calm_s
    useful = useful_steps(hurt, seconds) * rows
    starts = restarts(path, keep)
    middle = statistics.median(starts)
    starting, waits = lost_time(hurt, seconds, kills, middle)
    writes = [line["checkpoint_s"] for line in read_metrics(calm.metrics) if line["kind"] == "checkpoint"]
    doubled = sum(waits) - len(waits) * min(waits, default=0.0)
    again = len(_train_lines(hurt)) - sum(line["kind"] == "train" for line in current_lines(read_metrics(hurt.metrics)))

    def share(wall: float) -> float:
        return 100 * useful / wall / undisturbed

    def share_if(start: float) -> float:
        return share(seconds - lost_time(hurt, seconds, kills, start)[0])

    return [
        figure(f"a kill every {every:g} s for {seconds:g} s: kills", len(kills), "kills"),
        figure("  moments at which no worker was there to be killed", len(missed), ""),
        figure("  checkpoints undisturbed, of each second", sum(writes) / calm_s, "s"),
        figure("  undisturbed", undisturbed, "rows/s"),
        figure("  useful, start-up taken out", useful / (seconds - starting), "rows/s"),
        figure("    of undisturbed", share(seconds - starting), "%", 70, most=False),
        figure("    with start-up in", share(seconds), "%"),
        figure("    start-up taken out, each wait as short as the shortest", share(seconds - starting - doubled), "%"),
        figure("    of undisturbed, were a start the shortest", share_if(starts[0]), "%"),
        figure("    of undisturbed, were a start the longest", share_if(starts[-1]), "%"),
        figure("  undisturbed restarts, launch to first step: shortest", starts[0], "s"),
        figure("    median", middle, "s"),
        figure("    longest", starts[-1], "s"),
        figure("  start-ups taken out, all together", starting, "s"),
        figure("  from a kill to the next launch (seen, and a pause): shortest", min(waits, default=0.0), "s"),
        figure("    longest", max(waits, default=0.0), "s"),
        figure("    all together", sum(waits), "s"),
        figure("  steps done again", again, "steps"),
    ]


def lost_time(run: RunPaths, seconds: float, kills: list[float], one_start: float) -> tuple[float, list[float]]:
    """Return the seconds spent on restarts within the first `seconds`, each counted up to the length of an undisturbed
    start, and how long each kill waited for the next launch."""
    trained = _train_lines(run)
    until = trained[0]["time"] + seconds
    starting, waits = 0.0, []
    attempts = _attempts(run)
    for attempt in attempts[1:]:
        firsts = [line["time"] for line in trained if line["attempt"] == attempt["attempt"]]
        end = min([until, *firsts[:1], attempt["ended"]])
        starting += min(one_start, max(0.0, end - attempt["started"]))
    for kill in kills:
        later = [attempt["started"] for attempt in attempts if attempt["started"] > kill]
        waits.append(min([until, *later[:1]]) - kill)
    return starting, waits


def soak(path: Path, seconds: float) -> list[dict[str, Any]]:
    """Compare the memory of a run with validations and checkpoints in the last fifth of its time with that in the
    second."""
    samples: list[tuple[float, dict[str, float]]] = []

    def watch(run: RunPaths, started: float) -> None:
        while time.time() < started + seconds:
            samples.append(((time.time() - started) / seconds, memory_now() | {STORE: store_mib()}))
            time.sleep(5.0)  # looking takes memory and time too

    scenes = Path(str(load_job(path, ()).data.train.path))  # type: ignore[union-attr]
    evaluate = [f"data.eval={{path: {scenes}, max_rows: 6}}", "evaluate.every_steps=60", "evaluate.num_samples=6"]
    evaluate += ["evaluate.metric=f1_50", "evaluate.max_new_tokens=8", "checkpoint.every_steps=30"]
    run = run_for(path, "soak", seconds, watch, *evaluate)
    kinds = Counter(line["kind"] for line in read_metrics(run.metrics))
    figures = [
        figure(f"{seconds / 60:g} minutes: steps", kinds["train"], "steps", 1, most=False),
        figure("  validations", kinds["eval"], "", 1, most=False),
        figure("  checkpoints", kinds["checkpoint"], "", 1, most=False),
    ]
    names = sorted({name for _, sample in samples for name in sample})
    for name in names:
        early, late = _mean(samples, name, 0.2, 0.4), _mean(samples, name, 0.8, 1.0)
        bar = None if name == STORE or REST in name else 5.0
        figures.append(figure(f"  {name}, second fifth", early, "MiB"))
        figures.append(figure("    grown by the last fifth", late - early, "MiB"))
        figures.append(figure("    of what it was", 100 * (late / max(early, 1e-9) - 1), "%", bar))
    return figures


def memory_now() -> dict[str, float]:
    """Return MiB of the driver, each worker, the loaders and the rest of Ray, in three measures: proportional, own
    pages, and resident. Proportional memory divides a shared page among its processes, so the sum is what the machine
    holds.

    Resident memory grows longest: a process keeps every page of the object store that it has ever touched, whatever the
    page holds now, until it has touched them all.
    """
    workers, loaders = processes("RayTrainWorker"), processes("MapWorker")
    known = {process.pid for process in (*workers, *loaders)}
    groups = {"driver": [psutil.Process()]}
    groups |= {f"worker {number}": [process] for number, process in enumerate(workers)}
    groups |= {"loaders": loaders, REST: [p for p in processes() if p.pid not in known]}
    memory: dict[str, float] = {}
    for name, group in groups.items():
        sizes = []
        for process in group:
            with contextlib.suppress(psutil.Error):
                sizes.append(process.memory_full_info())
        memory[name] = sum(size.pss for size in sizes) / MIB
        memory[name + OWN] = sum(size.uss for size in sizes) / MIB
        memory[name + SEEN] = sum(size.rss for size in sizes) / MIB
    return memory


def _mean(samples: list[tuple[float, dict[str, float]]], name: str, first: float, last: float) -> float:
    return statistics.mean(sample[name] for when, sample in samples if first <= when < last and name in sample)
