"""Check every row of every source of a job for `ray-vlm data check`, before a run reads it.

Rows are those of the index: header, end-of-file marker, boxes, labels and tokens are checked when it is built. A bad
row, a source without a good one, and a file that cannot be used do not stop the check.
"""

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ray_vlm.config.data import Data, Source
from ray_vlm.config.task import labels_of
from ray_vlm.data.images import FETCH_AGAIN, decode
from ray_vlm.data.index import Index, join_rows, tag_kinds, write_part
from ray_vlm.data.parts import Indexer, ReadSource, all_of
from ray_vlm.data.records import BadRow, Record
from ray_vlm.data.spec import SampleSpec
from ray_vlm.data.suspicions import tell_unused
from ray_vlm.errors import DataError, RunError
from ray_vlm.machine import count_cpus
from ray_vlm.runs.console import track
from ray_vlm.runs.text import format_table, plural

_THREADS = min(8, count_cpus())
_SHOWN_REASONS = 40
_VARYING = (  # parts that differ between reasons of one kind, and their replacements; the order matters
    (re.compile(r"^.{1,300}?\.\w+ row \d+: "), ""),  # the file of the row, of a source of several
    (re.compile(r"^[^:]{1,300}\.(?:txt|xml|json): "), ""),  # the annotation of an image
    (re.compile(r"\{['\"].{1,100}?(?=\}? is not )\}?"), "{…}"),  # an object, which may be cut off
    (re.compile(r"^id .{1,300}? is used by"), "id … is used by"),
    (re.compile(r"\s\((?:/|[a-z0-9]+://).*\)$"), ""),  # the image's path, which the index appends
    (re.compile(r"\[(?=[-\d'\"]|nan|inf)[^\]]*\]"), "[…]"),
    (re.compile(r"(?<!\w)'(?:[^'\\]|\\.)*'(?!\w)"), "'…'"),
    (re.compile(r'(?<!\w)"(?:[^"\\]|\\.)*"(?!\w)'), '"…"'),
    (re.compile(r"\b0x[0-9a-f]+\b"), "N"),
    (re.compile(r"\b\d+x\d+\b"), "NxN"),
    (re.compile(r"(?<![\w-])-?\d+(?:\.\d+)?"), "N"),
)


@dataclass(frozen=True)
class SourceCheck:
    """The result for one source. `name` is its setting (`train`, `mix[0]`, `eval`, `test`).

    `rows` = `usable` + the number of `bad`. `problems`: why the whole file cannot be used. `seconds`: time for reading
    and checking. `notes`: what looks odd about the source.
    """

    name: str
    path: str
    rows: int
    usable: int
    bad: tuple[BadRow, ...]
    seconds: float
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether nothing is bad."""
        return not self.bad and not self.problems


def _named_sources(data: Data) -> dict[str, Source]:
    """Return the sources with files, by setting. A share of the training rows is not a separate source."""
    sources = {"train": data.train, **{f"mix[{i}]": source for i, source in enumerate(data.mix)}}
    sources |= {"eval": data.eval, "test": data.test}
    return {name: source for name, source in sources.items() if source is not None and source.ratio is None}


def check_sources(data: Data, spec: SampleSpec, indexer: Indexer, decode_images: bool = False) -> Iterator[SourceCheck]:
    """Check every source in turn, unusable ones first, and yield each result as soon as it is done.

    `spec`: the job's, to which the class names of the data are added here. `decode_images`: also decode every image
    completely, as training will. Raise only if the job itself cannot work (its model, its prompt); faults of the data
    are in the results.
    """
    sources = _named_sources(data)
    read: dict[str, ReadSource] = {}
    seconds: dict[str, float] = {}
    for name, source in sources.items():
        started = time.monotonic()
        try:
            read[name] = indexer.read(source)
            problems = [] if len(read[name]) else [f"{source.name}: it has no rows."]
        except DataError as error:
            problems = error.problems
        seconds[name] = time.monotonic() - started
        if problems:  # before anything slow is loaded
            read.pop(name, None)
            yield SourceCheck(name, source.name, 0, 0, (), seconds[name], tuple(problems))
    if not read:
        return
    training = [rows for name, rows in read.items() if name == "train" or name.startswith("mix")]
    labels = [label for rows in training or read.values() for label in rows.shards.labels]
    spec = spec.with_labels(labels)
    unused: list[str] = []
    if training and not labels_of(spec.task) and spec.task.name == "detection":
        shards = (shard for rows in read.values() for shard in rows.open())
        unused = tell_unused(labels, {tag for kind in tag_kinds(shards, "tags_read")[0] for tag in kind})
    for name, rows in read.items():
        started, path = time.monotonic(), rows.source.name
        part = indexer.part(all_of(rows), spec)
        joined = join_rows(part, data.max_tokens)
        bad = list(joined.bad)
        if decode_images and len(joined.positions):
            bad += _find_undecodable(write_part(joined), path)
        notes = [*part.notes, *(unused if name == "train" else [])]
        took = seconds[name] + time.monotonic() - started
        yield SourceCheck(name, path, len(rows), len(rows) - len(bad), tuple(bad), took, notes=tuple(notes))


def _find_undecodable(index: Index, path: str) -> list[BadRow]:
    """Return the usable rows that have an image which cannot be decoded."""
    with ThreadPoolExecutor(_THREADS) as pool:
        checked = track(pool.map(_undecodable, index.records), f"decoding the images of {path}", len(index))
        return [bad for bad in checked if bad is not None]


def _undecodable(row: Record) -> BadRow | None:
    """Return a `BadRow` if one of a row's images cannot be decoded, else None."""
    for image, size in zip(row.images, row.sizes, strict=True):
        name = "" if isinstance(image, bytes) else f" ({image})"
        try:
            pixels = decode(image)
        except Exception as error:  # decoders raise exceptions of any type
            return BadRow(
                row.row, row.id, f"image cannot be decoded ({type(error).__name__}: {error}); {FETCH_AGAIN}{name}"
            )
        if (pixels.shape[1], pixels.shape[0]) != size:
            sizes = f"{pixels.shape[1]}x{pixels.shape[0]} px, and its header says {size[0]}x{size[1]}"
            return BadRow(row.row, row.id, f"image decodes to {sizes}; write the file again{name}")
    return None


