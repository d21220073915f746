"""Log an evaluation's metrics to the run's own page in Weights & Biases, at the step of the weights."""

import re
import tempfile

from ray_vlm.config.schema import Track
from ray_vlm.errors import RunError
from ray_vlm.runs.read import Run, is_number, read_run
from ray_vlm.runs.store import is_remote
from ray_vlm.runs.trackers import WandbTracker


def track_test(track: Track, adapter: str, numbers: dict[str, float]) -> None:
    """Log `test/<metric>` to the page of the adapter's run. Do nothing without a run or without `track.wandb`.
    `adapter`: a run's `best/`, `final/` or checkpoint."""
    if not track.wandb:
        return
    base, mark, query = adapter.partition("?")
    folder, _, name = base.rstrip("/").rpartition("/")
    try:
        run = read_run(f"{folder}{mark}{query}")
    except RunError:
        return
    step, page = step_of(run, name), run.about.get("id")
    if step is None or not isinstance(page, str):
        return
    local_dir = tempfile.mkdtemp(prefix="ray_vlm-") if is_remote(run.address) else run.address
    options = {"project": track.wandb_project, "entity": track.wandb_entity, "id": page, "dir": local_dir}
    tracker = WandbTracker(options, run.address)
    tracker.log_test({key: value for key, value in numbers.items() if is_number(value)}, step)
    tracker.finish()


def step_of(run: Run, name: str) -> int | None:
    """Return the step of a run's folder of weights; None for any other folder."""
    if match := re.match(r"checkpoint-(\d+)-", name):
        return int(match[1])
    if name == "best":
        return run.best["step"] if run.best else None
    return run.step if name == "final" else None
