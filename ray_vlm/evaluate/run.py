"""Evaluate a job's base or an adapter on `data.test`: predict every row, measure, write the results.

The base and every adapter go through the same function, with the same images, prompts and parser.
"""

import csv
import json
import logging
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_vlm.config.cluster import Cluster
from ray_vlm.config.data import Data
from ray_vlm.config.schema import Evaluate, JobConfig, Track
from ray_vlm.data.parts import load_parts
from ray_vlm.data.preprocessing import read_preprocessing
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.sources.detect import settle_formats
from ray_vlm.data.spec import sample_spec
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.evaluate.actors import InferenceJob, open_adapter
from ray_vlm.evaluate.generate import ANSWERS, answer_all, plan_batches, plan_walks
from ray_vlm.evaluate.intervals import measure_intervals
from ray_vlm.evaluate.metrics import measure
from ray_vlm.evaluate.prediction import Prediction, build_predictions, join_names
from ray_vlm.evaluate.report import EvalResult, write_report
from ray_vlm.runs.card import CHOSE_BEST
from ray_vlm.runs.checkpoints import fetch_folder
from ray_vlm.runs.paths import write_bad_rows, write_json
from ray_vlm.runs.read import Run, is_number, read_run
from ray_vlm.runs.trackers import WandbTracker
from ray_vlm.storage import is_remote, split_address, split_options

logger = logging.getLogger(__name__)
MEMORIES = {"truth": "the truth's", "model": "the model's own"}  # `evaluate.memory` in words
_FOLDERS = {"truth": "", "model": "-own-memory"}  # suffixes of the folders of results, by `evaluate.memory`


@dataclass(frozen=True)
class EvalTarget:
    """What is measured: the base as the job loads it, or an adapter for it; `folder`: its subfolder among several."""

    title: str
    folder: str
    job: JobConfig
    adapter: str | None = None


def plan_targets(
    job: JobConfig, adapters: Sequence[str], base: bool, unquantised: bool, both_memories: bool = False
) -> list[EvalTarget]:
    """Plan what to measure, in the order of the report: the unquantised base, the base, the adapters.

    Without adapters the base is always measured. The unquantised base shows which part of a difference is due to
    quantisation. `both_memories`: all with the truth's memory, then all with their own. Raise `ConfigError` for a task
    without memory.
    """
    job = settle_formats(job)
    targets = []
    if unquantised and job.model.load_in_4bit:
        unquantised_job = job.model_copy(update={"model": job.model.model_copy(update={"load_in_4bit": False})})
        targets.append(EvalTarget("base, not quantised", "base-unquantised", unquantised_job))
    if base or not adapters:
        targets.append(EvalTarget("base, 4 bit" if job.model.load_in_4bit else "base", "base", job))
    names = [Path(split_options(adapter)[0]).parts[-2:] for adapter in adapters]
    for i, (adapter, parts) in enumerate(zip(adapters, names, strict=True)):
        title = "/".join(parts) if names.count(parts) == 1 else f"{'/'.join(parts)} ({i + 1})"
        targets.append(EvalTarget(title, f"{i + 1}-{'-'.join(parts)}", job, adapter))
    if not both_memories:
        return targets
    if job.task.name != "gui_steps":
        raise ConfigError(f"--both-memories: the task {job.task.name} has no memory of earlier steps. Leave it out.")
    if len(targets) == 1 and adapters:
        targets = [replace(targets[0], folder=names[0][-1])]  # named as its run's evaluations are
    return [_with_memory(target, memory) for memory in MEMORIES for target in targets]


def _with_memory(target: EvalTarget, memory: str) -> EvalTarget:
    options = target.job.evaluate.model_copy(update={"memory": memory})
    job = target.job.model_copy(update={"evaluate": options})
    return replace(target, folder=f"{target.folder}{_FOLDERS[memory]}", job=job)