def group_reason(reason: str) -> str:
    """Replace numbers, names and paths in a reason, so that reasons of one kind are equal."""
    text = plain(reason)
    for pattern, stands_for in _VARYING:
        text = pattern.sub(stands_for, text)
    return text


def group_bad(bad: Iterable[BadRow]) -> list[tuple[str, list[BadRow]]]:
    """Return kinds of reasons with their rows, the most frequent first."""
    groups: dict[str, list[BadRow]] = {}
    for row in bad:
        groups.setdefault(group_reason(row.reason), []).append(row)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def describe_check(check: SourceCheck) -> str:
    """Describe a source: how many rows, how many are bad, and the first reason of each kind in full."""
    speed = f"{check.rows / check.seconds:,.0f} rows/s" if check.seconds > 0 else "at once"
    lines = [
        f"data.{check.name}  {plain(check.path)}",
    ]
    if check.rows or not check.problems:
        counts = f"rows {check.rows}, usable {check.usable}, bad {len(check.bad)}"
        lines.append(f"  {counts}  ({check.seconds:.1f} s, {speed})")
    lines += [f"  cannot be used: {plain(problem)}" for problem in check.problems]
    lines += [f"  note: {plain(note.removeprefix(check.path + ': '))}" for note in check.notes]
    groups = group_bad(check.bad)
    if groups:
        table = [["  count", "for example", "reason"]]
        for _, rows in groups[:_SHOWN_REASONS]:
            example = f"row {rows[0].row} (id {shorten(rows[0].id) or '?'})"
            table.append([str(len(rows)), example, _describe_group(rows)])
        lines.append(format_table(table, left=(1, 2), longest=sys.maxsize))
    if len(groups) > _SHOWN_REASONS:
        rest = sum(len(rows) for _, rows in groups[_SHOWN_REASONS:])
        others = plural(len(groups) - _SHOWN_REASONS, "other reason")
        lines.append(f"  and {plural(rest, 'bad row')} with {others}; --bad-rows PATH writes all of them")
    return "\n".join(lines)


def _describe_group(rows: Sequence[BadRow]) -> str:
    """Return the full reason of a group's first row, and how many other reasons the group has."""
    others = len({row.reason for row in rows}) - 1
    more = f" ({others} more of this kind; --bad-rows PATH writes them all)" if others else ""
    return f"{plain(rows[0].reason)}{more}"


def describe_shares(data: Data) -> list[str]:
    """Return one line for each part that is a share of the training rows, and so is checked with them."""
    parts = {"eval": data.eval, "test": data.test}
    return [
        f"data.{name}  {part.ratio:.0%} of the training rows, checked with them"
        for name, part in parts.items()
        if part is not None and part.ratio is not None
    ]


def write_bad_rows(path: str, checks: Iterable[SourceCheck]) -> int:
    """Write each bad row as a JSON line `part, row, id, reason`; return their number. Raise `RunError`."""
    count = 0
    try:
        with open(path, "w", encoding="utf-8") as file:
            for check in checks:
                for bad in check.bad:
                    line = {"part": check.name, "row": bad.row, "id": bad.id, "reason": bad.reason}
                    file.write(json.dumps(line) + "\n")
                    count += 1
    except OSError as error:
        raise RunError(f"--bad-rows: {path} cannot be written ({error.strerror}). Give another path.") from None
    return count


def plain(text: str, keep: str = "") -> str:
    """Escape unprintable characters, except those in `keep`, for a terminal or a picture."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, longest: int = 32) -> str:
    """Return a name that is printable and at most `longest` characters."""
    text = plain(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
