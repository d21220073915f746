"""Read labelme: a JSON file for each image (github.com/wkentaro/labelme), with shapes in pixels."""

import base64
import binascii
import json
import math
import os
from collections.abc import Mapping
from functools import partial
from posixpath import basename, dirname, normpath, splitext
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.data.records import Box
from ray_vlm.data.sources.detection import box_around, pick_image, refuse_columns
from ray_vlm.data.sources.fields import is_number, shown, text_fault, word
from ray_vlm.data.sources.folders import list_files, local_folder
from ray_vlm.data.sources.member_files import Member, MemberFiles
from ray_vlm.data.sources.tables import OpenedRows
from ray_vlm.data.sources.tar import ImageRoot, open_images
from ray_vlm.errors import DataError
from ray_vlm.storage import local_path, split_address

_MAX_BYTES = 64 * 2**20  # of a file, which may hold its image as text
_NO_OBJECTS = ("__ignore__", "_background_")
_NOT_AREAS = ("point", "points", "line", "linestrip")


def open_labelme(source: Source) -> OpenedRows:
    """Open a folder of JSON files, or one of them. Images lie where `imagePath` says, relative to the JSON file, or
    inside it. Raise `DataError`."""
    refuse_columns(source, "labelme")
    if len(source.paths) > 1:
        raise DataError(f"{source.name}: labelme is read from one folder. Give each an entry of data.mix.")
    address = source.paths[0]
    if address.lower().endswith(".json") and os.path.isfile(local_path(address)):
        folder, name = split_address(address)
        files = [file for file in list_files(folder, (".json",), (), source.follow_links) if file.name == name]
    else:
        folder = local_folder(address, "labelme")
        files = list_files(folder, (".json",), (), source.follow_links)
    if not files:
        raise DataError(f"{folder}: has no .json files. Give `path` the folder with labelme's files.")
    members = [Member("", os.path.join(folder, file.name), file.size, file.changed) for file in files]
    read = partial(
        _read_member, f"{folder.rstrip('/')}/", open_images(source.image_root or folder), source.follow_links
    )
    return OpenedRows(MemberFiles(address, members, read, max_bytes=_MAX_BYTES), folder)


def labelme_version(source: Source) -> list[Any]:
    """Return what identifies the present content of the data set. Raise `DataError`."""
    table = open_labelme(source).table
    assert isinstance(table, MemberFiles)
    return table.version


def _read_member(
    folder: str, root: ImageRoot, follow_links: bool, member: Member, data: bytes | None
) -> dict[str, Any]:
    """Return the cells of an image. `folder`: of the files, which their ids are relative to; `root`: of the images."""
    content = _parse(data or b"")
    shapes = content.get("shapes")
    if not isinstance(shapes, list):
        raise ValueError("the file has no list `shapes`; it is no file of labelme, move it out of the folder")
    name = member.annotation.removeprefix(folder)
    boxes: dict[tuple[str, object], Box] = {}  # shapes of one label and group are parts of one object
    for position, shape in enumerate(shapes):
        if not isinstance(shape, dict):
            raise ValueError(f"shapes[{position}] is {shown(shape)}, not an object; mend it")
        try:
            label, box = _read_shape(shape)
        except ValueError as error:
            raise ValueError(f"shapes[{position}]: {error}") from None
        group = shape.get("group_id")
        key = (label, f"shape {position}" if group is None else shown(group))
        boxes[key] = box_around([box[:2], box[2:], boxes[key][:2], boxes[key][2:]]) if key in boxes else box
    return {
        "id": splitext(name)[0],
        "image": _image(content, name, root, follow_links),
        "boxes": list(boxes.values()),
        "labels": [label for label, _ in boxes],
        "listed": (content.get("imageWidth"), content.get("imageHeight")),
    }


def _parse(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"the file is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the file is not JSON ({error}); mend it") from None
    if not isinstance(content, dict):
        raise ValueError("the file is no JSON object; it is no file of labelme, move it out of the folder")
    if reason := text_fault({key: value for key, value in content.items() if key != "imageData"}):
        raise ValueError(f"the file {reason}")
    return content


def _image(content: Mapping[str, Any], name: str, root: ImageRoot, follow_links: bool) -> tuple[str, ...] | bytes:
    """Return the names that the image may have, or its bytes if the file holds them and none of the names exists."""
    path, inside = content.get("imagePath"), content.get("imageData")
    names: tuple[str, ...] = ()
    if isinstance(path, str) and path.strip():
        plain, folder = path.strip().replace("\\", "/"), dirname(name)
        spelled = (normpath(f"{folder}/{plain}" if folder else plain), f"{folder}/{basename(plain)}".lstrip("/"))
        names = tuple(dict.fromkeys(n for n in spelled if basename(n)))
        _check_name(names, name, root, follow_links)
    if not isinstance(inside, str) or not inside:
        return names
    try:
        pick_image(root, names, follow_links, must_exist=True)
        return names
    except ValueError:
        pass
    try:
        return base64.b64decode(inside, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"imageData is not base64 ({error}), and imagePath {shown(path)} is not there") from None


def _check_name(names: tuple[str, ...], annotation: str, root: ImageRoot, follow_links: bool) -> None:
    """Raise `ValueError` if `imagePath` names an image, and another one has the file's own name, as after files were
    renamed."""
    stem = splitext(annotation)[0]
    if not names or splitext(basename(names[0]))[0] == basename(stem):
        return
    own = stem + splitext(names[0])[1]
    try:
        pick_image(root, (own,), follow_links, must_exist=True)
        named, _ = pick_image(root, names, follow_links, must_exist=True)
    except ValueError:
        return
    raise ValueError(
        f"imagePath names {named!r}, and {own!r} has the file's own name, so the image is not clear; mend imagePath"
    )


def _read_shape(shape: Mapping[str, Any]) -> tuple[str, Box]:
    """Return the label of a shape and the box around it."""
    label = word(shape.get("label"), "label")
    if label in _NO_OBJECTS:
        raise ValueError(f"label {label} marks what is no object; remove the shape")
    kind = shape.get("shape_type") or "polygon"  # early versions have no types
    if kind in _NOT_AREAS:
        raise ValueError(f"{label!r} is a {kind}, which has no box; draw a rectangle or a polygon")
    if not isinstance(kind, str) or kind not in ("rectangle", "polygon", "circle", "mask"):
        raise ValueError(f"{label!r} is a {shown(kind)}, which is not read; draw a rectangle or a polygon")
    points = _points(shape.get("points"), label)
    counts = {"rectangle": (2, 4), "circle": (2,), "mask": (2,)}.get(kind, range(3, len(points) + 1))
    if len(points) not in counts:
        raise ValueError(f"{label!r} is a {kind} of {len(points)} points; mend or remove it")
    if kind == "circle":
        (x, y), edge = points
        radius = math.hypot(edge[0] - x, edge[1] - y)
        return label, (x - radius, y - radius, x + radius, y + radius)
    x1, y1, x2, y2 = box_around(points)
    # The points of a mask are its first and its last pixel.
    return label, (x1, y1, x2 + 1, y2 + 1) if kind == "mask" else (x1, y1, x2, y2)


def _points(value: object, label: str) -> list[tuple[float, float]]:
    pairs = value if isinstance(value, list) else []
    points = [p for p in pairs if isinstance(p, list) and len(p) == 2 and all(is_number(v) for v in p)]
    if not points or len(points) < len(pairs):
        raise ValueError(f"the points of {label!r} are {shown(value)}, not a list of [x, y] in finite numbers; mend it")
    return [(float(x), float(y)) for x, y in points]
