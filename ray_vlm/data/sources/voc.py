"""Read Pascal VOC: an XML file for each image (host.robots.ox.ac.uk/pascal/VOC), as the VOC devkit, LabelImg, Roboflow,
CVAT and others write it."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from posixpath import basename, splitext
from typing import TYPE_CHECKING, Any

from ray_vlm.config.data import Source
from ray_vlm.data.sources.detection import pick_image, read_number, refuse_columns
from ray_vlm.data.sources.fields import word
from ray_vlm.data.sources.folders import IMAGES, FolderFile, list_files, local_folder, spellings
from ray_vlm.data.sources.member_files import Member, MemberFiles
from ray_vlm.data.sources.tables import OpenedRows
from ray_vlm.data.sources.tar import tar_of
from ray_vlm.data.sources.xml_files import parse_xml, text_of
from ray_vlm.errors import DataError

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_IMAGE_FOLDERS = ("jpegimages", "images", "imgs", "image", "img")
_DEVKIT = re.compile(r"The VOC\d{4} Database|PASCAL VOC", re.IGNORECASE)
_ROTATED = ("robndbox", "rotated_bndbox")


@dataclass(frozen=True)
class _Layout:
    """Where a data set has its files. `base`: the folder that names are relative to; `annotations`, `images`: folders
    below it, empty for itself; `split_file`: the list of the rows' names, empty where all annotations are rows."""

    base: str
    annotations: str
    images: str
    split_file: str


def open_voc(source: Source) -> OpenedRows:
    """Open a folder with `Annotations/` and `JPEGImages/`, or of XML files with their images beside them.

    `split` selects the names in `ImageSets/Main/<split>.txt`, or a folder of that name. Without one, `train` is taken
    if there is such a list or folder, and all annotations if there is none. Images without an annotation are no rows.
    Raise `DataError`.
    """
    refuse_columns(source, "Pascal VOC")
    if len(source.paths) > 1:
        raise DataError(f"{source.name}: Pascal VOC is read from one folder. Give each an entry of data.mix.")
    layout = _find_layout(local_folder(source.paths[0], "Pascal VOC"), source.split)
    folder = os.path.join(layout.base, layout.annotations)
    files = list_files(folder, (".xml",), (), source.follow_links)
    if layout.split_file:
        files = list(_select(files, layout.split_file))
    if not files:
        raise DataError(
            f"{folder}: has no .xml files. Give `path` the folder with Annotations/, or with the XML files."
        )
    images = "" if source.image_root else layout.images
    prefix = "" if source.image_root or layout.images else f"{layout.annotations}/" if layout.annotations else ""
    if tar_of(source.image_root):
        stems: dict[str, str] = {}
    else:
        top = local_folder(source.image_root, "Pascal VOC") if source.image_root else os.path.join(layout.base, images)
        stems = _by_stem(list_files(top, (), IMAGES, source.follow_links), images)
    members = [
        Member(stems.get(prefix + splitext(file.name)[0], "") or stems.get(basename(splitext(file.name)[0]), ""),
               os.path.join(folder, file.name), file.size, file.changed)
        for file in files
    ]  # fmt: skip
    top = "" if tar_of(source.image_root) else source.image_root or layout.base
    read = partial(_read_member, f"{folder.rstrip('/')}/", images, prefix, top, source.follow_links)
    return OpenedRows(MemberFiles(folder, members, read, settings=(images, prefix)), layout.base)


def voc_version(source: Source) -> list[Any]:
    """Return what identifies the present content of the data set. Raise `DataError`."""
    table = open_voc(source).table
    assert isinstance(table, MemberFiles)
    return table.version


def _find_layout(folder: str, split: str | None) -> _Layout:
    """Return where the files of a data set lie. Raise `DataError` if the split is not there, or it is several sets."""
    names = {name.lower(): name for name in sorted(os.listdir(folder), reverse=True)}
    annotations = names.get("annotations")
    above = os.path.dirname(folder)
    if os.path.basename(folder) == "Annotations" and os.path.isdir(os.path.join(above, "JPEGImages")):
        return _find_layout(above, split)
    wanted = spellings(split or "train")
    if annotations is None and not any(name.endswith(".xml") for name in names):
        if (part := next((names[name] for name in wanted if name in names), None)) is not None:
            return _find_layout(os.path.join(folder, part), None)  # Roboflow: a folder for each split
        inner = sorted(n for n in names.values() if os.path.isdir(os.path.join(folder, n, "Annotations")))
        if len(inner) == 1:
            return _find_layout(os.path.join(folder, inner[0]), split)
        if inner:
            raise DataError(f"{folder}: holds the data sets {', '.join(inner[:5])}. Give each an entry of data.mix.")
    images = next((names[name] for name in _IMAGE_FOLDERS if name in names), "")
    images = images if images and os.path.isdir(os.path.join(folder, images)) else ""
    lists = os.path.join(folder, names.get("imagesets", "ImageSets"), "Main")
    return _Layout(folder, annotations or "", images, _find_split(folder, lists, split))


def _find_split(folder: str, lists: str, split: str | None) -> str:
    """Return the file with the names of a split, empty if all annotations are rows. Raise `DataError`."""
    existing = sorted(os.listdir(lists)) if os.path.isdir(lists) else []
    texts = {splitext(name)[0].lower(): name for name in existing if name.lower().endswith(".txt")}
    names = spellings(split) if split else ("train", "default", "trainval") if texts else ()
    for name in names:
        if name in texts:
            return os.path.join(lists, texts[name])
    if split and os.path.basename(folder).lower() not in spellings(split):
        listed = ", ".join(sorted(texts)[:20]) or "no list"
        raise DataError(f"{folder}: no split {split!r} in ImageSets/Main, where there is {listed}. Mend `split`.")
    if texts and not split:
        raise DataError(f"{lists}: has no train.txt but {', '.join(sorted(texts)[:20])}. Set `split` of the source.")
    return ""


