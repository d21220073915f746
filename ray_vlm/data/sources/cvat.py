"""Read CVAT for images 1.1: one XML file (docs.cvat.ai/docs/manual/advanced/formats/format-cvat), streamed.

A million images are read in the memory of a few.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from posixpath import splitext
from typing import TYPE_CHECKING, Any

from ray_vlm.config.data import Source
from ray_vlm.data.records import BadRow, Box
from ray_vlm.data.sources.detection import box_around, read_number, refuse_columns
from ray_vlm.data.sources.fields import shown, text_fault, word
from ray_vlm.data.sources.files import describe_version
from ray_vlm.data.sources.folders import spellings
from ray_vlm.data.sources.pieces import PIECE_ROWS, NumberedRow, Piece, cut_entries, row_digest, unreadable_file
from ray_vlm.data.sources.tables import OpenedRows
from ray_vlm.data.sources.xml_files import NO_TYPES
from ray_vlm.errors import DataError
from ray_vlm.storage import is_remote, join, local_path, open_file, split_address

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_NOT_BOXES = ("polyline", "points", "cuboid", "skeleton")
_IGNORED = ("tag", "attribute")  # labels of the whole image


def open_cvat(source: Source) -> OpenedRows:
    """Open the XML file, or the folder with `annotations.xml`.

    `split` selects the images of a subset. Without one, those of a project's subset `train` are taken if it has one,
    and all images if not. Tags, which belong to the whole image, and attributes are not read. Raise `DataError`.
    """
    refuse_columns(source, "CVAT")
    address = _address(source)
    return OpenedRows(CvatFile(address, source.split), split_address(address)[0])


def cvat_version(source: Source) -> list[Any]:
    """Return what identifies the present content of the file."""
    return describe_version([_address(source)])


def _address(source: Source) -> str:
    address = source.paths[0]
    if len(source.paths) > 1:
        raise DataError(f"{source.name}: CVAT is read from one file. Give each an entry of data.mix.")
    folder = not is_remote(address) and os.path.isdir(local_path(address))
    return join(address, "annotations.xml") if folder else address


@dataclass
class _Meta:
    """What stands before the images: class names in order, and the subsets of a project, or that of a task."""

    labels: list[str] = field(default_factory=list)
    subsets: tuple[str, ...] = ()
    subset: str = ""


class CvatFile:
    """The images of a file. One process divides it; `entries` of its pieces are the rows."""

    columns: tuple[str, ...] | None = None

    def __init__(self, address: str, split: str | None):
        self.address, self.split = address, split

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[Piece]:
        """Yield the pieces of the file, each with the class names that the file lists. Raise `DataError`."""
        meta = _Meta()
        for piece in cut_entries(((entry, repr(entry).encode()) for entry in self._entries(meta)), rows):
            names = row_digest(tuple(meta.labels)).hexdigest()
            yield replace(piece, labels=tuple(meta.labels), fingerprint=f"{piece.fingerprint}-{names}")

    def read(self, piece: Piece) -> list[NumberedRow | BadRow]:
        """Return the rows of a piece."""
        return list(piece.entries)

    def _entries(self, meta: _Meta) -> Iterator[NumberedRow | BadRow]:
        """Yield the images of the split; fill `meta` before the first."""
        number, others = 0, dict[str, None]()
        for element in self._images(meta):
            subset = element.get("subset") or meta.subset
            if not _is_selected(subset, self.split, meta):
                others.setdefault(subset)
                continue
            yield _read_image(number, element, subset)
            number += 1
        if not number and others:
            listed = ", ".join(repr(name) for name in others) or "none"
            raise DataError(
                f"{self.address}: no image is in the subset {self.split or 'train'!r}; there is {listed}. Set "
                "`split` of the job's source."
            )

    def _images(self, meta: _Meta) -> Iterator["Element"]:
        """Yield the `<image>` elements one after another. Raise `DataError` if the file is another one."""
        from defusedxml import DefusedXmlException
        from defusedxml.ElementTree import ParseError, iterparse

        parents: list[Element] = []
        try:
            with open_file(self.address) as file:
                for event, element in iterparse(file, ("start", "end"), forbid_dtd=True):
                    if event == "start":
                        self._check_start(element, len(parents))
                        parents.append(element)
                        continue
                    parents.pop()
                    if len(parents) != 1:
                        continue
                    if element.tag == "meta":
                        _read_meta(element, meta)
                    elif element.tag == "image":
                        yield element
                    parents[0].clear()
        except DefusedXmlException:
            raise DataError(f"{self.address}: has {NO_TYPES}.") from None
        except (ParseError, LookupError) as error:
            raise DataError(f"{self.address}: not readable as XML ({error}). Export it again.") from None
        except (OSError, ImportError) as error:
            raise unreadable_file(self.address, error) from None
        except ValueError as error:
            raise DataError(f"{self.address}: not readable ({error}). Mend it, or export it again.") from None

    def _check_start(self, element: "Element", depth: int) -> None:
        if depth == 0 and element.tag != "annotations":
            voc = (
                " It is of Pascal VOC: give `path` its folder, and set format=voc."
                if element.tag == "annotation"
                else ""
            )
            raise DataError(
                f"{self.address}: begins with <{str(element.tag)[:80]}>, and CVAT's file with <annotations>. Export "
                f"`CVAT for images 1.1`.{voc}"
            )
        if depth == 1 and element.tag == "track":
            raise DataError(
                f"{self.address}: has tracks, as `CVAT for video 1.1`, which is not read. Export the task as `CVAT for "
                "images 1.1`, with its frames as images."
            )


def _read_meta(element: "Element", meta: _Meta) -> None:
    for kind in ("project", "task", "job"):
        for part in element.iter(kind):
            listed = [label for label in part.findall("labels/label") if not label.findtext("parent")]  # of a skeleton
            names = [word(label.findtext("name"), "the name of a label") for label in listed]
            meta.labels = meta.labels or list(dict.fromkeys(names))
    subsets = element.findtext("project/subsets") or ""
    meta.subsets = tuple(name.strip() for name in subsets.split("\n") if name.strip())
    meta.subset = (element.findtext("task/subset") or "").strip()


def _is_selected(subset: str, split: str | None, meta: _Meta) -> bool:
    if split is None:
        train = {name.lower() for name in meta.subsets} & set(spellings("train"))
        return not train or subset.lower() in train
    return subset.lower() in spellings(split)


def _read_image(number: int, element: "Element", subset: str) -> NumberedRow | BadRow:
    """Return the cells of an image, or why it cannot be used."""
    name = (element.get("name") or "").strip().replace("\\", "/")
    try:
        if reason := text_fault([name, subset]):
            raise ValueError(f"its name {reason}")
        objects = [_read_shape(shape) for shape in element if shape.tag not in _IGNORED]
    except ValueError as error:
        return BadRow(number, name, f"<image> {element.get('id', number)} {name[:200]!r}: {error}")
    folders = dict.fromkeys(("", "images/", *((f"images/{subset}/", f"{subset}/") if subset else ())))
    return number, {
        "id": splitext(name)[0],
        "image": tuple(f"{folder}{name}" for folder in folders) if name else (),
        "boxes": [box for _, box in objects],
        "labels": [label for label, _ in objects],
        "listed": _listed(element),
    }


def _listed(element: "Element") -> tuple[float, ...]:
    try:
        return tuple(float(element.get(side, "")) for side in ("width", "height"))
    except ValueError:
        return ()


def _read_shape(shape: "Element") -> tuple[str, Box]:
    """Return the label of a shape and the box around it."""
    label = word(shape.get("label"), f"the label of a {str(shape.tag)[:80]}")
    if shape.tag in _NOT_BOXES:
        raise ValueError(f"{label!r} is a {shape.tag}, which has no box; draw a rectangle or a polygon")
    if shape.tag not in ("box", "polygon", "ellipse", "mask"):
        raise ValueError(f"{label!r} is a {shown(shape.tag)}, which is not read; draw a rectangle or a polygon")

    def numbers(*names: str) -> list[float]:
        return [read_number(shape.get(name), f"{name} of {label!r}") for name in names]

    if shape.get("rotation") is not None and numbers("rotation") != [0.0]:
        raise ValueError(f"{label!r} is rotated by {shown(shape.get('rotation'))} degrees; draw it upright")
    if shape.tag == "box":
        x1, y1, x2, y2 = numbers("xtl", "ytl", "xbr", "ybr")
        return label, (x1, y1, x2, y2)
    if shape.tag == "ellipse":
        x, y, rx, ry = numbers("cx", "cy", "rx", "ry")
        return label, (x - rx, y - ry, x + rx, y + ry)
    if shape.tag == "mask":
        x, y, width, height = numbers("left", "top", "width", "height")
        return label, (x, y, x + width, y + height)
    pairs = [pair.split(",") for pair in (shape.get("points") or "").split(";") if pair.strip()]
    if len(pairs) < 3 or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"points of {label!r} are {shown(shape.get('points'))}, not three or more x,y; mend them")
    what = f"a point of {label!r}"
    return label, box_around([(read_number(x.strip(), what), read_number(y.strip(), what)) for x, y in pairs])
