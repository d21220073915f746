"""Read exports of Label Studio, JSON, JSON-MIN and CSV (labelstud.io/guide/export, labelstud.io/guide/task_format).

Regions are in percent of the image; their boxes become pixels of the size that the file lists.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from posixpath import basename, splitext
from typing import Any
from urllib.parse import unquote

from ray_vlm.config.data import Source
from ray_vlm.data.image_paths import local_root
from ray_vlm.data.records import BadRow, Box, SftRecord
from ray_vlm.data.sources.detection import box_around, box_context, pick_image
from ray_vlm.data.sources.fields import Row, column_setting, is_empty, is_number, nested, shown, word
from ray_vlm.data.sources.files import single_file
from ray_vlm.data.sources.folders import IMAGES
from ray_vlm.data.sources.pieces import PIECE_ROWS, NumberedRow, Piece
from ray_vlm.data.sources.tables import OpenedRows, TableFile, open_table
from ray_vlm.storage import is_remote, split_address

_LABELS = ("rectanglelabels", "polygonlabels", "ellipselabels", "labels")
_SHAPES = ("rectangle", "polygon", "ellipse", *_LABELS)
_NOT_BOXES = (
    *("brush", "brushlabels", "keypoint", "keypointlabels", "vector", "vectorlabels", "bitmask", "bitmasklabels"),
    *("videorectangle", "magicwand", "cube", "cubelabels"),
)
_UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")  # what Label Studio puts before the name of an uploaded file


def open_label_studio(source: Source) -> OpenedRows:
    """Open the file of an export. Raise `DataError`."""
    address = single_file(source)
    return OpenedRows(_Tasks(open_table(address)), split_address(address)[0])


class _Tasks:
    """The tasks of an export, in any file of rows; the keys of `data` are columns beside those of the task."""

    columns: tuple[str, ...] | None = None

    def __init__(self, table: TableFile):
        self.table, self.address = table, table.address

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[Piece]:
        """Yield the pieces of the file."""
        return self.table.pieces(rows)

    def read(self, piece: Piece) -> list[NumberedRow | BadRow]:
        """Return the rows of a piece."""
        return [row if isinstance(row, BadRow) else _flat(*row) for row in self.table.read(piece)]


def _flat(number: int, task: dict[str, Any]) -> NumberedRow | BadRow:
    """Return the cells of a task. Tables write lists as text, and every key in each object, empty where it is not
    meant."""
    try:
        cells = {name: _filled(value if _is_name(value) else nested(value, name)) for name, value in task.items()}
    except ValueError as error:
        return BadRow(number, "", str(error))
    data = cells.get("data")
    return (number, {**data, **cells}) if isinstance(data, dict) else (number, cells)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _is_image(value)


def _filled(value: Any) -> Any:
    """Return a value without the keys of objects that are null."""
    if isinstance(value, dict):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def label_studio_record(row: Row) -> SftRecord:
    """Read a task. Predictions are not read. Raise `ValueError` with the problem and its fix."""
    regions = _regions(row)
    objects, listed, in_shares = _objects(regions)
    shares = row.source.box_frame == "image" or not listed
    boxes = tuple(in_shares)
    if not shares:
        width, height = listed
        boxes = tuple((x1 * width, y1 * height, x2 * width, y2 * height) for x1, y1, x2, y2 in in_shares)
    context = box_context(row.source, boxes, listed, "relative_1" if shares else "pixels")
    name, image = pick_image(row.root, _spellings(_image_value(row)), row.source.follow_links, must_exist=True)
    if isinstance(image, str) and isinstance(row.root, str) and not is_remote(row.root):
        name = image.removeprefix(f"{local_root(row.root).rstrip('/')}/")  # without backslashes and %20
    truth = {"boxes": boxes, "labels": tuple(objects)}
    name = name if str(image).endswith(name) else unquote(name)  # the file has the plain name
    return SftRecord(splitext(name)[0], row.number, (image,), (), truth, context, row.group)


def _regions(row: Row) -> list[dict[str, Any]]:
    """Return the results of the only annotation of a task, each as the export `JSON` has it."""
    annotations = row.cells.get("annotations")
    if annotations is None:
        annotations = row.cells.get("completions")  # of early versions
    if annotations is None:
        return _regions_of_min(row)
    if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
        raise ValueError(f"annotations {shown(annotations)} is no list of annotations; export `JSON` or `JSON-MIN`")
    kept = [a for a in annotations if not a.get("was_cancelled") and not a.get("skipped")]
    if not kept:
        state = "skipped" if annotations else "not annotated"
        raise ValueError(f"the task is {state}; annotate it, or leave it out of the export")
    truths = [a for a in kept if a.get("ground_truth")]
    kept = truths if len(truths) == 1 else kept
    results = [_results(annotation.get("result")) for annotation in kept]
    if len(results) > 1:
        first, *others = [sorted(zip(*_objects(r)[::2], strict=True)) for r in results]
        if any(other != first for other in others):
            raise ValueError(
                f"the task has {len(results)} annotations that differ; keep one, or mark one as ground truth"
            )
    return results[0]


def _results(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(result, dict) for result in value):
        raise ValueError(f"result {shown(value)} is no list of regions; export `JSON` or `JSON-MIN`")
    return value


def _regions_of_min(row: Row) -> list[dict[str, Any]]:
    """Return the regions of a task of JSON-MIN, which lie in a column of the labelling tag's name."""
    regions: list[dict[str, Any]] = []
    for value in row.cells.values():
        if isinstance(value, list) and value and all(isinstance(v, dict) and "original_width" in v for v in value):
            kinds = [next((k for k in (*_LABELS, *_NOT_BOXES) if k in region), "") for region in value]
            regions += [
                {"type": kind, "value": region, **{k: region.get(k) for k in ("original_width", "original_height")}}
                for kind, region in zip(kinds, value, strict=True)
            ]
    if not regions and is_empty(row.cells.get("annotation_id")):
        raise ValueError("the row has neither annotations nor regions; export `JSON` or `JSON-MIN` of Label Studio")
    return regions


