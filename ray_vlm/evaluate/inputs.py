"""What `ray-vlm predict` is given, as questions: an image, a folder of images, or a table.

A table (.csv, .tsv, .json, .jsonl, .parquet) has a column of images, relative to its folder or to `--image-root`, and
what the task needs: `question` for chat, `box` for positions; or for GUI steps `Task_id, Image_id, Instruction`, a
task's rows being its steps in order.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_vlm.data.fields import from_json, is_empty
from ray_vlm.data.files import parent_folder, resolve_image
from ray_vlm.data.image_kinds import FORMATS
from ray_vlm.data.records import BadRow
from ray_vlm.data.tables import read_table
from ray_vlm.errors import ConfigError, DataError
from ray_vlm.evaluate.questions import Ask
from ray_vlm.runs.store import is_remote

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_COLUMNS = ("image", "images", "file_name", "image_path", "path", "Image_id")  # where a table has its images

assert len(_IMAGES) >= len(FORMATS)


@dataclass(frozen=True)
class Input:
    """One question of an input. `error`: why it cannot be asked, where reading it has shown that.

    `task`, `step`: the Task_id of a GUI step, and its place in the task, from 0; None of other tasks' rows.
    """

    ask: Ask
    error: str | None = None
    task: str | None = None
    step: int | None = None


def read_inputs(given: Sequence[str], question: str | None, task: str, image_root: str | None = None) -> list[Input]:
    """The questions that images, folders and tables ask. Raises `DataError` where one of them is not there, and
    `ConfigError` for an `image_root` that no table uses."""
    if image_root is not None:
        if not any(_is_table(name) for name in given):
            raise ConfigError(f"--image-root {image_root}: it is for tables, and none is given. Leave it out.")
        if not is_remote(image_root) and not Path(image_root).is_dir():
            raise ConfigError(f"--image-root {image_root}: no such folder. Give the folder of the table's images.")
    return [found for name in given for found in _read_input(name, question, task, image_root)]


def _is_table(given: str) -> bool:
    path = Path(given)
    return path.suffix.lower() in TABLES and not path.is_dir()


def _read_input(given: str, question: str | None, task: str, image_root: str | None) -> list[Input]:
    path = Path(os.path.abspath(given))  # replicas have another current folder
    told = {"question": question} if question is not None else {}
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGES and p.is_file())
        return [Input(Ask((str(p),), told, str(p.relative_to(path)))) for p in found]
    if _is_table(given):
        return _read_table(given, told, task, image_root or parent_folder(given))
    if not path.is_file():
        raise DataError(f"{given}: no such file or folder.")
    return [Input(Ask((str(path),), told, given))]


def _read_table(address: str, told: Mapping[str, Any], task: str, root: str) -> list[Input]:
    table = read_table(address)
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
        place: dict[str, Any] = {}
        if task == "gui_steps":
            of_task = "" if is_empty(cells.get("Task_id")) else str(cells["Task_id"])
            place = {"task": of_task, "step": steps[of_task] if of_task else 0}
            steps[of_task] += 1
        try:
            images = tuple(resolve_image(root, str(value)) for value in _listed(cells.get(column)))
            inputs.append(Input(Ask(images, dict(told) | _told(cells, task), name), **place))
        except ValueError as error:
            inputs.append(Input(Ask((), {}, name), str(error), **place))
    return inputs


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
        told["goal"] = "" if is_empty(cells.get("Instruction")) else str(cells["Instruction"])
    return told
