"""The manifest of a run, `run.json`: status, versions, hardware, attempts."""

import json
import os
import platform
import subprocess
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

from ray_vlm import __version__
from ray_vlm.machine import count_cpus
from ray_vlm.runs.attempts import complete
from ray_vlm.runs.drivers import this_process
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.runs.paths import CLAIMED, RunPaths, write_json

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
            "id": f"{paths.name}-{uuid.uuid4().hex[:8]}",  # unique among runs of that name; the id in W&B too
            "command": command,
            "versions": {"ray-vlm": __version__, "python": platform.python_version()} | _versions(),
            "git_commit": _git_commit(),
            "hardware": _hardware(),
            "attempts": [],
            "result": None,
        },
    )
    paths.publish(paths.job, paths.resolved)
    start_attempt(paths)
    paths.store.remove(CLAIMED)


def start_attempt(paths: RunPaths) -> int:
    """Add an attempt of this process to `run.json` and return its number."""
    run = json.loads(paths.run.read_text())
    number = last_attempt(paths) + 1
    attempt = {"attempt": number, "started": time.time(), "driver": this_process()}
    _write(paths, run | {"status": "running", "attempts": [*run["attempts"], attempt]})
    return number


def last_attempt(paths: RunPaths) -> int:
    """Return the highest number of an attempt, including those that Ray started by itself (in `metrics.jsonl`)."""
    listed = [a["attempt"] for a in json.loads(paths.run.read_text())["attempts"]]
    return max([0, *listed, *(line["attempt"] for line in read_metrics(paths.metrics) if line["kind"] == "start")])


def update_manifest(paths: RunPaths, **changes: Any) -> None:
    """Change top-level fields of `run.json`."""
    _write(paths, json.loads(paths.run.read_text()) | changes)


def end_attempt(paths: RunPaths, status: str, error: str = "") -> None:
    """Close the last attempt: `finished`, `failed`, `preempted` or `interrupted`."""
    run = json.loads(paths.run.read_text())
    last = run["attempts"][-1]
    # A later call, such as a sweep's for a trial that it ended, keeps the first end time.
    last |= {"ended": last.get("ended") or time.time(), "status": status} | ({"error": error} if error else {})
    run["attempts"] = complete(run["attempts"], read_metrics(paths.metrics))
    _write(paths, run)


def finish_manifest(paths: RunPaths, status: str, result: dict[str, Any] | None = None, error: str = "") -> None:
    """Close the last attempt and set the run's status: `finished`, `failed` or `interrupted`."""
    end_attempt(paths, status, error)
    update_manifest(paths, status=status, result=result)


def _write(paths: RunPaths, run: dict[str, Any]) -> None:
    write_json(paths.run, run)
    paths.publish(paths.run)


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _git_commit() -> str | None:
    """Return the commit of the source, with `+changes` if the tree differs; None outside a checkout."""
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
    return {"machine": platform.machine(), "cpus": count_cpus(), "memory_gib": round(pages / 2**30, 1)}