def _objects(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], tuple[float, ...], list[Box]]:
    """Return the labels, the (width, height) that the file lists (empty if it lists none), and the boxes as shares."""
    areas: dict[object, Box] = {}
    labels: dict[object, list[str]] = {}
    listed: tuple[float, ...] = ()
    for position, result in enumerate(results):
        kind, value = result.get("type"), result.get("value")
        if kind in _NOT_BOXES:
            raise ValueError(f"a region is a {kind}, which has no box; draw a rectangle or a polygon")
        if kind not in _SHAPES or not isinstance(value, dict):
            if isinstance(value, dict) and "x" in value and "width" in value and kind == "":
                raise ValueError(f"a region has no label, only {shown(list(value))}; give it one")
            continue  # choices, texts and relations are not about areas
        if result.get("item_index") or result.get("image_rotation"):
            what = "image_rotation" if result.get("image_rotation") else "item_index"
            raise ValueError(
                f"a region has {what}={shown(result[what])}; turn or split the image before it is labelled"
            )
        key = result.get("id") if isinstance(result.get("id"), str) else position
        areas[key] = _box(value)
        labels.setdefault(key, []).extend(_names(value))
        sides = (result.get("original_width"), result.get("original_height"))
        if all(is_number(side) and side > 0 for side in sides):  # type: ignore[operator]
            listed = (float(sides[0]), float(sides[1]))  # type: ignore[arg-type]
    for names in labels.values():
        if len(set(names)) != 1:
            raise ValueError(f"a region has {len(set(names))} labels ({shown(names)}); give it one")
    return [labels[key][0] for key in areas], listed, list(areas.values())


def _names(value: Mapping[str, Any]) -> list[str]:
    listed = [value[key] for key in _LABELS if not is_empty(value.get(key))]
    if not all(isinstance(names, list) for names in listed):
        raise ValueError(f"the labels of a region are {shown(listed)}, not a list of names; mend them")
    names = [name for names in listed for name in names]
    return [word(name, "the label of a region") for name in names]


