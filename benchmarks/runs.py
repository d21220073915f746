"""The cost of reading runs: a comparison of 50 runs of 10,000 steps, and one line of metrics."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import figure, report
from ray_vlm.cli import main
from ray_vlm.runs.monitor import Monitor, TrainingLog
from ray_vlm.runs.paths import RunPaths


def write_runs(folder: Path, num_runs: int, num_steps: int) -> list[Path]:
    """Write runs with a line for each step, in the monitor's format."""
    runs = []
    for i in range(num_runs):
        run = folder / f"run_{i:02d}"
        run.mkdir()
        job: dict[str, Any] = {
            "method": {"name": "sft"},
            "task": {"name": "detection"},
            "train": {"learning_rate": 1e-4 * (i + 1)},
        }
        (run / "resolved.json").write_text(json.dumps(job))
        (run / "run.json").write_text(json.dumps({"status": "finished", "attempts": [{"started": 0.0, "ended": 9.0}]}))
        log = TrainingLog(RunPaths(run), job)
        monitor = Monitor(run / "metrics.jsonl", 1, record=log.add)
        for step in range(1, num_steps + 1):
            monitor.write("train", step, step / num_steps, _values(step, i))
            if step % 1000 == 0:
                monitor.write("eval", step, step / num_steps, {"loss": 1.0 / step})
        monitor.close()
        runs.append(run)
    return runs


def _values(step: int, i: int) -> dict[str, float]:
    loss = 3.0 / step**0.5 + i / 100
    speed = {"tokens_per_s": 4000.25, "step_s": 0.5123, "mean_token_accuracy": 0.61}
    return {"loss": loss, "learning_rate": 1e-4, "grad_norm": 0.4 + loss, **speed}


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return all figures; `quick` writes fewer and shorter runs, and the bars do not apply to its times."""
    num_runs, num_steps = (5, 1_000) if quick else (50, 10_000)
    with tempfile.TemporaryDirectory() as temporary:
        started = time.perf_counter()
        runs = write_runs(Path(temporary), num_runs, num_steps)
        line_ms = (time.perf_counter() - started) / (num_runs * num_steps) * 1000
        started = time.perf_counter()
        main(["runs", "compare", *map(str, runs), "--html", f"{temporary}/compare.html"])
        wall = time.perf_counter() - started
        size = (Path(temporary) / "compare.html").stat().st_size / 2**20
    return [
        figure("runs.compare", wall, "s", None if quick else 5.0),
        figure("runs.compare_page", size, "MiB"),
        figure("monitor.line", line_ms, "ms", 1.0),
    ]


if __name__ == "__main__":
    report(measure)
