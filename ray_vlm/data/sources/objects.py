"""Read detection rows that hold their boxes in a column `objects`: ms-swift's, and those of `datasets` on the hub.

Every function raises `ValueError` with the problem and its fix.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ray_vlm.data.records import Box, Image, SftRecord
from ray_vlm.data.sources import fields
from ray_vlm.data.sources.conversations import read_objects
from ray_vlm.data.sources.detection import box_context
from ray_vlm.data.sources.fields import Row, is_number, shown

_CATEGORIES = ("category", "categories", "label", "labels", "category_name", "category_id", "class", "classes")
_BOXES = ("bbox", "bboxes", "boxes")
_SLACK_PX = 1.0


def _single_image(row: Row, *names: str) -> tuple[Image, ...]:
    pictures = fields.images(row, *names)
    if len(pictures) != 1:
        raise ValueError(f"the row has {len(pictures)} images; a detection row has one. Split or mend it")
    return pictures


def objects_record(row: Row) -> SftRecord:
    """Read detection from ms-swift's `objects`; `messages` are not read."""
    pictures = _single_image(row, "images", "image")
    labels, boxes, _, units = read_objects(row, 1)
    if len(labels) != len(boxes):
        raise ValueError(f"objects has {len(labels)} ref for {len(boxes)} bbox; give each box its name")
    for corners in boxes:
        fields.box(corners, "objects.bbox")
    return SftRecord(row.id, row.number, pictures, (), {"boxes": boxes, "labels": labels}, units, row.group)


def hf_objects_record(row: Row) -> SftRecord:
    """Read `image` and `objects` as data sets of the hub have them (huggingface.co/docs/datasets, object detection).

    `objects` is `{"bbox": [[x, y, width, height], ...], "category": [...]}` or a list of `{"bbox", "category"}`.
    Categories are names; the readers have replaced the numbers of a `ClassLabel`. Crowds (`iscrowd: 1`) are left out
    unless `crowds` is `objects`, as in COCO. The metadata of a folder has the image as `file_name`. `width` and
    `height` of the row are the size that the file lists.
    """
    pictures = _single_image(row, "images", "image", "file_name")
    entries = _entries(fields.nested(row.cells.get("objects"), "objects"))
    objects = [entry for entry in entries if row.source.crowds == "objects" or not _is_crowd(entry.get("iscrowd"))]
    labels = tuple(_category(entry) for entry in objects)
    sides = [fields.numbers(_value(entry, _BOXES), 4, "objects.bbox (x, y, width, height)") for entry in objects]
    listed = (row.cells.get("width"), row.cells.get("height"))
    if row.source.box_units == "pixels":
        _check_layout(sides, listed)
    boxes = tuple((x, y, x + width, y + height) for x, y, width, height in sides)
    context = box_context(row.source, boxes, listed)
    if len(objects) < len(entries):
        context["crowds"] = len(entries) - len(objects)
    truth = {"boxes": boxes, "labels": labels}
    return SftRecord(row.id, row.number, pictures, (), truth, context, row.group)


def declared_categories(feature: object) -> list[str]:
    """Return the names of the `ClassLabel` of the categories, in its order. `feature`: of the column `objects`, as
    `datasets` describes it; empty if it has none."""
    if isinstance(feature, list) and len(feature) == 1:
        return declared_categories(feature[0])
    if not isinstance(feature, dict):
        return []
    if feature.get("_type") == "ClassLabel":
        names = feature.get("names")
        words = (name.strip() for name in names if isinstance(name, str)) if isinstance(names, list) else ()
        return [name for name in dict.fromkeys(words) if name]
    if "feature" in feature:
        return declared_categories(feature["feature"])
    return next((names for key in _CATEGORIES if (names := declared_categories(feature.get(key)))), [])


def _entries(objects: object) -> list[Mapping[str, Any]]:
    """Return one mapping for each object of the row."""
    if isinstance(objects, list) and all(isinstance(entry, dict) for entry in objects):
        return objects
    if not isinstance(objects, dict):
        raise ValueError(
            f'objects {shown(objects)} is not {{"bbox": [...], "category": [...]}}; fill it, with empty lists for an '
            f"image without objects, or name its column, as in {fields.column_setting('objects')}"
        )
    boxes = _value(objects, _BOXES)
    if not isinstance(boxes, list):
        raise ValueError(f"objects has {shown(list(objects))}, and no list `bbox`; add [[x, y, width, height], ...]")
    lists = {name: value for name, value in objects.items() if isinstance(value, list)}
    lengths = Counter({name: len(value) for name, value in lists.items() if name in (*_BOXES, *_CATEGORIES, "iscrowd")})
    if len(set(lengths.values())) > 1:
        raise ValueError(f"objects has lists of different lengths ({dict(lengths)}); give each box one category")
    return [{name: value[i] for name, value in lists.items() if len(value) == len(boxes)} for i in range(len(boxes))]


def _value(entry: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((entry[name] for name in names if name in entry and entry[name] is not None), None)


def _is_crowd(value: object) -> bool:
    return value.strip().lower() in ("1", "1.0", "true") if isinstance(value, str) else value == 1


def _category(entry: Mapping[str, Any]) -> str:
    value = _value(entry, _CATEGORIES)
    if value is None:
        raise ValueError(f"an object has no category, only {shown(list(entry))}; add `category` with its name")
    if isinstance(value, int | float):
        raise ValueError(
            f"category {value} is a number, and the file has no name for it; give the column the type ClassLabel with "
            "`cast_column` of `datasets` before it is saved, or write names"
        )
    return fields.word(value, "category")


def _check_layout(boxes: Sequence[Box | tuple[float, ...]], listed: tuple[Any, Any]) -> None:
    """Raise `ValueError` if the boxes of a row seem to be corners: as width and height they leave the image."""
    if not boxes or not all(is_number(side) for side in listed):
        return
    width, height = listed
    leaves = any(x + w > width + _SLACK_PX or y + h > height + _SLACK_PX for x, y, w, h in boxes)
    corners = all(x1 < x2 <= width + _SLACK_PX and y1 < y2 <= height + _SLACK_PX for x1, y1, x2, y2 in boxes)
    if leaves and corners:
        raise ValueError(
            f"objects.bbox {shown(list(boxes[0]))} leaves the image of {width:g}x{height:g} px as x, y, width, height, "
            "and fits it as corners x1, y1, x2, y2; write x, y, width, height, or use format=objects, which has corners"
        )
