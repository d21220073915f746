"""Read a source: create its file on first use, and turn its rows into records, by one function for each format.

A row that cannot be read becomes a `BadRow`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.config.paths import import_function
from ray_vlm.data.records import BadRow, Record, SftRecord
from ray_vlm.data.sources import fields
from ray_vlm.data.sources.coco import image_root, read_coco
from ray_vlm.data.sources.conversations import chat_record, preference_record, prompt_record, read_objects
from ray_vlm.data.sources.fields import Row, shown
from ray_vlm.data.sources.gui import gui_records
from ray_vlm.data.sources.tables import Table, read_table
from ray_vlm.errors import ConfigError, DataError, RayVlmError
from ray_vlm.runs.console import lasting

_CORNERS = ("x1", "y1", "x2", "y2")
_NOT_ATTRIBUTES = ("id", "image", "group", *_CORNERS, "bbox")


def read_source(source: Source) -> tuple[list[Record | BadRow], list[str]]:
    """Return `read_rows` of the source, after creating its file if needed. Raise as `read_rows` does, and
    `ConfigError` if the file cannot be created."""
    with lasting(f"reading {source.path}"):
        prepare_source(source)
        return read_rows(source)


def prepare_source(source: Source) -> None:
    """Call `source.create` with the path if the file is not there yet. Raise `ConfigError` if it cannot be called."""
    if source.create is None or Path(source.path).exists():
        return
    try:
        import_function(source.create)(source.path)
    except RayVlmError:
        raise
    except Exception as error:  # a user's own function
        raise ConfigError(
            f"create={source.create!r} failed for {source.path} ({type(error).__name__}: {error}). "
            "It is module:function, called with the path."
        ) from error


def read_rows(source: Source) -> tuple[list[Record | BadRow], list[str]]:
    """Return all rows of a source in file order, and the class names that it declares.

    Class names are COCO's categories in their order, or else the sorted labels of the rows (for classification
    `attribute=value`, the attributes in the order of their columns). `sizes` of the records is empty: the index reads
    image sizes from the files' headers. Raise `DataError` if the whole file cannot be used.
    """
    return FORMATS[source.format](source)


def objects_record(row: Row) -> SftRecord:
    """Read detection from ms-swift's `objects`; `messages` are not read."""
    pictures = fields.images(row, "images", "image")
    if len(pictures) != 1:
        raise ValueError(f"the row has {len(pictures)} images; a detection row has one. Split or mend it")
    labels, boxes, _, units = read_objects(row, 1)
    if len(labels) != len(boxes):
        raise ValueError(f"objects has {len(labels)} ref for {len(boxes)} bbox; give each box its name")
    for corners in boxes:
        fields.box(corners, "objects.bbox")
    return SftRecord(row.id, row.number, pictures, (), {"boxes": boxes, "labels": labels}, units, row.group)


def classification_record(row: Row) -> SftRecord:
    """Read `image` and attribute columns, and a box in `x1, y1, x2, y2` or `bbox` if there is one."""
    pictures = fields.images(row, "image")
    if len(pictures) != 1:
        raise ValueError(f"the row has {len(pictures)} images; a classification row has one. Split or mend it")
    attributes = {name: fields.word(row.cells.get(name), f"attribute {name}") for name in _attributes(row)}
    corners = _box_of(row)
    context = {} if corners is None else {"box": corners, **fields.box_units(row)}
    return SftRecord(row.id, row.number, pictures, (), {"attributes": attributes}, context, row.group)


def _attributes(row: Row) -> list[str]:
    """Return the attributes that `columns` names, or every column that has no other meaning."""
    named = [name for name in row.source.columns if name not in _NOT_ATTRIBUTES]
    taken = {*_NOT_ATTRIBUTES, *row.source.columns.values()}
    attributes = named or [name for name in row.columns if name not in taken]
    if not attributes:
        raise DataError(
            f"{row.source.path}: no column with an attribute. It has {', '.join(row.columns)}; add one, such as "
            f"`label`, or name one, as in {fields.column_setting('label')}."
        )
    return attributes


def _box_of(row: Row) -> tuple[float, float, float, float] | None:
    if (value := row.first("bbox")) is not None:
        return fields.box(fields.nested(value, "bbox"), "bbox")
    corners = [row.cells.get(name) for name in _CORNERS]
    if all(fields.is_empty(v) for v in corners):
        return None
    return fields.box([_number(v) for v in corners], ", ".join(_CORNERS))


def _number(value: object) -> object:
    """Return the number in a CSV cell; return other values unchanged, for the check of the box to report."""
    try:
        return float(value) if isinstance(value, str) and "_" not in value else value
    except ValueError:
        return value


def _read(
    source: Source, make: Callable[[Row], Record], needs: tuple[tuple[str, ...], ...]
) -> tuple[list[Record | BadRow], list[str]]:
    """Read the rows of a table one by one. `needs`: one column of each group of names must be filled."""
    rows = _rows(source, needs)[: source.max_rows]
    made = _number_twice([_made(row, make, needs) for row in rows])
    labels = dict.fromkeys(label for record in made if isinstance(record, SftRecord) for label in _labels(record))
    attributes = list(dict.fromkeys(label.partition("=")[0] for label in labels if "=" in label))
    return made, sorted(labels, key=lambda label: (_attribute_position(label, attributes), label))


def _attribute_position(label: str, attributes: list[str]) -> int:
    """Return the position of a label's attribute in the order of the columns."""
    name = label.partition("=")[0]
    return attributes.index(name) if name in attributes else 0


