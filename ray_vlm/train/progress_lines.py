"""How far a worker's longer work is, as lines of the run: the base is loaded, held-out rows are measured."""

from collections.abc import Callable

from ray_vlm.runs.console import Console
from ray_vlm.runs.monitor import Monitor
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.attempt import Attempt
from ray_vlm.train.context import DistributedContext


def progress_writer(paths: RunPaths, context: DistributedContext, attempt: Attempt) -> Callable[[str], None]:
    """A function that puts a line among those of the run; rank 0 speaks for all. Under Ray the driver shows it.

    It opens the file each time: the base is loaded before the run's own monitor is there.
    """
    if context.rank != 0:
        return lambda text: None
    paths.refresh(paths.metrics)  # an object store cannot append: what is there is written again, with more
    show = None if context.ray else Console(0, 1).show

    def write(text: str) -> None:
        monitor = Monitor(paths.metrics, attempt.number, (), show, lambda: paths.publish(paths.metrics))
        monitor.progress(attempt.step, text)
        monitor.close()

    return write
