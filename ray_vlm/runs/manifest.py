"""What a run says of itself: `run.json` (status, versions, hardware, attempts) and the summary `training_log.json`."""

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from ray_vlm import __version__
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.runs.paths import RunPaths, write_json

_PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "torchvision",
    "datasets",
    "deepspeed",
)


def start_manifest(paths: RunPaths, job: dict[str, Any], job_text: str, command: list[str]) -> None:
    """Write `job.yaml`, `resolved.json` and `run.json` before anything starts."""
    paths.job.write_text(job_text, encoding="utf-8")
    write_json(paths.resolved, job)
    write_json(
        paths.run,
        {
            "status": "running",
            "command": command,
            "versions": {"ray-vlm": __version__, "python": platform.python_version()} | _versions(),
            "git_commit": _git_commit(),
            "hardware": _hardware(),
            "attempts": [{"attempt": 1, "started": time.time()}],
            "result": None,
        },
    )


def update_manifest(paths: RunPaths, **changes: Any) -> None:
    """Change top-level fields of `run.json`."""
    write_json(paths.run, json.loads(paths.run.read_text()) | changes)


def finish_manifest(paths: RunPaths, status: str, result: dict[str, Any] | None = None, error: str = "") -> None:
    """Close the last attempt and set the run's status: `finished`, `failed` or `interrupted`."""
    run = json.loads(paths.run.read_text())
    run["attempts"][-1] |= {"ended": time.time(), "status": status} | ({"error": error} if error else {})
    write_json(paths.run, run | {"status": status, "result": result})


def write_training_log(paths: RunPaths, best: dict[str, Any] | None) -> dict[str, Any]:
    """Sum the run up in `training_log.json`: configuration, histories, best checkpoint (step, metrics, path)."""
    lines = read_metrics(paths.metrics)
    log = {
        "configuration": json.loads(paths.resolved.read_text()),
        "training_history": [_without(line, "kind") for line in lines if line["kind"] == "train"],
        "epoch_history": [_without(line, "kind") for line in lines if line["kind"] == "epoch"],
        "validation_history": [_without(line, "kind") for line in lines if line["kind"] == "eval"],
        "best_checkpoint": best,
    }
    write_json(paths.training_log, log)
    return log


def _without(line: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k != key}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _git_commit() -> str | None:
    """Commit of the source that runs, with `+changes` where the tree differs; None outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "") or None


def _hardware() -> dict[str, Any]:
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"machine": platform.machine(), "cpus": os.cpu_count(), "memory_gib": round(pages / 2**30, 1)}
