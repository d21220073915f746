"""Read COCO detection JSON (cocodataset.org/#format-data): one record for each image."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.data.records import BadRow, SftRecord
from ray_vlm.data.sources.detection import box_context
from ray_vlm.data.sources.fields import control_character, is_empty, is_number, shown, word
from ray_vlm.data.sources.files import single_file
from ray_vlm.data.sources.pieces import read_json
from ray_vlm.data.sources.tar import ImageRoot, find_image
from ray_vlm.data.suspicions import crowd_problem
from ray_vlm.errors import DataError

# Keys of files of other tools, and the tool's name.
_TOOLS: tuple[tuple[set[str], str], ...] = (
    ({"annotations", "data"}, "Label Studio: set format=label_studio"),
    ({"shapes", "imagePath"}, "labelme, one for each image: give `path` their folder, and set format=labelme"),
    ({"_via_img_metadata"}, "VIA: export COCO there"),
    ({"samples", "name"}, "FiftyOne: export COCO there"),
    ({"objects", "img_width"}, "Label Studio or Supervisely: export COCO there"),
    ({"objects", "image"}, "rows of `datasets` with objects: set format=hf_objects, or format=objects for ms-swift"),
    ({"conversations"}, "LLaVA: set format=llava"),
    ({"messages"}, "chats: set format=messages"),
)
_NO_CLASSES = ("_background_", "__ignore__")  # labelme's names for the background


def read_coco(source: Source, root: ImageRoot) -> tuple[list[SftRecord | BadRow], list[str]]:
    """Return all images and the class names of `categories`, both in file order. `root`: where the images lie.

    Boxes are `[x, y, width, height]`; an annotation without one gets the box around its `segmentation`. Crowd regions
    (`iscrowd: 1`) are left out, since they are not one object, unless `crowds` says otherwise. Annotations of images
    that are not listed become one bad row behind the images. Raise `DataError` if the whole file cannot be used.
    """
    path = single_file(source)
    data = read_json(path)
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in ("images", "annotations")):
        raise DataError(
            f"{source.name}: not COCO; expected a JSON object with lists `images` and `annotations`.{_name_tool(data)}"
        )
    _check_columns(source, data["images"])
    used = {str(_id_of(annotation, "category_id")) for annotation in data["annotations"]}
    names, labels = _categories(data.get("categories"), used, path)
    seen = Counter(str(_id_of(image)) for image in data["images"] if _id_of(image) is not None)
    boxes, stray = _boxes_by_image(data["annotations"], set(seen), len(data["images"]))
    _check_crowds(source, boxes, names)
    rows = [_row(i, image, boxes, names, source, root, seen) for i, image in enumerate(data["images"])]
    return [*rows[: source.max_rows], *stray], labels


def _name_tool(data: object) -> str:
    """Name the tool that seems to have written the file, and its fix; empty if unknown."""
    first = data[0] if isinstance(data, list) and data else data
    if not isinstance(first, dict):
        return ""
    tool = next((tool for keys, tool in _TOOLS if keys <= first.keys()), None)
    return f" It looks like a file of {tool}." if tool else ""


def _check_columns(source: Source, images: list) -> None:
    """Raise `DataError` for `columns` that cannot be renamed or do not exist."""
    for field, column in source.columns.items():
        if field not in ("image", "file_name", "group"):
            raise DataError(
                f"columns: {field!r} cannot be renamed in COCO files. Use image (their file_name) or group."
            )
        if not any(isinstance(image, dict) and column in image for image in images):
            existing = sorted({name for image in images if isinstance(image, dict) for name in image})
            raise DataError(f"{source.name}: no image has {column!r}, named by columns.{field}; there is {existing}.")


def _id_of(value: object, key: str = "id") -> int | str | None:
    """Return the id under `key`, or None if there is no usable one. 1.0 is 1: tables with gaps write it so."""
    identifier = value.get(key) if isinstance(value, dict) else None
    if isinstance(identifier, float) and identifier.is_integer():
        return int(identifier)
    usable = isinstance(identifier, int | str) and not isinstance(identifier, bool) and identifier != ""
    return identifier if usable else None


def _categories(categories: object, used: set[str], path: str) -> tuple[dict[str, str], list[str]]:
    """Return the names by id (as text), and the class names in file order. `used`: ids that annotations have.

    Groups are not classes: a category that is a supercategory of others, has none itself, and is used by no annotation,
    as Roboflow writes the project's name. Nor are labelme's two names for the background. Two ids with one name are one
    class.
    """
    listed = categories if isinstance(categories, list) else []
    pairs = [(_id_of(c), c["name"]) for c in listed if isinstance(c, dict) and isinstance(c.get("name"), str)]
    names = {str(i): name for i, name in pairs if i is not None and name}
    if not names or len(pairs) < len(listed):
        raise DataError(f"{path}: `categories` must list objects, each with an `id` and a `name`.")
    if len(names) < len(pairs):
        raise DataError(f"{path}: `categories` has an id twice, or a name that is empty. Make ids unique, fill names.")
    for name in names.values():
        if character := control_character(name):
            raise DataError(f"{path}: category {shown(name)} holds the control character {character}. Remove it.")
    parents = {c["supercategory"] for c in listed if isinstance(c.get("supercategory"), str)}
    classes = {
        str(_id_of(c)): c["name"]
        for c in listed
        if str(_id_of(c)) in used or not (c["name"] in _NO_CLASSES or _is_group(c, parents))
    }
    return names, list(dict.fromkeys((classes or names).values()))


def _is_group(category: dict, parents: set[str]) -> bool:
    return category["name"] in parents and category.get("supercategory") in (None, "", "none")


def _boxes_by_image(annotations: list, images: set[str], num_images: int) -> tuple[dict[str, list[dict]], list[BadRow]]:
    """Return annotations by the id of their image, and those of unlisted images as one bad row."""
    boxes, strays = defaultdict(list), list[str]()
    for position, annotation in enumerate(annotations):
        image = _id_of(annotation, "image_id")
        if image is None or str(image) not in images:
            image_id = annotation.get("image_id") if isinstance(annotation, dict) else annotation
            strays.append(f"annotation {position} has image_id {shown(image_id)}, which no image has")
        else:
            boxes[str(image)].append(annotation)
    more = f", and so have {len(strays) - 1} others" if len(strays) > 1 else ""
    return boxes, [BadRow(num_images, "", f"{strays[0]}{more}; remove it or add the image")] if strays else []


def _check_crowds(source: Source, boxes: dict[str, list[dict]], names: dict[str, str]) -> None:
    """Raise `DataError` if most annotations of a class are crowds and the job does not say what they are."""
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for annotation in (annotation for image_annotations in boxes.values() for annotation in image_annotations):
        name = names.get(str(_id_of(annotation, "category_id")))
        if name is not None:
            counts[not _is_crowd(annotation)][name] += 1
    if source.crowds is None and (problem := crowd_problem(*counts)):
        raise DataError(f"{source.name}: {problem}.")


def _is_crowd(annotation: dict) -> bool:
    value = annotation.get("iscrowd")
    return value.strip().lower() in ("1", "1.0", "true") if isinstance(value, str) else value == 1


def _row(
    row: int, image: object, boxes: dict, names: dict, source: Source, root: ImageRoot, seen: Counter
) -> SftRecord | BadRow:
    file_name = source.columns.get("image", source.columns.get("file_name", "file_name"))
    if not isinstance(image, dict) or _id_of(image) is None or not isinstance(image.get(file_name), str):
        return BadRow(row, "", f"an entry of `images` needs an `id` (a number or text) and a `{file_name}`")
    name = str(_id_of(image))
    if character := control_character(name):
        return BadRow(row, "", f"id {shown(name)} holds the control character {character}; remove it")
    if seen[name] > 1:
        return BadRow(row, name, f"id {name} is used by {seen[name]} images; make it unique")
    try:
        path = find_image(root, image[file_name], source.follow_links)
        group = word(image.get(source.columns["group"]), "group") if "group" in source.columns else ""
        annotations = boxes.get(name, [])
        objects = [a for a in annotations if source.crowds == "objects" or not _is_crowd(a)]
        truth = _truth(objects, names)
    except ValueError as error:
        return BadRow(row, name, str(error))
    context = box_context(source, truth["boxes"], (image.get("width"), image.get("height")))
    if len(objects) < len(annotations):
        context["crowds"] = len(annotations) - len(objects)
    return SftRecord(name, row, (path,), (), truth, context, group)


def _truth(annotations: Iterable[Mapping[str, Any]], names: dict[str, str]) -> dict[str, tuple]:
    """Return corners and class names. Raise `ValueError`."""
    corners, labels = [], []
    for annotation in annotations:
        box, category = _box_of(annotation), _id_of(annotation, "category_id")
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


def _box_of(annotation: Mapping[str, Any]) -> Any:
    """Return the value of `bbox`, or else the box around `segmentation`: polygons, or a mask as run lengths."""
    box, mask = annotation.get("bbox"), annotation.get("segmentation")
    if not is_empty(box) or is_empty(mask):
        return box
    if isinstance(mask, dict):
        return _box_of_mask(mask)
    if not isinstance(mask, list):
        raise ValueError("there is no bbox, and segmentation is neither polygons nor run lengths; add a bbox")
    points = [polygon for polygon in mask if isinstance(polygon, list) and len(polygon) >= 4 and len(polygon) % 2 == 0]
    if len(points) < len(mask) or not all(is_number(v) for polygon in points for v in polygon):
        raise ValueError("there is no bbox, and segmentation has a polygon that is not x, y, x, y, ...; add a bbox")
    xs, ys = ([float(v) for polygon in points for v in polygon[axis::2]] for axis in (0, 1))
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _box_of_mask(mask: dict) -> list[float]:
    """Return the box around a mask of run lengths, `{"size": [height, width], "counts": [...] or text}`."""
    from pycocotools import mask as masks

    size: Any = mask.get("size")
    counts: Any = mask.get("counts")
    try:
        if not all(isinstance(side, int) and 0 < side < 2**20 for side in (size[0], size[1])):
            raise ValueError(f"size {shown(size)}")  # pycocotools divides by it
        if isinstance(counts, list):
            if sum(counts) != size[0] * size[1] or min(counts) < 0:
                raise ValueError("the counts do not add up to its size")
            run_lengths = masks.frPyObjects(mask, size[0], size[1])
        else:
            run_lengths = {"size": size, "counts": counts.encode("ascii")}
        x, y, width, height = (float(v) for v in masks.toBbox(run_lengths))
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError, KeyError) as error:
        raise ValueError(f"there is no bbox, and segmentation cannot be read ({error}); add a bbox") from None
    return [x, y, width, height]
