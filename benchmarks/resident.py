"""Trials on a base that stays in memory against one `TorchTrainer` per trial: the same curves, and the speed-up.

Eight trials of 20 steps of 4 rows with one validation of 16, of the demo job in 4 bit, that differ in their seed. Both
arms are sweeps in one Ray cluster that is up before the clock starts.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import figure, report
from ray_vlm.runs.monitor import read_metrics

JOB = "jobs/demo_sft.yaml"
SHORT = [
    *("train.max_steps=20", "train.global_batch_size=4", "train.micro_batch_size=4", "evaluate.every_steps=20"),
    *("evaluate.num_samples=16", "checkpoint.every_steps=20", "data.test=null", "tune.export=null"),
    *("tune.scheduler=none", "tune.default_first=false", "tune.max_concurrent=1"),
]


def sweep(folder: Path, name: str, seeds: int, *words: str) -> tuple[dict[str, list[float]], float]:
    """Return the losses of each trial, in training and validation, and the seconds of the sweep."""
    from ray_vlm.tune.sweep import tune

    space = folder / "space.yaml"
    space.write_text(json.dumps({"seed": {"grid": list(range(seeds))}}))
    started = time.monotonic()
    words = (*SHORT, f"run.output_dir={folder}", f"run.name={name}", f"tune.num_trials={seeds}", *words)
    trials = Path(tune(JOB, words, str(space))) / "trials"
    wall = time.monotonic() - started
    lines = {trial.name: read_metrics(trial / "metrics.jsonl") for trial in sorted(trials.iterdir())}
    return {n: [e["loss"] for e in entries if e["kind"] in ("train", "eval")] for n, entries in lines.items()}, wall


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return all figures; `quick` runs two trials, and the bar does not apply to its ratio."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    from ray_vlm.cluster.connect import start_ray
    from ray_vlm.cluster.preflight import build_demand
    from ray_vlm.config.load import load_job

    seeds = 2 if quick else 8
    with tempfile.TemporaryDirectory() as temporary, start_ray(build_demand(load_job(JOB, SHORT))):
        shared, kept_s = sweep(Path(temporary), "kept", seeds, "tune.resident=true")
        alone, alone_s = sweep(Path(temporary), "alone", seeds, "tune.resident=false", "cluster.num_workers=1")
    worst = max(
        abs(a - b) / max(abs(b), 1e-9) for name in alone for a, b in zip(shared[name], alone[name], strict=True)
    )
    return [
        figure("resident.kept", kept_s, "s"),
        figure("resident.torch_trainers", alone_s, "s"),
        figure("resident.speedup", alone_s / kept_s, "x", None if quick else 3.0, most=False),
        figure("resident.curves", worst, "relative", 1e-6),
        figure("resident.points", sum(map(len, shared.values())), ""),
    ]


if __name__ == "__main__":
    report(measure)
