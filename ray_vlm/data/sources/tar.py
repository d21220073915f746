"""Find images in a tar file that `image_root` names in place of a folder. Nothing is unpacked: an image is a range of
the file's bytes.
"""

import io
import tarfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from posixpath import normpath
from typing import Any, BinaryIO
from urllib.parse import unquote

import numpy as np

from ray_vlm.data.image_paths import check_name, local_root, resolve_image
from ray_vlm.data.records import ImageRange, hash_bytes
from ray_vlm.errors import DataError
from ray_vlm.storage import describe_file, is_remote, local_path, open_file, split_options

TAR_NAMES = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.zstd", ".tar.lz4")
_PACKED = (  # first bytes of a compressed file, and what unpacks it
    (b"\x1f\x8b", "gunzip"),
    (b"BZh", "bunzip2"),
    (b"\xfd7zXZ\0", "unxz"),
    (b"\x28\xb5\x2f\xfd", "unzstd"),
    (b"\x04\x22\x4d\x18", "unlz4"),
    (b"PK\x03\x04", "unzip"),
)
_BLOCK = 512  # bytes; all parts of a tar are multiples of it
_AHEAD, _AHEAD_REMOTE = 2**20, 2**23  # bytes that are read at a time: a request to an object store takes long
_SHOWN = 3  # names of members in messages
# Lengths that stand for members that are no images, and what they are.
_LINK, _FOLDER, _SPARSE, _DEVICE = -1, -2, -3, -4
_KINDS = {
    _LINK: "a link; put the file itself there, as `tar --dereference --hard-dereference` does",
    _FOLDER: "a folder; give the path of an image",
    _SPARSE: "a sparse file, which is not read; make the tar without --sparse",
    _DEVICE: "neither a file nor a link; mend the path",
}


class TarImages:
    """The members of a tar file by name. It pickles, and takes 24 bytes for each member."""

    def __init__(self, address: str):
        """Read the headers of all members. Raise `DataError` if the file is no complete tar."""
        self.address = address if is_remote(address) else local_path(address)
        try:
            _, *version = describe_file(self.address)
            self.version = (version[0], version[1])
            with open_tar(self.address) as file:
                self._read_headers(file)
        except FileNotFoundError:
            raise DataError(f"image_root {address}: no such file. Give the tar or the folder of the images.") from None
        except (OSError, ValueError, ImportError) as error:
            raise DataError(
                f"image_root {address}: not readable ({error}). Give a tar that this machine can read."
            ) from None

    def _read_headers(self, file: BinaryIO) -> None:
        title = f"image_root {self.address}"
        check_not_packed(file, self.address, title, "no image")
        hashes, starts, lengths, names = array("Q"), array("q"), array("q"), list[str]()
        for member in walk_members(file, title, self.version[0]):
            if (name := plain_name(member.name)) is None:
                continue
            hashes.append(_hash(name))
            starts.append(member.offset_data)
            lengths.append(_length(member))
            if lengths[-1] >= 0 and len(names) < _SHOWN:
                names.append(name)
        if not names:
            raise DataError(f"{title}: holds no files. Give the tar or the folder of the images.")
        self.names = tuple(names)
        order = np.argsort(np.frombuffer(hashes, np.uint64), kind="stable")
        self.hashes = np.frombuffer(hashes, np.uint64)[order]
        self.starts, self.lengths = np.frombuffer(starts, np.int64)[order], np.frombuffer(lengths, np.int64)[order]

    def find(self, name: str) -> ImageRange:
        """Return where an image lies. Raise `ValueError` with the reason for names that are not in the tar, that leave
        it (`..`, absolute paths, URLs), and of members that are no files.

        Names are spelled as `resolve_image` takes them; of several members of one name the last one counts.
        """
        check_name(name)
        if name.startswith("/") or "://" in name or ".." in name.split("/"):
            raise ValueError(f"image {name[:200]!r} lies outside image_root {self.address}; give a path inside it")
        slashes = name.replace("\\", "/")
        for spelled in dict.fromkeys((name, slashes, unquote(name), unquote(slashes))):
            if (plain := _normalise(spelled)) is None:
                continue
            key = np.uint64(_hash(plain))
            position = int(np.searchsorted(self.hashes, key, "right")) - 1  # the last one of the name
            if position < 0 or self.hashes[position] != key:
                continue
            length = int(self.lengths[position])
            if length < 0:
                raise ValueError(f"image {name[:200]!r} of {self.address} is {_KINDS[length]}")
            return ImageRange(self.address, self.version, int(self.starts[position]), length, plain)
        raise ValueError(
            f"image {name[:200]!r} is not in {self.address}, which begins with {', '.join(self.names)}; mend the path"
        )


@contextmanager
def open_tar(address: str) -> Iterator[BinaryIO]:
    """Open a tar file for reading its headers; it is read ahead, less on a disk than from an object store."""
    with open_file(address) as opened:
        raw: Any = getattr(opened, "raw", opened)
        file = io.BufferedReader(raw, _AHEAD_REMOTE if is_remote(address) else _AHEAD)
        try:
            yield file
        finally:
            file.detach()


