"""Read the rows of a WebDataset: a tar in which consecutive files with one name and different extensions are a sample
(github.com/webdataset/webdataset#the-webdataset-format).

Images stay where they are, as ranges of the tar's bytes.
"""

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ray_vlm.data.records import BadRow, ImageRange, hash_bytes
from ray_vlm.data.sources.fields import text_fault
from ray_vlm.data.sources.pieces import (
    MAX_LINE_BYTES,
    PIECE_BYTES,
    PIECE_ROWS,
    NumberedRow,
    Piece,
    changed_file,
    unreadable_file,
)
from ray_vlm.data.sources.tar import check_not_packed, describe_kind, open_tar, plain_name, walk_members
from ray_vlm.storage import describe_file

_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)  # the key, and the extension: all behind its first dot
_IMAGES = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"}
_IMAGES |= {"img", "heic", "jp2"}  # these too are images, which the check of images refuses by name
_PLAIN_IMAGE = re.compile(r"(?:[0-9]+\.)?[^.]*")  # `jpg`, or `0.jpg` of a sample with several
_TEXTS = {"txt", "text", "transcript", "caption", "prompt", "question", "answer"}
_NUMBERS = {"cls", "cls2", "class", "count", "index", "inx", "id", "label"}
_OTHER_MEDIA = {
    "video": {"mp4", "webm", "mov", "avi", "mkv", "mpg", "mpeg", "m4v"},
    "audio": {"wav", "mp3", "flac", "ogg", "m4a", "aac", "opus"},
}
_READ = ("json", "text", "number")


class Sample(dict[str, Any]):
    """The cells of a sample by name, and the extensions of its files."""

    def __init__(self, cells: Mapping[str, Any], extensions: Sequence[str]):
        super().__init__(cells)
        self.extensions = tuple(extensions)

    def __or__(self, other: Mapping[str, Any]) -> "Sample":  # type: ignore[override]
        return Sample({**self, **other}, self.extensions)

    def __reduce__(self) -> tuple[type["Sample"], tuple[dict[str, Any], tuple[str, ...]]]:
        return Sample, (dict(self), self.extensions)


class _File(NamedTuple):
    """A file of a sample: its extension, its name in the tar, where it lies, and why it cannot be read, or empty."""

    extension: str
    name: str
    start: int
    size: int
    fault: str


class _Group(NamedTuple):
    """Consecutive members with one key. `start`: where the header of the first one is."""

    key: str
    start: int
    files: list[_File]


class WebDatasetTable:
    """A tar file whose rows are samples. Its pieces are ranges of bytes, which any process reads by itself."""

    columns: tuple[str, ...] | None = None

    def __init__(self, address: str):
        """Look at the start of the file. Raise `DataError` if it cannot be read or is compressed."""
        self.address = address
        try:
            _, size, changed = describe_file(address)
            self.version = (size, changed)
            with open_tar(address) as file:
                check_not_packed(file, address, address, "no sample")
        except (OSError, ValueError, ImportError) as error:
            raise unreadable_file(address, error) from None

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[Piece]:
        """Yield the pieces of the file, for which all headers are read once; it takes 32 bytes a sample. `entries` of a
        piece are the rows whose key other samples have too. A change of the file changes all pieces. Raise `DataError`
        where it is no complete tar."""
        hashes, starts, weights = array("Q"), array("q"), array("q")
        try:
            with open_tar(self.address) as file:
                for group in _groups(walk_members(file, self.address, self.version[0], ends_marked=True)):
                    hashes.append(hash_bytes(group.key.encode("utf-8", "surrogateescape")))
                    starts.append(group.start)
                    weights.append(sum(part.size for part in group.files if _kind(part.extension) in _READ))
        except (OSError, ValueError, ImportError) as error:
            raise unreadable_file(self.address, error) from None
        again = _rows_with_one_key(np.frombuffer(hashes, np.uint64))
        first = weight = 0
        for row in range(len(starts) + 1):
            is_last = row == len(starts)
            if row > first and (is_last or row - first == rows or weight + weights[row] > PIECE_BYTES):
                low, high = np.searchsorted(again, (first, row))
                fingerprint = "{:x}_{:x}_{}_{}".format(*self.version, first, row)
                end = self.version[0] if is_last else starts[row]
                entries = tuple(again[low:high].tolist())
                yield Piece(first, row - first, fingerprint, starts[first], end, entries=entries, num_bytes=weight)
                first, weight = row, 0
            weight += 0 if is_last else weights[row]

    def read(self, piece: Piece) -> list[NumberedRow | BadRow]:
        """Return the rows of a piece. Raise `DataError` if the file has changed."""
        try:
            if describe_file(self.address)[1:] != self.version:
                raise changed_file(self.address)
            repeated = set(piece.entries)
            with open_tar(self.address) as file:
                members = walk_members(file, self.address, self.version[0], piece.start, piece.end)
                rows: list[NumberedRow | BadRow] = []
                for number, group in enumerate(_groups(members), piece.first_row):
                    if len(rows) == piece.num_rows:  # fewer than the piece had, for `max_rows`
                        break
                    rows.append(self._row(number, group, file, number in repeated))
                return rows
        except (OSError, ValueError, ImportError) as error:
            raise unreadable_file(self.address, error) from None

    def _row(self, number: int, group: _Group, file: BinaryIO, is_repeated: bool) -> NumberedRow | BadRow:
        try:
            if is_repeated:
                raise ValueError(
                    "other files of this key lie elsewhere in the tar, so this sample may lack some; write the files "
                    "of a sample one after another (`tar --sort=name`), and give each sample a key of its own"
                )
            cells = self._cells(group, file)
            if reason := text_fault(cells):
                raise ValueError(reason)
            return number, cells
        except ValueError as error:
            return BadRow(number, group.key, f"sample {group.key!r} of {self.address}: {error}")

    def _cells(self, group: _Group, file: BinaryIO) -> Sample:
        """Return the cells of a sample. Raise `ValueError` if it cannot be used."""
        extensions = [part.extension for part in group.files]
        if fault := next((part.fault for part in group.files if part.fault), None):
            raise ValueError(fault)
        if twice := next((name for name in extensions if extensions.count(name) > 1), None):
            raise ValueError(f"it has two files .{twice}; keep one, or name them .0.{twice} and .1.{twice}")
        listed: dict[str, Any] = {}  # by the JSON
        cells: dict[str, Any] = {}
        images: dict[str, ImageRange] = {}
        for part in group.files:
            kind = _kind(part.extension)
            if kind == "image":
                images[part.extension] = ImageRange(self.address, self.version, part.start, part.size, part.name)
            elif kind in _OTHER_MEDIA:
                cells[kind] = part.name
            elif kind:
                value = _parse(part, kind, _read(file, part))
                if isinstance(value, dict) and "." not in part.extension:
                    listed |= value
                else:
                    cells[part.extension] = value
        cells = listed | cells
        return Sample(cells | _image_cells(images, cells) | {"id": group.key}, extensions)


