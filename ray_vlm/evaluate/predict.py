"""`ray-vlm predict RUN INPUT... --output PATH`: images, folders and tables in, JSON lines or a table out.

A table (.csv, .tsv, .json, .jsonl, .parquet) has a column of images, relative to its folder, and what the task needs:
`question` for chat, `box` for positions; or for GUI steps `Task_id, Image_id, Instruction`, a task's rows being its
steps in order. Their memory is what the model itself answered before.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_vlm.data.cells import from_json, is_empty
from ray_vlm.data.files import parent_folder, resolve_image
from ray_vlm.data.images import FORMATS
from ray_vlm.data.records import BadRow
from ray_vlm.data.tables import read_table
from ray_vlm.errors import ConfigError, DataError, RunError
from ray_vlm.evaluate.predictor import Ask, Found, Predictor

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_COLUMNS = ("image", "images", "file_name", "image_path", "path", "Image_id")  # where a table has its images
_ROUND = 16  # batches that are answered before their results are written

assert len(_IMAGES) >= len(FORMATS)


def predict_files(
    predictor: Predictor,
    inputs: Sequence[str],
    output: str,
    question: str | None = None,
    draw: str | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Answer every input and write the results, in the order of the inputs; returns how many.

    `output`: .jsonl or .csv; `draw`: a folder for images with what was found on them. Inputs that cannot be read are
    results too, with `error`; raises `DataError` where none can.
    """
    if Path(output).suffix.lower() not in (".jsonl", ".csv"):
        raise ConfigError(f"--output {output}: its name ends in neither .jsonl nor .csv.")
    asks = [ask for given in inputs for ask in read_input(given, question, predictor.task)]
    if not asks:
        raise DataError(f"{', '.join(inputs)}: no images there. Give images, folders of images, or a table.")
    results: list[dict[str, Any]] = []
    failed = 0
    for part in _rounds(predictor, asks):
        for ask, result in part:
            failed += isinstance(result, str)
            results.append(_result(ask, result))
            if draw and isinstance(result, Found):
                _draw(Path(draw), len(results), ask, result)
        say(f"predicted {len(results)}/{len(asks)}" + (f", {failed} cannot be read" if failed else ""))
    order = {id(ask): i for i, ask in enumerate(asks)}
    results.sort(key=lambda result: order[result.pop("_ask")])
    _write(output, results)
    if failed == len(asks):
        raise DataError([f"{result['id']}: {result['error']}" for result in results[:20]])
    return len(results)


def read_input(given: str, question: str | None, task: str) -> list[Ask]:
    """The questions that an image, a folder or a table asks. Raises `DataError` where there is nothing."""
    path = Path(given)
    told = {"question": question} if question is not None else {}
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGES and p.is_file())
        return [Ask((str(p),), told, str(p.relative_to(path))) for p in found]
    if path.suffix.lower() in TABLES:
        return _read_table(given, told, task)
    if not path.is_file():
        raise DataError(f"{given}: no such file or folder.")
    return [Ask((str(path),), told, str(path))]


def _read_table(address: str, told: Mapping[str, Any], task: str) -> list[Ask]:
    table, root = read_table(address), parent_folder(address)
    column = next((name for name in _COLUMNS if name in table.columns), None)
    if column is None:
        raise DataError(f"{address}: no column of images. It has {list(table.columns)}; name one {_COLUMNS[0]!r}.")
    asks = []
    for row in table.rows:
        if isinstance(row, BadRow):
            asks.append(Ask((), {"error": row.reason}, row.id or f"row {row.row}"))
            continue
        number, cells = row
        name = str(cells["id"]) if not is_empty(cells.get("id")) else f"row {number}"
        try:
            images = tuple(resolve_image(root, str(value)) for value in _listed(cells.get(column)))
            asks.append(Ask(images, dict(told) | _told(cells, task), name))
        except ValueError as error:
            asks.append(Ask((), {"error": str(error)}, name))
    return asks


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json(value, "images")
    if is_empty(value):
        raise ValueError("its cell of images is empty")
    return list(value) if isinstance(value, list | tuple) else [value]


def _told(cells: Mapping[str, Any], task: str) -> dict[str, Any]:
    """What a row tells beside its images."""
    told: dict[str, Any] = {}
    if task == "chat" and not is_empty(cells.get("question")):
        told["question"] = str(cells["question"])
    if task == "classification" and not is_empty(cells.get("box")):
        told["box"] = from_json(cells["box"], "box")
    if task == "gui_steps":
        told |= {"goal": str(cells.get("Instruction") or ""), "task": str(cells.get("Task_id") or "")}
    return told


Answered = list[tuple[Ask, Found | str]]


def _rounds(predictor: Predictor, asks: Sequence[Ask]) -> Iterator[Answered]:
    """All questions with what was found, or why they cannot be asked; GUI tasks side by side, step by step."""
    if predictor.task == "gui_steps":
        yield from _steps(predictor, asks)
        return
    size = max(1, predictor.job.evaluate.batch_size) * _ROUND
    for start in range(0, len(asks), size):
        yield _answered(predictor, asks[start : start + size])


def _answered(predictor: Predictor, asks: Sequence[Ask]) -> Answered:
    good, results = [], {}
    for i, ask in enumerate(asks):
        try:
            if "error" in ask.told:
                raise DataError(str(ask.told["error"]))
            predictor.record(ask)
            good.append(i)
        except DataError as error:
            results[i] = "; ".join(error.problems)
    found = predictor.predict_many([asks[i] for i in good])
    results |= dict(zip(good, found, strict=True))  # type: ignore[arg-type]
    return [(ask, results[i]) for i, ask in enumerate(asks)]


def _steps(predictor: Predictor, asks: Sequence[Ask]) -> Iterator[Answered]:
    """Step i of every task at once; what was answered is the memory of the next step."""
    tasks: dict[str, list[Ask]] = {}
    for i, ask in enumerate(asks):
        tasks.setdefault(str(ask.told.get("task") or f"\0{i}"), []).append(ask)
    history: dict[str, tuple[str, ...]] = dict.fromkeys(tasks, ())
    for number in range(max(map(len, tasks.values()))):
        names = [name for name, steps in tasks.items() if number < len(steps)]
        now = [tasks[name][number] for name in names]
        answered = _answered(
            predictor, [_with_history(ask, history[name]) for ask, name in zip(now, names, strict=True)]
        )
        for name, (_, found) in zip(names, answered, strict=True):
            if isinstance(found, Found):
                short, long = predictor.remember(history[name], found)
                history[name] = (*long, *short)
        yield [(ask, found) for ask, (_, found) in zip(now, answered, strict=True)]


def _with_history(ask: Ask, history: tuple[str, ...]) -> Ask:
    told = {k: v for k, v in ask.told.items() if k != "task"}
    return Ask(ask.images, told if "error" in told else told | {"history": history}, ask.id)


def _result(ask: Ask, found: Found | str) -> dict[str, Any]:
    head = {"_ask": id(ask), "id": ask.id, "images": list(ask.images)}
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
        raise RunError(f"{output} cannot be written ({error}). Give another --output.") from None


def _draw(folder: Path, number: int, ask: Ask, found: Found) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found.draw().save(folder / f"{number:05d}-{Path(str(ask.images[0])).stem}.png")
