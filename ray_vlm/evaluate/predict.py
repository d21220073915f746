"""`ray-vlm predict RUN INPUT... --output PATH`: images, folders and tables in, JSON lines or a table out.

An input is an image, a folder of images, or rows as `data.*.path` takes them (a table, a pattern or a folder of shards,
a folder of `save_to_disk`, tars of WebDataset) that have a column of images, relative to their folder or to
`--image-root`, and what the task needs: `question` for chat, `box` for positions; for GUI steps `Task_id, Image_id,
Instruction`, where the rows of a task are its steps in order. Answers are generated as in `evaluate`: in batches, by
any number of processes, and none again after a call was killed. The steps of a GUI task are answered in order, with
the model's own earlier answers as their memory.
"""

import csv
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.config.row_files import row_suffix
from ray_vlm.data.draw import MIN_SIDE
from ray_vlm.data.images import read_image
from ray_vlm.data.records import BadRow, ImageRange, SftRecord
from ray_vlm.data.sources.fields import from_json, is_empty
from ray_vlm.data.sources.formats import open_rows
from ray_vlm.data.sources.tables import read_all
from ray_vlm.data.sources.tar import TAR_NAMES, ImageRoot, find_image, open_images, tar_of
from ray_vlm.errors import ConfigError, DataError, RunError
from ray_vlm.evaluate.generate import answer_all, plan_batches, plan_walks
from ray_vlm.evaluate.prediction import join_names
from ray_vlm.evaluate.predictor import Ask, Found, Predictor
from ray_vlm.storage import is_remote, replacing

logger = logging.getLogger(__name__)
_ENDINGS = (".jsonl", ".csv")
_MOST_REASONS = 20  # in the error where no input can be read; the results hold all of them
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_COLUMNS = ("image", "images", "file_name", "image_path", "path", "Image_id")  # the first of them that a table has


@dataclass(frozen=True)
class Input:
    """One question of an input. `error`: why it cannot be asked, if reading it failed.

    `names`: its images as the table or the command line names them. `task`, `step`: the Task_id of a GUI step and its
    position in the task, from 0; None for other tasks.
    """

    ask: Ask
    error: str | None = None
    task: str | None = None
    step: int | None = None
    names: tuple[str, ...] = ()


def predict_files(
    predictor: Predictor,
    inputs: Sequence[str],
    output: str,
    question: str | None = None,
    draw: str | None = None,
    num_replicas: int = 0,
    image_root: str | None = None,
) -> int:
    """Answer every input, write the results in the order of the inputs, and return their number.

    `output`: .jsonl or .csv; `draw`: a folder for the images with the predictions drawn; `num_replicas`: processes that
    load the model, 0 for this one; `image_root`: folder or tar of the images that tables name, by default the table's
    own folder.
    An input that cannot be read is a result with `error`. Raise `DataError`, after writing, where none can be read.
    """
    if Path(output).suffix.lower() not in _ENDINGS:
        raise ConfigError(f"--output {output}: its name ends in neither .jsonl nor .csv. Give it one of these endings.")
    questions = read_inputs(inputs, question, predictor.task, image_root)
    if not questions:
        raise DataError(f"{', '.join(inputs)}: no images there. Give images, folders of images, or a table.")
    records, errors = _records(predictor, questions)
    if errors:
        logger.info(f"{len(errors)} of {len(questions)} inputs cannot be read; their results say why")
    answers = _answers(predictor, list(records.values()), output, num_replicas) if records else []
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


def _answers(predictor: Predictor, records: Sequence[SftRecord], output: str, num_replicas: int) -> list[str]:
    builder, size = predictor.builder, predictor.job.evaluate.batch_size
    inference = replace(predictor.inference_job(num_replicas), records=tuple(records))
    if predictor.task == "gui_steps":
        inference = replace(inference, batches=plan_walks(records, size), memory="model")
    else:
        costs = [sum(builder.token_counts(record)[:2]) for record in records]
        inference = replace(inference, batches=plan_batches(costs, size))
    try:
        return answer_all(inference, builder, _answers_path(output), num_replicas, predictor.weights)
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
            else:
                steps = ["Task_id", "step"] if any("Task_id" in result for result in results) else []
                table = csv.DictWriter(file, ["id", *steps, "images", "found", "ok", "answer", "error"])
                table.writeheader()
                table.writerows(_as_cells(result) for result in results)
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
    prediction.draw(MIN_SIDE).save(folder / f"{number:05d}-{Path(str(ask.images[0])).stem}.png")


