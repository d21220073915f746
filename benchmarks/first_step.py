"""The time from `ray-vlm train` to the first step of a run in its own process, with an index on disk: where it goes.

Run: python -m benchmarks.first_step [--against CHECKOUT] [--quick] [--json PATH]. The job trains the tiny model in
4 bit with `cluster.num_workers: 0`. `--against`: another checkout of this package, which alternates with this one under
the same interpreter. Other programs make a start longer and never shorter, and its CPU time by less than its wall time:
of each checkout the run with the least CPU time counts.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from benchmarks.figures import figure, report_against
from ray_vlm.demo.shapes import draw

ROOT = Path(__file__).parents[1]
BAR = 0.5  # of the other checkout's CPU time
_RUNS, _QUICK_RUNS = 6, 2
# Runs the command line, and notes when modules are first looked for and lines of metrics are written.
_OBSERVER = """
import json, sys, time
from pathlib import Path

moments, modules = [], {"ray_vlm.train.driver", "transformers", "ray_vlm.train.worker"}

def note(name):
    moments.append([name, time.time(), time.process_time()])

class Observer:
    def find_spec(self, name, path=None, target=None):
        if name in modules:
            modules.remove(name)
            note(name)

sys.meta_path.insert(0, Observer())
from ray_vlm.runs.monitor import Monitor
start, write = Monitor.start, Monitor.write

def observed_start(self, *args, **kwargs):
    start(self, *args, **kwargs)
    note("start")

def observed_write(self, kind, *args, **kwargs):
    write(self, kind, *args, **kwargs)
    note(kind)

Monitor.start, Monitor.write = observed_start, observed_write
from ray_vlm.cli import main
code = main(sys.argv[2:])
Path(sys.argv[1]).write_text(json.dumps(moments))
sys.exit(code)
"""
# What ends at each moment.
_PHASES = {
    "ray_vlm.train.driver": "Python, the command line",
    "transformers": "the driver: job, rows, plan",
    "ray_vlm.train.worker": "imports: torch, transformers, PEFT, TRL",
    "start": "the model and the trainer",
    "train": "the first step",
}


@dataclass(frozen=True)
class Start:
    """Seconds of each phase by its name: wall time and CPU time of the process."""

    wall: dict[str, float]
    cpu: dict[str, float]

    def seconds(self) -> float:
        """Return the wall time to the first step."""
        return sum(self.wall.values())

    def cpu_seconds(self) -> float:
        """Return the CPU time to the first step."""
        return sum(self.cpu.values())


def start(checkout: Path, folder: Path) -> Start:
    """Run the job from a checkout in a process of its own."""
    moments, env = folder / "moments.json", os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", _OBSERVER, str(moments), "train", "job.yaml", "--overwrite"]
    began = time.time()
    subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    return read_moments(json.loads(moments.read_text(encoding="utf-8")), began)


def read_moments(moments: list[tuple[str, float, float]], began: float) -> Start:
    """Return the phases between the first moments of each name: `(name, time, CPU seconds of the process)`."""
    first = {name: (at, cpu) for name, at, cpu in reversed(moments)}
    ends = [(began, 0.0), *(first[name] for name in _PHASES)]
    seconds = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(ends)]
    wall, cpu = zip(*seconds, strict=True)
    return Start(dict(zip(_PHASES.values(), wall, strict=True)), dict(zip(_PHASES.values(), cpu, strict=True)))


def write_inputs(folder: Path) -> None:
    """Write the job and its rows."""
    draw(folder, "studio", "train", 50)
    job = {
        "model": {"name": "tiny"},
        "lora": {"rank": 8, "alpha": 16},
        "data": {"train": {"path": "train.json"}, "index_dir": "index"},
        "train": {"max_steps": 1, "global_batch_size": 8, "micro_batch_size": 4},
        "cluster": {"num_workers": 0},
        "run": {"name": "run", "output_dir": "runs"},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")


def tabulate(starts: dict[str, Start]) -> str:
    """Return a Markdown table: a row for each phase, with wall and CPU seconds."""
    lines = ["| seconds (CPU seconds) | " + " | ".join(starts) + " |", "|---" * (len(starts) + 1) + "|"]
    for name in _PHASES.values():
        cells = (f"{own.wall[name]:.2f} ({own.cpu[name]:.2f})" for own in starts.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    totals = (f"{own.seconds():.2f} ({own.cpu_seconds():.2f})" for own in starts.values())
    return "\n".join([*lines, "| in all | " + " | ".join(totals) + " |"])


def compare(others: list[Path], runs: int) -> list[dict[str, Any]]:
    """Alternate between this checkout and the others, and print the table of the best run of each."""
    checkouts = {"this checkout": ROOT} | {str(other): other.absolute() for other in others}
    starts: dict[str, list[Start]] = {label: [] for label in checkouts}
    with tempfile.TemporaryDirectory() as name:
        folders = {label: Path(name) / str(number) for number, label in enumerate(checkouts)}
        for label, folder in folders.items():
            folder.mkdir()
            write_inputs(folder)
            start(checkouts[label], folder)  # fills the index, and compiles what a checkout brings
        for _ in range(runs):
            for label, checkout in checkouts.items():
                starts[label].append(start(checkout, folders[label]))
                last = starts[label][-1]
                print(f"{label}: {last.seconds():.2f} s, {last.cpu_seconds():.2f} CPU s", flush=True)
    print(tabulate({label: min(own, key=Start.cpu_seconds) for label, own in starts.items()}))
    least = {label: min(map(Start.cpu_seconds, own)) for label, own in starts.items()}
    soonest = {label: min(map(Start.seconds, own)) for label, own in starts.items()}
    figures = [figure(f"first step, {label}", taken, "CPU s") for label, taken in least.items()]
    figures += [figure(f"first step, {label}, wall", taken, "s") for label, taken in soonest.items()]
    for label in list(checkouts)[1:]:
        figures.append(figure(f"CPU time, against {label}", least["this checkout"] / least[label], "x", bar=BAR))
        figures.append(figure(f"wall time, against {label}", soonest["this checkout"] / soonest[label], "x"))
    return figures


if __name__ == "__main__":
    report_against(lambda checkouts, quick: compare(checkouts, _QUICK_RUNS if quick else _RUNS))