def _image_cells(images: Mapping[str, ImageRange], cells: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cells of a sample's images. `image` or `images` are those with a plain extension or a number before it
    (`.jpg`, `.0.jpg`), all if there are none; others have their extension as their name, as `seg.png`."""
    plain = {name: image for name, image in images.items() if _PLAIN_IMAGE.fullmatch(name)} or images
    named = {name: image for name, image in images.items() if name not in plain}
    ordered = list(plain.values())
    if not ordered:
        return named
    if isinstance(listed := cells.get("images"), list) and len(listed) != len(ordered):
        raise ValueError(
            f"its JSON lists {len(listed)} images, and it has {len(ordered)} (.{', .'.join(plain)}); mend it"
        )
    if isinstance(listed, list) and all(isinstance(name, str) for name in listed):
        by_name = {image.name.rpartition("/")[2]: image for image in ordered}
        names = [name.rpartition("/")[2] for name in listed]
        ordered = [by_name[name] for name in names] if set(names) == by_name.keys() else ordered
    if len(ordered) == 1 and not isinstance(listed, list):
        return {**named, "image": ordered[0]}
    return {**named, "images": ordered}


def _kind(extension: str) -> str:
    """Return what a file of a sample holds: an image, `json`, `text`, `number`, `video` or `audio`; empty for files
    that are not read."""
    last = extension.rpartition(".")[2]
    if last in _IMAGES:
        return "image"
    if last in ("json", "jsn"):
        return "json"
    if last in _TEXTS:
        return "text"
    if last in _NUMBERS:
        return "number"
    return next((media for media, names in _OTHER_MEDIA.items() if last in names), "")


def _read(file: BinaryIO, part: _File) -> bytes:
    if part.size > MAX_LINE_BYTES:
        raise ValueError(f"its .{part.extension} has {part.size} bytes, above {MAX_LINE_BYTES}; shorten it")
    file.seek(part.start)
    return file.read(part.size)


def _parse(part: _File, kind: str, data: bytes) -> Any:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its .{part.extension} is not UTF-8 ({error.reason} at byte {error.start})") from None
    if kind == "json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its .{part.extension} is not JSON ({error}); mend it") from None
    text = text.strip() if kind == "number" else text
    return int(text) if kind == "number" and re.fullmatch(r"-?[0-9]{1,18}", text) else text


def _groups(members: Iterator[Any]) -> Iterator[_Group]:
    """Yield the samples among the members of a tar. Folders are passed over, and names without a key (`README`,
    `.DS_Store`), as WebDataset does."""
    group: _Group | None = None
    for member in members:
        match = _NAME.fullmatch(plain_name(member.name) or member.name)
        if match is None or member.isdir():
            continue
        key, extension = match[1], match[2].lower()
        fault = describe_kind(member) or ""
        fault = f"{match[0]} is {fault}" if fault else ""
        if plain_name(member.name) is None:
            fault = f"{member.name[:200]!r} leaves the tar; write it with a plain name"
        if group is None or key != group.key:
            if group is not None:
                yield group
            group = _Group(key, member.offset, [])
        group.files.append(_File(extension, match[0], member.offset_data, member.size, fault))
    if group is not None:
        yield group


def _rows_with_one_key(hashes: np.ndarray) -> np.ndarray:
    """Return the rows whose hash another row has too, in order."""
    ordered = np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    return np.flatnonzero(np.isin(hashes, repeated)) if len(repeated) else np.empty(0, np.int64)
