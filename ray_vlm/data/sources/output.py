"""The folder of a data set that is being written: its files, and its images under safe names.

An image keeps its bytes. Its suffix is that of its content, and its name is unique without the suffix too, since many
formats name the annotations of `a.jpg` `a.txt` or `a.xml`.
"""

import json
import os
import re
import shutil
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TextIO
from urllib.parse import unquote

from ray_vlm.data.images import read_image
from ray_vlm.data.records import Box, Image, ImageRange, Record, SftRecord
from ray_vlm.errors import DataError, RunError
from ray_vlm.storage import is_remote, open_file, split_address, split_options

ImageMode = Literal["copy", "link", "inside"]
Part = Literal["train", "eval", "test"]
SPLITS: dict[Part, str] = {"train": "train", "eval": "val", "test": "test"}  # as folders and lists are named
LONE_GROUP = "image "  # how the groups of rows begin that belong to none, in files in which every row has one
# Columns of rows of prompts that are not passed on to rewards, by format.
_OF_PROMPTS = ("id", "group", "image", "images", "prompt")
ROW_COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": _OF_PROMPTS,
    "rec": (*_OF_PROMPTS, "problem", "conversations", "messages"),
}
NOT_XML = re.compile("[\ufffe\uffff]")  # what texts of readers may hold and XML does not
_REQUESTS, _ROWS_AHEAD = 16, 32  # to an object store at once, and rows whose images are fetched or wait
_LONGEST = 200  # bytes of a name without its suffix; a file system allows 255 with it
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f/\\:*?"<>|\ud800-\udfff%]')  # here or on Windows, or in addresses
_LAYOUT = re.compile(r"images/((train|val|test)/)?")  # what readers of folders put before the names of images
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names that Windows keeps for itself
# First bytes of a file, and the suffixes of its kind; the first one is given to a file that has none of them.
_KINDS: tuple[tuple[re.Pattern[bytes], tuple[str, ...]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), (".jpg", ".jpeg", ".jpe", ".jfif")),
    (re.compile(rb"\x89PNG"), (".png",)),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), (".webp",)),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), (".avif",)),
    (re.compile(rb"GIF8"), (".gif",)),
    (re.compile(rb"BM"), (".bmp",)),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), (".tif", ".tiff")),
    (re.compile(rb"P[1-7]\s"), (".ppm", ".pgm", ".pbm", ".pnm")),
)


def safe_name(text: str) -> str:
    """Return a file name without suffix for a text: the text itself wherever it is safe on all systems."""
    name = _UNSAFE.sub("_", text).strip(" ").rstrip(".")
    if name.startswith(".") or _DEVICES.fullmatch(name):
        name = f"_{name}"
    return name.encode()[:_LONGEST].decode(errors="ignore").rstrip(" .") or "image"


def safe_path(text: str) -> str:
    """Return a relative path without suffix for a text whose parts between `/` are safe names; else a safe name."""
    parts = text.split("/")
    return text if all(safe_name(part) == part for part in parts) else safe_name(text)


def file_key(name: str) -> str:
    """Return what is the same for names of one file where a disk knows neither case nor the spelling of accents."""
    return unicodedata.normalize("NFC", name).casefold()


def own_name(record: Record) -> str:
    """Return the name of a row's image where it is to be the row's id. It may lie in folders, without those that
    readers of YOLO and Label Studio put before every name."""
    return safe_path(record.id[match.end() :] if (match := _LAYOUT.match(record.id)) else record.id)


def yolo_name(record: Record) -> str:
    """Return the same without a folder `images`, whose last one in a path stands for `labels`."""
    name = own_name(record)
    return safe_name(name) if "images" in name.split("/") else name


def class_name(record: Record) -> str:
    """Return the same below the folder of the class, which the reader puts before it."""
    return safe_path(record.id.removeprefix(f"{label_of(record)}/"))


def label_of(record: Record) -> str:
    """Return the value of the first attribute of classification."""
    assert isinstance(record, SftRecord)
    return str(next(iter(record.truth["attributes"].values())))


