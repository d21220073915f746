"""Count the reads from a device in a block, by the code that makes them.

A read waits for all work that is queued on the device. On a CPU every tensor stands for one on a device, so a read is a
call that would wait if its tensor were on a GPU: a number, a list or an array of it, its move to the host, and
operations whose result has a shape that depends on values. On a GPU torch reports them itself, copies from unpinned
memory to the device among them.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ray_vlm
from ray_vlm.data.collate import attach_plan, upload
from ray_vlm.models.layouts import LayoutPlanner
from ray_vlm.models.vision_inputs import ImagePlan, plan_images

_OURS = str(Path(ray_vlm.__file__).parent)
_OWNERS = ("trl", "transformers", "peft", "accelerate", "bitsandbytes")
_CALLS = ("tolist", "numpy", "__array__", "cpu")  # of a tensor, which no dispatched operation shows
_OPERATIONS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")
# What these ask of tensors, and send to the device, is on the host, so no read, though on a CPU it looks like one.
# Tests send it to the device "meta", where a read raises. A GRPO step calls them: its rows are known after sampling.
_ON_THE_HOST = {f.__code__ for f in (attach_plan, upload, LayoutPlanner.plan, ImagePlan.to, plan_images)}
_run_backward = torch.autograd._engine_run_backward
_REPORT = "called a synchronizing CUDA operation"


class DeviceReads(Counter[tuple[str, str]]):
    """Reads by who makes them and where: `("ray_vlm", "models/attention.py:81 tolist")`, the innermost frame of this
    package or a library of `_OWNERS`; "other" without one, "backward" for the gradient of an operation."""

    def of(self, *owners: str) -> dict[str, int]:
        """The reads of these owners, by place."""
        return {place: count for (owner, place), count in self.items() if owner in owners}

    def add(self, name: str) -> None:
        """Count a read of this name by the code that runs now, unless that works on the host."""
        if not _is_on_the_host():
            owner, place = _caller()
            self[owner, f"{place} {name}"] += 1

    def listed(self) -> str:
        """A line for each place, the most reads first."""
        return "\n".join(f"{count:4} {owner:12} {place}" for (owner, place), count in self.most_common())


def _is_on_the_host() -> bool:
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code not in _ON_THE_HOST:
        frame = frame.f_back
    return frame is not None


def _caller() -> tuple[str, str]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if frame.f_code is _Calls.run_backward.__code__:
            return "backward", "of an operation"
        if path.startswith(_OURS):
            return "ray_vlm", f"{path.removeprefix(_OURS + '/')}:{frame.f_lineno}"
        for owner in _OWNERS:
            if f"/site-packages/{owner}/" in path:
                return owner, f"{path.rpartition(f'/{owner}/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "other", ""


class _Calls(TorchFunctionMode):
    """Counts calls of `_CALLS`, and moves to "cpu"; a move to a tensor's own device is none."""

    def __init__(self, reads: DeviceReads):
        super().__init__()
        self.reads, self.counted = reads, False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        moves = name == "to" and any(isinstance(v, str) and v == "cpu" for v in (*args[1:], *(kwargs or {}).values()))
        if name not in _CALLS and not moves:
            return func(*args, **(kwargs or {}))
        self.reads.add(name)
        self.counted = True  # the operations that it consists of are no further reads
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.counted = False

    def run_backward(self, *args: Any, **options: Any) -> Any:
        """The autograd engine's pass with this mode on, which recomputes forwards (see `support/precision.py`)."""
        with self:
            return _run_backward(*args, **options)


class _Operations(TorchDispatchMode):
    """Counts `_OPERATIONS`, and those that need the number of true values of a mask."""

    def __init__(self, reads: DeviceReads, calls: _Calls):
        super().__init__()
        self.reads, self.calls = reads, calls

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if not self.calls.counted and (name in _OPERATIONS or _has_open_shape(name, args, kwargs or {})):
            self.reads.add(name)
        return func(*args, **(kwargs or {}))


def _has_open_shape(name: str, args: tuple, kwargs: dict) -> bool:
    if name == "repeat_interleave":
        return isinstance(args[-1], torch.Tensor) and kwargs.get("output_size") is None
    if name not in ("index", "index_put", "index_put_", "_unsafe_index"):
        return False
    masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return masks and not ("put" in name and args[2].numel() == 1)  # which is a `masked_fill`


@contextmanager
def count_reads(device: str = "cpu") -> Iterator[DeviceReads]:
    """Count the reads of the block."""
    reads = DeviceReads()
    with ExitStack() as stack:
        if torch.device(device).type == "cuda":
            stack.enter_context(_reported(reads))
        else:
            calls = _Calls(reads)
            stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", calls.run_backward))
            stack.enter_context(calls)
            stack.enter_context(_Operations(reads, calls))
        yield reads


@contextmanager
def _reported(reads: DeviceReads) -> Iterator[None]:
    """Count what torch reports of a GPU. A report is a warning, which is raised while the call that waits runs."""

    def show(message: Any, *_: Any, **__: Any) -> None:
        if _REPORT in str(message):
            reads.add("waits")

    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
