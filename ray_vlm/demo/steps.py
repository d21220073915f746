"""What the demo does more than once: find a job, train a run, measure weights."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ray_vlm.config.schema import JobConfig


@dataclass(frozen=True)
class Step:
    """A measured stage: its name in `summary.json`, its title, its metrics and their folder, and its run, if any."""

    name: str
    title: str
    metrics: dict[str, Any]
    folder: Path
    run: Path | None = None


def find_job(name: str) -> Path:
    """Return the path of a shipped job file: in the installed package, or in the checkout of this code."""
    installed = Path(str(resources.files("ray_vlm"))) / "starter" / "jobs" / name
    return installed if installed.is_file() else Path(__file__).parents[2] / "jobs" / name


def train_step(job: JobConfig, name: str) -> Path:
    """Run the job, whose file ships as `name`; return the run's folder."""
    from ray_vlm.train.driver import train

    paths = train(job, find_job(name).read_text(encoding="utf-8"), overwrite=True)
    return paths.root


def measure_step(name: str, title: str, job: JobConfig, folder: Path, run: Path | None = None) -> Step:
    """Evaluate a run's best adapter on the job's test rows, into the run's folder; or the base, into `folder`."""
    from ray_vlm.evaluate.run import evaluate

    adapter = None if run is None else str(run / "best")
    output_dir = folder / "evaluate" / name if run is None else run / "evaluate/best"
    metrics = evaluate(job, adapter, output_dir, say=lambda text: print(f"  {text}", flush=True))
    return Step(name, title, metrics, output_dir, run)
