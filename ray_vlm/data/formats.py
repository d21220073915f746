"""Source row -> record: one function a format. A row that cannot be read becomes a `BadRow`, never an exception."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_vlm.config.schema import Source
from ray_vlm.data.records import BadRow, SftRecord
from ray_vlm.errors import DataError


def read_rows(source: Source) -> tuple[list[SftRecord | BadRow], list[str]]:
    """All rows of a source in file order, and the class names it declares, in its own order.

    Image sizes are not known yet (`sizes` is empty): the index reads them from the files' headers. Raises `DataError`
    where the file as a whole cannot be used.
    """
    rows, labels = FORMATS[source.format](source)
    return rows[: source.max_rows], labels


def read_coco(source: Source) -> tuple[list[SftRecord | BadRow], list[str]]:
    """COCO detection JSON (cocodataset.org/#format-data): one record an image, boxes `[x, y, width, height]`."""
    data = _read_json(Path(source.path))
    if not isinstance(data, dict) or not isinstance(data.get("images"), list) or "categories" not in data:
        raise DataError(f"{source.path}: not COCO; expected a JSON object with `images`, `annotations`, `categories`.")
    names, labels = _categories(data["categories"], source.path)
    boxes = defaultdict(list)
    for annotation in data.get("annotations") or ():
        boxes[annotation.get("image_id") if isinstance(annotation, dict) else None].append(annotation)
    root = Path(source.image_root or Path(source.path).parent).resolve()
    ids = [image.get("id") if isinstance(image, dict) else None for image in data["images"]]
    seen = Counter(i for i in ids if i is not None)
    rows = [_coco_row(i, image, boxes, names, root, seen) for i, image in enumerate(data["images"])]
    orphans = sorted(map(str, set(boxes) - set(ids)))
    if orphans:
        raise DataError(
            f"{source.path}: {len(orphans)} image_id values in `annotations` have no image ({', '.join(orphans[:5])})."
            " Remove those annotations or add their images."
        )
    return rows, labels


FORMATS: dict[str, Callable[[Source], tuple[list[SftRecord | BadRow], list[str]]]] = {"coco": read_coco}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Give `path` the location of the rows.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as UTF-8 JSON ({error}).") from None


def _categories(categories: Any, path: str) -> tuple[dict[Any, str], list[str]]:
    try:
        pairs = [(c["id"], str(c["name"])) for c in categories]
    except (TypeError, KeyError):
        raise DataError(f"{path}: each entry of `categories` needs `id` and `name`.") from None
    labels = [name for _, name in pairs]
    if len(set(labels)) < len(labels) or len(dict(pairs)) < len(pairs) or not pairs:
        raise DataError(f"{path}: `categories` is empty or has an id or a name twice.")
    return dict(pairs), labels


def _coco_row(row: int, image: Any, boxes: dict, names: dict, root: Path, seen: Counter) -> SftRecord | BadRow:
    if not isinstance(image, dict) or "id" not in image or not isinstance(image.get("file_name"), str):
        return BadRow(row, "", "an entry of `images` needs `id` and `file_name`")
    name = str(image["id"])
    if seen[image["id"]] > 1:
        return BadRow(row, name, f"id {name} is used by {seen[image['id']]} images; make it unique")
    path = (root / image["file_name"]).resolve()
    if not path.is_relative_to(root):
        return BadRow(row, name, f"image {image['file_name']} lies outside image_root {root}")
    truth: dict[str, list] = {"boxes": [], "labels": []}
    for annotation in boxes.get(image["id"], ()):
        box, category = annotation.get("bbox"), annotation.get("category_id")
        if category not in names:
            return BadRow(row, name, f"category_id {category!r} is not in `categories`")
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(v) for v in box):
            return BadRow(row, name, f"bbox {box!r} is not four finite numbers [x, y, width, height]")
        x, y, w, h = map(float, box)
        truth["boxes"].append((x, y, x + w, y + h))
        truth["labels"].append(names[category])
    return SftRecord(name, row, (str(path),), (), {key: tuple(value) for key, value in truth.items()})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