def _read_gui(source: Source) -> tuple[list[Record | BadRow], list[str]]:
    needs = (("Task_id",), ("Image_id",), ("Instruction",), ("Output",), ("Grounding",))
    return _refuse_twice([*gui_records(_rows(source, needs), source)]), []


def _labels(record: SftRecord) -> list[str]:
    if "attributes" in record.truth:
        return [f"{name}={value}" for name, value in record.truth["attributes"].items()]
    return list(record.truth.get("labels", ()))


def _made(row: Row | BadRow, make: Callable[[Row], Record], needs: tuple[tuple[str, ...], ...]) -> Record | BadRow:
    if isinstance(row, BadRow):
        return row
    try:
        for names in needs:
            if row.first(*names) is None:
                existing = ", ".join(row.cells)[:200]
                raise ValueError(
                    f"no {' or '.join(names)}; the row has {existing}. Fill it, or name its column, as in "
                    f"{fields.column_setting(names[0], _guess_column(row, needs))}"
                )
        return make(row)
    except ValueError as error:
        return BadRow(row.number, row.id, str(error))


def _guess_column(row: Row, needs: tuple[tuple[str, ...], ...]) -> str:
    """Return the only filled column whose name the format does not know, or the placeholder NAME."""
    known = {*_NOT_ATTRIBUTES, "images", *row.source.columns, *(name for names in needs for name in names)}
    unknown = [name for name, value in row.cells.items() if name not in known and not fields.is_empty(value)]
    return unknown[0] if len(unknown) == 1 else "NAME"


def _number_twice(rows: list[Record | BadRow]) -> list[Record | BadRow]:
    """Number rows that share an id, as several questions about one image do: the second becomes `ID#2`. They form one
    group, so that no split separates them."""
    counts = Counter(row.id for row in rows)
    met: Counter[str] = Counter()
    numbered: list[Record | BadRow] = []
    for row in rows:
        if counts[row.id] > 1 and not isinstance(row, BadRow):
            met[row.id] += 1
            name = row.id if met[row.id] == 1 else f"{row.id}#{met[row.id]}"
            while name != row.id and name in counts:
                met[row.id] += 1
                name = f"{row.id}#{met[row.id]}"
            row = replace(row, id=name, group=row.group or row.id)
        numbered.append(row)
    return numbered


def _refuse_twice(rows: list[Record | BadRow]) -> list[Record | BadRow]:
    counts = Counter(row.id for row in rows)
    return [
        BadRow(row.row, row.id, f"id {row.id} is used by {counts[row.id]} rows; make it unique")
        if not isinstance(row, BadRow) and counts[row.id] > 1
        else row
        for row in rows
    ]


def _rows(source: Source, needs: tuple[tuple[str, ...], ...]) -> list[Row | BadRow]:
    """Return the rows of a table under the names of ray_vlm. Raise `DataError` for missing columns."""
    table = read_table(source.path)
    _check_columns(table, source, needs)
    root = image_root(source)
    return [row if isinstance(row, BadRow) else _row(*row, source, root, table.columns) for row in table.rows]


def _check_columns(table: Table, source: Source, needs: tuple[tuple[str, ...], ...]) -> None:
    existing = ", ".join(table.columns)[:400]
    problems = [
        f"{source.path}: no column {column!r}, named by columns.{name}; it has {existing}."
        for name, column in source.columns.items()
        if table.columns and column not in table.columns
    ]
    if table.has_schema:
        available = {*table.columns, *source.columns}
        problems += [
            f"{source.path}: no column {' or '.join(names)}; it has {existing}. Add it, or name its column, as in "
            f"{fields.column_setting(names[0])}."
            for names in needs
            if not available & set(names)
        ]
    if problems:
        raise DataError(problems)


def _row(number: int, cells: dict[str, Any], source: Source, root: str, columns: tuple[str, ...]) -> Row | BadRow:
    """Return the cells under the names of ray_vlm, with id and group."""
    cells = cells | {field: cells.get(column) for field, column in source.columns.items()}
    name, group = cells.get("id"), cells.get("group")
    try:
        if isinstance(name, bool) or not (fields.is_empty(name) or isinstance(name, str | int)):
            raise ValueError(f"id {shown(name)} is neither a text nor a whole number; mend it")
        name = str(number) if fields.is_empty(name) else fields.word(name, "id")
        group = "" if fields.is_empty(group) and "group" not in source.columns else fields.word(group, "group")
    except ValueError as error:
        return BadRow(number, "", str(error))
    return Row(number, name, group, cells, source, root, columns)


FORMATS: dict[str, Callable[[Source], tuple[list[Any], list[str]]]] = {
    "coco": read_coco,
    "llava": partial(_read, make=partial(chat_record, column="conversations"), needs=(("conversations",),)),
    "messages": partial(_read, make=partial(chat_record, column="messages"), needs=(("messages",),)),
    "objects": partial(_read, make=objects_record, needs=(("images", "image"), ("objects",))),
    "image_csv": partial(_read, make=classification_record, needs=(("image",),)),
    "gui_csv": _read_gui,
    "preference": partial(
        _read,
        make=preference_record,
        needs=(
            ("prompt", "messages", "conversations"),
            ("chosen", "messages"),
            ("rejected", "rejected_response"),
        ),
    ),
    "prompt": partial(_read, make=prompt_record, needs=(("prompt", "problem"),)),
}
