"""Images inside files: how much memory does training on a large Parquet file take, and what do its orders read?

Run: python -m benchmarks.image_files [--quick] [--folder PATH] [--json PATH]. The file has JPEGs of 0.8 megapixels, 100
kB each, in rows of messages: 1.4 GB of them in groups of 50 rows and in one single group, and 5.6 GB in groups of 50.
`--folder`: keeps the files for the next run.

1. Training with two Ray workers and a loader each, against the same job on 50 rows: the largest PSS of the driver, a
   worker and a loader, 300 MB more; of the file that is four times as large, 50 MB more than of the other.
2. The bytes that a loading process reads a step, with windows and with a full shuffle, against what `--dry-run` says:
   within 10 %.
"""

import argparse
import io
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from benchmarks.figures import figure, report
from benchmarks.index import ROOT, Watched, environment, verb, watch
from ray_vlm.config.load import load_job
from ray_vlm.config.paths import absolute_paths
from ray_vlm.data import inner_images
from ray_vlm.train.prepare import prepare

IMAGE = (1024, 768)
DISTINCT = 64  # images that differ; the others differ behind their end marker
GROUP_ROWS, FEW = 50, 50
STEPS, ROWS_A_STEP = 150, 8
MORE_MB, FOURFOLD_MB, WITHIN = 300.0, 50.0, 0.10


def make_images() -> list[bytes]:
    """Return JPEGs of about 100 kB: smooth shapes with noise."""
    rng, images = np.random.default_rng(0), []
    for _ in range(DISTINCT):
        coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize(IMAGE, Image.Resampling.BICUBIC)
        noise = rng.integers(-8, 9, (IMAGE[1], IMAGE[0], 1), np.int16)
        file = io.BytesIO()
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=80)
        images.append(file.getvalue())
    return images


