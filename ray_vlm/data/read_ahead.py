"""Fetch the images of the rows that come next from an object store, while earlier rows are decoded.

A request takes as long as decoding several images. Files of a disk are read where they are decoded.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from ray_vlm.data.images import read_image
from ray_vlm.data.plan import MicroBatch
from ray_vlm.data.records import Image
from ray_vlm.data.rows import Rows
from ray_vlm.storage import is_remote

FetchedImages = list[Future[tuple[Image, ...]]] | None  # of each row of a micro-batch
_REQUESTS = 64  # at once; an image takes two, one after the other
# Bytes of images that are fetched or wait to be decoded, and the fewest and most rows that they may be.
_BYTES_AHEAD, _FEWEST_AHEAD, _MOST_AHEAD = 64 * 2**20, 8, 128
_SEEN = 8  # micro-batches whose images show how large the next ones are
_LOOKED_AT = 64  # rows that show whether images lie in an object store


@contextmanager
def fetch_ahead(
    rows: Rows, micros: Iterable[MicroBatch], remote: bool
) -> Iterator[Iterator[tuple[MicroBatch, FetchedImages]]]:
    """Give an iterator of the micro-batches with the futures of their images, which are fetched ahead; without futures
    if the images are not `remote`, as `lie_remotely` returns."""
    if not remote:
        yield ((micro, None) for micro in micros)
        return
    from pyarrow import io_thread_count, set_io_thread_count

    set_io_thread_count(max(io_thread_count(), _REQUESTS))  # so many connections may a client of S3 have
    pool = ThreadPoolExecutor(_REQUESTS, "ray-vlm-fetch")
    try:
        yield _fetch(rows, micros, pool)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a store that hangs holds up nobody


def _fetch(
    rows: Rows, micros: Iterable[MicroBatch], pool: ThreadPoolExecutor
) -> Iterator[tuple[MicroBatch, FetchedImages]]:
    started: deque[tuple[MicroBatch, list[Future[tuple[Image, ...]]]]] = deque()
    given: deque[list[Future[tuple[Image, ...]]]] = deque(maxlen=_SEEN)
    ahead, limit = 0, _FEWEST_AHEAD
    for micro in micros:
        started.append((micro, [pool.submit(fetch_images, rows, number) for number in micro.rows]))
        ahead += len(micro.rows)
        limit = count_ahead([future for fetched in given for future in fetched], limit)
        while ahead > limit:
            first = started.popleft()
            ahead -= len(first[0].rows)
            given.append(first[1])
            yield first
    yield from started


def count_ahead(fetched: list[Future[tuple[Image, ...]]], before: int) -> int:
    """Return how many rows to fetch ahead if their images are as large as those of these rows that have been fetched;
    as many as `before` if there are none."""
    made = [future.result() for future in fetched if future.done() and future.exception() is None]
    if not made:
        return before
    size = sum(len(image) for images in made for image in images if isinstance(image, bytes)) / len(made)
    return int(min(_MOST_AHEAD, max(_FEWEST_AHEAD, _BYTES_AHEAD / max(1.0, size))))


def fetch_images(rows: Rows, number: int) -> tuple[Image, ...]:
    """Return the bytes of the images of a row. Raise `OSError` or `ValueError` if one cannot be read."""
    return tuple(read_image(image) for image in rows.images(number))


def lie_remotely(rows: Rows) -> bool:
    """Return whether images of rows all over the data lie in an object store."""
    some = range(0, len(rows), max(1, len(rows) // _LOOKED_AT))
    addresses = (i if isinstance(i, str) else getattr(i, "address", "") for n in some for i in rows.images(n))
    return any(map(is_remote, addresses))
