"""The cells of one row -> checked values. Every function raises `ValueError` with what is wrong and what to do."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ray_vlm.config.data import Source
from ray_vlm.data.files import resolve_image
from ray_vlm.data.records import Box, Image, Point
from ray_vlm.data.tables import text_fault

_FARTHEST = 1e9  # no image is this large; NaN and infinity fail the comparison too
_LAYOUT = {4: ("four", "[x1, y1, x2, y2]"), 2: ("two", "[x, y]")}


@dataclass(frozen=True)
class Row:
    """One row of a source: its cells under our names, and the folder that its images are in.

    `columns` are the names that any row of the source has.
    """

    number: int
    id: str
    group: str
    cells: Mapping[str, Any]
    source: Source
    root: str
    columns: tuple[str, ...]

    def first(self, *names: str) -> Any:
        """The first filled cell among `names`, or None; names that the user has mapped come first."""
        ordered = sorted(names, key=lambda name: name not in self.source.columns)
        return next((self.cells[name] for name in ordered if not is_empty(self.cells.get(name))), None)


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: null, no text, NaN (what pandas writes for nothing), an empty list or object."""
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, list | tuple | dict) and not value)
        or (isinstance(value, float) and math.isnan(value))
    )


def shown(value: Any) -> str:
    """The start of a value, for messages; control characters are escaped."""
    try:
        return repr(value[:80]) if isinstance(value, str | bytes) else str(value)[:80]
    except RecursionError:
        return "a deeply nested value"


def control_character(text: str) -> str | None:
    """The first control character but newline and tab, or half of a surrogate pair, in a text; written as an escape."""
    if text.isprintable():
        return None
    odd = (c for c in text if (c < " " and c not in "\n\t") or "\x7f" <= c < "\xa0" or "\ud800" <= c <= "\udfff")
    return next((repr(c)[1:-1] for c in odd), None)


def word(value: Any, what: str) -> str:
    """A name, an id or an attribute's value as text without spaces around it; `what` names it in the message."""
    if not isinstance(value, str | int | float) or is_empty(value):
        raise ValueError(f"{what} is {'empty' if is_empty(value) else shown(value)}; fill it with text or a number")
    text = str(value).strip()
    if found := control_character(text):
        raise ValueError(f"{what} {shown(text)} holds the control character {found}; remove it")
    return text


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that can be a coordinate."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _FARTHEST


def numbers(value: Any, count: int, what: str) -> tuple[float, ...]:
    """`count` (4 or 2) coordinates from a list."""
    if not isinstance(value, list | tuple) or len(value) != count or not all(is_number(v) for v in value):
        words, layout = _LAYOUT[count]
        raise ValueError(f"{what} {shown(value)} is not {words} finite numbers {layout}; mend it")
    return tuple(float(v) for v in value)


def box(value: Any, what: str) -> Box:
    """(x1, y1, x2, y2) from a list of four; whether it lies in the image is checked where sizes are known."""
    x1, y1, x2, y2 = numbers(value, 4, what)
    return (x1, y1, x2, y2)


def point(value: Any, what: str) -> Point:
    """(x, y) from a list of two."""
    x, y = numbers(value, 2, what)
    return (x, y)


def region(value: Any, what: str) -> Box | Point:
    """A box from a list of four, a point from a list of two."""
    return point(value, what) if isinstance(value, list | tuple) and len(value) == 2 else box(value, what)


def from_json(value: Any, what: str) -> Any:
    """The value of a cell that holds JSON as text; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} holds {shown(value)}, which is not JSON ({error}); write it as JSON") from None
    if reason := text_fault(found):
        raise ValueError(f"{what} {reason}")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def nested(value: Any, what: str) -> Any:
    """Lists and objects, also where a CSV cell holds them as JSON text; other values as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        return from_json(value, what)
    return value


def images(row: Row, *names: str) -> tuple[Image, ...]:
    """The images of a row from the first filled cell among `names`: one or a list of paths, bytes, or objects
    `{"bytes", "path"}`, of which the bytes count when there are any."""
    value = row.first(*names)
    if isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]"):
        value = from_json(value, names[0])
    if value is None:
        return ()
    return tuple(image(v, row) for v in (value if isinstance(value, list | tuple) else [value]))


def image(value: Any, row: Row) -> Image:
    """One image: bytes as they are, a path resolved inside the row's folder of images."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str):
        raise ValueError(f"image {shown(value)} is neither a path nor bytes; give a path under image_root")
    return resolve_image(row.root, value, row.source.follow_links)


def box_units(row: Row) -> dict[str, str]:
    """What goes into a record's context where its numbers are not pixels."""
    return {} if row.source.box_units == "pixels" else {"box_units": row.source.box_units}
