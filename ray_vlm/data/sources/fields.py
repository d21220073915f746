"""Check and return the cells of one row. Every function raises `ValueError` with the problem and its fix."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ray_vlm.config.data import Source
from ray_vlm.data.records import Box, Image, ImageRange, Point
from ray_vlm.data.sources.data_uris import is_data_uri, read_data_uri
from ray_vlm.data.sources.tar import ImageRoot, find_image

_FARTHEST = 1e9  # no image is this large; NaN and infinity fail the comparison too
_LAYOUT = {4: ("four", "[x1, y1, x2, y2]"), 2: ("two", "[x, y]")}


@dataclass(slots=True)
class Row:
    """One row of a source: its cells under the names of ray_vlm, and where its images lie.

    `columns` are all names that rows of the source have.
    """

    number: int
    id: str
    group: str
    cells: Mapping[str, Any]
    source: Source
    root: ImageRoot
    columns: tuple[str, ...]

    def first(self, *names: str) -> Any:
        """Return the first filled cell among `names`, or None; names that the user has mapped come first."""
        if columns := self.source.columns:
            names = tuple(sorted(names, key=lambda name: name not in columns))
        for name in names:
            if not is_empty(value := self.cells.get(name)):
                return value
        return None


def text_fault(value: object) -> str | None:
    """Return why a text somewhere in a value cannot be used (NUL characters, half a surrogate pair), or None."""
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if isinstance(current, dict):
            waiting += [*current, *current.values()]
        elif isinstance(current, list | tuple):
            waiting += current
        elif isinstance(current, str):
            if "\0" in current:
                return "holds NUL characters in a text; remove them"
            if not current.isascii() and any("\ud800" <= c <= "\udfff" for c in current):
                return "holds half a surrogate pair in a text, which is not Unicode; write the text again"
    return None


def is_empty(value: object) -> bool:
    """Return whether a cell is empty: null, blank text, NaN (as pandas writes it), an empty list or object."""
    if isinstance(value, str):
        return not value or value.isspace()
    if value is None or isinstance(value, (list, tuple, dict)):
        return not value
    return isinstance(value, float) and math.isnan(value)


def shown(value: object) -> str:
    """Return the start of a value for messages, with control characters escaped."""
    try:
        return repr(value[:80]) if isinstance(value, str | bytes) else str(value)[:80]
    except RecursionError:
        return "a deeply nested value"


def control_character(text: str) -> str | None:
    """Return the first control character other than newline and tab, or half of a surrogate pair, in a text, as an
    escape; None if there is none."""
    if text.isprintable():
        return None
    odd = (c for c in text if (c < " " and c not in "\n\t") or "\x7f" <= c < "\xa0" or "\ud800" <= c <= "\udfff")
    return next((repr(c)[1:-1] for c in odd), None)


def word(value: object, what: str) -> str:
    """Return a name, an id or an attribute's value as stripped text; `what` names it in the message."""
    if is_empty(value) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{what} is {'empty' if is_empty(value) else shown(value)}; fill it with text or a number")
    text = str(value).strip()
    if character := control_character(text):
        raise ValueError(f"{what} {shown(text)} holds the control character {character}; remove it")
    return text


def is_number(value: object) -> bool:
    """Return whether a value is a finite number that can be a coordinate."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _FARTHEST


def numbers(value: object, count: int, what: str) -> tuple[float, ...]:
    """Return `count` (4 or 2) coordinates from a list."""
    if not isinstance(value, list | tuple) or len(value) != count or not all(is_number(v) for v in value):
        words, layout = _LAYOUT[count]
        raise ValueError(f"{what} {shown(value)} is not {words} finite numbers {layout}; mend it")
    return tuple(float(v) for v in value)


def box(value: object, what: str) -> Box:
    """Return (x1, y1, x2, y2) from a list of four. Whether it lies in the image is checked once sizes are known."""
    x1, y1, x2, y2 = numbers(value, 4, what)
    return (x1, y1, x2, y2)


def point(value: object, what: str) -> Point:
    """Return (x, y) from a list of two."""
    x, y = numbers(value, 2, what)
    return (x, y)


def region(value: object, what: str) -> Box | Point:
    """Return a box from a list of four, a point from a list of two."""
    return point(value, what) if isinstance(value, list | tuple) and len(value) == 2 else box(value, what)


def from_json(value: object, what: str) -> Any:
    """Parse a cell that holds JSON as text; return other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} holds {shown(value)}, which is not JSON ({error}); write it as JSON") from None
    if reason := text_fault(parsed):
        raise ValueError(f"{what} {reason}")
    return parsed


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def nested(value: object, what: str) -> Any:
    """Parse a list or an object that a CSV cell holds as JSON text; return other values unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        return from_json(value, what)
    return value


def images(row: Row, *names: str) -> tuple[Image, ...]:
    """Return the images in the first filled cell among `names`: one or a list of paths, data URIs, bytes, or
    objects `{"bytes", "path"}`, whose bytes come first."""
    value = row.first(*names)
    if isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]"):
        value = from_json(value, names[0])
    if isinstance(value, list | tuple):
        return tuple(image(v, row) for v in value)
    return () if value is None else (image(value, row),)


def image(value: object, row: Row) -> Image:
    """Return one image: bytes or a range of a file unchanged, the bytes of a data URI, a path resolved inside the row's
    folder of images."""
    if isinstance(value, ImageRange):
        return value
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        if is_data_uri(value):
            return read_data_uri(value)
        return find_image(row.root, value, row.source.follow_links)
    if isinstance(value, bytes) and value:
        return value
    raise ValueError(f"image {shown(value)} is neither a path nor bytes; give a path under image_root")


def column_setting(name: str, column: str = "NAME") -> str:
    """Return an example, for messages, of the setting that reads `name` from `column`."""
    return f"data.train.columns={{{name}: {column}}}"


def box_units(row: Row) -> dict[str, str]:
    """Return the entry of a record's context for numbers that are not pixels; empty for pixels."""
    return {} if row.source.box_units == "pixels" else {"box_units": row.source.box_units}
