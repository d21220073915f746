"""Throughput of the data path: images per second against a bare loop and a torch DataLoader, from files and from files
with many images.

Run: python -m benchmarks.data [--quick] [--json PATH]. JPEGs of 12, 2 and 0.3 megapixels are read, decoded and resized
for Qwen3-VL (at most 1280 * 1024 pixels) by one process or thread with one torch thread. The arms: a bare loop of
Pillow and the processor's resize, and the same with torchvision's decoder, which makes the same pixels faster;
`stream_ray` with one loader and `stream_local` with one thread, which also make tokens and labels; a torch DataLoader
with one worker, with either decoder. The package takes threads for the 0.3 megapixels and Ray Data for the others, and
the bars are for what it takes. Arms alternate, and the figures are medians of ratios within a round. Start-up and
whatever is buffered at either end do not count: the clock runs from the first row of a loader's second task to the
first row of its last.

Then the same images in a Parquet file with groups of 50 rows, as members of a tar, and behind an S3 server that takes
30 ms for each request, with the order of rows that the package plans for each.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.figures import figure, report
from ray_vlm.config.data import Data, Source
from ray_vlm.data.images import read_size
from ray_vlm.data.parts import build_index
from ray_vlm.data.plan import Plan
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import SampleSpec
from ray_vlm.data.stream import StreamSpec, mean_bytes, pack, stream_local, stream_ray, task_size
from ray_vlm.demo.tiny import write_untrained
from tests.support.object_server import serving
from tests.support.photos import FILES, LABELS, SIZES, make_spec, write_images, write_rows

MICRO = 2  # rows in a micro-batch
TASK = {"12mp": 34, "2mp": 34, "0.3mp": 64}  # rows of a loader's task in `stream_ray`
TASKS = {"12mp": 4, "2mp": 8, "0.3mp": 24}  # how many are streamed; the first and the last are not timed
TAKEN = {"12mp": "ray", "2mp": "ray", "0.3mp": "threads"}  # by the package
VS_BARE = {"12mp": 0.95, "2mp": 0.90, "0.3mp": 0.85}
GROUP_ROWS, WINDOW = 50, 1000  # of the Parquet file, and of its order
FROM_DISK, FROM_STORE = 0.8, 0.7
PAUSE_S = 0.03  # of the server before each answer
BUCKET = "photos"


def read_plainly(path: str, spec: SampleSpec, fast: bool = False) -> Any:
    """Decode, convert and resize an image without a needless copy; return `uint8 [h, w, 3]`. `fast`: with
    torchvision's decoder."""
    import torch
    from transformers.image_utils import SizeDict

    builder = load_sample_builder(spec)
    processor, sizes = builder.processor.image_processor, builder.image_spec
    if fast:
        from torchvision.io import ImageReadMode, decode_jpeg

        with open(path, "rb") as file:
            data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
        tensor = decode_jpeg(data, ImageReadMode.RGB).unsqueeze(0)
    else:
        with Image.open(path) as picture:
            picture.load()
            pixels = np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    limits = SizeDict(shortest_edge=sizes.min_pixels, longest_edge=sizes.max_pixels)
    small = processor.resize(tensor, size=limits, resample=processor.resample, factor=sizes.factor)
    return small[0].permute(1, 2, 0).contiguous()


class PlainDataset:
    """The same work as a torch data set."""

    def __init__(self, paths: Sequence[str], spec: SampleSpec, fast: bool):
        self.paths, self.spec, self.fast = paths, spec, fast

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        return read_plainly(self.paths[number], self.spec, self.fast)


def rate(micro_batches: Iterable[Any], task: int, size: int = 1) -> float:
    """Return images per second from the first row of the second task to the first of the last; `size` rows come at a
    time."""
    arrivals = []
    for _ in micro_batches:
        arrivals += [time.perf_counter()] * size
    last = len(arrivals) - task
    return (last - task) / (arrivals[last] - arrivals[task])


def through_loop(paths: Sequence[str], spec: SampleSpec, task: int, fast: bool) -> float:
    """Return images per second of the bare loop."""
    return rate((read_plainly(path, spec, fast) for path in paths), task)


def through_loader(paths: Sequence[str], spec: SampleSpec, task: int, fast: bool) -> float:
    """Return images per second of a torch DataLoader with one worker."""
    from torch.utils.data import DataLoader

    data = PlainDataset(paths, spec, fast)
    loader = DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4, multiprocessing_context="spawn")
    return rate(loader, task)


