"""Where a step's time goes: seconds in each phase, on a GPU by events in its queue, which hold nothing up."""

import platform
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray_vlm.models.operations import OperationCounter
from ray_vlm.train.context import DistributedContext


class Clock:
    """Adds up the seconds of named phases until they are taken, and knows which one it is in.

    `inside`: the phases, the outer ones first; `entered`: how often each was begun; `moved`: when one last began or
    ended, as `time.monotonic` counts; `thread`: the one that did.
    """

    def __init__(self, device: str):
        self._events: list[tuple[str, Any, Any]] | None = [] if device.startswith("cuda") else None
        self._seconds: dict[str, float] = {}
        self.inside: list[str] = []
        self.entered: Counter[str] = Counter()
        self.tick()

    def tick(self) -> None:
        """Something was got done."""
        self.moved, self.thread = time.monotonic(), threading.get_ident()

    @contextmanager
    def phase(self, name: str, host: bool = False) -> Iterator[None]:
        """What the body takes counts to `name`. `host`: it is the CPU's work, such as waiting for data."""
        self.inside.append(name)
        self.entered[name] += 1
        self.tick()
        try:
            with self._timed(name, host):
                yield
        finally:
            self.inside.pop()
            self.tick()

    @contextmanager
    def _timed(self, name: str, host: bool) -> Iterator[None]:
        if self._events is None or host:
            started = time.perf_counter()
            try:
                yield
            finally:
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started
            return
        import torch

        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        try:
            yield
        finally:
            last.record()
            self._events.append((name, first, last))

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call. On a GPU it waits for the phases to end."""
        seconds, self._seconds = self._seconds, {}
        for name, first, last in self._events or ():
            last.synchronize()
            seconds[name] = seconds.get(name, 0.0) + first.elapsed_time(last) / 1000
        if self._events:
            self._events.clear()
        return seconds


def split_time(phases: dict[str, float]) -> dict[str, float]:
    """`data_s` (waiting for rows, making tensors), `rollout_s` (answers), `forward_s`, `backward_s` of a step,
    from the phases that the feed counts: `batch` holds `data` and `collate`, `step` holds `forward`."""
    data = phases.get("data", 0.0) + phases.get("collate", 0.0)
    rollout = max(0.0, phases.get("batch", 0.0) - data)
    forward = phases.get("forward", 0.0)
    backward = max(0.0, phases.get("step", 0.0) - forward)
    return {"data_s": data, "rollout_s": rollout, "forward_s": forward, "backward_s": backward}


def watch_usage(
    batches: Any, operations: OperationCounter, context: DistributedContext
) -> Callable[[], dict[str, float]]:
    """A function that gives what was used since it was last asked: times; images, tokens that went through the language
    model (`model_tokens`) and model FLOPs (`model_tflop`) of all ranks, of which this one speaks for all; and the peak
    of memory (GiB, of the card or of this process) so far."""
    counted = batches.num_images

    def take() -> dict[str, float]:
        nonlocal counted
        images, counted = batches.num_images - counted, batches.num_images
        times, (work, flops) = split_time(batches.clock.take()), operations.take()
        whole = {"images": images, "model_tokens": work.tokens, "model_tflop": flops / 1e12}
        whole = {name: value * context.world_size for name, value in whole.items()}
        return times | whole | {"peak_memory_gib": peak_memory(context.device)}

    return take


def peak_memory(device: str) -> float:
    """The most memory so far, GiB: allocated on the card, or resident in this process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def name_device(device: str) -> str:
    """The card's or the processor's name, as its maker gives it."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")
    except OSError:
        return platform.processor() or "CPU"