def _box(value: Mapping[str, Any]) -> Box:
    """Return the box of a region as shares of the image."""
    if rotation := value.get("rotation"):
        raise ValueError(f"a region is rotated by {shown(rotation)} degrees; draw it upright")
    if "points" in value:
        points = value["points"] if isinstance(value["points"], list) else []
        pairs = [p for p in points if isinstance(p, list) and len(p) == 2 and all(is_number(v) for v in p)]
        if len(pairs) < 3 or len(pairs) < len(points):
            raise ValueError(f"points {shown(value['points'])} are not three or more [x, y] in percent; mend them")
        x1, y1, x2, y2 = box_around([(x, y) for x, y in pairs])
        return x1 / 100, y1 / 100, x2 / 100, y2 / 100
    keys = ("x", "y", "radiusX", "radiusY") if "radiusX" in value else ("x", "y", "width", "height")
    numbers = [value.get(key) for key in keys]
    if not all(is_number(number) for number in numbers):
        raise ValueError(f"{', '.join(keys)} of a region are {shown(numbers)}, not finite numbers; mend them")
    x, y, width, height = (float(number) / 100 for number in numbers)  # type: ignore[arg-type]
    if width <= 0 or height <= 0:
        raise ValueError(f"a region has {keys[2]} {width * 100:g} and {keys[3]} {height * 100:g}; draw it again")
    return (x - width, y - height, x + width, y + height) if "radiusX" in value else (x, y, x + width, y + height)


def _image_value(row: Row) -> str:
    """Return the name of the image: the column that the job names, or the only one that looks like an image."""
    if "image" in row.source.columns:
        value = row.cells.get("image")
        if not isinstance(value, str) or is_empty(value):
            raise ValueError(f"image {shown(value)} is no name; fill it, or name another key of data in columns.image")
        return value
    data = row.cells.get("data")
    keys = data if isinstance(data, dict) else row.cells
    names = {key: value for key, value in keys.items() if isinstance(value, str) and _is_image(value)}
    targets = {name for name in _targets(row) if name in names}
    chosen = next(iter(names)) if len(names) == 1 else next(iter(targets)) if len(targets) == 1 else "image"
    if chosen not in names and isinstance(value := keys.get("image"), str) and not is_empty(value):
        return value
    if chosen not in names:
        existing = ", ".join(names) or "none"
        raise ValueError(
            f"which key of data is the image is not clear (like images: {existing}); name it, as in "
            f"{column_setting('image')}"
        )
    return names[chosen]


def _targets(row: Row) -> Iterator[str]:
    annotations = row.cells.get("annotations")
    for annotation in annotations if isinstance(annotations, list) else ():
        results = annotation.get("result") if isinstance(annotation, dict) else None
        for result in results if isinstance(results, list) else ():
            if isinstance(result, dict) and isinstance(result.get("to_name"), str):
                yield result["to_name"]


def _is_image(value: str) -> bool:
    if len(value) > 4096:
        return value.startswith("data:image/")
    plain = unquote(value).partition("?")[0] if "local-files" not in value else unquote(value)
    return splitext(plain)[1].lower() in IMAGES or value.startswith(("data:image/", "/data/"))


def _spellings(value: str) -> tuple[str, ...]:
    """Return the names under the folder of images that the address of an image in Label Studio may mean: it, and its
    last parts, the longest first."""
    if value.startswith("data:"):
        return (value,)
    plain = value.strip()
    if "local-files" in plain:
        plain = plain.partition("?d=")[2] or plain
    elif "://" in plain:
        scheme, _, rest = plain.partition("://")
        _, _, key = rest.partition("/")
        plain = key.partition("?")[0] if scheme in ("http", "https") else key
    names: list[str] = []
    for spelled in dict.fromkeys((plain, unquote(plain))):
        parts = [part for part in spelled.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        names += ["/".join(parts[first:]) for first in range(len(parts))]
    last = basename(names[-1]) if names else ""
    if last:
        names += [f"images/{last}"]
        names += [_UPLOAD.sub("", last, count=1)] if _UPLOAD.match(last) else []
    return tuple(dict.fromkeys(names))
