"""Make batches ahead of the trainer: while one trains, a thread makes the next on the host and sends it to the device.

On a GPU the copy runs on a stream of its own, from pinned memory, beside the kernels of the batch that trains. On a CPU
a thread would only take the cores that train, so there each batch is made when it is taken.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from ray_vlm.data.collate import upload

if TYPE_CHECKING:
    import torch

_Item = TypeVar("_Item")
_CLOSE_S = 60.0  # for the item that is being made when a feed is closed


class _Entry(NamedTuple, Generic[_Item]):
    """An item, None behind the last, and its batch, on the way to the device."""

    item: "Future[_Item | None]"
    batch: "Future[Sent]"


class Sent(NamedTuple):
    """A batch whose copy to the device has begun, and the event that marks its end, None if it has ended."""

    batch: object
    copied: "torch.cuda.Event | None" = None


class Feed(Generic[_Item]):
    """Batches of the items of an iterator, in order: `take_item` returns an item, then `take_batch` its batch.

    `build` makes a batch on the host. `depth`: batches that are made ahead, all in one thread; 0: none, and no thread.
    An error of the iterator is raised by `take_item`, one of `build` by `take_batch`, with the traceback of the thread.
    """

    def __init__(
        self,
        items: Iterator[_Item],
        build: Callable[[_Item], object],
        device: str = "cpu",
        depth: int = 0,
    ):
        self._items, self._build = items, build
        self._depth, self._copier = depth, _Copier(device)
        self._entries: deque[_Entry[_Item]] = deque()  # asked for, oldest first
        self._asked: queue.SimpleQueue[_Entry[_Item] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def take_item(self) -> _Item | None:
        """Return the next item, or None behind the last; waits until it is there."""
        if not self._entries:
            self._ask()
        item = self._entries[0].item.result()
        if item is None:
            self._entries.clear()  # those behind it are None too
        return item

    def take_batch(self) -> object:
        """Return the batch of the item that was taken; kernels of the current stream find it on the device."""
        entry = self._entries.popleft()
        if self._depth == 0:
            self._make_batch(entry)
        sent = entry.batch.result()
        while len(self._entries) < self._depth:
            self._ask()
        return self._copier.receive(sent)

    def close(self) -> bool:
        """End the thread, and drop what it has made. Return whether it has ended: an item that is being made is waited
        for, a minute at most, and a later end of the process takes the thread with it."""
        self._closed = True
        self._entries.clear()
        if self._thread is None:
            return True
        self._asked.put(None)
        self._thread.join(_CLOSE_S)
        return not self._thread.is_alive()

    def _ask(self) -> None:
        """Ask for one more item and, if batches are made ahead, for its batch."""
        entry: _Entry[_Item] = _Entry(Future(), Future())
        self._entries.append(entry)
        if self._depth == 0:
            return self._make_item(entry)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="ray-vlm-feed", daemon=True)
            self._thread.start()
        self._asked.put(entry)

    def _work(self) -> None:
        while (entry := self._asked.get()) is not None and not self._closed:
            self._make_item(entry)
            if not self._closed and entry.item.exception() is None and entry.item.result() is not None:
                self._make_batch(entry)

    def _make_item(self, entry: _Entry[_Item]) -> None:
        _fill(entry.item, lambda: next(self._items, None))

    def _make_batch(self, entry: _Entry[_Item]) -> None:
        item = entry.item.result()
        assert item is not None
        _fill(entry.batch, lambda: self._copier.send(self._build(item)))


_Result = TypeVar("_Result")


def _fill(future: "Future[_Result]", function: Callable[[], _Result]) -> None:
    """Set the result of a future, or the error of whatever kind, which is raised where the result is taken."""
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)


class _Copier:
    """Sends batches to a device: on a GPU by a stream of its own, from any thread, for the stream that trains."""

    def __init__(self, device: str):
        import torch

        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.startswith("cuda"):
            # A thread begins with card 0 as its current one, so the card is named.
            index = torch.device(device).index
            self._device = f"cuda:{torch.cuda.current_device() if index is None else index}"
            self._stream = torch.cuda.Stream(self._device)

    def send(self, batch: object) -> Sent:
        """Begin to copy a batch to the device. A list of rows stays on the host, and no GPU is called."""
        if self._stream is None or not isinstance(batch, Mapping):
            return Sent(upload(batch, self._device))
        import torch

        with torch.cuda.stream(self._stream):  # of the stream's card, also in this thread
            return Sent(upload(batch, self._device), self._stream.record_event())

    def receive(self, sent: Sent) -> object:
        """Return a batch that was sent; the current stream waits for the end of its copy, the host does not."""
        if sent.copied is None:
            return sent.batch
        import torch

        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(sent.copied)
        for tensor in _tensors_in(sent.batch):
            if not tensor.is_pinned():  # which is the host's
                tensor.record_stream(stream)  # its memory is the copy stream's, which must not use it again before
        return sent.batch


def _tensors_in(value: object) -> "Iterator[torch.Tensor]":
    """Yield the tensors of a batch, also those that its objects, such as `ImageBytes`, hold."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(entry)
    elif is_dataclass(value):
        yield from _tensors_in(vars(value))