def plan_stream(source: Source, spec: SampleSpec, folder: Path, plan: Plan | None = None) -> StreamSpec:
    """Return what is streamed of a source, whose index is built in `folder`; in file order without a `plan`."""
    builder = load_sample_builder(spec)
    index = build_index(source, Data(), builder, str(folder / "index"))
    plan = plan or Plan(len(index), MICRO, MICRO, 1, shuffle=False)
    return StreamSpec(index.records, spec, plan, 0, 0, plan.num_steps, mean_bytes(index.records, builder.image_spec))


def through_stream(stream: StreamSpec, taken: str, task: int) -> float:
    """Return images per second of this package's stream with one loader, through Ray Data or by a thread."""
    if taken == "threads":
        return rate(stream_local(stream), task, MICRO)
    assert task_size(stream) * MICRO == task
    return rate(stream_ray(stream, num_loaders=1, cpus_per_loader=1), task, MICRO)


def stored_bytes(paths: Sequence[str], stream: StreamSpec, spec: SampleSpec) -> float:
    """Return the bytes of the block that holds a micro-batch, divided by those of its pixels."""
    rows = [stream.rows.sample(load_sample_builder(spec), number) for number in range(MICRO)]
    assert all(np.array_equal(row.images[0], read_plainly(path, spec)) for row, path in zip(rows, paths, strict=False))
    return pack(0, rows).get_total_buffer_size() / sum(image.nbytes for row in rows for image in row.images)


def run_in_turn(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the rates of each arm, one a round."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            rates[name].append(run())
    return rates


def ratio(rates: dict[str, list[float]], one: str, other: str) -> float:
    """Return the median of the ratios of two arms."""
    return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))


def stream_figures(folder: Path, spec: SampleSpec, rounds: int, share: float) -> list[dict[str, Any]]:
    """Run the arms in turn for each size."""
    figures = []
    for name, size in SIZES.items():
        task = TASK[name]
        num_rows = max(round(TASKS[name] * share), 3) * task
        write_images(folder / name, size, FILES)
        source = write_rows(folder / name, size, num_rows, FILES)
        paths = [str(folder / name / f"{i % FILES}.jpg") for i in range(num_rows)]
        stream = plan_stream(source, spec, folder / name)
        arms: dict[str, Callable[[], float]] = {}
        for kind, fast in (("", False), (".fast", True)):
            arms[f"bare{kind}"] = partial(through_loop, paths, spec, task, fast)
            arms[f"dataloader{kind}"] = partial(through_loader, paths, spec, task, fast)
        arms |= {taken: partial(through_stream, stream, taken, task) for taken in ("ray", "threads")}
        rates = run_in_turn(arms, rounds)
        figures += [figure(f"data.{arm}.{name}", statistics.median(v), "images/s") for arm, v in rates.items()]
        for taken in ("ray", "threads"):
            barred = taken == TAKEN[name]
            for kind in ("", ".fast"):
                against_bare = ratio(rates, taken, f"bare{kind}")
                against_loader = ratio(rates, taken, f"dataloader{kind}")
                bars = (VS_BARE[name], 1.0) if barred else (None, None)
                figures += [
                    figure(f"data.{taken}_vs_bare{kind}.{name}", against_bare, "x", bars[0], most=False),
                    figure(f"data.{taken}_vs_dataloader{kind}.{name}", against_loader, "x", bars[1], most=False),
                ]
        figures.append(figure(f"data.stored_bytes.{name}", stored_bytes(paths, stream, spec), "x", 1.05))
    return figures


