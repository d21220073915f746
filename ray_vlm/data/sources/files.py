"""Find the files that hold the rows of a source."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.config.paths import describe_search, is_hub_data_set
from ray_vlm.config.row_files import is_pattern, match_files
from ray_vlm.config.row_folders import files_of_folder
from ray_vlm.data.sources.hub import hub_files, is_hub, pin_address
from ray_vlm.data.sources.pieces import unreadable_file
from ray_vlm.errors import DataError
from ray_vlm.storage import (
    describe_files,
    full_address,
    is_remote,
    join,
    kind_of,
    split_address,
    split_options,
)

_REQUESTS = 32  # to an object store at a time
_SHOWN = 5
_VERSIONS = 64  # files, or groups of files, whose versions are kept apart


def find_files(source: Source) -> tuple[str, ...]:
    """Return the addresses of the files with the rows of a source, in order. Raise `DataError` if there are none.

    Those of a list keep its order, those of a glob or a folder are in natural order.
    """
    if is_hub(source):
        return hub_files(source)
    if isinstance(source.path, tuple) and (names := list(filter(is_hub_data_set, source.path))):
        raise DataError(
            f"{names[0]}: no such file or folder, and a data set of the hub is no part of a list. Mend the name, or "
            "give each data set an entry of data.mix."
        )
    if len(source.paths) > 1 and any(map(is_remote, source.paths)):
        with ThreadPoolExecutor(_REQUESTS) as pool:
            named = list(pool.map(lambda path: _expand(path, source), source.paths))
    else:
        named = [_expand(path, source) for path in source.paths]
    files = tuple(chain.from_iterable(named))
    _check_files(source, named)
    return files


def _expand(path: str, source: Source) -> tuple[str, ...]:
    """Return the files that one path names."""
    path = pin_address(path)
    options = split_options(path)[1]
    if options and "=" not in options:
        raise DataError(
            f"{path}: in an address `?` begins its options. Write `*` or `[0-9]` for a character of a file's name."
        )
    try:
        kind = kind_of(path)
        if kind == "folder":
            return files_of_folder(path, source.split)
        if kind is None and is_pattern(path):
            _check_split(path, source)
            return _expand_pattern(path)
    except (OSError, ValueError, ImportError) as error:
        raise unreadable_file(path, error) from None
    if kind is None:
        raise unreadable_file(path, FileNotFoundError(path))
    _check_split(path, source)
    return (path,)


def _check_split(path: str, source: Source) -> None:
    """Raise `DataError` if a split of files is asked for that are no splits: all of their rows would be read."""
    if source.split is not None:
        raise DataError(
            f"{path}: split={source.split} is set, and a file or a pattern has no splits. Name the files of the split, "
            "or a folder that has several."
        )


def _expand_pattern(pattern: str) -> tuple[str, ...]:
    files, missing = match_files(pattern)
    if not files:
        raise DataError(
            f"{pattern}: no file matches. Mend the pattern, or give a file or a folder.{describe_search(pattern)}"
        )
    if missing:
        names = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if missing[_SHOWN:] else "")
        raise DataError(f"{pattern}: there is no {names}. Fetch what is missing, or name what is there.")
    return files


def _check_files(source: Source, named: Sequence[Sequence[str]]) -> None:
    """Raise `DataError` for a file that is named twice, also through a link to its folder. `named`: the files of each
    path."""
    folders: dict[str, str] = {}  # to their paths with links followed
    seen: dict[str, tuple[str, str]] = {}
    for path, files in zip(source.paths, named, strict=True):
        for file in files:
            folder, name = split_address(full_address(file))
            real = folder
            if not is_remote(file):
                real = folders.get(folder) or folders.setdefault(folder, os.path.realpath(folder))
            if (key := join(real, name)) in seen:
                first, by = seen[key]
                same = "" if first == file else f" ({first} is the same file)"
                raise DataError(
                    f"{file}: listed twice, by {by!r} and by {path!r}{same}. Name it once; `weight` says how often "
                    "rows are shown."
                )
            seen[key] = (file, path)


def single_file(source: Source) -> str:
    """Return the address of the only file of a source. Raise `DataError` if it has several: the format needs all rows
    in one."""
    files = find_files(source)
    if len(files) > 1:
        raise DataError(
            f"{source.name}: {len(files)} files, and format={source.format} is read from one. Give each an entry of "
            "data.mix."
        )
    return files[0]


def describe_version(addresses: Sequence[str]) -> list[Any]:
    """Return what identifies the present content of files: address, size and time of each, one after another; of a
    file that cannot be described the address alone, since the reader names the problem.

    Of more than 64 files, it is the first and last address of each of 64 groups, the number of its files, and a hash.
    """
    about = describe_files(addresses)
    if len(addresses) > _VERSIONS:
        version = []
        step = -(-len(addresses) // _VERSIONS)
        for start in range(0, len(addresses), step):
            some = addresses[start : start + step]
            text = json.dumps([some, about[start : start + step]])
            digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
            version += [f"{some[0]} to {PurePosixPath(some[-1]).name}", len(some), digest]
        return version
    return [value for address, known in zip(addresses, about, strict=True) for value in (address, *(known or ()))]
