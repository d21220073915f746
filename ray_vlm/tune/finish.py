"""The end of a sweep: measure the best trial on the test rows, export it, and write the report."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray_vlm.config.check import tune_metrics
from ray_vlm.config.check_method import TASK_METRICS
from ray_vlm.config.load import load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.evaluate.export import export_run, kind_of
from ray_vlm.evaluate.run import evaluate
from ray_vlm.evaluate.weights import weights_of
from ray_vlm.runs.card import MERGED
from ray_vlm.runs.read import Run, read_run
from ray_vlm.runs.store import Store, is_remote, join
from ray_vlm.runs.text import format_number
from ray_vlm.tune.report import write_report
from ray_vlm.tune.space import Space
from ray_vlm.tune.trials import Trial, rank, trial_address

REPORT = "report.html"


def finish_sweep(
    address: str, job: JobConfig, space: Space, trials: Sequence[Trial], say: Callable[[str], None] = print
) -> None:
    """Measure and export the best trial as the job says, and write the report. Existing files are replaced."""
    best = trials[rank(trials)[0]]
    run = read_run(trial_address(address, best.name))
    say(
        f"best: trial {best.name}, {best.metric} {format_number(best.metrics[best.metric])} at step {best.best_step}: "
        + ", ".join(f"{key}={value}" for key, value in best.values.items())
    )
    notes = [f"Ranked by {best.metric} on the eval rows."]
    if job.data.tested is not None:
        notes.append(_measure(run, say))
    if job.tune.export is not None:
        kind = kind_of(run, job.tune.export == "merged")
        name = f"export/{kind}"
        Store(address).remove(name)
        _make(address, name, lambda folder: export_run(run.address, str(folder), kind == MERGED, None, lambda _: None))
        notes.append(f"The best trial is exported in {name}/.")
        say(f"exported: {join(address, name)}")
    begun = [trial for trial in trials if trial.values]
    runs = [read_run(trial_address(address, trial.name)) for trial in begun]
    page = write_report(f"Sweep {_name(address)}", space, tune_metrics(job.tune, job.evaluate), begun, runs, notes)
    Store(address).write(REPORT, page.encode())
    say(f"report {join(address, REPORT)}")


def _measure(run: Run, say: Callable[[str], None]) -> str:
    """Evaluate the best trial on the test rows and return a sentence with the numbers."""
    weights = weights_of(run, None)
    name = f"evaluate/{weights.partition('?')[0].rstrip('/').rpartition('/')[2]}"
    job, metrics = load_resolved(dict(run.job)), dict[str, Any]()
    _make(run.address, name, lambda folder: metrics.update(evaluate(job, weights, folder, say)))
    names = [name for name in TASK_METRICS[metrics["task"]] if name in metrics["overall"]]
    numbers = ", ".join(f"{name} {format_number(metrics['overall'][name])}" for name in names[:4])
    rows = (
        "validation rows, which also chose it" if metrics.get("rows_chose_best") else "test rows, which chose nothing"
    )
    sentence = f"The best trial on {metrics['num_rows']} {rows}: {numbers}."
    say(sentence)
    return sentence


def _make(address: str, name: str, make: Callable[[Path], object]) -> None:
    """Call `make` with the folder `name` under `address`; for an object store with a temporary folder, which is then
    copied there."""
    if not is_remote(address):
        make(Path(address) / name)
        return
    with tempfile.TemporaryDirectory(prefix="ray_vlm-") as root:
        folder = Path(root) / "made"
        make(folder)
        store = Store(address)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            store.write(f"{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())


def _name(address: str) -> str:
    return address.partition("?")[0].rstrip("/").rpartition("/")[2]
