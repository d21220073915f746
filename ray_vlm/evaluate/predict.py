"""`ray-vlm predict RUN INPUT... --output PATH`: images, folders and tables in, JSON lines or a table out.

Answers are made as `evaluate` makes them: in batches, by any number of processes, none twice where a call was killed.
The steps of a GUI task follow one another: their memory is what the model itself answered before.
"""

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray_vlm.data.records import SftRecord
from ray_vlm.errors import ConfigError, DataError, RunError
from ray_vlm.evaluate.actors import Loaded
from ray_vlm.evaluate.generate import answer_all, answer_records, plan_batches
from ray_vlm.evaluate.inputs import read_input
from ray_vlm.evaluate.predictor import Ask, Found, Predictor
from ray_vlm.tasks.gui_steps import remember

_ENDINGS = (".jsonl", ".csv")


def predict_files(
    predictor: Predictor,
    inputs: Sequence[str],
    output: str,
    question: str | None = None,
    draw: str | None = None,
    num_replicas: int = 0,
    say: Callable[[str], None] = print,
) -> int:
    """Answer every input and write the results, in the order of the inputs; returns how many.

    `output`: .jsonl or .csv; `draw`: a folder for images with what was found on them; `num_replicas`: processes that
    hold the model, 0 is this one. Inputs that cannot be read are results too, with `error`; raises `DataError` where
    none can.
    """
    if Path(output).suffix.lower() not in _ENDINGS:
        raise ConfigError(f"--output {output}: its name ends in neither .jsonl nor .csv.")
    asks = [ask for given in inputs for ask in read_input(given, question, predictor.task)]
    if not asks:
        raise DataError(f"{', '.join(inputs)}: no images there. Give images, folders of images, or a table.")
    records, errors = _records(predictor, asks)
    if len(errors) == len(asks):
        raise DataError([f"{asks[i].id}: {reason}" for i, reason in list(errors.items())[:20]])
    if errors:
        say(f"{len(errors)} of {len(asks)} inputs cannot be read; their results say why")
    answers = dict(zip(records, _answers(predictor, list(records.values()), output, num_replicas, say), strict=True))
    results = []
    for i, ask in enumerate(asks):
        result = errors[i] if i in errors else predictor.understand(records[i], answers[i], ask)
        results.append(_result(ask, result))
        if draw and isinstance(result, Found):
            _draw(Path(draw), i + 1, ask, result)
    _write(output, results)
    _kept(output).unlink(missing_ok=True)
    return len(results)


def _records(predictor: Predictor, asks: Sequence[Ask]) -> tuple[dict[int, SftRecord], dict[int, str]]:
    """By position: the records that can be asked, and why the others cannot."""
    records: dict[int, SftRecord] = {}
    errors: dict[int, str] = {}
    for i, ask in enumerate(asks):
        try:
            if "error" in ask.told:
                raise DataError(str(ask.told["error"]))
            told = dict(ask.told)
            task = told.pop("task", None)
            record = predictor.record(replace(ask, told=told), i)
            records[i] = record if task is None else replace(record, context={**record.context, "task": task})
        except DataError as error:
            errors[i] = "; ".join(error.problems)
    return records, errors


def _answers(
    predictor: Predictor, records: Sequence[SftRecord], output: str, num_replicas: int, say: Callable[[str], None]
) -> list[str]:
    preparer, size = predictor.preparer, predictor.job.evaluate.batch_size
    steps = predictor.task == "gui_steps"
    costs = [] if steps else [sum(preparer.token_counts(record)[:2]) for record in records]
    batches = plan_walks(records, size) if steps else plan_batches(costs, size)
    work = replace(predictor.work(num_replicas), records=tuple(records), batches=batches)
    try:
        return answer_all(work, _kept(output), num_replicas, say, predictor.weights, walk if steps else None)
    except OSError as error:
        raise _cannot_write(output, error) from None


def plan_walks(records: Sequence[SftRecord], batch_size: int) -> tuple[tuple[int, ...], ...]:
    """Positions of the records of `batch_size` tasks at a time, whole; a record without a task is one of its own."""
    whole = sorted(_by_task(records).values(), key=len, reverse=True)  # of one batch about as long
    return tuple(
        tuple(i for steps in whole[start : start + batch_size] for i in steps)
        for start in range(0, len(whole), batch_size)
    )


def walk(loaded: Loaded, records: Sequence[SftRecord], positions: Sequence[int]) -> list[str]:
    """The answers to whole GUI tasks, step i of all at once; what was answered is the memory of the next step."""
    preparer, tasks = loaded.preparer, _by_task(records)
    answers = [""] * len(records)
    history: dict[Any, tuple[str, ...]] = dict.fromkeys(tasks, ())
    for number in range(max(map(len, tasks.values()))):
        now = {name: steps[number] for name, steps in tasks.items() if number < len(steps)}
        asked = [_with_history(records[i], history[name]) for name, i in now.items()]
        texts = answer_records(loaded, asked)
        for (name, i), record, text in zip(now.items(), asked, texts, strict=True):
            answers[i] = text
            found = preparer.task.parse(text, preparer.frames(record)).values
            short, long = remember(history[name], found["output"], preparer.setting)
            history[name] = (*long, *short)
    return answers


def _by_task(records: Sequence[SftRecord]) -> dict[Any, list[int]]:
    """Positions of each task's records, in order."""
    tasks: dict[Any, list[int]] = {}
    for i, record in enumerate(records):
        tasks.setdefault(record.context["task"] or i, []).append(i)
    return tasks


def _with_history(record: SftRecord, history: tuple[str, ...]) -> SftRecord:
    return replace(record, context={**record.context, "history": history, "step": len(history)})


def _kept(output: str) -> Path:
    """Where answers grow until the results are written."""
    path = Path(output)
    return path.with_name(f".{path.name}.answers.jsonl")


def _result(ask: Ask, found: Found | str) -> dict[str, Any]:
    head = {"id": ask.id, "images": list(ask.images)}
    if isinstance(found, str):
        return head | {"error": found}
    values = {"answer": found.answer, "found": dict(found.values), "ok": found.ok, "repairs": list(found.repairs)}
    return head | values


def _write(output: str, results: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines, or a table with one row for each result."""
    path = Path(output)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
            else:
                table = csv.writer(file)
                table.writerow(["id", "images", "found", "ok", "answer", "error"])
                for r in results:
                    found = json.dumps(r.get("found"), ensure_ascii=False) if "found" in r else ""
                    images = " ".join(map(str, r["images"]))
                    table.writerow([r["id"], images, found, r.get("ok", ""), r.get("answer", ""), r.get("error", "")])
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(output, error) from None


def _cannot_write(output: str, error: OSError) -> RunError:
    return RunError(f"{output} cannot be written ({error}). Give another --output.")


def _draw(folder: Path, number: int, ask: Ask, found: Found) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found.draw().save(folder / f"{number:05d}-{Path(str(ask.images[0])).stem}.png")