def evaluate(job: JobConfig, adapter: str | None, folder: Path) -> dict[str, Any]:
    """Write `predictions.jsonl`, `predictions.csv`, `details.json` and `metrics.json` into `folder`, and return the
    metrics.

    `adapter`: a run's `best/` or `final/`, None for the base alone, the zero-shot baseline. Answers that an earlier
    call with the same inputs left there are not generated again.
    """
    if job.data.tested is None:
        raise ConfigError(
            "`data.test` is missing, and rows that chose a checkpoint do not measure it fairly. Set data.test; or set "
            "data.test_on_eval=true to measure the rows of data.eval, which every report then notes."
        )
    options, weights = job.evaluate, fetch_folder(adapter) if adapter is not None else None
    parts = load_parts(
        job, ["test"], read_preprocessing(weights, sample_spec(job, [])) if weights is not None else None
    )
    index, builder = parts.test, load_sample_builder(parts.spec)
    assert index is not None
    started, actors = time.monotonic(), num_actors(options, job.cluster)
    uri = open_adapter(job, adapter, weights, actors)
    if options.memory == "model":
        batches = plan_walks(index.records, options.batch_size)
    else:
        batches = plan_batches(index.image_tokens + index.prompt_tokens, options.batch_size)
    inference = InferenceJob(job, parts.spec, index.records, uri, batches, options.memory)
    answers = answer_all(inference, builder, folder / ANSWERS, actors, weights)
    predictions = build_predictions(index.records, answers, builder)
    metrics = measure(job.task.name, predictions)
    tested = _describe_test(job.data, options.memory)
    metrics |= {"adapter": adapter, "test": tested, "wall_s": time.monotonic() - started}
    metrics |= {"memory": options.memory} if job.task.name == "gui_steps" else {}
    metrics["num_bad_rows"] = len(index.bad)
    metrics |= {"rows_chose_best": True} if job.data.test_on_eval else {}
    metrics["intervals"] = measure_intervals(job.task.name, [p.as_dict() for p in predictions])
    folder.mkdir(parents=True, exist_ok=True)
    if index.bad:
        write_bad_rows(folder / "bad_rows.jsonl", {"test": index.bad})
        logger.info(f"{len(index.bad)} bad rows left out; see {folder / 'bad_rows.jsonl'}")
    write_predictions(folder, predictions)
    write_json(folder / "details.json", metrics | {"rows": [p.as_dict() for p in predictions]})
    write_json(folder / "metrics.json", metrics)
    return metrics


def _titled(title: str, memory: str | None) -> str:
    """Return the title with the memory that GUI steps had, where there is one."""
    return f"{title}, {MEMORIES[memory]} memory" if memory in MEMORIES else title


def num_actors(options: Evaluate, cluster: Cluster) -> int:
    """Return the number of processes that load the model; 0 is this one alone."""
    if options.engine == "samplers":
        return 0  # this process asks them
    if options.num_replicas is not None:
        return options.num_replicas
    return cluster.most_workers if cluster.num_workers and cluster.gpus_per_worker else 0


def _describe_test(data: Data, memory: str) -> str:
    """Describe the rows that are measured."""
    test, train = data.tested, data.train
    assert test is not None
    rows = test.name or f"{test.ratio} of {train.name if train else ''}"
    return _titled(rows, memory) if memory == "model" else rows


def write_predictions(folder: Path, predictions: Sequence[Prediction]) -> None:
    """Write all predictions as JSON lines and as a CSV table: a row for each record, for detection for each object."""
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
            table.writerow([p.id, join_names([i for i in p.images if i]), p.answer, *cells])


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """Read the predictions that `write_predictions` wrote, as dictionaries."""
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def evaluate_and_report(targets: Sequence[EvalTarget], output: str | None, against: str | None) -> Path:
    """Run `ray-vlm evaluate`: evaluate, log the main metrics, write `report.html`. Return the folder.

    `targets`: one or more, of the same job but for `model.load_in_4bit` and `evaluate.memory`.
    """
    job, folder = targets[0].job, resolve_output_dir(targets, output)
    results = []
    if against is not None:
        results.append(load_result(Path(against), Path(against).name, job.task.name))
    for target in targets:
        output_dir = folder if len(targets) == 1 else folder / target.folder
        metrics = evaluate(target.job, target.adapter, output_dir)
        title = _titled(target.title, metrics.get("memory"))
        results.append(EvalResult(title, metrics, read_predictions(output_dir)))
        numbers = "  ".join(f"{name} {value:.3f}" for name, value in metrics["overall"].items())
        note = f" {CHOSE_BEST}" if metrics.get("rows_chose_best") else ""
        logger.info(f"{title}, {metrics['num_rows']} rows{note}: {numbers}")
        # Only one memory is tracked: both would be logged under the same names.
        if target.adapter is not None and metrics.get("memory") != "model":
            track_test(job.track, target.adapter, metrics["overall"])
    if other := next((r for r in results if _ids(r) != _ids(results[0])), None):
        raise RunError(
            f"{results[0].title} and {other.title} hold different test rows, so they cannot be compared. Evaluate both "
            "on the same data.test."
        )
    runs = {
        target.title if len(targets) > 1 else "": Path(target.adapter).parent / "metrics.jsonl"
        for target in targets  # a target that is measured with both memories has one title, so one curve
        if target.adapter and not is_remote(target.adapter)
    }
    changes = write_report(folder / "report.html", f"{Path(job.model.name).name}: {job.task.name}", results, runs)
    if changes:
        first, last = results[0].title, results[-1].title
        write_json(folder / "comparison.json", {"of": last, "against": against or first, "differences": changes})
        lines = (f"{name} {c['difference']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f})" for name, c in changes.items())
        logger.info(f"{last} against {first}, with 95 % intervals: {'  '.join(lines)}")
    logger.info(f"report {folder / 'report.html'}")
    return folder


