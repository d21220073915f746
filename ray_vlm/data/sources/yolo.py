"""Read YOLO data sets: a text file of shares of the image for each image (docs.ultralytics.com/datasets/detect).

A line is `class x_center y_center width height`, or `class x1 y1 x2 y2 x3 y3 ...` of a polygon, whose box is taken. An
image whose label file is missing or empty has no objects.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from posixpath import splitext
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.data.sources.detection import box_around, read_number, refuse_columns
from ray_vlm.data.sources.fields import shown
from ray_vlm.data.sources.member_files import Member, MemberFiles
from ray_vlm.data.sources.tables import OpenedRows
from ray_vlm.data.sources.yolo_files import YoloFiles, find_yolo_files
from ray_vlm.errors import DataError
from ray_vlm.storage import open_file

_SAMPLED, _SAMPLED_BYTES = 400, 2**16  # label files that are looked at before all others, and bytes of each
_OUTSIDE = 0.01  # of a share; tools round
_ALIGNED = 1e-3


@dataclass(frozen=True)
class _Lines:
    """What the lines of a data set are: the names by class id, the numbers behind a pose's box (0: no pose), and
    whether eight numbers are a polygon, which only other polygons in the data set show."""

    names: Mapping[int, str]
    pose_numbers: int
    has_polygons: bool


def open_yolo(source: Source) -> OpenedRows:
    """Open a data set by its `data.yaml`, `obj.data` or `classes.txt`, or the folder that has one. Raise
    `DataError`."""
    refuse_columns(source, "YOLO")
    files = find_yolo_files(source)
    lines = _Lines(files.names, files.pose_numbers, _look_for_polygons(files, source))
    read = partial(_read_member, lines)
    labels = list(dict.fromkeys(name for _, name in sorted(files.names.items())))
    table = MemberFiles(files.address, files.members, read, labels, settings=lines)
    return OpenedRows(table, files.root)


def yolo_version(source: Source) -> list[Any]:
    """Return what identifies the present content of the data set. Raise `DataError`."""
    table = open_yolo(source).table
    assert isinstance(table, MemberFiles)
    return table.version


def _look_for_polygons(files: YoloFiles, source: Source) -> bool:
    """Return whether a sample of the label files has polygons. Raise `DataError` if it has oriented boxes."""
    if files.pose_numbers:
        return False
    labelled = [member.annotation for member in files.members if member.annotation and member.size]
    counts: Counter[int] = Counter()
    example = ""
    for address in labelled[:: max(1, len(labelled) // _SAMPLED)]:
        for cells in _sample(address):
            counts[len(cells)] += 1
            if len(cells) == 9 and not example and not _is_aligned(cells):
                example = f"{address}: {' '.join(cells)}"
    polygons = any(count > 5 and count % 2 and count != 9 for count in counts)
    if example and not polygons:
        raise DataError(
            f"{source.name}: the labels have a class and eight numbers, as oriented boxes (YOLO OBB) do, for example "
            f"{example[:300]}. Rotated boxes are not read: export upright boxes."
        )
    return polygons


def _sample(address: str) -> list[list[str]]:
    """Return the cells of the first lines of a file; none if it cannot be read, which its row reports."""
    try:
        with open_file(address) as file:
            data = file.read(_SAMPLED_BYTES)
    except (OSError, ValueError):
        return []
    lines = data.decode("utf-8-sig", "replace").replace("\r", "\n").split("\n")
    return [line.split() for line in (lines[:-1] if len(data) == _SAMPLED_BYTES else lines) if line.strip()]


def _is_aligned(cells: Sequence[str]) -> bool:
    """Return whether the four points of a line are the corners of an upright rectangle, for which a polygon and an
    oriented box are the same."""
    try:
        values = [float(cell) for cell in cells[1:]]
    except ValueError:
        return False
    points = list(zip(values[::2], values[1::2], strict=True))
    x1, y1, x2, y2 = box_around(points)
    near = [min(abs(x - x1), abs(x - x2)) < _ALIGNED and min(abs(y - y1), abs(y - y2)) < _ALIGNED for x, y in points]
    return all(near)


def _read_member(lines: _Lines, member: Member, data: bytes | None) -> dict[str, Any]:
    """Return the cells of an image. Raise `ValueError` with the first line that cannot be used."""
    if not member.image:
        raise ValueError(
            "there are labels, and no image of this name in the folders of the split; add the image, or remove the file"
        )
    objects: dict[tuple[Any, ...], None] = {}  # a line that is written twice is one object
    for number, line in enumerate(_split(data or b""), 1):
        if cells := line.split():
            try:
                objects[_read_line(cells, lines)] = None
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return {
        "id": splitext(member.image)[0],
        "image": (member.image,),
        "boxes": [tuple(corners) for _, *corners in objects],
        "labels": [label for label, *_ in objects],
        "box_units": "relative_1",
    }


def _split(data: bytes) -> list[str]:
    if b"\0" in data:
        raise ValueError("the file holds NUL characters; save it as UTF-8 text")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the file is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _read_line(cells: Sequence[str], lines: _Lines) -> tuple[Any, ...]:
    """Return the class name and the corners of an object."""
    label = _class_name(cells[0], lines.names)
    count = len(cells)
    if lines.pose_numbers:
        if count not in (5, 5 + lines.pose_numbers):
            raise ValueError(f"{count} numbers, and kpt_shape asks for {5 + lines.pose_numbers}; mend one")
        cells = cells[:5]
    elif count == 6:
        raise ValueError(
            "six numbers, as of predictions with a confidence, which are no labels; export labels, or remove the sixth"
        )
    elif count != 5 and (count < 7 or count % 2 == 0):
        raise ValueError(
            f"{count} numbers; a box has 5 (class x_center y_center width height), a polygon 7, 9, 11, ..."
        )
    elif count == 9 and not lines.has_polygons and not _is_aligned(cells):
        raise ValueError(
            "a class and eight numbers that are no upright rectangle, either an oriented box or a polygon of four "
            "points, which nothing else in the data set tells; write a box of 5 numbers"
        )
    values = [_share(cell) for cell in cells[1:]]
    if len(values) == 4:
        x, y, width, height = values
        return label, x - width / 2, y - height / 2, x + width / 2, y + height / 2
    return label, *box_around(list(zip(values[::2], values[1::2], strict=True)))


def _class_name(cell: str, names: Mapping[int, str]) -> str:
    try:
        number = read_number(cell, "class")
    except ValueError:
        raise ValueError(
            f"class {shown(cell)} is not a whole number; a line begins with the number of a class"
        ) from None
    if not number.is_integer():
        raise ValueError(f"class {shown(cell)} is not a whole number; a line begins with the number of a class")
    if int(number) not in names:
        raise ValueError(
            f"class {int(number)} is not among the {len(names)} names, {min(names)} to {max(names)}; add its name or "
            "mend the line"
        )
    return names[int(number)]


def _share(cell: str) -> float:
    value = read_number(cell, "a number of the line")
    if not -_OUTSIDE <= value <= 1 + _OUTSIDE:
        raise ValueError(f"{cell[:40]} is not a share of the image from 0 to 1; divide pixels by width or height")
    return value