def write_parquet(path: Path, num_rows: int, group_rows: int) -> Path:
    """Write the rows, unless the file is there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.exists():
        return path
    images, part = make_images(), path.with_suffix(".part")
    writer = None
    for start in range(0, num_rows, group_rows):
        rows = [
            {
                "id": f"{number:07d}",
                "images": [{"bytes": images[number % DISTINCT] + b"%d" % number, "path": None}],
                "messages": [
                    {"role": "user", "content": "<image>What is this?"},
                    {"role": "assistant", "content": f"A pattern, number {number % DISTINCT}."},
                ],
            }
            for number in range(start, min(start + group_rows, num_rows))
        ]
        table = pa.Table.from_pylist(rows)
        writer = writer or pq.ParquetWriter(part, table.schema, use_dictionary=False)
        writer.write_table(table, row_group_size=group_rows)
    assert writer is not None
    writer.close()
    part.rename(path)
    return path


def write_job(folder: Path, rows: Path) -> Path:
    """Write the job over these rows: two Ray workers with a loader each."""
    job = {
        "task": "chat",
        "model": {"name": "tiny", "load_in_4bit": False},
        "lora": {"rank": 4, "alpha": 8},
        "data": {
            "train": {"path": str(rows), "format": "messages"},
            "max_pixels": 128 * 128,
            "num_loaders": 1,
            "loaders": "ray_data",
        },
        "train": {
            "global_batch_size": ROWS_A_STEP,
            "micro_batch_size": 2,
            "max_steps": STEPS,
            "precision": "fp32",
            "log_every_steps": 1,
        },
        "cluster": {"num_workers": 2},
        "run": {"output_dir": str(folder / "runs")},
    }
    path = folder / f"job-{rows.stem}.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path


def train(folder: Path, rows: Path, *overrides: str) -> Watched:
    """Index the rows, then train on them with a watch. The driver that indexes is watched too."""
    name = rows.stem
    words = ["train", str(write_job(folder, rows)), "--overwrite", f"run.name={name}", *overrides]
    watched = watch(words, folder / f"{name}.log", poll_s=0.5)
    print(f"{name}: {watched.wall_s:.0f} s", flush=True)
    return watched


def memory_figures(folder: Path, num_rows: int) -> list[dict[str, Any]]:
    """Train on each file, and compare the memory of the processes that are alike."""
    few = train(folder, write_parquet(folder / f"rows-{FEW}.parquet", FEW, GROUP_ROWS))
    runs = {
        "groups of 50": write_parquet(folder / f"rows-{num_rows}.parquet", num_rows, GROUP_ROWS),
        "one group": write_parquet(folder / f"rows-{num_rows}-one.parquet", num_rows, num_rows),
        "four times as large, groups of 50": write_parquet(folder / f"rows-{4 * num_rows}.parquet", 4 * num_rows, 50),
    }
    figures, most = [], dict[tuple[str, str], float]()
    for run, rows in runs.items():
        figures.append(figure(f"{run}: the file", rows.stat().st_size / 1e6, "MB"))
        watched = train(folder, rows)
        for label, title in (("driver", "driver"), ("worker", "RayTrainWorker"), ("loader", "MapWorker")):
            most[run, label] = watched.largest(title, watched.pss)
            more = most[run, label] - few.largest(title, few.pss)
            figures.append(figure(f"  largest PSS of a {label}", most[run, label], "MB"))
            figures.append(figure(f"    more than with {FEW} rows", more, "MB", MORE_MB))
            if run.startswith("four"):
                beyond = most[run, label] - most["groups of 50", label]
                figures.append(figure("    more than of the smaller file", beyond, "MB", FOURFOLD_MB))
    return figures


def announced_bytes(job: Path, shuffle: str) -> float:
    """Return the bytes that a step reads by the words of `--dry-run`."""
    command = verb("train", str(job), "--dry-run", f"data.shuffle={shuffle}")
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    match = re.search(rf"a step of {ROWS_A_STEP} rows reads about ([\d.,]+) MB", done.stdout + done.stderr)
    if match is None:
        raise RuntimeError(f"--dry-run says nothing of bytes: {done.stdout[-3000:]}")
    return float(match[1].replace(",", "")) * 1e6


def read_bytes(job: Path, shuffle: str, steps: int, warm: int) -> float:
    """Return the bytes of row groups that the loaders of both workers read a step, after some steps. Each has a cache
    of its own, so one is played after the other."""
    prepared = prepare(absolute_paths(load_job(str(job), [f"data.shuffle={shuffle}"])))
    total = 0.0
    for rank in range(2):
        inner_images.forget_groups()
        before = 0
        for step in range(warm + steps):
            if step == warm:
                before = inner_images.read_group_bytes()
            for micro in prepared.plan.rank_step(step, rank):
                for row in micro.rows:
                    for image in prepared.train.records.images(row):
                        assert not isinstance(image, str | bytes)
                        inner_images.read_inner(image)
        total += inner_images.read_group_bytes() - before
    return total / steps


def bytes_figures(folder: Path, num_rows: int) -> list[dict[str, Any]]:
    """Compare what a step reads with what `--dry-run` says, in the windows that the package chooses and in a full
    shuffle."""
    job, epoch = write_job(folder, folder / f"rows-{num_rows}.parquet"), num_rows // ROWS_A_STEP
    figures = []
    for name, shuffle, steps, warm in (("windows", "null", epoch, 0), ("a full shuffle", "full", 150, 100)):
        announced, read = announced_bytes(job, shuffle), read_bytes(job, shuffle, steps, warm)
        figures += [
            figure(f"{name}: bytes that a step of {ROWS_A_STEP} rows reads", read / 1e6, "MB"),
            figure("  by --dry-run", announced / 1e6, "MB"),
            figure("  distance from it", abs(read / announced - 1), "", WITHIN),
        ]
    return figures


def measure(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Return all figures, with files in `folder`."""
    num_rows = 3500 if quick else 14_000
    return memory_figures(folder, num_rows) + bytes_figures(folder, num_rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark in a folder that is kept, or in a temporary one."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--folder", type=Path)
    known, rest = parser.parse_known_args(argv)
    if known.folder is not None:
        known.folder.mkdir(parents=True, exist_ok=True)
        report(lambda quick: measure(known.folder.absolute(), quick), rest)
    with tempfile.TemporaryDirectory() as temporary:
        report(lambda quick: measure(Path(temporary), quick), rest)


if __name__ == "__main__":
    main()
