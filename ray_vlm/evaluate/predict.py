"""`ray-vlm predict RUN INPUT... --output PATH`: images, folders and tables in, JSON lines or a table out.

Answers are generated as in `evaluate`: in batches, by any number of processes, and none again after a call was killed.
The steps of a GUI task are answered in order, with the model's own earlier answers as their memory.
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
from ray_vlm.evaluate.generate import answer_all, plan_batches
from ray_vlm.evaluate.inputs import Input, read_inputs
from ray_vlm.evaluate.prediction import join_names
from ray_vlm.evaluate.predictor import Found, Predictor
from ray_vlm.evaluate.questions import Ask
from ray_vlm.evaluate.walks import plan_walks

_ENDINGS = (".jsonl", ".csv")
_MOST_REASONS = 20  # in the error where no input can be read; the results hold all of them


def predict_files(
    predictor: Predictor,
    inputs: Sequence[str],
    output: str,
    question: str | None = None,
    draw: str | None = None,
    num_replicas: int = 0,
    say: Callable[[str], None] = print,
    image_root: str | None = None,
) -> int:
    """Answer every input, write the results in the order of the inputs, and return their number.

    `output`: .jsonl or .csv; `draw`: a folder for the images with the predictions drawn; `num_replicas`: processes that
    load the model, 0 for this one; `image_root`: folder of the images that tables name, by default the table's own.
    An input that cannot be read is a result with `error`. Raise `DataError`, after writing, where none can be read.
    """
    if Path(output).suffix.lower() not in _ENDINGS:
        raise ConfigError(f"--output {output}: its name ends in neither .jsonl nor .csv. Give it one of these endings.")
    questions = read_inputs(inputs, question, predictor.task, image_root)
    if not questions:
        raise DataError(f"{', '.join(inputs)}: no images there. Give images, folders of images, or a table.")
    records, errors = _records(predictor, questions)
    if errors:
        say(f"{len(errors)} of {len(questions)} inputs cannot be read; their results say why")
    answers = _answers(predictor, list(records.values()), output, num_replicas, say) if records else []
    predictions = {
        i: predictor.understand(record, answer, questions[i].ask)
        for (i, record), answer in zip(records.items(), answers, strict=True)
    }
    outcomes: dict[int, Found | str] = {**predictions, **errors}
    _write(output, [_result(entry, outcomes[i]) for i, entry in enumerate(questions)])
    if not records:
        reasons = [f"{questions[i].ask.id}: {reason}" for i, reason in list(errors.items())[:_MOST_REASONS]]
        raise DataError([*reasons, f"None of {len(questions)} inputs can be read; {output} says why of each."])
    if draw:
        for i, prediction in predictions.items():
            _draw(Path(draw), i + 1, questions[i].ask, prediction)
    _answers_path(output).unlink(missing_ok=True)
    return len(questions)


def _records(predictor: Predictor, questions: Sequence[Input]) -> tuple[dict[int, SftRecord], dict[int, str]]:
    """Return, by position, the records that can be asked, and the reasons why the others cannot."""
    records: dict[int, SftRecord] = {}
    errors: dict[int, str] = {}
    for i, entry in enumerate(questions):
        record = entry.error or predictor.try_record(entry.ask, i)
        if isinstance(record, str):
            errors[i] = record
        elif entry.task is None:
            records[i] = record
        else:
            records[i] = replace(record, context={**record.context, "task": entry.task})
    return records, errors


def _answers(
    predictor: Predictor, records: Sequence[SftRecord], output: str, num_replicas: int, say: Callable[[str], None]
) -> list[str]:
    builder, size = predictor.builder, predictor.job.evaluate.batch_size
    work = replace(predictor.work(num_replicas), records=tuple(records))
    if predictor.task == "gui_steps":
        work = replace(work, batches=plan_walks(records, size), memory="model")
    else:
        costs = [sum(builder.token_counts(record)[:2]) for record in records]
        work = replace(work, batches=plan_batches(costs, size))
    try:
        return answer_all(work, _answers_path(output), num_replicas, say, predictor.weights)
    except OSError as error:
        raise _cannot_write(output, error) from None


def _answers_path(output: str) -> Path:
    """Return the file that collects answers until the results are written."""
    path = Path(output)
    return path.with_name(f".{path.name}.answers.jsonl")


def _result(entry: Input, outcome: Found | str) -> dict[str, Any]:
    """Build one line of the output from a prediction, or from the reason why there is none."""
    result: dict[str, Any] = {"id": entry.ask.id}
    if entry.task is not None:
        result |= {"Task_id": entry.task, "step": entry.step}
    # Not the resolved paths: those of a submitted job lie in a temporary folder.
    result["images"] = list(entry.names)
    if isinstance(outcome, str):
        return result | {"error": outcome}
    values = {"answer": outcome.answer, "found": dict(outcome.values), "ok": outcome.ok}
    return result | values | {"repairs": list(outcome.repairs)}


def _write(output: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines, or a CSV table with one row for each result."""
    path = Path(output)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
            else:
                steps = ["Task_id", "step"] if any("Task_id" in result for result in results) else []
                table = csv.DictWriter(file, ["id", *steps, "images", "found", "ok", "answer", "error"])
                table.writeheader()
                table.writerows(_as_cells(result) for result in results)
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(output, error) from None


def _as_cells(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result as a row of a table: one image by its name, several as a JSON list, and the values as JSON."""
    cells = {name: value for name, value in result.items() if name != "repairs"}
    cells["images"] = join_names(result["images"])
    if "found" in result:
        cells["found"] = json.dumps(result["found"], ensure_ascii=False)
    return cells


def _cannot_write(output: str, error: OSError) -> RunError:
    return RunError(f"{output} cannot be written ({error}). Give another --output.")


def _draw(folder: Path, number: int, ask: Ask, prediction: Found) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    prediction.draw().save(folder / f"{number:05d}-{Path(str(ask.images[0])).stem}.png")
