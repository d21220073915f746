"""The index of 300,000 LLaVA rows in 1,000 files: what do many files cost, against the same rows in one?

Run: python -m benchmarks.source_files [--quick] [--folder PATH] [--json PATH]. The rows, the base and the bare loop are
those of `benchmarks.index`, and so are the bars. Arms alternate; each command is a process of its own on one core.

1. The first index of 1,000 files of JSON lines and of 1,000 Parquet files against the bare loop, and against one file.
2. The second start of `train`, `data check`, `data stats` and `evaluate` with a pattern of 1,000 files.
3. One training step, with the index on disk: the whole command, with 1,000 files against one.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.figures import figure, report
from benchmarks.index import (
    FEW,
    QUICK_ROWS,
    ROOT,
    ROWS,
    SPEED,
    environment,
    held_to,
    index_s,
    row_s,
    second_figures,
    two_cores,
    verb,
    write_data,
    write_job,
)

FILES, QUICK_FILES = 1000, 100


def split_rows(rows: Path, kind: str, num_files: int) -> str:
    """Write the rows as files of one kind, unless they are there; return the pattern that names all of them."""
    folder = rows.parent / f"{rows.stem}-{num_files}-{kind}"
    pattern = f"{folder}/rows-*.{kind}"
    if folder.exists():
        return pattern
    lines = rows.read_text(encoding="utf-8").splitlines()
    share = -(-len(lines) // num_files)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for number in range(num_files):
        some, path = lines[number * share : (number + 1) * share], part / f"rows-{number:05d}.{kind}"
        if kind == "jsonl":
            path.write_text("\n".join(some) + "\n", encoding="utf-8")
        else:
            import pyarrow as pa
            from pyarrow import parquet

            parquet.write_table(pa.Table.from_pylist([json.loads(line) for line in some]), path)
    part.rename(folder)
    return pattern


def job_over(job: Path, pattern: str, folder: Path) -> Path:
    """Write the job over other files with the same rows, whose images lie in `folder`."""
    values = yaml.safe_load(job.read_text(encoding="utf-8"))
    values["data"]["train"] |= {"path": pattern, "image_root": str(folder)}
    path = job.with_name(f"{job.stem}-{Path(pattern).suffix[1:]}-files.yaml")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def step_s(job: Path, folder: Path) -> float:
    """Return the seconds of a command that trains one step, whose index is there."""
    words = ["cluster.num_workers=0", "train.max_steps=1", "run.name=step", f"run.output_dir={folder}"]
    command = verb("train", str(job), "--overwrite", *words)
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, check=True)
    return time.perf_counter() - started


def measure_files(folder: Path, num_rows: int, num_files: int, rounds: int) -> list[dict[str, Any]]:
    """Build, start and train over one file and over many, by turns."""
    rows = write_data(folder, num_rows)
    one, few = write_job(folder, rows), write_job(folder, write_data(folder, FEW))
    jobs = {"one file": one} | {
        f"{num_files:,} files of {kind}": job_over(one, split_rows(rows, kind, num_files), folder)
        for kind in ("jsonl", "parquet")
    }
    core, _ = two_cores()
    bare: list[float] = []
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    steps: dict[str, list[float]] = {name: [] for name in jobs}
    with held_to({core}):
        for _ in range(rounds):
            command = [sys.executable, "-m", "benchmarks.index", "--bare", str(rows)]
            done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
            bare.append(json.loads(done.stdout)["total"] / num_rows)
            start = index_s(few, folder / "built", environment())
            for name, job in jobs.items():
                taken[name].append(row_s(index_s(job, folder / "built", environment()), start, num_rows))
                print(f"{name}: {1e6 * taken[name][-1]:.0f} us a row, bare loop {1e6 * bare[-1]:.0f}", flush=True)
    for job in jobs.values():
        step_s(job, folder / "steps")  # builds the index
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            steps[name].append(step_s(job, folder / "steps"))
    return [
        figure("bare loop, a row", 1e6 * statistics.median(bare), "us"),
        *_ratios(taken, statistics.median(bare)),
        *(figure(f"one step, {name}, the whole command", statistics.median(s), "s") for name, s in steps.items()),
        *second_figures(folder, jobs[f"{num_files:,} files of jsonl"]),
    ]


def _ratios(taken: Mapping[str, list[float]], loop: float) -> list[dict[str, Any]]:
    figures = []
    for name, seconds in taken.items():
        row = statistics.median(seconds)
        figures.append(figure(f"first index, {name}, a row", 1e6 * row, "us"))
        figures.append(figure("  speed against the bare loop", loop / row, "x", SPEED, most=False))
        if name != "one file":
            paired = [b / a for a, b in zip(taken["one file"], seconds, strict=True)]
            figures.append(figure("  against one file", statistics.median(paired), "x"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--folder", type=Path, help="a folder for the data set, which stays there")
    own, rest = parser.parse_known_args()

    def measure(quick: bool) -> list[dict[str, Any]]:
        size = (QUICK_ROWS, QUICK_FILES, 1) if quick else (ROWS, FILES, 2)
        with tempfile.TemporaryDirectory(prefix="source-files") as temporary:
            folder = Path(own.folder or temporary).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            return measure_files(folder, *size)

    report(measure, rest, about=__doc__)


if __name__ == "__main__":
    main()
