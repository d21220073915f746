"""Stream planned rows as batches, in plan order, made ahead of the trainer.

`stream_local` runs loaders in threads of this process. `stream_ray` runs them in Ray Data actors, one pipeline for each
rank, and images cross the object store as uint8. Both yield the same rows, byte for byte, since the same function makes
them.
"""

import contextlib
import ctypes
import math
import pickle
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_vlm.cluster.environment import Environment
from ray_vlm.data.backpressure import AT_ONCE, WindowFeeder, keep_fed, start_thread, take_planned
from ray_vlm.data.images import ImageSpec
from ray_vlm.data.plan import MicroBatch, Plan
from ray_vlm.data.read_ahead import FetchedImages, fetch_ahead, lie_remotely
from ray_vlm.data.records import Image, Record
from ray_vlm.data.rows import Rows, make_row
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import IGNORED, Sample, SampleSpec
from ray_vlm.errors import RunError
from ray_vlm.models.libraries import import_transformers, keep_imports, training_imports

if TYPE_CHECKING:
    import pyarrow
    from ray.actor import ActorHandle

_FIRST_S = 60.0  # time in which a loader starts if there is a CPU for it
PREFETCH_MICRO_BATCHES = 3  # micro-batches that wait ready for the trainer
_CALL_ROWS, _CALL_BYTES = 16, 8 * 2**20  # rows that a thread makes at a time, and their pixels
_BLOCK_BYTES = 16 * 2**20  # Ray Data passes a block on when it has this size
_BLOCKS_READY = 2  # blocks that wait ready for the trainer, beside the one that it takes rows from
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


def make_rows(
    builder: SampleBuilder,
    rows: Rows,
    micro: MicroBatch,
    replace_unreadable: bool = False,
    fetched: FetchedImages = None,
) -> list[Sample]:
    """Return the rows of a micro-batch; nothing is trained of those of a padding micro-batch. `fetched`: the images of
    each row, if they are fetched ahead."""
    images: Sequence[Future[tuple[Image, ...]] | None] = fetched or [None] * len(micro.rows)
    samples = [
        make_row(builder, rows, number, replace_unreadable, future)
        for number, future in zip(micro.rows, images, strict=True)
    ]
    if micro.padding:
        samples = [replace(sample, labels=np.full_like(sample.labels, IGNORED)) for sample in samples]
    return samples


def stream_local(spec: StreamSpec, threads: int = 1) -> Generator[list[Sample]]:
    """Yield the micro-batches of `spec` as `stream_micro_batches` does."""
    micros = (spec.plan.micro_batch(number, spec.rank) for number in range(spec.first, spec.last))
    size = max(1, int(min(_CALL_ROWS, _CALL_BYTES / max(spec.row_bytes, 1.0)) / spec.plan.rows_at_once))
    build = partial(load_sample_builder, spec.spec)
    yield from stream_micro_batches(micros, spec.rows, build, threads, size, spec.replace_unreadable)


def stream_micro_batches(
    micros: Iterator[MicroBatch],
    rows: Rows,
    build: Callable[[], SampleBuilder],
    threads: int = 1,
    size: int = 1,
    replace_unreadable: bool = False,
) -> Generator[list[Sample]]:
    """Yield the rows of micro-batches from threads that stay a few ahead. Raise an error of a thread here.

    `build` returns the process's builder; `size`: micro-batches that a thread makes at a time. Decoders and torch
    release Python's lock, so threads decode side by side.
    """
    # One thread plans, since an order that is made at the beginning of an epoch would hold up the trainer.
    with (
        fetch_ahead(rows, micros, lie_remotely(rows)) as planned,
        ThreadPoolExecutor(1, "ray-vlm-planner") as planner,
        ThreadPoolExecutor(threads, "ray-vlm-loader") as pool,
    ):

        def start(calls: int) -> None:
            for _ in range(calls):
                started.append(pool.submit(make, planner.submit(lambda: list(islice(planned, size)))))

        def make(some: Future[list[tuple[MicroBatch, FetchedImages]]]) -> list[list[Sample]]:
            builder = build()
            return [make_rows(builder, rows, micro, replace_unreadable, fetched) for micro, fetched in some.result()]

        started: deque[Future[list[list[Sample]]]] = deque()
        try:
            start(threads + math.ceil(PREFETCH_MICRO_BATCHES / size))
            while made := started.popleft().result():
                start(1)
                yield from made
        finally:
            planner.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)


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
    blocks: Any = iter(dataset.iter_batches(batch_size=None, prefetch_batches=_BLOCKS_READY, batch_format="pyarrow"))
    with contextlib.closing(keep_fed(blocks, feeder)) as fed:
        for number, rows in unpack(fed):
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


def mean_bytes(records: Sequence[Record], image_spec: ImageSpec) -> float:
    """Return the mean bytes of a row's pixels over some records."""
    sides = [image_spec.place(size).resized for record in records for size in record.sizes]
    return sum(3.0 * width * height for width, height in sides) / max(1, len(records))


def mean_pixels(records: Sequence[Record]) -> float:
    """Return the mean pixels of the images of some records, before resizing."""
    sizes = [size for record in records for size in record.sizes]
    return sum(float(width * height) for width, height in sizes) / max(1, len(sizes))


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
        with training_imports():
            import_transformers()
            import torch
            import transformers.image_processing_backends
            import transformers.processing_utils  # noqa: F401

            keep_imports()
        torch.set_num_threads(1)
        _keep_memory()
        self.rows, self.spec, self.first = rows, spec, first
        self.replace_unreadable, self.gate, self.remote = replace_unreadable, gate, lie_remotely(rows)

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator["pyarrow.Table"]:
        first, last = (self.first + int(batch["id"][end]) for end in (0, -1))
        for start in range(first, last + 1, AT_ONCE):
            planned = take_planned(self.gate, start, min(start + AT_ONCE, last + 1), begun=start > first)
            builder = load_sample_builder(self.spec)
            with fetch_ahead(self.rows, planned, self.remote) as fetching:
                for number, (micro, fetched) in enumerate(fetching, start):
                    yield pack(number, make_rows(builder, self.rows, micro, self.replace_unreadable, fetched))


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
    """Pack a micro-batch as an Arrow table of binary values: first all but the pixels, pickled, then the pixels of each
    image. No pixels are copied."""
    import pyarrow as pa

    header = [(replace(row, images=()), [image.shape for image in row.images]) for row in rows]
    values = [np.frombuffer(pickle.dumps((number, header), protocol=5), np.uint8)]
    values += [np.ascontiguousarray(image).reshape(-1) for row in rows for image in row.images]
    chunks = []
    for value in values:
        ends = pa.py_buffer(np.array([0, len(value)], np.int64))
        chunks.append(pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(value)]))
    return pa.table({"values": pa.chunked_array(chunks)})


def unpack(tables: Iterable["pyarrow.Table"]) -> Iterator[tuple[int, list[Sample]]]:
    """Yield the number and the rows of each micro-batch that `pack` packed; pixels are not copied. A table may hold
    several micro-batches, and parts of one."""
    values = (value.as_buffer() for table in tables for value in table.column("values"))
    for value in values:
        number, header = pickle.loads(value)  # noqa: S301  (a loader of this run wrote it)
        rows = []
        for sample, shapes in header:
            images = tuple(np.frombuffer(next(values), np.uint8).reshape(shape) for shape in shapes)
            rows.append(replace(sample, images=images))
        yield number, rows
