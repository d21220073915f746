"""Source row -> record: one function a format. A row that cannot be read becomes a `BadRow`, never an exception."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_vlm.config.schema import Source
from ray_vlm.data.records import BadRow, SftRecord
from ray_vlm.errors import DataError

_FARTHEST_PX = 1e9  # no image is this large; NaN and infinity fail the comparison too


def read_rows(source: Source) -> tuple[list[SftRecord | BadRow], list[str]]:
    """All rows of a source in file order, and the class names it declares, in its own order.

    Image sizes are not known yet (`sizes` is empty): the index reads them from the files' headers. Raises `DataError`
    where the file as a whole cannot be used.
    """
    rows, labels = FORMATS[source.format](source)
    return rows[: source.max_rows], labels


def read_coco(source: Source) -> tuple[list[SftRecord | BadRow], list[str]]:
    """COCO detection JSON (cocodataset.org/#format-data): one record an image, boxes `[x, y, width, height]`.

    Crowd regions (`iscrowd: 1`) are left out: they are not one object.
    """
    data = _read_json(Path(source.path))
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in ("images", "annotations")):
        raise DataError(f"{source.path}: not COCO; expected a JSON object with lists `images` and `annotations`.")
    names, labels = _categories(data.get("categories"), source.path)
    try:
        root = Path(source.image_root or Path(source.path).parent).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"image_root {source.image_root!r} cannot be used ({error}). Give a folder.") from None
    seen = Counter(str(_id_of(image)) for image in data["images"] if _id_of(image) is not None)
    boxes = _boxes_by_image(data["annotations"], set(seen), source.path)
    return [_coco_row(i, image, boxes, names, root, seen) for i, image in enumerate(data["images"])], labels


FORMATS: dict[str, Callable[[Source], tuple[list[SftRecord | BadRow], list[str]]]] = {"coco": read_coco}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Give `path` the location of the rows.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as UTF-8 JSON ({error}).") from None


def _id_of(value: Any, key: str = "id") -> int | str | None:
    """The id under `key`, or None where there is none that can be used."""
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, int | str) and not isinstance(found, bool) and found != "" else None


def _categories(categories: Any, path: str) -> tuple[dict[str, str], list[str]]:
    """Names by id (as text), and the names in file order."""
    listed = categories if isinstance(categories, list) else []
    pairs = [(_id_of(c), c["name"]) for c in listed if isinstance(c, dict) and isinstance(c.get("name"), str)]
    names = {str(i): name for i, name in pairs if i is not None and name}
    if not names or len(pairs) < len(listed):
        raise DataError(f"{path}: `categories` must list objects, each with an `id` and a `name`.")
    if len(names) < len(pairs) or len(set(names.values())) < len(names):
        raise DataError(f"{path}: `categories` has an id or a name twice, or empty. Make them unique.")
    return names, list(names.values())


def _boxes_by_image(annotations: list, images: set[str], path: str) -> dict[str, list[dict]]:
    boxes, problems = defaultdict(list), []
    for position, annotation in enumerate(annotations):
        image = _id_of(annotation, "image_id")
        if str(image) not in images:
            problems.append(f"{path}: annotation {position} has image_id {image!r}, which no image has")
        elif annotation.get("iscrowd") != 1:
            boxes[str(image)].append(annotation)
    if problems:
        more = f" ({len(problems) - 5} more)" if len(problems) > 5 else ""
        raise DataError([*problems[:5], f"{path}: remove those annotations or add their images.{more}"])
    return boxes


def _coco_row(row: int, image: Any, boxes: dict, names: dict, root: Path, seen: Counter) -> SftRecord | BadRow:
    if _id_of(image) is None or not isinstance(image.get("file_name"), str):
        return BadRow(row, "", "an entry of `images` needs an `id` (a number or text) and a `file_name`")
    name = str(image["id"])
    if seen[name] > 1:
        return BadRow(row, name, f"id {name} is used by {seen[name]} images; make it unique")
    try:
        path = (root / image["file_name"]).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        return BadRow(row, name, f"file_name {image['file_name'][:80]!r} is not a path ({error})")
    if not path.is_relative_to(root):
        return BadRow(row, name, f"image {image['file_name']} lies outside image_root {root}")
    truth: dict[str, list] = {"boxes": [], "labels": []}
    for annotation in boxes.get(name, ()):
        box, category = annotation.get("bbox"), _id_of(annotation, "category_id")
        if str(category) not in names:
            return BadRow(row, name, f"category_id {annotation.get('category_id')!r} is not in `categories`")
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(v) for v in box):
            return BadRow(row, name, f"bbox {str(box)[:80]} is not four finite numbers [x, y, width, height]")
        x, y, w, h = map(float, box)
        truth["boxes"].append((x, y, x + w, y + h))
        truth["labels"].append(names[str(category)])
    return SftRecord(name, row, (str(path),), (), {key: tuple(value) for key, value in truth.items()})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _FARTHEST_PX
