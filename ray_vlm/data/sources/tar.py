"""Find images in a tar file that `image_root` names in place of a folder. Nothing is unpacked: an image is a range of
the file's bytes.
"""

import io
import tarfile
from array import array
from functools import lru_cache
from pathlib import Path
from posixpath import normpath
from typing import Any, BinaryIO
from urllib.parse import unquote

import numpy as np

from ray_vlm.config.data import Source
from ray_vlm.data.image_paths import check_name, local_root, resolve_image
from ray_vlm.data.records import ImageRange, hash_bytes
from ray_vlm.errors import DataError
from ray_vlm.storage import describe_file, is_remote, local_path, open_file, split_address, split_options

_NAMES = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.zstd", ".tar.lz4")
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
            with open_file(self.address) as opened:
                ahead = _AHEAD_REMOTE if is_remote(address) else _AHEAD
                raw: Any = getattr(opened, "raw", opened)
                file = io.BufferedReader(raw, ahead)
                try:
                    self._read_headers(file)
                finally:
                    file.detach()
        except FileNotFoundError:
            raise DataError(f"image_root {address}: no such file. Give the tar or the folder of the images.") from None
        except (OSError, ValueError, ImportError) as error:
            raise DataError(
                f"image_root {address}: not readable ({error}). Give a tar that this machine can read."
            ) from None

    def _read_headers(self, file: BinaryIO) -> None:
        start = file.read(_BLOCK)
        file.seek(0)
        for mark, tool in _PACKED:
            if start.startswith(mark):
                raise DataError(
                    f"image_root {self.address}: a compressed file, in which no image can be read alone. Unpack it "
                    f"first (`{tool} {Path(split_options(self.address)[0]).name}`), and name the result."
                )
        hashes, starts, lengths, names = array("Q"), array("q"), array("q"), list[str]()
        before = -1  # the end of the last member
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    if tar.offset <= before or member.size < 0:
                        raise self._damaged(before)
                    before = tar.offset
                    tar.members.clear()  # type: ignore[attr-defined]  # it would hold all of them
                    if (name := _plain_name(member.name.lstrip("/"))) is None:
                        continue
                    hashes.append(_hash(name))
                    starts.append(member.offset_data)
                    lengths.append(_length(member))
                    if lengths[-1] >= 0 and len(names) < _SHOWN:
                        names.append(name)
                    if lengths[-1] >= 0 and member.offset_data + member.size > self.version[0]:
                        raise self._cut_off(f"{name} reaches beyond its end")
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
            if before < 0 and "end of data" not in str(error):
                raise DataError(
                    f"image_root {self.address}: no tar file ({error}). Give a folder of images, or a tar."
                ) from None
            raise self._cut_off(str(error)) from None
        file.seek(end)
        block = file.read(_BLOCK)  # zeros, or nothing where a writer has left the end mark out
        if 0 < len(block) < _BLOCK:
            raise self._cut_off("it ends within a header")
        if block.strip(b"\0"):
            raise self._damaged(end)
        if not names:
            raise DataError(f"image_root {self.address}: holds no files. Give the tar or the folder of the images.")
        self.names = tuple(names)
        order = np.argsort(np.frombuffer(hashes, np.uint64), kind="stable")
        self.hashes = np.frombuffer(hashes, np.uint64)[order]
        self.starts, self.lengths = np.frombuffer(starts, np.int64)[order], np.frombuffer(lengths, np.int64)[order]

    def _cut_off(self, reason: str) -> DataError:
        return DataError(f"image_root {self.address}: the tar is not complete ({reason}). Write or fetch it again.")

    def _damaged(self, position: int) -> DataError:
        return DataError(
            f"image_root {self.address}: damaged, no header of a tar is at byte {max(0, position)}. Write or fetch it "
            "again."
        )

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
            if (plain := _plain_name(spelled)) is None:
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
        return root if split_options(root)[0].lower().endswith(_NAMES) else ""
    try:
        path = Path(local_path(root))
        is_tar = path.is_file() or (path.name.lower().endswith(_NAMES) and not path.is_dir())
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


def image_root(source: Source) -> ImageRoot:
    """Return where a source's images lie, by default the folder of its rows. Raise `DataError`."""
    return open_images(source.image_root or split_address(source.path)[0])


def _plain_name(name: str) -> str | None:
    """Return a member's name without `.` and double slashes; None for one that leaves the tar."""
    plain = normpath(name)
    return None if plain.startswith(("../", "/")) or plain in ("..", ".") else plain


def _hash(name: str) -> int:
    return hash_bytes(name.encode("utf-8", "surrogateescape"))


def _length(member: tarfile.TarInfo) -> int:
    """Return the bytes of a file, or a negative number that stands for its kind."""
    if member.issparse():
        return _SPARSE
    if member.isreg():
        return member.size
    return _LINK if member.issym() or member.islnk() else _FOLDER if member.isdir() else _DEVICE