def _select(files: Iterable[FolderFile], split_file: str) -> Iterator[FolderFile]:
    """Yield the annotations that a split lists, in its order, also those that are not there."""
    existing = {splitext(file.name)[0]: file for file in files}
    try:
        with open(split_file, encoding="utf-8-sig", errors="surrogateescape") as opened:
            lines = opened.read().split("\n")
    except OSError as error:
        raise DataError(f"{split_file}: not readable ({error}). Mend its permissions.") from None
    for line in dict.fromkeys(line.strip() for line in lines):
        if line:
            name = line if line in existing else splitext(line)[0] if splitext(line)[0] in existing else ""
            name = name or re.sub(r"\s+-?[01]$", "", line)  # lists of one class have a flag behind the name
            yield existing.get(name) or FolderFile(f"{name}.xml")


def _by_stem(images: Iterable[FolderFile], prefix: str) -> dict[str, str]:
    """Return the images by their names without suffix, with `prefix`; of an ambiguous name an empty text."""
    stems: dict[str, str] = {}
    for image in images:
        stem = splitext(image.name)[0]
        stems[stem] = "" if stem in stems else f"{prefix}/{image.name}" if prefix else image.name
    return stems


def _read_member(
    folder: str, images: str, prefix: str, top: str, follow_links: bool, member: Member, data: bytes | None
) -> dict[str, Any]:
    """Return the cells of an image. `folder`: of the annotations, which their ids are relative to; `images`, `prefix`:
    where images lie under the folder of images, `top`, which is empty for a tar."""
    root = parse_xml(data or b"")
    if root.tag != "annotation":
        raise ValueError(f"the file begins with <{str(root.tag)[:80]}>, not with <annotation>; it is no Pascal VOC")
    name = member.annotation.removeprefix(folder)
    beside = f"{prefix}{os.path.dirname(name)}/".lstrip("/") if prefix or not images else ""
    written = text_of(root, "filename").replace("\\", "/")
    within = f"{images}/" if images else beside
    names = [f"{within}{written.lstrip('/')}", f"{within}{basename(written)}"] if basename(written) else []
    objects = [_read_object(element) for element in root.findall("object")]
    # Files that copy the devkit's header may count from 0.
    if _is_devkit(root) and all(min(box[:2]) >= 1 for _, box in objects):
        objects = [(label, (x1 - 1, y1 - 1, x2, y2)) for label, (x1, y1, x2, y2) in objects]
    return {
        "id": splitext(name)[0],
        "image": tuple(dict.fromkeys(_order_names(names, member.image, name, top, follow_links))),
        "boxes": [box for _, box in objects],
        "labels": [label for label, _ in objects],
        "listed": _listed(root),
    }


def _order_names(names: Sequence[str], own: str, annotation: str, top: str, follow_links: bool) -> list[str]:
    """Return the names that an image may have, the likeliest first. `names`: as `<filename>` says; `own`: the image
    with the annotation's own name, empty if there is none. Raise `ValueError` if two images may be meant."""
    if not own or not names:
        return [*names, *filter(None, [own])]
    if splitext(basename(names[0]))[0] == splitext(basename(annotation))[0]:
        return [own, *names]
    try:
        other = pick_image(top, names, follow_links, must_exist=True)[0] if top else ""
    except ValueError:  # it is not there
        other = ""
    if other:
        raise ValueError(
            f"<filename> names {other!r}, and {own!r} has the annotation's own name, so the image is not clear; mend "
            "<filename>, or remove it"
        )
    return [*names, own]


def _is_devkit(root: "Element") -> bool:
    """Return whether the VOC devkit has written the file, whose first pixel is 1."""
    return any(_DEVKIT.search(text_of(root, f"source/{name}")) for name in ("annotation", "database"))


def _listed(root: "Element") -> tuple[float, ...]:
    """Return width and height of the image as the file lists them, nothing if they are unknown."""
    sides = [text_of(root, f"size/{name}") for name in ("width", "height")]
    try:
        return tuple(float(side) for side in sides)
    except ValueError:
        return ()


def _read_object(element: "Element") -> tuple[str, tuple[float, float, float, float]]:
    """Return the class and the corners of an object as the file has them. Its parts are ignored."""
    label = word(text_of(element, "name"), "the <name> of an object")
    for name in _ROTATED:
        if element.find(name) is not None:
            raise ValueError(f"{label!r} has a <{name}>, and rotated boxes are not read; write a <bndbox>")
    if text_of(element, "rotated").lower() in ("1", "true"):
        raise ValueError(f"{label!r} is rotated, and rotated boxes are not read; write an upright <bndbox>")
    box = element.find("bndbox")
    if box is None:
        other = "a <polygon>, and" if element.find("polygon") is not None else "no <bndbox>;"
        raise ValueError(f"{label!r} has {other} only boxes are read; write a <bndbox>")
    x1, y1, x2, y2 = (
        read_number(text_of(box, name), f"<{name}> of {label!r}") for name in ("xmin", "ymin", "xmax", "ymax")
    )
    return label, (x1, y1, x2, y2)
