"""A CUDA graph's stand-in on a CPU: it records the operations of a step, and repeats them on the recorded tensors.

As a graph does, it keeps every number of Python's and every address of the capture: a step that depends on anything but
tensors that are changed in place gives wrong results when it is repeated. A read of a tensor's value is refused, as
CUDA refuses it during a capture.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"}


class RecordedSteps:
    """Captures a step as `CudaGraphs` does. `sizes`: operations of each capture; `replays`: of all of them together."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.replays = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        step()  # warm up
        recorder = _Recorder()
        with recorder:
            step()
        self.sizes.append(len(recorder.calls))

        def replay() -> None:
            self.replays += 1
            addresses = [tensor.data_ptr() for tensor in recorder.tensors()]
            for func, args, kwargs, output in recorder.calls:
                _write(func(*args, **kwargs), output)
            assert addresses == [tensor.data_ptr() for tensor in recorder.tensors()]

        return replay


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.name().split(".")[0] in _READS:
            raise RuntimeError(f"{func.name()} reads the device during a capture")
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors that the recorded operations read or write."""
        return [leaf for call in self.calls for leaf in tree_leaves(call[1:]) if isinstance(leaf, torch.Tensor)]


def _write(new: Any, recorded: Any) -> None:
    """Write the results of an operation where they were when it was recorded; a view is there already."""
    for value, target in zip(tree_leaves(new), tree_leaves(recorded), strict=True):
        if isinstance(target, torch.Tensor) and value.data_ptr() != target.data_ptr():
            target.copy_(value)
