"""Check one row against its images, and settle what its box numbers mean. No pixels are decoded.

Image sizes are read from the files' headers, boxes become pixels of the upright image, and a row that cannot be meant
as it stands becomes a `BadRow` with the reason and the fix.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray_vlm.data.images import FETCH_AGAIN, read_orientation, read_size
from ray_vlm.data.records import BadRow, Image, Record, SftRecord
from ray_vlm.data.suspicions import describe_sizes, sizes_differ, strip_marks, unit_problem
from ray_vlm.tasks.boxes import box_problem

KnownSizes = Mapping[str, tuple[int, int]]  # path of an image -> (width, height)
NONE_KNOWN: KnownSizes = {}
ReadSize = Callable[[Image], tuple[int, int]]


def measure_row(
    row: Record | BadRow,
    max_image_pixels: int,
    on_bad_box: str = "raise",
    known: KnownSizes = NONE_KNOWN,
    read: ReadSize | None = None,
) -> Record | BadRow:
    """Return the row with image sizes and with boxes in pixels, or a `BadRow`.

    `max_image_pixels`, `on_bad_box`: the job's settings. `known`: sizes of images that could be read when the run
    began. `read`: returns the size of an image, in place of `read_size`, such as that of a `SizeCache`.
    """
    if isinstance(row, BadRow):
        return row
    sizes, gone = [], False
    for image in row.images:
        try:
            sizes.append(read_size(image, max_image_pixels) if read is None else read(image))
        except (ValueError, OSError) as error:
            if isinstance(image, str) and image in known:
                sizes.append(known[image])  # training replaces the row
                gone = True
                continue
            name = "" if isinstance(image, bytes) else f" ({image})"
            return BadRow(row.row, row.id, f"{error}{name}")
    return settle_boxes(replace(row, sizes=tuple(sizes)), on_bad_box, gone)


def settle_boxes(record: Record, on_bad_box: str = "raise", gone: bool = False) -> Record | BadRow:
    """Return the record with boxes in original pixels, or a `BadRow` if they cannot be meant as they stand.

    `on_bad_box`: the job's setting. `gone`: the image cannot be read any more, and training replaces the row.
    """
    if not isinstance(record, SftRecord):
        return record
    listed = record.context.get("listed")
    if listed and (record.context["frame"] == "listed" or sizes_differ(listed, record.sizes[0])):
        turned = _in_listed_frame(record, gone)
        if isinstance(turned, BadRow):
            return turned
        record = turned
    elif "box_units" not in record.context and (reason := unit_problem(record)):
        return BadRow(record.row, record.id, reason)
    record = _to_pixels(record)
    if on_bad_box != "raise" and "labels" in record.truth:
        record = _without_bad_boxes(record, clip=on_bad_box == "clip")
    context = strip_marks(record.context)
    return replace(record, context=context) if len(context) < len(record.context) else record


def _without_bad_boxes(record: SftRecord, clip: bool) -> SftRecord:
    """Return the record with boxes inside its image; boxes that leave it are clipped or dropped."""
    width, height = record.sizes[0]
    remaining = []
    for box, label in zip(record.truth["boxes"], record.truth["labels"], strict=True):
        bad = box_problem(box, record.sizes[0]) is not None
        if bad and clip:
            x1, y1, x2, y2 = box
            box = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
            bad = box_problem(box, record.sizes[0]) is not None
        if not bad:
            remaining.append((box, label))
    boxes, labels = tuple(box for box, _ in remaining), tuple(label for _, label in remaining)
    return replace(record, truth={**record.truth, "boxes": boxes, "labels": labels})


def _in_listed_frame(record: SftRecord, gone: bool) -> SftRecord | BadRow:
    """Return the record with boxes scaled from the size that its file lists to its upright image."""
    listed, size = record.context["listed"], record.sizes[0]
    if record.context["frame"] != "listed":
        return BadRow(record.row, record.id, describe_sizes(listed, size))
    if gone:
        return record
    try:
        turn = read_orientation(record.images[0])
    except (OSError, ValueError) as error:  # the file has gone since its size was read; unturned boxes would be wrong
        return BadRow(record.row, record.id, f"image cannot be read ({error}); {FETCH_AGAIN}")
    if turn >= 5 and not sizes_differ(listed, size) and sizes_differ(listed[::-1], size):
        turn = 1  # this image was turned before its boxes were drawn
    stored = size[::-1] if turn >= 5 else size
    stretch = (stored[0] / listed[0]) / (stored[1] / listed[1])
    if abs(stretch - 1) > 0.02 and sizes_differ(listed, stored):
        return BadRow(
            record.row,
            record.id,
            f"the file lists {listed[0]}x{listed[1]} px, and the image has {size[0]}x{size[1]}, which is another "
            "shape; set box_frame=image, or mend its width and height",
        )
    boxes = tuple(_turned(box, listed, size, turn) for box in record.truth["boxes"])
    return replace(record, truth={**record.truth, "boxes": boxes})


def _turned(
    box: Sequence[float], listed: tuple[int, int], size: tuple[int, int], turn: int
) -> tuple[float, float, float, float]:
    """Return a box in an image of the size `listed` as it lies in the upright image of `size`. `turn`: the EXIF
    orientation."""
    width, height = listed
    x1, y1, x2, y2 = box
    # First the mirroring along each stored axis, then the exchange of axes (5 to 8).
    if turn in (2, 3, 7, 8):
        x1, x2 = width - x2, width - x1
    if turn in (3, 4, 6, 7):
        y1, y2 = height - y2, height - y1
    if turn >= 5:
        x1, y1, x2, y2, width, height = y1, x1, y2, x2, height, width
    scale_x, scale_y = size[0] / width, size[1] / height
    return x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y


def _to_pixels(record: SftRecord) -> SftRecord:
    """Return the record with boxes and points in original pixels, if its source gives shares of the image."""
    units = record.context.get("box_units")
    if units is None or not record.sizes:
        return record
    per_unit = 1.0 if units == "relative_1" else 1000.0
    image_of = record.context.get("image_of", ())

    def scale(region: Sequence[float] | None, image: int = 0) -> tuple[float, ...] | None:
        size = record.sizes[image] if image < len(record.sizes) else record.sizes[0]
        return None if region is None else tuple(v / per_unit * size[axis % 2] for axis, v in enumerate(region))

    def scaled(values: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(values)
        if "boxes" in out:
            numbers = image_of or (0,) * len(out["boxes"])
            out["boxes"] = tuple(scale(box, i) for box, i in zip(out["boxes"], numbers, strict=True))
        return out | {key: scale(out[key]) for key in ("box", "point") if out.get(key) is not None}

    context = {k: v for k, v in scaled(record.context).items() if k != "box_units"}
    return replace(record, truth=scaled(record.truth), context=context)
