"""Stream planned rows as batches, in plan order, made ahead of the trainer.

`stream_local` runs the loader in one thread of this process. `stream_ray` runs it in Ray Data actors, one pipeline for
each rank, and images cross the object store as uint8. Both yield the same rows, byte for byte, since the same function
makes them.
"""

import contextlib
import ctypes
import math
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from ray_vlm.cluster.environment import Environment
from ray_vlm.data.backpressure import AT_ONCE, WindowFeeder, keep_fed, start_thread, take_planned
from ray_vlm.data.images import ImageSpec
from ray_vlm.data.plan import MicroBatch, Plan
from ray_vlm.data.records import Record
from ray_vlm.data.rows import Rows, make_row
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import IGNORED, Sample, SampleSpec
from ray_vlm.errors import DataError, RunError
from ray_vlm.models.libraries import keep_imports, no_garbage_collection

if TYPE_CHECKING:
    import pyarrow
    from ray.actor import ActorHandle

_FIRST_S = 60.0  # time in which a loader starts if there is a CPU for it
PREFETCH_MICRO_BATCHES = 3  # micro-batches that wait ready for the trainer
_BLOCK_BYTES = 16 * 2**20  # Ray Data passes a block on when it has this size
_BLOCKS_AHEAD = 8  # of one loader; at Ray's 2 it idles until the driver's next check
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
# The largest task of a loader, in bytes of pixels and in rows. A task has an overhead of 10 ms or more, but what the
# other loaders make meanwhile waits in memory, since order is kept.
_TASK_BYTES, _TASK_ROWS = 128 * 2**20, 64
_TASKS = 256  # the most tasks of small rows: Ray Data puts all of them into the store before any loader starts


@dataclass(frozen=True)
class StreamSpec:
    """What one rank streams: its micro-batches `first` up to (not including) `last` of a plan over `rows`.

    `row_bytes`: approximate bytes of a row's pixels. `replace_unreadable`: replace a row that cannot be read any more
    by another (`data/rows.py`).
    """

    rows: Rows
    spec: SampleSpec
    plan: Plan
    rank: int
    first: int
    last: int
    row_bytes: float = 4 * 2**20
    replace_unreadable: bool = False


def make_rows(builder: SampleBuilder, rows: Rows, micro: MicroBatch, replace_unreadable: bool = False) -> list[Sample]:
    """Return the rows of a micro-batch; nothing is trained of those of a padding micro-batch."""
    samples = [make_row(builder, rows, number, replace_unreadable) for number in micro.rows]
    if micro.padding:
        samples = [replace(sample, labels=np.full_like(sample.labels, IGNORED)) for sample in samples]
    return samples


