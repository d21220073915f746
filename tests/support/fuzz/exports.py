"""Mutations for `fuzz` of COCO files as other tools write them. `inputs` defines an attempt.

Each tool's file is valid before it is broken: a test reads all of them without a bad row.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.fuzz.inputs import LABELS, Attempt, count_rows, make_job, read_all, write_base
from tests.support.fuzz.mutations import break_bytes, break_tree, pick

_WIDTH, _HEIGHT, _IMAGES = 100, 80, 4
_BOX = [10, 20, 30, 40]  # x, y, width, height in pixels
_POLYGON = [10, 20, 40, 20, 40, 60, 10, 60]
# The mask of that box, column by column, as run lengths: zeros first.
_RUNS = [10 * _HEIGHT + 20, *([40, 40] * 29), 40, 20 + 60 * _HEIGHT]


def write_cvat() -> dict[str, Any]:
    """CVAT: polygons, and run-length masks, which it marks as crowds."""
    images = [
        _image(i) | {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0} for i in range(1, _IMAGES + 1)
    ]
    mask = {"counts": _RUNS, "size": [_HEIGHT, _WIDTH]}
    boxes = [
        _box(1, 1, segmentation=[_POLYGON], area=1200.0, iscrowd=0, attributes={"occluded": False}),
        _box(2, 1, segmentation=[_POLYGON], area=1200.0, iscrowd=0, attributes={"occluded": True, "rotation": 12.5}),
        _box(3, 2, segmentation=mask, area=1200.0, iscrowd=1, attributes={"occluded": False}),
        _box(4, 2, segmentation=[], area=1200.0, iscrowd=0, attributes={"track_id": 3, "keyframe": True}),
    ]
    return {
        "licenses": [{"name": "", "id": 0, "url": ""}],
        "info": {"contributor": "", "date_created": "", "description": "", "url": "", "version": "", "year": ""},
        "categories": _categories("", 1),
        "images": images,
        "annotations": boxes,
    }


def write_label_studio() -> dict[str, Any]:
    """Label Studio: names with backslashes or from a URL, beside keypoints and rotated boxes."""
    names = ["images\\a.jpg", "images/a.jpg", "images\\b c.jpg", "images/b%20c.jpg"]
    images = [{"width": _WIDTH, "height": _HEIGHT, "id": i, "file_name": name} for i, name in enumerate(names)]
    boxes = [
        _box(i, i % 2, segmentation=[], ignore=0, iscrowd=0, area=1200.0, bbox=[float(v) for v in _BOX])
        for i in range(_IMAGES)
    ]
    info = {"year": 2026, "version": "1.0", "description": "", "contributor": "Label Studio", "url": ""}
    return {
        "images": images,
        "categories": [{"id": 0, "name": "dog"}, {"id": 1, "name": "cat"}],
        "annotations": boxes,
        "info": info,
    }


def write_roboflow() -> dict[str, Any]:
    """Roboflow: the project's name as category 0, licences as numbers, the name before the upload in `extra`."""
    images = [
        _image(i) | {"license": 1, "date_captured": "2026-01-01T00:00:00+00:00", "extra": {"name": f"{i}.png"}}
        for i in range(_IMAGES)
    ]
    boxes = [
        _box(i, 1 + i % 2, area=1200, segmentation=[], iscrowd=0, bbox=[10.5, 20, 30, 39.999]) for i in range(_IMAGES)
    ]
    categories = [{"id": 0, "name": "animals", "supercategory": "none"}, *_categories("animals", 1)]
    return {"info": {"year": "2026", "version": "1"}, "images": images, "categories": categories, "annotations": boxes}


def write_labelme() -> dict[str, Any]:
    """labelme: polygons with groups, a background class, and boxes that some converters leave out."""
    images = [_image(i) | {"license": 0, "url": None, "date_captured": "2026-01-01 00:00:00"} for i in range(_IMAGES)]
    boxes = [_box(i, 1 + i % 2, segmentation=[_POLYGON], area=1200.0, iscrowd=0, group_id=None) for i in range(_IMAGES)]
    boxes[2]["bbox"] = []
    del boxes[3]["bbox"]
    background = {"supercategory": None, "id": 0, "name": "_background_"}
    return {
        "info": {"description": None, "url": None, "version": None, "year": 2026},
        "licenses": [{"url": None, "id": 0, "name": None}],
        "images": images,
        "type": "instances",
        "annotations": boxes,
        "categories": [background, *_categories(None, 1)],  # type: ignore[list-item]
    }


