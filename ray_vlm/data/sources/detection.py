"""Make a detection record of cells that all readers of annotation tools fill alike.

Cells: `id`; `image`, the bytes of the image or its possible names under the folder of images, of which the first file
that exists is taken; `boxes` as corners x1, y1, x2, y2, and `labels`; optionally `listed`, the (width, height) that the
file gives the image, and `box_units` where the tool writes shares of the image.
"""

import os
from collections.abc import Sequence
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.data.records import Image, SftRecord
from ray_vlm.data.sources.fields import Row, is_number, shown
from ray_vlm.data.sources.tar import ImageRoot, TarImages, find_image
from ray_vlm.errors import DataError
from ray_vlm.storage import is_remote, open_file

_SHOWN = 4  # names in a message


def detection_record(row: Row) -> SftRecord:
    """Return the record. Raise `ValueError` if no file of the image's names exists."""
    cells = row.cells
    truth = {"boxes": tuple(cells["boxes"]), "labels": tuple(cells["labels"])}
    context = box_context(row.source, truth["boxes"], cells.get("listed", ()), cells.get("box_units"))
    names = cells["image"]
    image: Image = names if isinstance(names, bytes) else pick_image(row.root, names, row.source.follow_links)[1]
    return SftRecord(row.id, row.number, (image,), (), truth, context, row.group)


def box_context(
    source: Source, boxes: Sequence[Any], listed: Sequence[Any], units: str | None = None
) -> dict[str, Any]:
    """Return what the index needs for a row with boxes: their units, and the image size (width, height) that the file
    lists. `units`: those of the tool, which go before the job's."""
    if not boxes:
        return {}
    units = units or source.box_units
    if units != "pixels":
        return {"box_units": units}
    sides = [side for side in listed if is_number(side)]
    if source.box_frame == "image" or len(sides) < 2 or min(sides) < 1:
        return {}
    return {"listed": tuple(int(s) if float(s).is_integer() else s for s in sides), "frame": source.box_frame}


def pick_image(
    root: ImageRoot, names: Sequence[str], follow_links: bool = False, must_exist: bool = False
) -> tuple[str, Image]:
    """Return the first name that is a file, with its image. Raise `ValueError` with the names that were tried.

    Without `must_exist` nobody asks whether a single name is one; its size is read later.
    """
    names = list(dict.fromkeys(name for name in names if name))
    if not names:
        raise ValueError("image is not named; name it in the annotation")
    if len(names) == 1 and not must_exist:
        return names[0], find_image(root, names[0], follow_links)
    reasons: list[str] = []
    for name in names:
        try:
            image = find_image(root, name, follow_links)
        except ValueError as error:
            reasons.append(str(error))
            continue
        if not isinstance(image, str) or _is_file(image):
            return name, image
    folder = root.address if isinstance(root, TarImages) else root
    if len(reasons) == len(names) and not isinstance(root, TarImages):
        raise ValueError(reasons[0])
    others = ", ".join(repr(name[:120]) for name in names[1:_SHOWN])
    tried = f" ({others}{' and more' if len(names) > _SHOWN else ''} were tried too)" if others else ""
    raise ValueError(
        f"image {names[0][:200]!r} is not in {folder}{tried}; set image_root to the folder of the images, or mend the "
        "name"
    )


def _is_file(image: str) -> bool:
    if not is_remote(image):
        return os.path.isfile(image)
    try:
        open_file(image).close()
    except (OSError, ValueError):
        return False
    return True


def refuse_columns(source: Source, tool: str) -> None:
    """Raise `DataError` if the job names columns, which files of this tool do not have."""
    if source.columns:
        raise DataError(f"{source.name}: {tool} has no columns that could be renamed. Remove columns from the source.")


def read_number(text: object, what: str) -> float:
    """Return the finite number in a text. Raise `ValueError`."""
    try:
        value = float(text) if isinstance(text, str) and "_" not in text else None
    except ValueError:
        value = None
    if value is None or not is_number(value):
        raise ValueError(f"{what} is {'missing' if text is None else shown(text)}, not a finite number; mend it")
    return value


def box_around(points: Sequence[tuple[float, float]]) -> tuple[float, float, float, float]:
    """Return the box around points (x, y), of which there is at least one."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return min(xs), min(ys), max(xs), max(ys)
