"""Keep the names of images in data files inside their folder."""

import os
import re
from functools import lru_cache
from urllib.parse import unquote

from ray_vlm.storage import WEB, is_remote, local_path, split_options

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PLAIN = re.compile(r"(?:[\w-][\w .+-]*/)*[\w-][\w .+-]*", re.ASCII)  # names that mean one thing everywhere
_LONGEST_NAME, _LONGEST_PATH = 255, 4096  # bytes; limits of Linux file systems


def resolve_image(root: str, name: str, follow_links: bool = False) -> str:
    """Return the absolute path or the address of image `name` inside the folder `root`.

    Raise `ValueError` with the reason for names that leave the folder (`..`, absolute paths, symlinks), for URLs, and
    for names that no file can have. A name that does not exist may be spelled as Windows or the web do, with `\\` for
    `/` and `%20` for a space; otherwise this function does not check that the file exists. `follow_links`: a symlink
    inside the folder may lead out of it. Folders are resolved once in a process; a link in place of an image is always
    seen.
    """
    if len(name) <= _LONGEST_NAME and _PLAIN.fullmatch(name) and not is_remote(root):
        parent, _, last = ("", "", name) if follow_links else name.rpartition("/")
        folder = _inside(root, parent)
        if folder is not None and (follow_links or not os.path.islink(folder + last)):
            return folder + last
    check_name(name)
    scheme = _SCHEME.match(name)
    if is_remote(root):
        return _resolve_remote(root, name)
    if scheme and scheme[1].lower() != "file":
        raise ValueError(f"image {name[:80]!r} lies outside image_root {root}; give a path under it")
    folder = local_root(root)
    try:
        named = os.path.join(folder, name.removeprefix("file://"))
        named_inside = _is_inside(os.path.normpath(named), folder)
        path = os.path.normpath(named) if follow_links and named_inside else os.path.realpath(named)
    except (OSError, ValueError) as error:
        raise ValueError(f"image {name[:80]!r} is not a path ({error}); give a path under image_root") from None
    if ("\\" in name or "%" in name) and not os.path.exists(path):
        path = _find_spelled(folder, name.removeprefix("file://"), follow_links) or path
    if not _is_inside(path, folder):
        fix = "move it there, or set image_root"
        if named_inside:
            fix = f"it is a link to {path}; move that here, or set follow_links=true of the job's source"
        raise ValueError(f"image {name[:200]!r} lies outside image_root {folder}; {fix}")
    return path


def check_name(name: str) -> None:
    """Raise `ValueError` with the reason for URLs, and for names that no file can have. Data URIs in rows are read
    before their names are looked at (`sources/data_uris.py`)."""
    if name[:5].lower() == "data:":
        raise ValueError("image is a data: URI in place of a name; write it to a file and give a path under image_root")
    scheme = _SCHEME.match(name)
    if scheme and scheme[1].lower() in WEB:
        raise ValueError(f"image {name[:80]!r}: URLs are not read; download it and give a path under image_root")
    if reason := _not_a_path(name):
        raise ValueError(f"image {name[:80]!r} is not a path ({reason}); give a path under image_root")


@lru_cache(maxsize=4096)
def _inside(root: str, name: str) -> str | None:
    """Return the folder `name` inside the folder `root` with links followed and a slash at its end, or None if it
    cannot be used."""
    try:
        folder = local_root(root).rstrip("/") + "/"
        inside = os.path.realpath(folder + name).rstrip("/") + "/"
    except (OSError, ValueError):
        return None
    return inside if inside.startswith(folder) else None


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _find_spelled(folder: str, name: str, follow_links: bool) -> str | None:
    """Return the file inside `folder` that a name with backslashes or URL escapes means, if it exists."""
    plain = name.replace("\\", "/")
    for spelled in dict.fromkeys((plain, unquote(name), unquote(plain))):
        if spelled == name or "\0" in spelled:
            continue
        path = (os.path.normpath if follow_links else os.path.realpath)(os.path.join(folder, spelled))
        if _is_inside(path, folder) and os.path.isfile(path):
            return path
    return None


def _not_a_path(name: str) -> str | None:
    """Return why no file can have this name, or None."""
    if not name.strip():
        return "it is empty"
    if "\0" in name:
        return "it holds a NUL character"
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        return str(error)
    if len(encoded) > _LONGEST_PATH or max(map(len, encoded.split(b"/"))) > _LONGEST_NAME:
        return f"it is {len(encoded)} bytes long; {_LONGEST_NAME} of a name and {_LONGEST_PATH} in all can be used"
    return None


def local_root(root: str) -> str:
    """Return the folder of images with symlinks followed. Raise `OSError` or `ValueError` for impossible names."""
    return _resolved(root if root.startswith("/") else local_path(root))


@lru_cache(maxsize=64)
def _resolved(root: str) -> str:
    return os.path.realpath(root)


def _resolve_remote(root: str, name: str) -> str:
    base, options = split_options(root)
    folder = base.rstrip("/") + "/"
    inside = name.removeprefix(folder)
    if inside.startswith("/") or ".." in inside.split("/") or "::" in inside or _SCHEME.match(inside):
        raise ValueError(f"image {name[:200]!r} lies outside image_root {root}; move it there, or set image_root")
    if "?" in inside:
        raise ValueError(f"image {name[:200]!r} holds a ?, which ends an address; rename it")
    return folder + inside + options