def stream_local(spec: StreamSpec) -> Generator[list[Sample]]:
    """Yield the micro-batches of `spec` from a thread that stays a few ahead. Raise an error of that thread here."""
    ready: queue.Queue = queue.Queue(maxsize=PREFETCH_MICRO_BATCHES)
    stop = threading.Event()

    def put(item: list[Sample] | Exception | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            builder = load_sample_builder(spec.spec)
            for number in range(spec.first, spec.last):
                micro = spec.plan.micro_batch(number, spec.rank)
                put(make_rows(builder, spec.rows, micro, spec.replace_unreadable))
                if stop.is_set():
                    return
            put(None)
        except Exception as error:  # pass any error to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=work, name="ray-vlm-loader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def stream_ray(
    spec: StreamSpec, num_loaders: int, cpus_per_loader: float = 1.0, environment: Environment | None = None
) -> Generator[list[Sample]]:
    """Yield the micro-batches of `spec` from `num_loaders` Ray Data actors. Raise `RunError` if out of order."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.target_max_block_size = _BLOCK_BYTES
    context._max_num_blocks_in_streaming_gen_buffer = _BLOCKS_AHEAD
    context.execution_no_progress_timeout_s = -1  # a validation may take longer than Ray's half hour
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    total, size = spec.last - spec.first, task_size(spec)
    ahead = size * (num_loaders + 1)

    def micro_batch(number: int) -> MicroBatch:
        return spec.plan.micro_batch(number, spec.rank)

    # A loader takes a whole task at once, which begins up to `ahead`; the second one more is for the way to the gate.
    feeder = WindowFeeder(micro_batch, spec.first, spec.last, ahead, ahead + 2 * size)
    dataset = ray.data.range(total, override_num_blocks=math.ceil(total / size)).map_batches(
        _Loader,
        fn_constructor_args=(
            spec.rows,
            spec.spec,
            spec.first,
            spec.replace_unreadable,
            environment or Environment(),
            feeder.gate,
        ),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=num_loaders),
        num_cpus=cpus_per_loader,
    )
    expected = spec.first
    batches: Any = iter(
        dataset.iter_batches(batch_size=1, prefetch_batches=PREFETCH_MICRO_BATCHES, batch_format="pyarrow")
    )
    with contextlib.closing(keep_fed(batches, feeder)) as fed:
        for batch in fed:
            number, rows = unpack(batch)
            if number != expected:
                raise RunError(f"micro-batch {number} arrived where {expected} was due. Please report this.")
            expected += 1
            if number % size == 0:  # the gate lags by less than `ahead`, so the task that the trainer needs never waits
                feeder.reach(number)
            yield rows


class StartedStream(Iterator[list[Sample]]):
    """A stream whose first micro-batch is made at once, in a thread: a loader takes as long to start as a worker takes
    to load its libraries and its base."""

    def __init__(self, stream: Generator[list[Sample]]):
        self._stream = stream
        self._first: Future[list[Sample] | None] | None = start_thread(lambda: next(stream, None), "ray-vlm-first")

    def __next__(self) -> list[Sample]:
        first, self._first = self._first, None
        rows = next(self._stream, None) if first is None else first.result()
        if rows is None:
            raise StopIteration
        return rows

    def close(self) -> None:
        """End the stream. A generator cannot be closed while it runs, so this waits for a first micro-batch that is
        still being made. If there is no room for loaders, none will come, and the stream ends with its process."""
        if self._first is None or wait([self._first], _FIRST_S).done:
            self._stream.close()


Stream = Generator[list[Sample]] | StartedStream


def task_size(spec: StreamSpec) -> int:
    """Return how many micro-batches a loader makes at a time."""
    rows = max(_TASK_ROWS, (spec.last - spec.first) * spec.plan.rows_at_once / _TASKS)
    return max(1, int(min(rows, _TASK_BYTES / max(spec.row_bytes, 1.0)) / spec.plan.rows_at_once))


def mean_bytes(records: Sequence[Record], image_spec: ImageSpec, sample: int = 500) -> float:
    """Return the mean bytes of a row's pixels over evenly spaced records."""
    some = records[:: max(1, len(records) // sample)]
    sides = [image_spec.place(size).resized for record in some for size in record.sizes]
    return sum(3.0 * width * height for width, height in sides) / max(1, len(some))


class _Loader:
    """The Ray Data actor: keeps the rows and the processor, and turns numbers of micro-batches into packed rows.

    Numbers in Ray Data count from `first`. Which rows a micro-batch holds is asked of the `gate`.
    """

    def __init__(
        self,
        rows: Rows,
        spec: SampleSpec,
        first: int,
        replace_unreadable: bool,
        environment: Environment,
        gate: "ActorHandle",
    ):
        environment.apply()
        with no_garbage_collection():
            import torch
            import transformers.image_processing_backends
            import transformers.processing_utils  # noqa: F401
        keep_imports()
        torch.set_num_threads(1)
        _keep_memory()
        self.rows, self.spec, self.first = rows, spec, first
        self.replace_unreadable, self.gate = replace_unreadable, gate

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator["pyarrow.Table"]:
        first, last = (self.first + int(batch["id"][end]) for end in (0, -1))
        for start in range(first, last + 1, AT_ONCE):
            planned = take_planned(self.gate, start, min(start + AT_ONCE, last + 1), begun=start > first)
            builder = load_sample_builder(self.spec)
            for number, micro in enumerate(planned, start):
                yield pack(number, make_rows(builder, self.rows, micro, self.replace_unreadable))


def _keep_memory() -> None:
    """Tell glibc's allocator to keep the memory of one image for the next.

    By default it returns every large block to the system, and each of its pages costs a fault when it is needed again:
    a quarter of the time of a 12-megapixel photo.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):  # another C library
        return


def pack(number: int, rows: Sequence[Sample]) -> "pyarrow.Table":
    """Pack a micro-batch as an Arrow table of one row: pixels end to end as bytes, with their shapes beside them."""
    import pyarrow as pa

    images = [image for row in rows for image in row.images]
    columns = {
        "number": pa.array([number], pa.int64()),
        "lengths": pa.array([[len(row.input_ids) for row in rows]], pa.list_(pa.int32())),
        "num_images": pa.array([[len(row.images) for row in rows]], pa.list_(pa.int32())),
        "numbers": pa.array([[row.number for row in rows]], pa.list_(pa.int64())),
        "answers": pa.array([[[len(ids) for ids in row.completions] for row in rows]], pa.list_(pa.list_(pa.int32()))),
        "completions": _one_list([ids for row in rows for ids in row.completions]),
        "input_ids": _one_list([row.input_ids for row in rows]),
        "labels": _one_list([row.labels for row in rows]),
        "weights": _one_list([row.weights for row in rows if row.weights is not None], np.float32),
        "shapes": pa.array([[side for image in images for side in image.shape[:2]]], pa.list_(pa.int32())),
        "pixels": _one_binary(images),
    }
    return pa.table(columns)


def _one_binary(images: Sequence[np.ndarray]) -> "pyarrow.Array":
    """Return all pixels as one Arrow value, copied once."""
    import pyarrow as pa

    pixels = np.concatenate([np.zeros(0, np.uint8), *(image.reshape(-1) for image in images)])
    ends = pa.py_buffer(np.array([0, len(pixels)], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(pixels)])


def _one_list(parts: Sequence[np.ndarray], dtype: DTypeLike = np.int32) -> "pyarrow.Array":
    import pyarrow as pa

    values = np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)
    return pa.ListArray.from_arrays(np.array([0, len(values)], np.int32), pa.array(values))


def unpack(table: "pyarrow.Table") -> tuple[int, list[Sample]]:
    """Return the number and the rows that `pack` packed; pixels are not copied."""
    column = {name: table.column(name)[0] for name in table.column_names}
    about = zip(*(column[name].as_py() for name in ("lengths", "num_images", "numbers", "answers")), strict=True)
    ids, labels, weights, completion_ids = (
        column[name].values.to_numpy() for name in ("input_ids", "labels", "weights", "completions")
    )
    pixels = np.frombuffer(column["pixels"].as_buffer(), np.uint8)
    shapes = iter(column["shapes"].as_py())
    rows, token, pixel, first = [], 0, 0, 0
    for length, count, record, answers in about:
        images = []
        for _ in range(count):
            height, width = next(shapes), next(shapes)
            images.append(pixels[pixel : pixel + height * width * 3].reshape(height, width, 3))
            pixel += height * width * 3
        span = slice(token, token + length)
        ends = [first + sum(answers[: i + 1]) for i in range(len(answers))]
        completions = tuple(completion_ids[start:end] for start, end in zip([first, *ends], ends, strict=False))
        rows.append(
            Sample(
                ids[span],
                labels[span] if len(labels) else labels,
                tuple(images),
                weights[span] if len(weights) else None,
                completions,
                record,
            )
        )
        token, first = token + length, first + sum(answers)
    if pixel != len(pixels):
        raise DataError(f"{len(pixels) - pixel} bytes of pixels belong to no image. Please report this.")
    return int(column["number"].as_py()), rows
