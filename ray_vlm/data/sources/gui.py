"""Read GUI steps: rows of `Task_id, Image_id, Instruction, Output, Grounding`; a task's rows are its steps in order.

An Output is a step, `{"action": "click", ...}`, or nests it one level deeper, `{"action": {"type": "click", ...}}`. A
Grounding is a list of coordinates, or an object with named coordinates, or an object with such a list or object under a
known name.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.data.records import BadRow, Box, Point, SftRecord
from ray_vlm.data.sources import fields
from ray_vlm.data.sources.fields import Row, shown
from ray_vlm.errors import DataError

_ACTIONS = ("action", "action_type", "type")
_BOXES = ("bbox", "bbox_2d", "box")
_POINTS = ("point", "point_2d", "coordinate", "coordinates")
_CORNERS, _RECTANGLE = ("x1", "y1", "x2", "y2"), ("x", "y", "width", "height")  # of boxes that are written by name
_NUMBER = re.compile(r"-?\d{1,15}(\.\d{1,15})?")


def gui_records(rows: list[Row | BadRow], source: Source) -> list[SftRecord | BadRow]:
    """Return one record for each step of the tasks that the source's options select.

    `history` of a step is the readable Outputs of the task's earlier steps, as compact JSON, oldest first. A bad row
    leaves no gap in it if its Output can be read.
    """
    tasks = [_task_of(row) for row in rows]
    selected = _select_tasks([task for task in tasks if task is not None], source)
    history: dict[str, list[str]] = defaultdict(list)
    steps: Counter = Counter()
    records: list[SftRecord | BadRow] = []
    for row, task in zip(rows, tasks, strict=True):
        if isinstance(row, BadRow):
            records.append(row)
        elif task is None or task in selected:
            records.append(_record(row, task, steps, history))
    return records[: source.max_rows]


def _task_of(row: Row | BadRow) -> str | None:
    try:
        return None if isinstance(row, BadRow) else fields.word(row.cells.get("Task_id"), "Task_id")
    except ValueError:
        return None


def _select_tasks(tasks: list[str], source: Source) -> set[str]:
    """Return the first `max_tasks` tasks from `task_start` to `task_end`. Raise `DataError`."""
    order = {task: i for i, task in enumerate(dict.fromkeys(tasks))}
    selected = list(order)
    for option, sign in (("task_start", 1), ("task_end", -1)):
        limit = getattr(source, option)
        if limit is None:
            continue
        same = next((t for t in order if t == limit), None) or next(
            (t for t in order if _rank(t) == _rank(limit)), None
        )
        if same is None or (same != limit and _rank(limit) is None):
            some = ", ".join(list(order)[:5])
            raise DataError(f"{source.name}: {option}={limit!r} is no Task_id of this file. It has {some}, ...")
        selected = [task for task in selected if sign * _distance(task, same, order) >= 0]
    if order and not selected:
        raise DataError(
            f"{source.name}: no task lies from task_start={source.task_start!r} to task_end={source.task_end!r}. "
            "Exchange them, or leave one out."
        )
    return set(selected[: source.max_tasks])


def _rank(task: str) -> float | None:
    return float(task) if _NUMBER.fullmatch(task) else None


def _distance(task: str, limit: str, order: dict[str, int]) -> float:
    """Return how far a task comes after another: by their numbers, or by their positions in the file."""
    a, b = _rank(task), _rank(limit)
    return a - b if a is not None and b is not None else order[task] - order[limit]


def _record(row: Row, task: str | None, steps: Counter, history: dict[str, list[str]]) -> SftRecord | BadRow:
    if task is None:
        value = row.cells.get("Task_id")
        reason = "is empty" if fields.is_empty(value) else f"{shown(value)} is not a plain text or number"
        return BadRow(row.number, row.id, f"Task_id {reason}; {_fix('Task_id')}")
    step = steps[task]
    steps[task] += 1
    name = f"{task}/{step}" if fields.is_empty(row.cells.get("id")) else row.id
    try:
        if empty := [key for key in ("Output", "Image_id", "Instruction") if fields.is_empty(row.cells.get(key))]:
            raise ValueError(f"{' and '.join(empty)} is empty; {_fix(empty[0])}")
        output, written = _output(row)
        earlier = tuple(history[task])
        history[task].append(written)
        pointed_box, pointed_point = _grounding(row)
        screens = fields.images(row, "Image_id")
        if len(screens) != 1:
            raise ValueError(f"Image_id names {len(screens)} images; a step has one screen; name it alone")
        instruction = row.first("Instruction")
        if not isinstance(instruction, str):
            raise ValueError(f"Instruction {shown(instruction)} is not a text; say in words what the task is")
    except ValueError as error:
        return BadRow(row.number, name, str(error))
    truth = {"output": output, "box": pointed_box, "point": pointed_point}
    context: dict[str, Any] = {"instruction": instruction, "task": task, "step": step, "history": earlier}
    if pointed_box is not None or pointed_point is not None:
        context |= fields.box_units(row)
    return SftRecord(name, row.number, screens, (), truth, context, task)


def _fix(name: str) -> str:
    return f"fill it, or name its column, as in {fields.column_setting(name)}"


def _output(row: Row) -> tuple[dict[str, Any], str]:
    """Return the step with its `action` first, and the same as compact JSON. Raise `ValueError`."""
    value = fields.from_json(row.first("Output"), "Output")
    if not isinstance(value, dict):
        raise ValueError(f'Output holds {shown(value)}, which is not a JSON object; write {{"action": ...}}')
    action, arguments = _action(value)
    output = {"action": action, **arguments}
    try:
        return output, json.dumps(output, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"Output {shown(value)} cannot be written as JSON ({error}); mend it") from None


def _action(value: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the action's name and its arguments, those of a nested action object first. Raise `ValueError`."""
    key = next((name for name in _ACTIONS if name in value), "action")
    action, arguments = value.get(key), {name: v for name, v in value.items() if name != key}
    if isinstance(action, dict):
        inner = next((name for name in (*_ACTIONS, "name") if name in action), "action")
        nested = {name: v for name, v in action.items() if name != inner}
        if twice := [name for name in nested if name in arguments]:
            raise ValueError(f"Output {shown(value)} says {twice[0]!r} twice, beside `{key}` and in it; keep one")
        action, arguments = action.get(inner), {**nested, **arguments}
    if not isinstance(action, str) or not action.strip():
        raise ValueError(f"Output {shown(value)} has no text under `action`; name what is done")
    return fields.word(action, "action"), arguments


