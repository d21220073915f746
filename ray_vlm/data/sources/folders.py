"""List the files of a folder tree, with sizes and times where these are needed; a million files take seconds."""

import os
from collections.abc import Collection
from typing import NamedTuple

from ray_vlm.config.paths import describe_search
from ray_vlm.errors import DataError
from ray_vlm.storage import is_remote, local_path

# Suffixes of image files. Some of these are not read, and make a bad row that says so.
IMAGES = frozenset(
    [
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"),
        *(".heic", ".heif", ".jp2", ".dng", ".mpo", ".pfm"),
    ]
)
SPLITS = (("train", "training"), ("val", "valid", "validation", "eval"), ("test", "testing"))  # names of one split
_NOT_DATA = ("__MACOSX",)  # folders that systems leave behind; names that begin with a dot are skipped too


def spellings(split: str) -> tuple[str, ...]:
    """Return the names of a split in lower case, itself alone if it has no others."""
    return next((names for names in SPLITS if split.lower() in names), (split.lower(),))


class FolderFile(NamedTuple):
    """A file: its name relative to the folder, with `/`, and its bytes and time of the last change (ns), which are 0
    where they were not asked for."""

    name: str
    size: int = 0
    changed: int = 0


def local_folder(address: str, what: str) -> str:
    """Return the absolute path of a folder. Raise `DataError` if it is none, or an address; `what` names the format."""
    if is_remote(address):
        raise DataError(
            f"{address}: {what} has a file for each image, which is read from a folder of this machine alone. Copy the "
            "folder, or write the rows as one file (COCO, JSONL, Parquet)."
        )
    path = local_path(address)
    if not os.path.isdir(path):
        kind = "not a folder" if os.path.exists(path) else "no such folder"
        raise DataError(f"{address}: {kind}. Give `path` the folder of the {what} data set.{describe_search(address)}")
    return path


def list_files(
    folder: str,
    stamped: Collection[str],
    named: Collection[str] = (),
    follow_links: bool = False,
    root: str | None = None,
    before: str = "",
) -> list[FolderFile]:
    """Return the files below a folder, sorted by name, with `before` in front of it. Hidden ones are skipped.

    `stamped`: lower-case suffixes of files that are returned with size and time, `named`: of those without. A link to
    a folder or to one of the stamped files is followed if it stays below `root` (by default `folder`) or with
    `follow_links`, otherwise it is an error. Raise `DataError`.
    """
    files: list[FolderFile] = []
    top, allowed = os.path.realpath(folder), os.path.realpath(root or folder)
    entered = {top}
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            with os.scandir(os.path.join(folder, prefix)) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name in _NOT_DATA:
                        continue
                    suffix = suffix_of(entry.name)
                    if suffix in named and not entry.is_dir():
                        files.append(FolderFile(f"{before}{prefix}{entry.name}"))
                    elif suffix in stamped and not entry.is_dir():
                        if entry.is_symlink() and not follow_links:
                            check_link(entry, allowed)
                        files.append(_stamp(f"{before}{prefix}{entry.name}", entry))
                    elif entry.is_dir() and _may_enter(entry, top, None if follow_links else allowed, entered):
                        waiting.append(f"{prefix}{entry.name}/")
        except OSError as error:
            raise DataError(f"{os.path.join(folder, prefix)}: not readable ({error}). Mend its permissions.") from None
    return sorted(files)


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name in lower case, with its dot."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def check_link(entry: os.DirEntry[str], allowed: str) -> None:
    """Raise `DataError` for a link that leads out of the folder `allowed`, which is given with its links followed."""
    target = os.path.realpath(entry.path)
    if not f"{target}/".startswith(f"{allowed}/"):
        raise DataError(
            f"{entry.path}: a link to {target}, outside {allowed}. Move that here, or set follow_links=true of the "
            "job's source."
        )


def _stamp(name: str, entry: os.DirEntry[str]) -> FolderFile:
    try:
        about = entry.stat()
    except OSError:  # a link to nothing; reading it names the problem
        return FolderFile(name)
    return FolderFile(name, about.st_size, about.st_mtime_ns)


def _may_enter(entry: os.DirEntry[str], top: str, allowed: str | None, entered: set[str]) -> bool:
    """Return whether a folder is listed: each once, and a link only if it stays below `allowed`; None: all links."""
    if not entry.is_symlink():
        return True
    target = os.path.realpath(entry.path)
    if allowed is not None:
        check_link(entry, allowed)
    # A link to a folder that is listed by itself would give its images twice, and one to its own parents endlessly.
    if target in entered or f"{target}/".startswith(f"{top}/") or f"{top}/".startswith(f"{target}/"):
        return False
    entered.add(target)
    return True
