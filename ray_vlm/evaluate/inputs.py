"""What `ray-vlm predict` is given, as questions: an image, a folder of images, or a table.

A table (.csv, .tsv, .json, .jsonl, .parquet) has a column of images, relative to its folder, and what the task needs:
`question` for chat, `box` for positions; or for GUI steps `Task_id, Image_id, Instruction`, a task's rows being its
steps in order.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_vlm.data.cells import from_json, is_empty
from ray_vlm.data.files import parent_folder, resolve_image
from ray_vlm.data.images import FORMATS
from ray_vlm.data.records import BadRow
from ray_vlm.data.tables import read_table
from ray_vlm.errors import DataError
from ray_vlm.evaluate.predictor import Ask

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_COLUMNS = ("image", "images", "file_name", "image_path", "path", "Image_id")  # where a table has its images

assert len(_IMAGES) >= len(FORMATS)


def read_input(given: str, question: str | None, task: str) -> list[Ask]:
    """The questions that an image, a folder or a table asks. Raises `DataError` where there is nothing."""
    path = Path(os.path.abspath(given))  # replicas have another current folder
    told = {"question": question} if question is not None else {}
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGES and p.is_file())
        return [Ask((str(p),), told, str(p.relative_to(path))) for p in found]
    if path.suffix.lower() in TABLES:
        return _read_table(given, told, task)
    if not path.is_file():
        raise DataError(f"{given}: no such file or folder.")
    return [Ask((str(path),), told, given)]


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