def _grounding(row: Row) -> tuple[Box | None, Point | None]:
    """Return the box and the point that a step points at, if any. Raise `ValueError`."""
    value = fields.from_json(row.first("Grounding"), "Grounding")
    if fields.is_empty(value):
        return None, None
    known = [key for key in (*_BOXES, *_POINTS) if isinstance(value, dict) and key in value]
    held = {key: coordinates for key in known if not fields.is_empty(coordinates := _coordinates(value[key]))}
    boxes = [fields.box(held[key], f"Grounding {key}") for key in _BOXES if key in held]
    points = [fields.point(held[key], f"Grounding {key}") for key in _POINTS if key in held]
    if held:
        return boxes[0] if boxes else None, points[0] if points else None
    by_name = _coordinates(value)
    if by_name is value and not known and not isinstance(value, list):
        raise ValueError(
            f"Grounding holds {shown(value)}; use one of {', '.join((*_BOXES, *_POINTS))}, coordinates by name "
            "(x, y or x1, y1, x2, y2), or nothing where nothing is pointed at"
        )
    if by_name is None or isinstance(by_name, dict):
        return None, None
    target = fields.region(by_name, "Grounding")
    return (target, None) if len(target) == 4 else (None, target)


def _coordinates(value: object) -> Any:
    """Return named coordinates as a list, or None if all are empty; return any other value unchanged."""
    if not isinstance(value, dict):
        return value
    coordinates: list[Any]
    if any(name in value for name in _CORNERS):
        coordinates = [value.get(name) for name in _CORNERS]
    elif all(name in value for name in _RECTANGLE):
        coordinates = [value[name] for name in _RECTANGLE]
        if all(fields.is_number(v) for v in coordinates):
            x, y, width, height = coordinates
            coordinates = [x, y, x + width, y + height]
    elif "x" in value or "y" in value:
        coordinates = [value.get("x"), value.get("y")]
    else:
        return value
    return None if all(fields.is_empty(v) for v in coordinates) else coordinates