def check_not_packed(file: BinaryIO, address: str, title: str, loss: str) -> None:
    """Raise `DataError` for a compressed file. `title`: what the message begins with; `loss`: what cannot be read alone
    in it."""
    start = file.read(_BLOCK)
    file.seek(0)
    for mark, tool in _PACKED:
        if start.startswith(mark):
            raise DataError(
                f"{title}: a compressed file, in which {loss} can be read alone. Unpack it first "
                f"(`{tool} {Path(split_options(address)[0]).name}`), and name the result."
            )


def walk_members(
    file: BinaryIO, title: str, size: int, start: int = 0, end: int | None = None, ends_marked: bool = False
) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar in order, from the header at byte `start` to the one at byte `end`, by default all.

    `size`: bytes of the file. `ends_marked`: its end must be marked by zeros, without which a file that was cut off
    between two members looks whole. Raise `DataError`, whose message begins with `title`, where the tar is damaged or
    cut off.
    """
    before = -1  # the end of the last member
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (end is None or tar.offset < end or before < 0) and (member := tar.next()) is not None:
                if tar.offset <= before or member.size < 0:
                    raise _damaged(title, before)
                before = tar.offset
                tar.members.clear()  # type: ignore[attr-defined]  # it would hold all of them
                if member.isreg() and not member.issparse() and member.offset_data + member.size > size:
                    raise _cut_off(title, f"{member.name.lstrip('/')} reaches beyond its end")
                yield member
            last = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        if before < 0 and "end of data" not in str(error):
            raise DataError(f"{title}: no tar file ({error}). Give a folder of images, or a tar.") from None
        raise _cut_off(title, str(error)) from None
    if end is not None:
        return
    file.seek(last)
    block = file.read(_BLOCK)  # zeros, or nothing where a writer has left the end mark out
    if 0 < len(block) < _BLOCK:
        raise _cut_off(title, "it ends within a header")
    if not block and ends_marked:
        raise DataError(
            f"{title}: the end of the tar is not marked, so it was cut off or its writer was stopped. Write or fetch "
            "it again; if it is whole, mark the end (`truncate -s +1024 FILE`)."
        )
    if block.strip(b"\0"):
        raise _damaged(title, last)


def _cut_off(title: str, reason: str) -> DataError:
    return DataError(f"{title}: the tar is not complete ({reason}). Write or fetch it again.")


def _damaged(title: str, position: int) -> DataError:
    return DataError(f"{title}: damaged, no header of a tar is at byte {max(0, position)}. Write or fetch it again.")


ImageRoot = str | TarImages  # where images lie: a folder, by its path or address, or a tar file


def find_image(root: ImageRoot, name: str, follow_links: bool = False) -> str | ImageRange:
    """Return the path or address of an image in a folder, or its range in a tar. Raise `ValueError` with the reason for
    names that cannot be used."""
    return root.find(name) if isinstance(root, TarImages) else resolve_image(root, name, follow_links)


def tar_of(root: str | None) -> str:
    """Return the address of the tar file that an `image_root` names; an empty text for a folder and for none."""
    if root is None:
        return ""
    if is_remote(root):
        return root if split_options(root)[0].lower().endswith(TAR_NAMES) else ""
    try:
        path = Path(local_path(root))
        is_tar = path.is_file() or (path.name.lower().endswith(TAR_NAMES) and not path.is_dir())
    except (OSError, ValueError):
        return ""
    return str(path) if is_tar else ""


def open_images(root: str) -> ImageRoot:
    """Return the folder at a path or address, or the members of the tar file there. Raise `DataError`."""
    if tar := tar_of(root):
        try:
            version = describe_file(tar)[1:]
        except (OSError, ValueError, ImportError):
            return TarImages(tar)  # names the problem
        return _read_tar(tar, version)
    try:
        if not is_remote(root):
            local_root(root)
    except (OSError, ValueError) as error:
        raise DataError(f"image_root {root!r} cannot be used ({error}). Give a folder or a tar file.") from None
    return root


@lru_cache(maxsize=4)
def _read_tar(address: str, version: tuple[int, int]) -> TarImages:
    """Return the members of a tar file. Its headers are read once in a process, until its `version` changes."""
    return TarImages(address)


def plain_name(name: str) -> str | None:
    """Return a member's name without `.`, double slashes and slashes at its start; None for one that leaves the tar."""
    return _normalise(name.lstrip("/"))


def _normalise(name: str) -> str | None:
    plain = normpath(name)
    return None if plain.startswith(("../", "/")) or plain in ("..", ".") else plain


def _hash(name: str) -> int:
    return hash_bytes(name.encode("utf-8", "surrogateescape"))


def describe_kind(member: tarfile.TarInfo) -> str | None:
    """Return what a member is that cannot be read, with the fix; None for a file."""
    return _KINDS.get(_length(member))


def _length(member: tarfile.TarInfo) -> int:
    """Return the bytes of a file, or a negative number that stands for its kind."""
    if member.issparse():
        return _SPARSE
    if member.isreg():
        return member.size
    return _LINK if member.issym() or member.islnk() else _FOLDER if member.isdir() else _DEVICE
