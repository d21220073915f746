"""Time of each phase of a step. On a GPU it is measured by CUDA events, which do not synchronise."""

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
    """Adds up the seconds of named phases until `take` is called, and knows the current phase.

    `inside`: the current phases, outermost first; `entered`: how often each was entered; `moved`: the
    `time.monotonic()` of the last start or end of a phase; `thread`: the thread in which that happened.
    """

    def __init__(self, device: str):
        self._events: list[tuple[str, Any, Any]] | None = [] if device.startswith("cuda") else None
        self._seconds: dict[str, float] = {}
        self.inside: list[str] = []
        self.entered: Counter[str] = Counter()
        self.tick()

    def tick(self) -> None:
        """Record that the process has made progress."""
        self.moved, self.thread = time.monotonic(), threading.get_ident()

    @contextmanager
    def phase(self, name: str, host: bool = False) -> Iterator[None]:
        """Count the time of the body for `name`. `host`: the body is work of the CPU, such as waiting for data."""
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
        """Return the seconds of each phase since the last call. On a GPU this waits for the phases to end."""
        seconds, self._seconds = self._seconds, {}
        for name, first, last in self._events or ():
            last.synchronize()
            seconds[name] = seconds.get(name, 0.0) + first.elapsed_time(last) / 1000
        if self._events:
            self._events.clear()
        return seconds


def split_time(phases: dict[str, float]) -> dict[str, float]:
    """Return `data_s` (waiting for rows, making tensors), `rollout_s` (sampling answers), `forward_s` and `backward_s`.

    Phases are nested: `batch` contains `data` and `collate`, `step` contains `forward`.
    """
    data = phases.get("data", 0.0) + phases.get("collate", 0.0)
    rollout = max(0.0, phases.get("batch", 0.0) - data)
    forward = phases.get("forward", 0.0)
    backward = max(0.0, phases.get("step", 0.0) - forward)
    return {"data_s": data, "rollout_s": rollout, "forward_s": forward, "backward_s": backward}


def watch_usage(
    batches: Any, operations: OperationCounter, context: DistributedContext
) -> Callable[[], dict[str, float]]:
    """Return a function that gives the usage since its last call.

    These are the times of `split_time`; the images, the tokens of the language model (`model_tokens`) and the model
    FLOPs (`model_tflop`) of all ranks, estimated as this rank's times the number of ranks; and the peak memory so far
    (GiB, of the GPU or of this process).
    """
    counted = batches.num_images

    def take() -> dict[str, float]:
        nonlocal counted
        images, counted = batches.num_images - counted, batches.num_images
        times, (work, flops) = split_time(batches.clock.take()), operations.take()
        totals = {"images": images, "model_tokens": work.tokens, "model_tflop": flops / 1e12}
        totals = {name: value * context.world_size for name, value in totals.items()}
        return times | totals | {"peak_memory_gib": peak_memory(context.device)}

    return take


def peak_memory(device: str) -> float:
    """Return the peak memory so far in GiB: allocated on the GPU, or resident in this process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def name_device(device: str) -> str:
    """Return the name of the GPU or of the processor."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")
    except OSError:
        return platform.processor() or "CPU"
