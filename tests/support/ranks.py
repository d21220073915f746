"""Ranks that are threads of this process: what they exchange, and what each of them asks of the storage."""

import pickle
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ray_vlm.distributed import DistributedContext
from ray_vlm.errors import RunError
from ray_vlm.storage import Store

T = TypeVar("T")


@dataclass
class Group:
    """A process group of threads. `received`: bytes that each rank got from others, as objects are pickled."""

    size: int
    values: list[Any] = field(init=False)
    received: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)
        self.values, self.received = [None] * self.size, [0] * self.size


@dataclass(frozen=True)
class PlayedRank(DistributedContext):
    """A rank whose collective operations are those of threads."""

    group: Group = field(default_factory=lambda: Group(1))

    def _exchange(self, value: Any, take: Callable[[list[Any]], T]) -> T:
        """Give this rank's value, and return what `take` makes of those of all."""
        self.group.values[self.rank] = value
        self.group.barrier.wait()
        taken = take(self.group.values)
        self.group.barrier.wait()
        return taken

    def _receive(self, value: T) -> T:
        data = pickle.dumps(value)
        self.group.received[self.rank] += len(data)
        return pickle.loads(data)

    def broadcast(self, value: T) -> T:
        return self._exchange(value, lambda values: self._receive(values[0]) if self.rank else value)

    def gather(self, value: T) -> list[T]:
        return self._exchange(value, lambda values: [] if self.rank else [self._receive(one) for one in values])

    def scatter(self, values: Sequence[T]) -> T:
        return self._exchange(values, lambda every: self._receive(every[0][self.rank]))

    def max(self, values: Sequence[int]) -> list[int]:
        return self._exchange(values, lambda every: self._receive([max(column) for column in zip(*every, strict=True)]))

    def sum(self, values: Sequence[float]) -> list[float]:
        return self._exchange(values, lambda every: self._receive([sum(column) for column in zip(*every, strict=True)]))


class CountingStore(Store):
    """A store that counts what is asked of it: its operations on a disk, or the requests to an object store.

    `once`: the operations on a disk with their first argument, in which polls for a file count once.
    """

    COUNTED = ("names", "files", "read", "write", "put", "staging", "remove")
    _one_at_a_time = threading.Lock()  # readers of fsspec's memory:// share the position in a file

    def __init__(self, address: str | Path):
        super().__init__(address)
        self.asked: Counter[str] = Counter()
        self.once: set[tuple[Any, ...]] = set()
        for name in self.COUNTED if self.local is not None else ():
            setattr(self, name, partial(self._count, name, getattr(self, name)))

    def _count(self, name: str, do: Callable[..., T], *args: Any) -> T:
        self.asked[name] += 1
        self.once.add((name, *args[:1]))
        return do(*args)

    def _ask(self, do: Callable[[], T]) -> T:
        self.asked["request"] += 1
        with self._one_at_a_time:
            return super()._ask(do)


def on_ranks(stores: Sequence[Store], do: Callable[[Store, PlayedRank], T], group: Group | None = None) -> list[Any]:
    """Return what `do` returns on each rank, or the `RunError` that it raises there. The ranks are Ray's workers."""
    group = group or Group(len(stores))

    def run(rank: int) -> Any:
        try:
            return do(stores[rank], PlayedRank(rank, len(stores), ray=True, group=group))
        except RunError as error:
            return error

    with ThreadPoolExecutor(len(stores)) as pool:
        return list(pool.map(run, range(len(stores))))
