"""The numbers of an evaluation where the run's own numbers are: in Weights & Biases, at the step of the weights."""

import re
import tempfile

from ray_vlm.config.schema import Track
from ray_vlm.errors import RunError
from ray_vlm.runs.read import Run, is_number, read_run
from ray_vlm.runs.store import is_remote
from ray_vlm.runs.trackers import WandbTracker


def track_test(track: Track, adapter: str, numbers: dict[str, float]) -> None:
    """Send `test/<metric>` to the page of the run that the adapter is of; nothing where it is of no run, or where the
    job sends nothing. `adapter`: a run's `best/`, `final/` or checkpoint."""
    if not track.wandb:
        return
    base, mark, options = adapter.partition("?")
    folder, _, name = base.rstrip("/").rpartition("/")
    try:
        run = read_run(f"{folder}{mark}{options}")
    except RunError:
        return
    step, page = step_of(run, name), run.about.get("id")
    if step is None or not isinstance(page, str):
        return
    made = tempfile.mkdtemp(prefix="ray_vlm-") if is_remote(run.address) else run.address
    where = {"project": track.wandb_project, "entity": track.wandb_entity, "id": page, "dir": made}
    tracker = WandbTracker(where, run.address)
    tracker.log_test({key: value for key, value in numbers.items() if is_number(value)}, step)
    tracker.finish()


def step_of(run: Run, name: str) -> int | None:
    """The step of a run's folder of weights; None for another folder."""
    if found := re.match(r"checkpoint-(\d+)-", name):
        return int(found[1])
    if name == "best":
        return run.best["step"] if run.best else None
    return run.step if name == "final" else None
