"""Evaluate a job's base or an adapter on `data.test`: predict every row, measure, write what was found.

The base and every adapter go through this one function, with the same images, wording and parser.
"""

import csv
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.preprocessing import read_preprocessing
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import sample_spec
from ray_vlm.data.splits import load_parts
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.evaluate.actors import InferenceJob
from ray_vlm.evaluate.generate import ANSWERS, answer_all, plan_batches
from ray_vlm.evaluate.intervals import measure_intervals
from ray_vlm.evaluate.metrics import measure
from ray_vlm.evaluate.pictures import EvalResult
from ray_vlm.evaluate.prediction import Prediction, build_predictions
from ray_vlm.evaluate.report import write_report
from ray_vlm.evaluate.tracked import track_test
from ray_vlm.evaluate.walks import plan_walks
from ray_vlm.runs.card import CHOSE_BEST
from ray_vlm.runs.checkpoints import fetch_folder
from ray_vlm.runs.paths import write_bad_rows, write_json
from ray_vlm.runs.store import full_address, is_remote

MEMORIES = {"truth": "the truth's", "model": "the model's own"}  # `evaluate.memory` in words
_FOLDERS = {"truth": "", "model": "-own-memory"}  # what ends the names of folders with results


@dataclass(frozen=True)
class EvalTarget:
    """What is measured: the base as the job loads it, or an adapter on it; `folder`: its name among several."""

    title: str
    folder: str
    job: JobConfig
    adapter: str | None = None


def plan_subjects(
    job: JobConfig, adapters: Sequence[str], base: bool, unquantised: bool, both_memories: bool = False
) -> list[EvalTarget]:
    """What to measure, in the order of the report: the base unquantised, the base, the adapters.

    With nothing asked for, the base. In one report the loss by quantisation is not mistaken for training's.
    `both_memories`: all with the truth's memory, then all with their own. Raises `ConfigError` for tasks without one.
    """
    subjects = []
    if unquantised and job.model.load_in_4bit:
        whole = job.model_copy(update={"model": job.model.model_copy(update={"load_in_4bit": False})})
        subjects.append(EvalTarget("base, not quantised", "base-unquantised", whole))
    if base or not adapters:
        subjects.append(EvalTarget("base, 4 bit" if job.model.load_in_4bit else "base", "base", job))
    names = [Path(adapter.partition("?")[0]).parts[-2:] for adapter in adapters]
    for i, (adapter, parts) in enumerate(zip(adapters, names, strict=True)):
        title = "/".join(parts) if names.count(parts) == 1 else f"{'/'.join(parts)} ({i + 1})"
        subjects.append(EvalTarget(title, f"{i + 1}-{'-'.join(parts)}", job, adapter))
    if not both_memories:
        return subjects
    if job.task.name != "gui_steps":
        raise ConfigError(f"--both-memories: the task {job.task.name} has no memory of earlier steps. Leave it out.")
    if len(subjects) == 1 and adapters:
        subjects = [replace(subjects[0], folder=names[0][-1])]  # among the evaluations of its run
    return [_with_memory(subject, memory) for memory in MEMORIES for subject in subjects]


def _with_memory(subject: EvalTarget, memory: str) -> EvalTarget:
    options = subject.job.evaluate.model_copy(update={"memory": memory})
    job = subject.job.model_copy(update={"evaluate": options})
    return replace(subject, folder=f"{subject.folder}{_FOLDERS[memory]}", job=job)