def read_inputs(inputs: Sequence[str], question: str | None, task: str, image_root: str | None = None) -> list[Input]:
    """Read the questions of images, folders and tables. Raise `DataError` where one of them does not exist, and
    `ConfigError` for an `image_root` that no table uses."""
    root: ImageRoot | None = None
    if image_root is not None:
        if not any(_is_table(name) for name in inputs):
            raise ConfigError(f"--image-root {image_root}: it is for tables, and none is given. Leave it out.")
        if not is_remote(image_root) and not Path(image_root).is_dir() and not tar_of(image_root):
            raise ConfigError(
                f"--image-root {image_root}: no such folder. Give the folder of the table's images, or a tar of them."
            )
        root = open_images(image_root)
    return [entry for name in inputs for entry in _read_input(name, question, task, root)]


def _is_table(name: str) -> bool:
    """Return whether an input is rows: a file or a pattern of files with rows, or a folder that has no images."""
    path = Path(name)
    if path.is_dir():
        # Most folders are of images, and the first one ends the search.
        return not any(map(_is_image, path.rglob("*"))) and any(row_suffix(p.name) for p in path.rglob("*"))
    return bool(row_suffix(name)) or name.lower().endswith(TAR_NAMES)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _IMAGES and path.is_file()


def _read_input(name: str, question: str | None, task: str, root: ImageRoot | None) -> list[Input]:
    path = Path(os.path.abspath(name))  # replicas have another current folder
    fields = {"question": question} if question is not None else {}
    if _is_table(name):
        return _read_table(name, fields, task, root)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if _is_image(p))
        ids = [str(p.relative_to(path)) for p in files]
        return [
            Input(Ask((str(p),), fields, inside), names=(os.path.join(name, inside),))
            for p, inside in zip(files, ids, strict=True)
        ]
    if not path.is_file():
        raise DataError(f"{name}: no such file or folder.")
    return [Input(Ask((str(path),), fields, name), names=(name,))]


def _read_table(address: str, fields: Mapping[str, Any], task: str, root: ImageRoot | None) -> list[Input]:
    """Read a question from each row. `fields`: those of the command line; a row's own take precedence."""
    opened = open_rows(Source(path=address))
    assert opened.table is not None
    table, root = read_all(opened.table), root or opened.image_root
    column = next((name for name in _COLUMNS if name in table.columns), None)
    if column is None:
        raise DataError(f"{address}: no column of images. It has {list(table.columns)}; name one {_COLUMNS[0]!r}.")
    steps: Counter[str] = Counter()
    inputs = []
    for row in table.rows:
        if isinstance(row, BadRow):
            inputs.append(Input(Ask((), {}, row.id or f"row {row.row}"), row.reason))
            continue
        number, cells = row
        name = str(cells["id"]) if not is_empty(cells.get("id")) else f"row {number}"
        options: dict[str, Any] = {}
        if task == "gui_steps":
            task_id = "" if is_empty(cells.get("Task_id")) else str(cells["Task_id"])
            options = {"task": task_id, "step": steps[task_id] if task_id else 0}
            steps[task_id] += 1
        try:
            listed = _list_images(cells.get(column))
            options["names"] = tuple(f"row {number}" if isinstance(image, bytes) else str(image) for image in listed)
            images = tuple(image if isinstance(image, bytes) else find_image(root, str(image)) for image in listed)
            inputs.append(Input(Ask(images, {**fields, **_read_fields(cells, task)}, name), **options))
        except ValueError as error:
            inputs.append(Input(Ask((), {}, name), str(error), **options))
    return inputs


def _list_images(value: object) -> list[Any]:
    """Return the images of a cell, names or bytes: one, an object with `bytes` or `path` as `datasets` writes it, a
    list of these, or a list of names as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json(value, "images")
    if is_empty(value):
        raise ValueError("its cell of images is empty")
    listed = list(value) if isinstance(value, list | tuple) else [value]
    listed = [(image.get("bytes") or image.get("path")) if isinstance(image, dict) else image for image in listed]
    return [read_image(image) if isinstance(image, ImageRange) else image for image in listed]


def _read_fields(cells: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return the values of a row that the task's question takes beside its images."""
    fields: dict[str, Any] = {}
    if task == "chat" and not is_empty(cells.get("question")):
        fields["question"] = str(cells["question"])
    if task == "classification" and not is_empty(cells.get("box")):
        fields["box"] = from_json(cells["box"], "box")
    if task == "gui_steps":
        fields["goal"] = "" if is_empty(cells.get("Instruction")) else str(cells["Instruction"])
    return fields
