"""Progress of long work in a worker, such as loading the base or a validation, as lines of `metrics.jsonl`."""

from collections.abc import Callable

from ray_vlm.runs.console import Console
from ray_vlm.runs.monitor import Monitor
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.attempt import Attempt
from ray_vlm.train.context import DistributedContext


def progress_writer(paths: RunPaths, context: DistributedContext, attempt: Attempt) -> Callable[[str], None]:
    """Return a function that appends a progress line to the run's metrics, on rank 0 only. Under Ray the driver prints.

    It opens the file at each call, because the base is loaded before the run's own monitor exists.
    """
    if context.rank != 0:
        return lambda text: None
    paths.refresh(paths.metrics)  # an object store cannot append: the whole file is written again
    show = None if context.ray else Console(0, 1).show

    def write(text: str) -> None:
        monitor = Monitor(paths.metrics, attempt.number, (), show, lambda: paths.publish(paths.metrics))
        monitor.progress(attempt.step, text)
        monitor.close()

    return write
