"""Tell from the names and the first files of a folder which format it is of."""

import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from ray_vlm.config.data import FormatName
from ray_vlm.config.row_files import row_suffix
from ray_vlm.data.sources.image_folder import METADATA, SPLITS, SUFFIXES, is_hidden
from ray_vlm.data.sources.pieces import skim_json
from ray_vlm.data.sources.yolo_config import NAME_FILES
from ray_vlm.errors import DataError
from ray_vlm.storage import Store, is_remote, join, local_path, open_file, read_bytes

_MOST_FILES, _MOST_FOLDERS, _DEEPEST = 200, 500, 4  # that are looked at: files of one suffix in a folder; levels
_SOME = 3  # files of a kind that are opened
_START = 2**20  # bytes of a file that are read to tell what it is
_NOT_CLASSES = re.compile(
    r"(images?|imgs?|labels?|annotations?|masks?|jpegimages|imagesets|segmentation\w*|data)", re.I
)
_STATE = ("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json")  # of `datasets`
_OTHER_TOOLS = (({"_via_img_metadata"}, "VIA"), ({"samples", "name"}, "FiftyOne"), ({"objects", "size"}, "Supervisely"))
_YOLO_LINE = re.compile(r"\d+(\s+-?\d*\.?\d+(e-?\d+)?){4,}", re.I)


@dataclass
class Listing:
    """Some of the files of a folder and of the folders in it, by their paths in it."""

    address: str
    files: list[str] = field(default_factory=list)

    def ending(self, *suffixes: str) -> list[str]:
        """Return the files with a suffix, sorted."""
        return sorted(name for name in self.files if name.lower().endswith(suffixes))

    def below(self, folder: str, *suffixes: str) -> list[str]:
        """Return the files with a suffix that lie in a folder of a name, at any level."""
        return [name for name in self.ending(*suffixes) if folder in name.lower().split("/")[:-1]]


@dataclass(frozen=True)
class Sign:
    """What speaks for a format. `fault`: why the data set cannot be of it as it stands, empty if it can."""

    format: FormatName
    reason: str
    fault: str = ""


def list_folder(address: str) -> Listing:
    """Return some of the files of a folder. Raise `OSError`."""
    if is_remote(address):
        names = [name for name in Store(address).files() if not any(map(is_hidden, name.split("/")))]
        return Listing(address, sorted(names))
    listing, waiting = Listing(address), deque([""])
    for _ in range(_MOST_FOLDERS):
        if not waiting:
            break
        folder = waiting.popleft()
        with os.scandir(join(local_path(address), folder) if folder else local_path(address)) as entries:
            counts = Counter[str]()
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                suffix = os.path.splitext(entry.name)[1]
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    waiting += [name] if name.count("/") < _DEEPEST - 1 else []
                elif counts[suffix] < _MOST_FILES:
                    counts[suffix] += 1
                    listing.files.append(name)
    return listing


