"""COCO detection JSON (cocodataset.org/#format-data) -> one record an image."""

from collections import Counter, defaultdict
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.data.cells import control_character, is_number, shown, word
from ray_vlm.data.files import local_root, parent_folder, resolve_image
from ray_vlm.data.records import BadRow, SftRecord
from ray_vlm.data.tables import read_json
from ray_vlm.errors import DataError
from ray_vlm.runs.store import is_remote


def read_coco(source: Source) -> tuple[list[SftRecord | BadRow], list[str]]:
    """All images in file order and the names of `categories`, in file order; boxes are `[x, y, width, height]`.

    Crowd regions (`iscrowd: 1`) are left out: they are not one object. Raises `DataError` where the file as a whole
    cannot be used.
    """
    data = read_json(source.path)
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in ("images", "annotations")):
        raise DataError(f"{source.path}: not COCO; expected a JSON object with lists `images` and `annotations`.")
    source = _with_columns(source, data["images"])
    names, labels = _categories(data.get("categories"), source.path)
    seen = Counter(str(_id_of(image)) for image in data["images"] if _id_of(image) is not None)
    boxes = _boxes_by_image(data["annotations"], set(seen), source.path)
    rows = [_row(i, image, boxes, names, source, seen) for i, image in enumerate(data["images"])]
    return rows[: source.max_rows], labels


def image_root(source: Source) -> str:
    """The folder of a source's images, by default that of its rows. Raises `DataError`."""
    root = source.image_root or parent_folder(source.path)
    try:
        if not is_remote(root):
            local_root(root)
    except (OSError, ValueError) as error:
        raise DataError(f"image_root {root!r} cannot be used ({error}). Give a folder.") from None
    return root


def _with_columns(source: Source, images: list) -> Source:
    """The source with its image_root filled in, after a look at `columns`."""
    for ours, theirs in source.columns.items():
        if ours not in ("image", "file_name", "group"):
            raise DataError(f"columns: {ours!r} cannot be renamed in COCO files. Use image (their file_name) or group.")
        if not any(isinstance(image, dict) and theirs in image for image in images):
            found = sorted({name for image in images if isinstance(image, dict) for name in image})
            raise DataError(f"{source.path}: no image has {theirs!r}, named by columns.{ours}; there is {found}.")
    return source.model_copy(update={"image_root": image_root(source)})


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
    for name in names.values():
        if found := control_character(name):
            raise DataError(f"{path}: category {shown(name)} holds the control character {found}. Remove it.")
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


def _row(row: int, image: Any, boxes: dict, names: dict, source: Source, seen: Counter) -> SftRecord | BadRow:
    file_name = source.columns.get("image", source.columns.get("file_name", "file_name"))
    if _id_of(image) is None or not isinstance(image.get(file_name), str):
        return BadRow(row, "", f"an entry of `images` needs an `id` (a number or text) and a `{file_name}`")
    name = str(image["id"])
    if found := control_character(name):
        return BadRow(row, "", f"id {shown(name)} holds the control character {found}; remove it")
    if seen[name] > 1:
        return BadRow(row, name, f"id {name} is used by {seen[name]} images; make it unique")
    try:
        path = resolve_image(str(source.image_root), image[file_name])
        group = word(image.get(source.columns["group"]), "group") if "group" in source.columns else ""
        truth = _truth(boxes.get(name, ()), names)
    except ValueError as error:
        return BadRow(row, name, str(error))
    return SftRecord(name, row, (path,), (), truth, _context(source, truth), group)


def _context(source: Source, truth: dict) -> dict[str, str]:
    return {"box_units": source.box_units} if source.box_units != "pixels" and truth["boxes"] else {}


def _truth(annotations: Any, names: dict[str, str]) -> dict[str, tuple]:
    """Corners and class names. Raises `ValueError`."""
    corners, labels = [], []
    for annotation in annotations:
        box, category = annotation.get("bbox"), _id_of(annotation, "category_id")
        if str(category) not in names:
            raise ValueError(
                f"category_id {shown(annotation.get('category_id'))} is not in `categories`; mend it or add that one"
            )
        if not isinstance(box, list) or len(box) != 4 or not all(is_number(v) for v in box):
            raise ValueError(f"bbox {shown(box)} is not four finite numbers [x, y, width, height]; mend it")
        x, y, w, h = map(float, box)
        corners.append((x, y, x + w, y + h))
        labels.append(names[str(category)])
    return {"boxes": tuple(corners), "labels": tuple(labels)}