def _ids(result: EvalResult) -> list[str]:
    return [p["id"] for p in result.predictions]


def resolve_output_dir(targets: Sequence[EvalTarget], output: str | None) -> Path:
    """Return the folder of the results: beside the adapter; for the base or for several adapters in the job's output
    folder."""
    if output:
        return Path(output)
    job = targets[0].job
    adapter = targets[0].adapter if len({target.adapter for target in targets}) == 1 else None
    suffix = _FOLDERS[job.evaluate.memory]
    if is_remote(adapter or job.run.output_dir):
        raise ConfigError("results are written to a local folder, and this adapter or run is remote. Give --output.")
    if adapter:
        run_dir = Path(adapter).parent / "evaluate"
        return run_dir / f"{Path(adapter).name}{suffix}" if len(targets) == 1 else run_dir
    tested = job.data.tested
    part = "eval" if job.data.test_on_eval else "test"
    test = re.sub(r"[^\w.-]", "", Path(tested.paths[0]).stem).strip("-_.") if tested else ""  # of a glob its letters
    name = f"{Path(job.model.name).name}-{test or part}"
    return Path(job.run.output_dir) / "evaluate" / f"{name}{suffix if len(targets) == 1 else f'-{len(targets)}'}"


def load_result(folder: Path, title: str, task: str) -> EvalResult:
    """Read an earlier evaluation of a task. Raise `RunError` where the folder holds none."""
    advice = "Give a folder that `ray-vlm evaluate` wrote, such as RUN/evaluate/best."
    for name in ("metrics.json", "predictions.jsonl"):
        if not (folder / name).is_file():
            reason = f"the folder holds no {name}" if folder.is_dir() else "no such folder"
            raise RunError(f"{folder}: no evaluation here ({reason}). {advice}")
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        if metrics.get("task") != task:
            raise ValueError(f"it is of the task {metrics.get('task')!r}")
        return EvalResult(_titled(title, metrics.get("memory")), metrics, read_predictions(folder))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder}: no evaluation that can be read ({error}). {advice}") from None


def track_test(track: Track, adapter: str, numbers: dict[str, float]) -> None:
    """Log `test/<metric>` to the page of the adapter's run. Do nothing without a run or without `track.wandb`.
    `adapter`: a run's `best/`, `final/` or checkpoint."""
    if not track.wandb:
        return
    folder, name = split_address(adapter)
    try:
        run = read_run(folder)
    except RunError:
        return
    step, page = _step_of(run, name), run.about.get("id")
    if step is None or not isinstance(page, str):
        return
    local_dir = tempfile.mkdtemp(prefix="ray_vlm-") if is_remote(run.address) else run.address
    options = {"project": track.wandb_project, "entity": track.wandb_entity, "id": page, "dir": local_dir}
    tracker = WandbTracker(options, run.address)
    tracker.log_test({key: value for key, value in numbers.items() if is_number(value)}, step)
    tracker.finish()


def _step_of(run: Run, name: str) -> int | None:
    """Return the step of a run's folder of weights; None for any other folder."""
    if match := re.match(r"checkpoint-(\d+)-", name):
        return int(match[1])
    if name == "best":
        return run.best["step"] if run.best else None
    return run.step if name == "final" else None