def read_yaml(address: str) -> Any:
    """Return the value in a YAML file. Raise `DataError`."""
    import yaml

    try:
        return yaml.safe_load(read_bytes(address))
    except (OSError, ValueError, ImportError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{address}: not readable as YAML ({error}). Mend it.") from None


def yaml_sign(address: str, name: str) -> Sign | None:
    """Return what a YAML file says; None if it is of something else."""
    data = read_yaml(address)
    if not isinstance(data, dict) or {"names", "train", "nc", "val"}.isdisjoint(data):
        return None
    reason = f"{name} lists `names` and images, as YOLO's does"
    lacking = [key for key in ("names", "train") if key not in data]
    return Sign("yolo", reason, f"{name} has no `{lacking[0]}`" if lacking else "")


def xml_sign(address: str, name: str) -> Sign:
    """Return what the root of an XML file says. Raise `DataError` for one of something else."""
    from xml.etree.ElementTree import ParseError

    from defusedxml.common import DefusedXmlException
    from defusedxml.ElementTree import iterparse

    tags: list[str] = []
    reason = ""
    try:
        with open_file(address) as file:
            start = BytesIO(file.read(_START))
        for _, element in iterparse(start, ("start",)):
            tags.append(str(element.tag))
            if len(tags) > 1000:
                break
    except (ParseError, DefusedXmlException, ValueError, LookupError) as error:
        reason = f" ({error})"
    except OSError as error:
        raise DataError(f"{address}: not readable ({error}). Give a file that this machine can read.") from None
    root = tags[0] if tags else None
    if root == "annotation":
        fault = "" if {"object", "size", "filename"} & {*tags} else f"{name} has neither an object nor a size{reason}"
        return Sign("voc", f"the root of {name} is `annotation`", fault)
    if root == "annotations":
        fault = "" if {"image", "track", "meta"} & {*tags} else f"{name} has no image{reason}"
        return Sign("cvat", f"the root of {name} is `annotations`", fault)
    what = f"its root is `{root}`" if root else f"no XML{reason}"
    raise DataError(
        f"{address}: {what}, and XML is read of Pascal VOC (format=voc), whose root is `annotation`, and of CVAT "
        "(format=cvat), whose root is `annotations`. Give another file."
    )


def json_sign(address: str, name: str) -> Sign | None:
    """Return what the keys of a JSON object say; None for rows and for something else. Raise `DataError` if it is no
    JSON, or a file of a tool that is not read."""
    seen: dict[str, Any] = {}
    for key, value in skim_json(address, 100):
        seen[key] = value
        sign = _sign_of_keys(seen, name)
        is_rows = key == "" or (key == "data" and isinstance(value, list))
        if is_rows or (sign is not None and not sign.fault):
            break
    for keys, tool in _OTHER_TOOLS:
        if keys <= seen.keys():
            raise DataError(f"{address}: it looks like a file of {tool}, which is not read. Export COCO there.")
    return _sign_of_keys(seen, name)


def _sign_of_keys(seen: dict[str, Any], name: str) -> Sign | None:
    if "shapes" in seen or "imagePath" in seen:
        lacking = [key for key in ("shapes", "imagePath") if key not in seen]
        fault = f"{name} has no `{lacking[0]}`" if lacking else ""
        return Sign("labelme", f"{name} has `shapes` and `imagePath`", fault)
    lists = [key for key in ("images", "annotations", "categories") if isinstance(seen.get(key), list)]
    if len(lists) < 2:
        return None
    reason = f"{name} has `images` and `annotations`"
    if "images" not in lists or "annotations" not in lists:
        return Sign("coco", reason, f"{name} has no `{'annotations' if 'images' in lists else 'images'}`")
    entries = [entry for entry in seen["annotations"] if isinstance(entry, dict)]
    drawn = [entry for entry in entries if "image_id" in entry and ("bbox" in entry or "segmentation" in entry)]
    if entries and not drawn:
        return Sign("coco", reason, f"no annotation of {name} has an `image_id` and a `bbox`")
    if not entries and not isinstance(seen.get("categories"), list):
        return Sign("coco", reason, f"{name} has no `categories`")
    return Sign("coco", reason)


def folder_signs(listing: Listing) -> list[Sign]:
    """Return all that speaks for a format in a folder, of the formats that are folders. Raise `DataError` for a file
    that cannot be read."""
    return [*_yolo_signs(listing), *_xml_signs(listing), *_json_signs(listing), *_image_signs(listing)]


def _yolo_signs(listing: Listing) -> Iterator[Sign]:
    names = [name for name in listing.ending(".yaml", ".yml") if "/" not in name]
    signs = [sign for name in names if (sign := yaml_sign(join(listing.address, name), name)) is not None]
    labels, images = listing.below("labels", ".txt"), listing.below("images", *SUFFIXES)
    fault = next((f for name in labels[:_SOME] if (f := _label_fault(join(listing.address, name), name))), "")
    if signs:
        first = next((sign for sign in signs if not sign.fault), signs[0])
        yield first if first.fault or not fault else Sign("yolo", first.reason, fault)
    elif labels or (images and listing.below("labels", *SUFFIXES, ".json", ".xml")):
        fault = fault or ("" if images else "no folder `images` with images")
        yield Sign("yolo", "it has folders `images` and `labels`", fault if labels else "`labels` has no .txt files")
    elif lists := [
        name for name in listing.files if name in NAME_FILES or (name.endswith(".data") and "/" not in name)
    ]:
        stems = {os.path.splitext(name)[0] for name in listing.ending(*SUFFIXES)}
        texts = [name for name in listing.ending(".txt") if name[: -len(".txt")] in stems]
        if texts:
            fault = next((f for name in texts[:_SOME] if (f := _label_fault(join(listing.address, name), name))), "")
            yield Sign("yolo", f"it has {lists[0]} and text files beside the images, as darknet's", fault)


def _label_fault(address: str, name: str) -> str:
    """Return why a text file holds no labels of YOLO's, empty if it may."""
    try:
        with open_file(address) as file:
            lines = file.read(_START).decode("utf-8-sig").splitlines()[:20]
    except (OSError, ValueError) as error:
        return f"{name} cannot be read ({error})"
    wrong = next((line for line in lines if line.strip() and not _YOLO_LINE.fullmatch(line.strip())), None)
    return f"{name} has a line {wrong[:40]!r}, which is no class with four or more numbers" if wrong else ""


def _xml_signs(listing: Listing) -> Iterator[Sign]:
    names = listing.ending(".xml")
    yield from _distinct(xml_sign(join(listing.address, name), name) for name in names[:_SOME])


def _distinct(signs: Iterator[Sign]) -> list[Sign]:
    """Return the first sign of each format, one without a fault if there is one."""
    chosen: dict[str, Sign] = {}
    for sign in signs:
        if sign.format not in chosen or (chosen[sign.format].fault and not sign.fault):
            chosen[sign.format] = sign
    return list(chosen.values())


def _json_signs(listing: Listing) -> Iterator[Sign]:
    names = [name for name in listing.ending(".json") if name.rpartition("/")[2] not in _STATE]
    opened = (json_sign(join(listing.address, name), name) for name in names[:_SOME])
    yield from _distinct(sign for sign in opened if sign is not None)


def _image_signs(listing: Listing) -> Iterator[Sign]:
    """Yield `image_folder` for two or more folders of images."""
    images = [name.split("/") for name in listing.ending(*SUFFIXES)]
    top = {parts[0] for parts in images if len(parts) > 1}
    splits = {name for names in SPLITS.values() for name in names}
    deep = [parts for parts in images if len(parts) > 2 and parts[0].lower() in splits]
    is_split = bool(deep) and all(name.lower() in splits for name in top)
    classes = {parts[1] for parts in deep} if is_split else top
    if not classes:
        return
    others = [name for name in listing.files if not name.lower().endswith(SUFFIXES) and "/" in name]
    reserved = sorted(name for name in classes if _NOT_CLASSES.fullmatch(name))
    fault = ""
    if tables := [name for name in listing.files if name.rpartition("/")[2].lower() in METADATA]:
        fault = f"{tables[0]} lists what the images are; give it as `path`, with format=image_csv for classes"
    elif reserved:
        fault = f"{reserved[0]} is no name of a class"
    elif others:
        fault = f"{others[0]} is no image"
    elif len(classes) < 2:
        fault = f"the only folder of images is {next(iter(classes))}"
    yield Sign("image_folder", f"it has {len(classes)} folders with images alone", fault)


def is_saved(listing: Listing) -> bool:
    """Return whether a folder is one that `save_to_disk` of `datasets` wrote."""
    return not {"state.json", "dataset_dict.json"}.isdisjoint(listing.files)


def has_tables(listing: Listing) -> bool:
    """Return whether a folder has files of rows. Raise `DataError` for JSON that cannot be read."""
    names = [name for name in listing.ending(".json") if "/" not in name and name not in _STATE]
    if any(row_suffix(name) not in ("", ".json") for name in listing.files) or listing.ending(".tar"):
        return True
    return any(_lists_rows(join(listing.address, name)) for name in names[:_SOME])


def _lists_rows(address: str) -> bool:
    """Return whether a JSON file is a list of objects, or has one under `data`."""
    listed = next((value for key, value in skim_json(address, 1) if key in ("", "data")), None)
    return isinstance(listed, list) and bool(listed) and isinstance(listed[0], dict)


def metadata_of(names: Sequence[str]) -> list[str]:
    """Return the tables that list what the images of a folder are."""
    return [name for name in names if name.rpartition("/")[2].lower() in METADATA]