def write_via() -> dict[str, Any]:
    """VIA: image ids as text in annotations, and one flat polygon instead of a list of polygons."""
    images = [
        _image(i) | {"license": 1, "flickr_url": "", "coco_url": "", "date_captured": ""} for i in range(1, _IMAGES + 1)
    ]
    boxes = [
        _box(i, 1 + i % 2, image_id=str(i), category_id=str(1 + i % 2), segmentation=_POLYGON, area=1200, iscrowd=0)
        for i in range(1, _IMAGES + 1)
    ]
    info = {"year": 2026, "version": "1", "description": "VIA project exported to COCO format", "contributor": ""}
    return {"info": info, "images": images, "annotations": boxes, "licenses": [], "categories": _categories("type", 1)}


def write_fiftyone() -> dict[str, Any]:
    """FiftyOne: no supercategories, scores and attributes of its own, categories sorted by name."""
    images = [_image(i) | {"license": None, "coco_url": None} for i in range(1, _IMAGES + 1)]
    boxes = [
        _box(i, i % 2, area=1200.0, iscrowd=0, score=0.87, ignore=0, tags=["a"], supercategory="pet")
        for i in range(1, _IMAGES + 1)
    ]
    boxes[3] |= {"segmentation": {"counts": _RUNS, "size": [_HEIGHT, _WIDTH]}, "iscrowd": 0.0}
    return {"info": {}, "licenses": [], "categories": _categories(None, 0), "images": images, "annotations": boxes}


TOOLS: dict[str, Callable[[], dict[str, Any]]] = {
    "cvat": write_cvat,
    "fiftyone": write_fiftyone,
    "label_studio": write_label_studio,
    "labelme": write_labelme,
    "roboflow": write_roboflow,
    "via": write_via,
}


def _image(number: int) -> dict[str, Any]:
    return {"id": number, "width": _WIDTH, "height": _HEIGHT, "file_name": "a.jpg"}


def _box(image: int, category: int, **more: Any) -> dict[str, Any]:
    return {"id": image, "image_id": image, "category_id": category, "bbox": list(_BOX)} | more


def _categories(parent: str | None, first: int) -> list[dict[str, Any]]:
    return [{"id": first + i, "name": name, "supercategory": parent} for i, name in enumerate(("dog", "cat"))]


def write_images(folder: Path) -> None:
    """Write the images that the files name, below the folder; `a.jpg` exists already."""
    (folder / "images").mkdir(exist_ok=True)
    for name in ("a.jpg", "b c.jpg"):
        (folder / "images" / name).write_bytes((folder / "a.jpg").read_bytes())


def of_exports(folder: Path) -> Attempt:
    """Return an attempt on every tool's file, broken as a value or as bytes, read by `data check` and by the index both
    ways."""
    model = write_base(folder)
    write_images(folder)

    def attempt(rng: np.random.Generator) -> int:
        whole = TOOLS[pick(rng, sorted(TOOLS))]()
        by_bytes = rng.random() < 0.2
        rows = whole if by_bytes else break_tree(whole, rng)
        path = folder / "rows.json"
        path.write_text(json.dumps(rows))
        if by_bytes:
            path.write_bytes(break_bytes(path.read_bytes(), rng))
        source: dict[str, Any] = {"path": str(path), "format": "coco"}
        for setting, values in _SETTINGS.items():
            if rng.random() < 0.2:
                source[setting] = pick(rng, values)
        labels = LABELS["detection"] if rng.random() < 0.5 else None
        return read_all(make_job(model, "coco", source, labels), count_rows(rows, path, by_bytes))

    return attempt


_SETTINGS: dict[str, list[Any]] = {
    "crowds": ["objects", "skip"],
    "box_frame": ["image", "listed"],
    "box_units": ["relative_1", "relative_1000"],
    "follow_links": [True],
}
