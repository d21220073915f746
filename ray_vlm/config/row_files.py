"""The files that a name of rows in a job stands for: suffixes, globs, ranges in braces, and their order."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ray_vlm.storage import is_remote, join, list_folder, local_path, split_options

LINE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")  # these may also be compressed
ROW_SUFFIXES = (*LINE_SUFFIXES, ".parquet", ".arrow", ".feather")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # the names that pyarrow has for them
_MAGIC = re.compile(r"[*?\[{]")
_BRACES = re.compile(r"\{(-?[0-9]+\.\.-?[0-9]+|[^{}]*,[^{}]*)\}")
_MOST_NAMES = 100_000  # that braces may stand for


class Matches(NamedTuple):
    """The files that a pattern matches, in order, and what it stands for that matches none."""

    files: tuple[str, ...]
    missing: tuple[str, ...]


def split_suffix(name: str) -> tuple[str, str]:
    """Return the suffix of a file or an address in lower case, and behind it the one of a compression, or ''."""
    path = PurePosixPath(split_options(name)[0].lower())
    packed = path.suffix if path.suffix in COMPRESSIONS else ""
    return (PurePosixPath(path.stem).suffix if packed else path.suffix), packed


def row_suffix(name: str) -> str:
    """Return the suffix of a file that rows are read from, such as `.jsonl.gz`; '' for any other file."""
    suffix, packed = split_suffix(name)
    return suffix + packed if suffix in (LINE_SUFFIXES if packed else (*ROW_SUFFIXES, ".tar")) else ""


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Return the key by which names sort as people sort them: shard-2 before shard-10."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def is_pattern(name: str) -> bool:
    """Return whether a name has `*`, `?`, `[` or `{`. In an address `?` begins the options instead."""
    return _MAGIC.search(split_options(name)[0]) is not None


def expand_braces(pattern: str) -> list[str]:
    """Return the names that `{000..127}` and `{a,b}` stand for, in order. Raise `ValueError` for too many."""
    names: list[str] = []
    waiting = [pattern]  # the next one is the last
    while waiting:
        name = waiting.pop()
        if (match := _BRACES.search(name)) is None:
            names.append(name)
        else:
            waiting += [name[: match.start()] + value + name[match.end() :] for value in reversed(_values_of(match))]
        if len(names) + len(waiting) > _MOST_NAMES:
            raise ValueError(f"its braces stand for more than {_MOST_NAMES:,} names")
    return list(dict.fromkeys(names))


def _values_of(braces: re.Match[str]) -> list[str]:
    """Return what one pair of braces stands for."""
    first, dots, last = braces[1].partition("..")
    if not dots or "," in braces[1]:
        return braces[1].split(",")
    width = max(len(first), len(last)) if re.match("-?0[0-9]", first) or re.match("-?0[0-9]", last) else 0
    start, end = int(first), int(last)
    if abs(end - start) >= _MOST_NAMES:
        raise ValueError(f"{braces[0]} stands for more than {_MOST_NAMES:,} names")
    step = 1 if end >= start else -1
    return [f"{number:0{width}d}" for number in range(start, end + step, step)]


def match_files(pattern: str) -> Matches:
    """Return the files that a path or an address with wildcards matches: what braces stand for in its order, and the
    files of each in natural order.

    A wildcard matches no `/` and no dot at the start of a name, `**` any number of folders. Folders that exist under
    the name as it is written are taken as they are. Raise `OSError` or `ValueError` if a folder cannot be listed.
    """
    base, rest = split_pattern(pattern)
    names = expand_braces(rest)
    remote = is_remote(pattern)
    held: list[str] = []
    if remote:
        deep = any("/" in name or "**" in name for name in names)
        held = [entry.name for entry in list_folder(base, deep) if entry.is_file]
    present = set(held)
    files: dict[str, None] = {}
    missing = []
    for name in names:
        if not _MAGIC.search(name):
            matched = [name] if (name in present if remote else _is_file(os.path.join(base, name))) else []
        elif remote:
            matched = list(filter(_compile(name, _as_regex(name)).fullmatch, held))
        else:
            parts = re.sub(r"(\*\*/)+", "**/", name).strip("/").split("/")
            matched = list(_match_local(base, "/" if name.startswith("/") else "", parts, frozenset()))
        files |= dict.fromkeys(sorted(matched, key=natural_key))
        missing += [] if matched else [_join(base, name)]
    return Matches(tuple(_join(base, name) for name in files), tuple(missing))


def split_pattern(pattern: str) -> tuple[str, str]:
    """Return the folder in which a pattern is matched, '' for the current one, and the pattern in it."""
    if is_remote(pattern):
        address, options = split_options(pattern)
        scheme, _, path = address.partition("://")
        parts = path.split("/")
        count = next((i for i, part in enumerate(parts[:-1]) if _MAGIC.search(part)), len(parts) - 1)
        return f"{scheme}://{'/'.join(parts[:count])}{options}", "/".join(parts[count:])
    local = Path(local_path(pattern) if pattern.startswith(("file://", "~")) else pattern)
    count = 0
    while count < len(local.parts) - 1 and (
        not _MAGIC.search(local.parts[count]) or os.path.isdir(Path(*local.parts[: count + 1]))
    ):
        count += 1
    base = str(Path(*local.parts[:count])) if count else ""
    return base, str(Path(*local.parts[count:]))


def _match_local(base: str, folder: str, parts: Sequence[str], above: frozenset[str]) -> Iterator[str]:
    """Yield the files below a folder that the parts of a pattern match, relative to `base`. `folder`: relative to
    `base`, empty or with a slash at its end. `above`: the folders that `**` has come through, with links followed; a
    link to one of these has no end. Raise `OSError` if a folder cannot be listed: its rows would be missing."""
    part, rest = parts[0], parts[1:]
    if not _MAGIC.search(part):
        path = folder + part
        if not rest:
            yield from [path] if _is_file(os.path.join(base, path)) else ()
        elif os.path.isdir(os.path.join(base, path)):
            yield from _match_local(base, f"{path}/", rest, above)
        return
    if part == "**":
        if (real := os.path.realpath(os.path.join(base, folder))) in above:
            return
        above |= {real}
        yield from _match_local(base, folder, rest or ["*"], above)
    is_match = _compile(part, _component("*" if part == "**" else part)).fullmatch
    for entry in list_folder(os.path.join(base, folder) or "."):
        name = entry.name
        if is_match(name) is None or (name.startswith(".") and not part.startswith(".")):
            continue
        if part == "**":
            yield from () if entry.is_file else _match_local(base, f"{folder}{name}/", parts, above)
        elif rest:
            yield from () if entry.is_file else _match_local(base, f"{folder}{name}/", rest, above)
        elif entry.is_file:
            yield folder + name


def _is_file(path: str) -> bool:
    """Return whether there is a file, or a link to one that is gone: its rows are missing, so opening it must fail."""
    return os.path.lexists(path) and not os.path.isdir(path)


def _join(base: str, name: str) -> str:
    return join(base, name) if is_remote(base) else os.path.join(base, name)


def _compile(pattern: str, regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except re.error as error:  # `[z-a]`
        raise ValueError(f"{pattern} is no pattern: {error.msg}") from None


def _as_regex(pattern: str) -> str:
    """Return the regular expression of a pattern for names with `/`."""
    parts = pattern.split("/")
    text = ""
    for i, part in enumerate(parts):
        end = "" if i == len(parts) - 1 else "/"
        if part == "**":
            text += "(?:[^/.][^/]*/)*" + ("" if end else "[^/.][^/]*")
        else:
            text += (r"(?!\.)" if part[:1] in ("*", "?", "[") else "") + _component(part) + end
    return text


def _component(part: str) -> str:
    text = ""
    for token in re.findall(r"\[!?\]?[^\]]*\]|.", part, re.DOTALL):
        if len(token) > 1:
            held = re.sub(r"([\\\[\]^&~|])", r"\\\1", token[1:-1].removeprefix("!"))
            text += f"[{'^' if token[1] == '!' else ''}{held}]"
        else:
            text += {"*": "[^/]*", "?": "[^/]"}.get(token, re.escape(token))
    return text
