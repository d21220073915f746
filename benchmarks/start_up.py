"""The time from the command to the first step of a submitted two-step job: start and CPU time of each process.

Run: python -m benchmarks.start_up [--against CHECKOUT] [--quick] [--json PATH]. A head of four CPUs is started on this
machine; the job trains the tiny model in 4 bit with one Ray worker and one loader. `--against`: another checkout of
this package, which alternates with this one under the same interpreter.
"""

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.figures import figure, report_against
from ray_vlm.demo.shapes import draw
from ray_vlm.runs.monitor import read_metrics

ROOT = Path(__file__).parents[1]
BAR = 0.8  # of the other checkout's time
_POLL_S = 0.2
# What a process is, by a word of its command line or of the title that Ray gives it.
_PROCESSES = {
    "driver": "-m ray_vlm train",
    "controller": "ray::TrainController",
    "worker": "ray::RayTrainWorker",
    "loader": "ray::MapWorker",
}
_EVENTS = {"start": "the worker has its model", "train": "first step"}


@dataclass
class Start:
    """Seconds from the command to each event, and CPU seconds by process."""

    moments: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)


def submit(checkout: Path, folder: Path, address: str) -> Start:
    """Submit the job from a checkout, and watch the processes until the command has ended."""
    job, start, seen = checkout / "start_up_job.yaml", Start(), dict[int, tuple[str, float, float]]()
    shutil.rmtree(folder / "runs", ignore_errors=True)
    _write_job(job, folder)
    command = [sys.executable, "-m", "ray_vlm", "submit", "train", job.name, "--address", address]
    env = os.environ | {"PYTHONPATH": str(checkout)}
    with open(folder / "submit.log", "w", encoding="utf-8") as log:
        began = time.time()
        process = subprocess.Popen(command, cwd=checkout, env=env, stdout=log, stderr=log)
        while process.poll() is None:
            _look(seen)
            time.sleep(_POLL_S)
    job.unlink()
    if process.returncode:
        raise RuntimeError((folder / "submit.log").read_text(encoding="utf-8")[-2000:])
    start.moments["end"] = time.time() - began
    for name, started, cpu in sorted(seen.values(), key=lambda one: one[1]):
        if started > began:
            start.moments.setdefault(name, started - began)
            start.cpu[name] = start.cpu.get(name, 0.0) + cpu
    for line in read_metrics(folder / "runs" / "run" / "metrics.jsonl"):
        if line["kind"] in _EVENTS:
            start.moments.setdefault(_EVENTS[line["kind"]], line["time"] - began)
    return start


def _look(seen: dict[int, tuple[str, float, float]]) -> None:
    """Note what processes there are: by pid the name, when it was started, and its CPU seconds so far."""
    for process in psutil.process_iter():
        try:
            line, times = " ".join(process.cmdline()), process.cpu_times()
            name = next((name for name, word in _PROCESSES.items() if word in line and "submit" not in line), None)
            if name is not None and "/bin/sh" not in line and "bash" not in line:
                seen[process.pid] = (name, process.create_time(), times.user + times.system)
        except psutil.Error:
            continue


def _write_job(path: Path, folder: Path) -> None:
    job = {
        "model": {"name": "tiny"},
        "lora": {"rank": 8, "alpha": 16},
        "data": {"train": {"path": str(folder / "train.json")}, "num_loaders": 1},
        "train": {"max_steps": 2, "global_batch_size": 8, "micro_batch_size": 4},
        "cluster": {"num_workers": 1},
        "run": {"name": "run", "output_dir": str(folder / "runs")},
    }
    path.write_text(yaml.safe_dump(job), encoding="utf-8")


@contextmanager
def head(folder: Path) -> Iterator[str]:
    """Start a head of four CPUs; yield the address of its job server."""
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    port, dashboard = _free_port(), _free_port()
    command = [*ray, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=4"]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    with open(folder / "head.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, f"--temp-dir={folder}", "--disable-usage-stats"], env=env, stdout=log, stderr=log
        )
    try:
        _wait(lambda: _answers(dashboard))
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(done: Callable[[], bool], limit_s: float = 60.0) -> None:
    until = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > until:
            raise RuntimeError("the head did not start")
        time.sleep(0.5)


def tabulate(starts: dict[str, list[Start]]) -> str:
    """Return a Markdown table of medians: a row for each event, with the CPU seconds of the process that starts
    then."""
    rows = sorted({name for own in starts.values() for one in own for name in one.moments}, key=_order(starts))
    lines = ["| seconds after the command, median | " + " | ".join(starts) + " |", "|---" * (len(starts) + 1) + "|"]
    for name in rows:
        cells = []
        for own in starts.values():
            moments = [one.moments[name] for one in own if name in one.moments]
            cpu = [one.cpu[name] for one in own if name in one.cpu]
            cell = f"{statistics.median(moments):.1f}" if moments else "-"
            cells.append(cell + (f" ({statistics.median(cpu):.1f} CPU s)" if cpu else ""))
        lines.append(f"| {name}{' starts' if name in _PROCESSES else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _order(starts: dict[str, list[Start]]) -> Callable[[str], float]:
    own = next(iter(starts.values()))
    return lambda name: statistics.median([one.moments.get(name, 0.0) for one in own])


def compare(others: list[Path], pairs: int) -> list[dict[str, Any]]:
    """Alternate between this checkout and the others, and print the table."""
    checkouts = {"this checkout": ROOT} | {str(other): other.absolute() for other in others}
    starts: dict[str, list[Start]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory(prefix="r") as name:
        folder = Path(name)
        draw(folder, "studio", "train", 50)
        with head(folder) as address:
            for number in range(pairs + 1):
                for label, checkout in checkouts.items():
                    start = submit(checkout, folder, address)
                    print(label, {k: round(v, 1) for k, v in start.moments.items()}, flush=True)
                    if number:  # the first turn fills the disk's cache and compiles what a checkout brings
                        starts[label].append(start)
    print(tabulate(starts))
    first = {label: [one.moments["first step"] for one in own] for label, own in starts.items()}
    figures = [figure(f"first step, {label}", statistics.median(taken), "s") for label, taken in first.items()]
    this_checkout = first.pop("this checkout")
    for label, taken in first.items():
        ratio = statistics.median(a / b for a, b in zip(this_checkout, taken, strict=True))
        figures.append(figure(f"first step, against {label}", ratio, "x", bar=BAR))
    return figures


if __name__ == "__main__":
    report_against(lambda checkouts, quick: compare(checkouts, 1 if quick else 3))
