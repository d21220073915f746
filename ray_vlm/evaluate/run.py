"""Evaluate a job's base or an adapter on `data.test`: predict every row, measure, write what was found.

The base and every adapter go through this one function, with the same images, wording and parser.
"""

import csv
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.preprocessing import read_preprocessing
from ray_vlm.data.rows import load_preparer
from ray_vlm.data.spec import row_spec
from ray_vlm.data.splits import load_parts
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.evaluate.intervals import measure_intervals
from ray_vlm.evaluate.metrics import measure
from ray_vlm.evaluate.predict import generate_answers
from ray_vlm.evaluate.prediction import Prediction, build_predictions
from ray_vlm.evaluate.report import Stage, write_report
from ray_vlm.models.load import load_adapter, load_model
from ray_vlm.runs.checkpoints import fetch_folder
from ray_vlm.runs.paths import write_bad_rows, write_json
from ray_vlm.runs.store import is_remote


def evaluate(job: JobConfig, adapter: str | None, folder: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Write `predictions.jsonl`, `predictions.csv` and `metrics.json` into `folder`; returns the metrics.

    `adapter`: a run's `best/` or `final/`; None is the untouched base, the zero-shot baseline.
    """
    if job.data.test is None:
        raise ConfigError("`data.test` is missing: headline numbers never come from rows that chose a checkpoint.")
    weights = fetch_folder(adapter) if adapter is not None else None
    parts = load_parts(job, ["test"], read_preprocessing(weights, row_spec(job, [])) if weights is not None else None)
    index = parts.test
    assert index is not None
    preparer = load_preparer(parts.spec)
    device = "cuda:0" if job.cluster.gpus_per_worker else "cpu"
    _use_threads(job)
    model = load_model(job.model, job.train.bf16, device)
    if weights is not None:
        model = load_adapter(model, weights, job.model)
    started = time.monotonic()

    def progress(done: int) -> None:
        rate = done / (time.monotonic() - started)
        say(f"predicted {done}/{len(index)} rows, {rate:.1f}/s, {(len(index) - done) / rate:.0f} s left")

    options = job.evaluate
    answers = generate_answers(
        model, index.records, preparer, options.batch_size, options.max_new_tokens, device, progress
    )
    predictions = build_predictions(index.records, answers, preparer)
    metrics = measure(job.task.name, predictions)
    metrics |= {"adapter": adapter, "test": _told(job), "wall_s": time.monotonic() - started}
    metrics["num_bad_rows"] = len(index.bad)
    metrics["intervals"] = measure_intervals(job.task.name, [p.as_dict() for p in predictions])
    folder.mkdir(parents=True, exist_ok=True)
    if index.bad:
        write_bad_rows(folder / "bad_rows.jsonl", {"test": index.bad})
        say(f"{len(index.bad)} bad rows left out; see {folder / 'bad_rows.jsonl'}")
    write_predictions(folder, predictions)
    write_json(folder / "metrics.json", metrics)
    return metrics


def _told(job: JobConfig) -> str:
    """What was measured, in words."""
    test, train = job.data.test, job.data.train
    assert test is not None
    return test.path or f"{test.ratio} of {train.path if train else ''}"


def _use_threads(job: JobConfig) -> None:
    import torch

    torch.set_num_threads(max(1, int(job.cluster.cpus_per_worker)))


def write_predictions(folder: Path, predictions: Sequence[Prediction]) -> None:
    """All predictions as JSON lines, and as a table: one row a record, or for detection one row an object found."""
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(p.as_dict()) + "\n" for p in predictions)
    with open(folder / "predictions.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        if predictions and "boxes" in predictions[0].found:
            table.writerow(["id", "image", "label", "x1", "y1", "x2", "y2"])
            for p in predictions:
                for box, label in zip(p.found["boxes"], p.found["labels"], strict=True):
                    table.writerow([p.id, *p.images, label, *(round(v, 2) for v in box)])
            return
        table.writerow(["id", "image", "answer", "truth", "found", "score"])
        for p in predictions:
            cells = (json.dumps(value, ensure_ascii=False) for value in (p.truth, p.found, p.score))
            table.writerow([p.id, " ".join(i for i in p.images if i), p.answer, *cells])


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """What `write_predictions` wrote, as plain dictionaries."""
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def evaluate_and_report(job: JobConfig, adapter: str | None, output: str | None, against: str | None) -> Path:
    """What `ray-vlm evaluate` does: evaluate, print the headlines, write `report.html`. Returns the folder."""
    base = f"{Path(job.model.name).name}-{Path(job.data.test.path).stem or 'test' if job.data.test else 'test'}"
    default = Path(adapter).parent / "evaluate" / Path(adapter).name if adapter else None
    if output is None and is_remote(adapter or job.run.output_dir):
        raise ConfigError("results are written to a folder, and this adapter or run lies elsewhere. Give --output.")
    folder = Path(output) if output else default or Path(job.run.output_dir) / "evaluate" / base
    other = load_stage(Path(against), Path(against).name, job.task.name) if against is not None else None
    metrics = evaluate(job, adapter, folder)
    stages = [Stage(folder.name, metrics, read_predictions(folder))]
    if other is not None:
        if [p["id"] for p in other.predictions] != [p["id"] for p in stages[0].predictions]:
            raise RunError(f"{against} and {folder} hold different test rows, so they cannot be compared.")
        stages.insert(0, other)
    runs = {"": Path(adapter).parent / "metrics.jsonl"} if adapter and not is_remote(adapter) else {}
    changes = write_report(folder / "report.html", f"{Path(job.model.name).name}: {job.task.name}", stages, runs)
    numbers = "  ".join(f"{name} {value:.3f}" for name, value in metrics["overall"].items())
    print(f"{metrics['num_rows']} rows: {numbers}")
    if other is not None:
        write_json(folder / "comparison.json", {"against": str(against), "differences": changes})
        told = (f"{name} {c['difference']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f})" for name, c in changes.items())
        print(f"against {other.title}, with 95 % intervals: {'  '.join(told)}")
    print(f"report {folder / 'report.html'}")
    return folder


def load_stage(folder: Path, title: str, task: str) -> Stage:
    """An evaluation of a task that was written earlier. Raises `RunError` where there is none."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        if metrics.get("task") != task:
            raise ValueError(f"it is of the task {metrics.get('task')!r}")
        return Stage(title, metrics, read_predictions(folder))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{folder}: no evaluation here ({error}). Give a folder that `ray-vlm evaluate` wrote."
        ) from None
