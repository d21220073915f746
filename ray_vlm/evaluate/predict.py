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
from ray_vlm.evaluate.generate import answer_all, plan_batches
from ray_vlm.evaluate.inputs import Input, read_inputs
from ray_vlm.evaluate.predictor import Found, Predictor
from ray_vlm.evaluate.questions import Ask
from ray_vlm.evaluate.walks import plan_walks

_ENDINGS = (".jsonl", ".csv")
_MOST_REASONS = 20  # that are told where no input can be read; the results hold all of them


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
    """Answer every input and write the results, in the order of the inputs; returns how many.

    `output`: .jsonl or .csv; `draw`: a folder for images with what was found on them; `num_replicas`: processes that
    hold the model, 0 is this one; `image_root`: folder of the images that tables name, by default the table's own.
    Inputs that cannot be read are results too, with `error`; raises `DataError` once they are written where none can.
    """
    if Path(output).suffix.lower() not in _ENDINGS:
        raise ConfigError(f"--output {output}: its name ends in neither .jsonl nor .csv.")
    given = read_inputs(inputs, question, predictor.task, image_root)
    if not given:
        raise DataError(f"{', '.join(inputs)}: no images there. Give images, folders of images, or a table.")
    records, errors = _records(predictor, given)
    if errors:
        say(f"{len(errors)} of {len(given)} inputs cannot be read; their results say why")
    answers = _answers(predictor, list(records.values()), output, num_replicas, say) if records else []
    found = {
        i: predictor.understand(record, answer, given[i].ask)
        for (i, record), answer in zip(records.items(), answers, strict=True)
    }
    _write(output, [_result(of_one, errors[i] if i in errors else found[i]) for i, of_one in enumerate(given)])
    if not records:
        reasons = [f"{given[i].ask.id}: {reason}" for i, reason in list(errors.items())[:_MOST_REASONS]]
        raise DataError([*reasons, f"None of {len(given)} inputs can be read; {output} says why of each."])
    if draw:
        for i, of_one in found.items():
            _draw(Path(draw), i + 1, given[i].ask, of_one)
    _kept(output).unlink(missing_ok=True)
    return len(given)


def _records(predictor: Predictor, given: Sequence[Input]) -> tuple[dict[int, SftRecord], dict[int, str]]:
    """By position: the records that can be asked, and why the others cannot."""
    records: dict[int, SftRecord] = {}
    errors: dict[int, str] = {}
    for i, of_one in enumerate(given):
        found = of_one.error or predictor.try_record(of_one.ask, i)
        if isinstance(found, str):
            errors[i] = found
        elif of_one.task is None:
            records[i] = found
        else:
            records[i] = replace(found, context={**found.context, "task": of_one.task})
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
        return answer_all(work, _kept(output), num_replicas, say, predictor.weights)
    except OSError as error:
        raise _cannot_write(output, error) from None


def _kept(output: str) -> Path:
    """Where answers grow until the results are written."""
    path = Path(output)
    return path.with_name(f".{path.name}.answers.jsonl")


def _result(given: Input, found: Found | str) -> dict[str, Any]:
    result: dict[str, Any] = {"id": given.ask.id}
    if given.task is not None:
        result |= {"Task_id": given.task, "step": given.step}
    result["images"] = list(given.ask.images)
    if isinstance(found, str):
        return result | {"error": found}
    values = {"answer": found.answer, "found": dict(found.values), "ok": found.ok, "repairs": list(found.repairs)}
    return result | values


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
                steps = ["Task_id", "step"] if any("Task_id" in result for result in results) else []
                table = csv.DictWriter(file, ["id", *steps, "images", "found", "ok", "answer", "error"])
                table.writeheader()
                table.writerows(_as_cells(result) for result in results)
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(output, error) from None


def _as_cells(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result as a row of a table: several images in one cell, what was found as JSON."""
    cells = {name: value for name, value in result.items() if name != "repairs"}
    cells["images"] = " ".join(map(str, result["images"]))
    if "found" in result:
        cells["found"] = json.dumps(result["found"], ensure_ascii=False)
    return cells


def _cannot_write(output: str, error: OSError) -> RunError:
    return RunError(f"{output} cannot be written ({error}). Give another --output.")


def _draw(folder: Path, number: int, ask: Ask, found: Found) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found.draw().save(folder / f"{number:05d}-{Path(str(ask.images[0])).stem}.png")