def suffix_of(head: bytes, name: str = "") -> str:
    """Return the suffix of an image by its first 16 bytes; that of `name` if it is one of the same kind."""
    given = PurePosixPath(name).suffix
    for mark, suffixes in _KINDS:
        if mark.match(head):
            return given if given.lower() in suffixes else suffixes[0]
    raise ValueError("its first bytes are those of no image that is read")


def stem_of(name: str, folder: str) -> str:
    """Return the name of an image below `folder` without its suffix."""
    return name.removeprefix(f"{folder}/").rpartition(".")[0]


def name_of_image(image: Image) -> str:
    """Return the file name that an image has in its source, empty if it has none."""
    if isinstance(image, str):
        name = split_address(split_options(image)[0])[1]
        return unquote(name) if is_remote(image) else name
    return PurePosixPath(image.name).name if isinstance(image, ImageRange) else ""


class ImageFiles:
    """The images of a data set, each stored once in `folder`, by its location or else its content.

    `mode`: `link` makes hard links to local files, which need no space and stay when the source is deleted; `inside` is
    for a file that holds its images, which are only read here.
    """

    def __init__(self, root: Path, mode: ImageMode = "copy"):
        self.root, self.mode = root, mode
        self._fetched: dict[Image, Future[bytes]] = {}  # of an object store, until they are stored
        self._locations: set[Image] = set()  # of an object store, of which some were stored
        self._stored: dict[Any, str] = {}  # by folder and location or content
        self._inside = 0  # images that were read for a file that holds them
        self._names: dict[str, set[str]] = {}  # by folder: `file_key` of names without suffix

    def __len__(self) -> int:
        return sum(map(len, self._names.values())) + self._inside

    @property
    def waiting(self) -> int:
        """The images that were fetched ahead and are not stored yet."""
        return len(self._fetched)

    def fetch_ahead(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield the records, while the images of those that come next are fetched where they lie in an object store."""
        waiting: deque[Record] = deque()
        with ExitStack() as stack:
            pool: ThreadPoolExecutor | None = None
            for record in records:
                waiting.append(record)
                for image in filter(_is_in_store, record.images):
                    pool = pool or stack.enter_context(ThreadPoolExecutor(_REQUESTS, "ray-vlm-fetch"))
                    if image not in self._fetched and image not in self._locations:
                        self._fetched[image] = pool.submit(read_image, image)
                if len(waiting) > _ROWS_AHEAD:
                    yield waiting.popleft()
            yield from waiting

    def add(self, record: Record, number: int = 0, folder: str = "images", name: str = "") -> str:
        """Store image `number` of a record and return its name relative to the root.

        `name`: without suffix, as `own_name` returns it where the format keeps the id nowhere else; by default the
        image's name in the source. Raise `DataError` if the image cannot be read, `RunError` if it cannot be linked.
        """
        image = record.images[number]
        content = blake2b(image, digest_size=16).digest() if isinstance(image, bytes) else image
        key = (folder, content, name)
        if (stored := self._stored.get(key)) is not None:
            return stored
        with _naming(record, image):
            stored = self._store(image, folder, name, record.id)
        self._stored[key] = stored
        if _is_in_store(image):
            self._locations.add(image)
        return stored

    def read(self, record: Record) -> tuple[str, bytes]:
        """Return the file name and the bytes of a record's image, for a file that holds its images. Raise `DataError`
        if it cannot be read."""
        image = record.images[0]
        with _naming(record, image):
            data = self._bytes_of(image)
            given = name_of_image(image)
            stem = safe_name(PurePosixPath(given).stem if given else record.id)
            name = stem + suffix_of(data[:16], given)
        self._inside += 1
        return name, data

    def _bytes_of(self, image: Image) -> bytes:
        fetched = self._fetched.pop(image, None) if self._fetched else None
        return read_image(image) if fetched is None else fetched.result()

    def _store(self, image: Image, folder: str, stem: str, record_id: str) -> str:
        is_local = isinstance(image, str) and not is_remote(image)
        if is_local:
            assert isinstance(image, str)
            with open_file(image) as file:
                data = file.read(16)
        else:
            data = self._bytes_of(image)
        given = name_of_image(image)
        suffix = suffix_of(data[:16], given)
        stem = stem or safe_name(PurePosixPath(given).stem if given else record_id)
        name = f"{folder}/{self._unique(folder, stem)}{suffix}"
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_local:
            assert isinstance(image, str)
            self._copy(image, target)
        else:
            with writing(target):
                target.write_bytes(data)
        return name

    def _copy(self, image: str, target: Path) -> None:
        source = os.path.realpath(image)
        if self.mode == "copy":
            shutil.copyfile(source, target)
            return
        try:
            os.link(source, target)
        except OSError as error:
            raise RunError(f"{image} cannot be linked into {target.parent} ({error}). Use --images copy.") from None

    def _unique(self, folder: str, name: str) -> str:
        """Return the name, with a number behind it where another image of the folder has it."""
        names = self._names.setdefault(folder, set())
        unique, number = name, 1
        while file_key(unique) in names:
            number += 1
            unique = f"{name}-{number}"
        names.add(file_key(unique))
        return unique


def _is_in_store(image: Image) -> bool:
    address = image if isinstance(image, str) else getattr(image, "address", "")
    return is_remote(address)


@contextmanager
def _naming(record: Record, image: Image) -> Iterator[None]:
    """Turn errors of reading an image in the body into a `DataError` with its row."""
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename2 is not None:
            raise  # the new file cannot be written
        shown = "" if isinstance(image, bytes) else f" ({image})"
        raise DataError(f"row {record.row} (id {record.id}): image cannot be read: {error}{shown}") from None


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Give an `OSError` of the body, which writes `target`, that name, so that it is not taken for one of reading."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target), None, str(target)) from error


@dataclass(frozen=True)
class RowsProfile:
    """What a writer has to know of all rows before it writes the first one.

    `labels`: the class names in order. `attributes`: the names of the attributes of classification, in order.
    `numeric_ids`: every id is a whole number as JSON writes it. `grouped`: some row belongs to a group.
    """

    labels: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    numeric_ids: bool = False
    grouped: bool = False


@dataclass
class Output:
    """A data set that is being written to `folder`. `files`: the number of files with rows."""

    folder: Path
    images: ImageFiles
    profile: RowsProfile = field(default_factory=RowsProfile)
    part: Part = "train"
    files: int = 0

    @property
    def split(self) -> str:
        """The name of the part in names of folders and lists."""
        return SPLITS[self.part]

    @contextmanager
    def open(self, name: str) -> Iterator[TextIO]:
        """Open a text file of the data set for writing, and count it."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="") as file:
            yield file
        self.files += 1


def is_larger(box: Box, size: tuple[int, int]) -> bool:
    """Return whether a box is wider or higher than its image of (width, height): a share of YOLO would be above 1."""
    return box[2] - box[0] > size[0] or box[3] - box[1] > size[1]


def as_xml(text: str) -> str:
    """Return a text with the characters replaced that XML does not have."""
    return NOT_XML.sub("\ufffd", text)


def as_json(value: Any) -> str:
    """Return JSON on one line, with letters of all languages as they are; numbers keep every digit."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def plain_number(value: float) -> float | int:
    """Return a whole number as `int`, so that it is written without a point; every other number keeps its digits."""
    return int(value) if float(value).is_integer() else float(value)


def lone_group(record: Record) -> str:
    """Return a group of its own for a row that belongs to none."""
    return f"{LONE_GROUP}{record.id}"


def group_of(record: Record) -> str:
    """Return the group of a row, empty for none."""
    return "" if record.group == lone_group(record) else record.group


def id_and_group(record: Record) -> Mapping[str, str]:
    """Return the cells `id` and, if the row belongs to a group, `group`."""
    group = group_of(record)
    return {"id": record.id, **({"group": group} if group else {})}