def write_parquet(path: Path, photos: Path, size: tuple[int, int], num_rows: int) -> Source:
    """Write the rows of `write_rows` with their images into a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [(photos / f"{number}.jpg").read_bytes() for number in range(FILES)]
    box = [0.1 * size[0], 0.2 * size[1], 0.4 * size[0], 0.6 * size[1]]
    objects = {"ref": list(LABELS), "bbox": [[c * 10 + v for v in box] for c in (1, 2, 3)]}
    writer = None
    for start in range(0, num_rows, GROUP_ROWS):
        some = range(start, min(start + GROUP_ROWS, num_rows))
        rows = [{"images": [{"bytes": images[i % FILES], "path": None}], "objects": objects} for i in some]
        table = pa.Table.from_pylist(rows)
        writer = writer or pq.ParquetWriter(path, table.schema, use_dictionary=False)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return Source(path=str(path), format="objects")


def write_tar(path: Path, photos: Path, source: Source) -> Source:
    """Write the images of a source into a tar, and return the source with that."""
    with tarfile.open(path, "w") as tar:
        for number in range(FILES):
            tar.add(photos / f"{number}.jpg", f"{number}.jpg")
    return source.model_copy(update={"image_root": str(path)})


def plan_rows(source: Source, spec: SampleSpec, folder: Path) -> StreamSpec:
    """Return what is streamed of a source in the order that the package plans: in windows where images lie in row
    groups, else in a full shuffle."""
    index = build_index(source, Data(), load_sample_builder(spec), str(folder / "index"))
    units = index.units()
    grouped = len(units.starts) < len(index)
    order = {"unit_starts": units.starts, "window": WINDOW} if grouped else {}
    return plan_stream(source, spec, folder, Plan(len(index), MICRO, MICRO, 1, **order))


def source_figures(folder: Path, address: str, spec: SampleSpec, rounds: int, share: float) -> list[dict[str, Any]]:
    """Stream the same images from files, a Parquet file and a tar, on the disk and behind the server, in turn."""
    figures = []
    for name in ("2mp", "0.3mp"):
        here, task = folder / name, TASK[name]
        num_rows = max(round(TASKS[name] * share), 3) * task
        files = Source(path=str(here / "rows.json"))
        sources = {"files": files, "tar": write_tar(here / "photos.tar", here, files)}
        sources["parquet"] = write_parquet(here / "rows.parquet", here, SIZES[name], num_rows)
        remote = {
            f"s3.{kind}": source.model_copy(
                update={
                    "path": source.path.replace(str(folder), address),
                    "image_root": source.image_root and source.image_root.replace(str(folder), address),
                }
            )
            for kind, source in sources.items()
        }
        streams = {kind: plan_rows(source, spec, here) for kind, source in (sources | remote).items()}
        arms = {kind: partial(through_stream, stream, TAKEN[name], task) for kind, stream in streams.items()}
        rates = run_in_turn(arms, rounds)
        for kind in list(arms)[1:]:
            bar = FROM_STORE if kind.startswith("s3") else FROM_DISK
            value = ratio(rates, kind, "files")
            figures.append(figure(f"data.{kind}_vs_files.{name}", value, "x", bar, most=False))
    return figures


def run_index(folder: Path, num_rows: int) -> None:
    """Print as JSON the rows per second of the index and of its header checks alone, on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    spec = make_spec(folder / "model")
    source = write_rows(folder / "many", SIZES["0.3mp"], num_rows, num_rows)
    load_sample_builder(spec)
    rates = []
    for _ in range(3):
        started = time.perf_counter()
        index = build_index(source, Data(), load_sample_builder(spec))
        middle = time.perf_counter()
        for image in itertools.chain.from_iterable(record.images for record in index.records):
            read_size(image, Data().max_image_pixels)
        ended = time.perf_counter()
        rates.append((num_rows / (middle - started), num_rows / (ended - middle)))
        assert len(index) == num_rows
    print(json.dumps([statistics.median(values) for values in zip(*rates, strict=True)]))


def index_figures(folder: Path, num_rows: int) -> list[dict[str, Any]]:
    """Measure the index in a process of its own."""
    write_images(folder / "many", SIZES["0.3mp"], num_rows)
    command = [sys.executable, "-m", "benchmarks.data", "--index", str(folder), str(num_rows)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    index_rate, headers = json.loads(out.stdout.strip().splitlines()[-1])
    return [
        figure("data.index", index_rate, "rows/s", 1000, most=False),
        figure("data.index.headers_alone", headers, "rows/s"),
    ]


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return all figures."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as closes:
        folder = Path(temporary)
        spec = make_spec(write_untrained(folder / "model"))
        figures = index_figures(folder, 500 if quick else 2000)
        rounds, share = (1, 0.5) if quick else (3, 1.0)
        (folder / "s3").mkdir()
        (folder / "s3" / BUCKET).symlink_to(folder)
        os.environ.update(closes.enter_context(serving(folder / "s3", PAUSE_S)))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            figures += stream_figures(folder, spec, rounds, share)
            figures += source_figures(folder, f"s3://{BUCKET}", spec, rounds, share)
        finally:
            ray.shutdown()
    return figures


if __name__ == "__main__":
    if "--index" in sys.argv:
        run_index(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        report(measure)