def evaluate(job: JobConfig, adapter: str | None, folder: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Write `predictions.jsonl`, `predictions.csv`, `details.json` and `metrics.json` into `folder`; returns the
    metrics.

    `adapter`: a run's `best/` or `final/`; None is the untouched base, the zero-shot baseline. Answers that an earlier
    call left there, made from the same inputs, are not made again.
    """
    if job.data.tested is None:
        raise ConfigError(
            "`data.test` is missing: headline numbers do not come from rows that chose a checkpoint. Give it rows; or "
            "set data.test_on_eval=true to measure those of data.eval, and every report will say so."
        )
    weights = fetch_folder(adapter) if adapter is not None else None
    parts = load_parts(
        job, ["test"], read_preprocessing(weights, sample_spec(job, [])) if weights is not None else None
    )
    index = parts.test
    assert index is not None
    started, actors = time.monotonic(), num_actors(job)
    where = weights if actors == 0 or adapter is None else full_address(adapter)
    if job.evaluate.memory == "model":
        batches = plan_walks(index.records, job.evaluate.batch_size)
    else:
        batches = plan_batches(index.image_tokens + index.prompt_tokens, job.evaluate.batch_size)
    work = InferenceJob(job, parts.spec, index.records, where, batches, job.evaluate.memory)
    answers = answer_all(work, folder / ANSWERS, actors, say, weights)
    predictions = build_predictions(index.records, answers, load_sample_builder(parts.spec))
    metrics = measure(job.task.name, predictions)
    metrics |= {"adapter": adapter, "test": _told(job), "wall_s": time.monotonic() - started}
    metrics |= {"memory": job.evaluate.memory} if job.task.name == "gui_steps" else {}
    metrics["num_bad_rows"] = len(index.bad)
    metrics |= {"rows_chose_best": True} if job.data.test_on_eval else {}
    metrics["intervals"] = measure_intervals(job.task.name, [p.as_dict() for p in predictions])
    folder.mkdir(parents=True, exist_ok=True)
    if index.bad:
        write_bad_rows(folder / "bad_rows.jsonl", {"test": index.bad})
        say(f"{len(index.bad)} bad rows left out; see {folder / 'bad_rows.jsonl'}")
    write_predictions(folder, predictions)
    write_json(folder / "details.json", metrics | {"rows": [p.as_dict() for p in predictions]})
    write_json(folder / "metrics.json", metrics)
    return metrics


def _titled(title: str, memory: str | None) -> str:
    """A title that says whose memory GUI steps were told."""
    return f"{title}, {MEMORIES[memory]} memory" if memory in MEMORIES else title


def num_actors(job: JobConfig) -> int:
    """How many processes hold the model; 0 is this one."""
    if job.evaluate.num_replicas is not None:
        return job.evaluate.num_replicas
    return job.cluster.most_workers if job.cluster.num_workers and job.cluster.gpus_per_worker else 0


def _told(job: JobConfig) -> str:
    """What was measured, in words."""
    test, train = job.data.tested, job.data.train
    assert test is not None
    rows = test.path or f"{test.ratio} of {train.path if train else ''}"
    return _titled(rows, "model") if job.evaluate.memory == "model" else rows


def write_predictions(folder: Path, predictions: Sequence[Prediction]) -> None:
    """All predictions as JSON lines, and as a table: one row a record, or for detection one row an object found."""
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(p.as_dict()) + "\n" for p in predictions)
    with open(folder / "predictions.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        if predictions and "boxes" in predictions[0].parsed:
            table.writerow(["id", "image", "label", "x1", "y1", "x2", "y2"])
            for p in predictions:
                for box, label in zip(p.parsed["boxes"], p.parsed["labels"], strict=True):
                    table.writerow([p.id, *p.images, label, *(round(v, 2) for v in box)])
            return
        table.writerow(["id", "image", "answer", "truth", "found", "score"])
        for p in predictions:
            cells = (json.dumps(value, ensure_ascii=False) for value in (p.truth, p.parsed, p.score))
            table.writerow([p.id, " ".join(i for i in p.images if i), p.answer, *cells])


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """What `write_predictions` wrote, as plain dictionaries."""
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def evaluate_and_report(
    job: JobConfig, subjects: Sequence[EvalTarget], output: str | None, against: str | None
) -> Path:
    """What `ray-vlm evaluate` does: evaluate, print the headlines, write `report.html`. Returns the folder."""
    folder = resolve_output_dir(job, subjects, output)
    stages = []
    if against is not None:
        stages.append(load_stage(Path(against), Path(against).name, job.task.name))
    for subject in subjects:
        where = folder if len(subjects) == 1 else folder / subject.folder
        metrics = evaluate(subject.job, subject.adapter, where)
        title = _titled(subject.title, metrics.get("memory"))
        stages.append(EvalResult(title, metrics, read_predictions(where)))
        numbers = "  ".join(f"{name} {value:.3f}" for name, value in metrics["overall"].items())
        which = f" {CHOSE_BEST}" if metrics.get("rows_chose_best") else ""
        print(f"{title}, {metrics['num_rows']} rows{which}: {numbers}")
        if subject.adapter is not None and metrics.get("memory") != "model":  # numbers of one kind under one name
            track_test(job.track, subject.adapter, metrics["overall"])
    if other := next((s for s in stages if _ids(s) != _ids(stages[0])), None):
        raise RunError(f"{stages[0].title} and {other.title} hold different test rows, so they cannot be compared.")
    runs = {
        s.title if len(subjects) > 1 else "": Path(s.adapter).parent / "metrics.jsonl"
        for s in subjects  # one that is measured with both memories has one curve
        if s.adapter and not is_remote(s.adapter)
    }
    changes = write_report(folder / "report.html", f"{Path(job.model.name).name}: {job.task.name}", stages, runs)
    if changes:
        first, last = stages[0].title, stages[-1].title
        write_json(folder / "comparison.json", {"of": last, "against": against or first, "differences": changes})
        told = (f"{name} {c['difference']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f})" for name, c in changes.items())
        print(f"{last} against {first}, with 95 % intervals: {'  '.join(told)}")
    print(f"report {folder / 'report.html'}")
    return folder


def _ids(stage: EvalResult) -> list[str]:
    return [p["id"] for p in stage.predictions]


def resolve_output_dir(job: JobConfig, subjects: Sequence[EvalTarget], output: str | None) -> Path:
    """Where results go: beside the adapter, or for the base and for several of them under the job's output folder."""
    if output:
        return Path(output)
    adapter = subjects[0].adapter if len({subject.adapter for subject in subjects}) == 1 else None
    own = _FOLDERS[job.evaluate.memory]
    if is_remote(adapter or job.run.output_dir):
        raise ConfigError("results are written to a folder, and this adapter or run lies elsewhere. Give --output.")
    if adapter:
        of_run = Path(adapter).parent / "evaluate"
        return of_run / f"{Path(adapter).name}{own}" if len(subjects) == 1 else of_run
    tested = job.data.tested
    test = Path(tested.path).stem if tested and tested.path else "eval" if job.data.test_on_eval else "test"
    name = f"{Path(job.model.name).name}-{test}"
    return Path(job.run.output_dir) / "evaluate" / f"{name}{own if len(subjects) == 1 else f'-{len(subjects)}'}"


def load_stage(folder: Path, title: str, task: str) -> EvalResult:
    """An evaluation of a task that was written earlier. Raises `RunError` where there is none."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        if metrics.get("task") != task:
            raise ValueError(f"it is of the task {metrics.get('task')!r}")
        return EvalResult(_titled(title, metrics.get("memory")), metrics, read_predictions(folder))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{folder}: no evaluation here ({error}). Give a folder that `ray-vlm evaluate` wrote."
        ) from None
