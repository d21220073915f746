"""Read the inputs of `ray-vlm predict` as questions: an image, a folder of images, or a table.

A table (.csv, .tsv, .json, .jsonl, .parquet) has a column of images, relative to its folder or to `--image-root`, and
what the task needs: `question` for chat, `box` for positions; for GUI steps `Task_id, Image_id, Instruction`, where the
rows of a task are its steps in order.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_vlm.data.files import parent_folder, resolve_image
from ray_vlm.data.images import FORMATS
from ray_vlm.data.records import BadRow
from ray_vlm.data.sources.fields import from_json, is_empty
from ray_vlm.data.sources.tables import read_table
from ray_vlm.errors import ConfigError, DataError
from ray_vlm.evaluate.questions import Ask
from ray_vlm.runs.store import is_remote

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_COLUMNS = (
    "image",
    "images",
    "file_name",
    "image_path",
    "path",
    "Image_id",
)  # the first of them that a table has

assert len(_IMAGES) >= len(FORMATS)


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


def read_inputs(inputs: Sequence[str], question: str | None, task: str, image_root: str | None = None) -> list[Input]:
    """Read the questions of images, folders and tables. Raise `DataError` where one of them does not exist, and
    `ConfigError` for an `image_root` that no table uses."""
    if image_root is not None:
        if not any(_is_table(name) for name in inputs):
            raise ConfigError(f"--image-root {image_root}: it is for tables, and none is given. Leave it out.")
        if not is_remote(image_root) and not Path(image_root).is_dir():
            raise ConfigError(f"--image-root {image_root}: no such folder. Give the folder of the table's images.")
    return [entry for name in inputs for entry in _read_input(name, question, task, image_root)]


def _is_table(name: str) -> bool:
    path = Path(name)
    return path.suffix.lower() in TABLES and not path.is_dir()


def _read_input(name: str, question: str | None, task: str, image_root: str | None) -> list[Input]:
    path = Path(os.path.abspath(name))  # replicas have another current folder
    fields = {"question": question} if question is not None else {}
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGES and p.is_file())
        ids = [str(p.relative_to(path)) for p in files]
        return [
            Input(Ask((str(p),), fields, inside), names=(os.path.join(name, inside),))
            for p, inside in zip(files, ids, strict=True)
        ]
    if _is_table(name):
        return _read_table(name, fields, task, image_root or parent_folder(name))
    if not path.is_file():
        raise DataError(f"{name}: no such file or folder.")
    return [Input(Ask((str(path),), fields, name), names=(name,))]


def _read_table(address: str, fields: Mapping[str, Any], task: str, root: str) -> list[Input]:
    """Read a question from each row. `fields`: those of the command line; a row's own take precedence."""
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
        options: dict[str, Any] = {}
        if task == "gui_steps":
            task_id = "" if is_empty(cells.get("Task_id")) else str(cells["Task_id"])
            options = {"task": task_id, "step": steps[task_id] if task_id else 0}
            steps[task_id] += 1
        try:
            options["names"] = tuple(map(str, _list_images(cells.get(column))))
            images = tuple(resolve_image(root, image) for image in options["names"])
            inputs.append(Input(Ask(images, {**fields, **_read_fields(cells, task)}, name), **options))
        except ValueError as error:
            inputs.append(Input(Ask((), {}, name), str(error), **options))
    return inputs


def _list_images(value: Any) -> list[Any]:
    """Return the images of a cell: a name, a list of names, or such a list as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json(value, "images")
    if is_empty(value):
        raise ValueError("its cell of images is empty")
    return list(value) if isinstance(value, list | tuple) else [value]


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
