"""Build the index of each part of a job: train (with its mixed sources), eval and test, from files or as shares.

`plan_split` decides alone; `load_parts` reads. A share is drawn from groups if rows belong together, so no split
separates them.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import JobConfig
from ray_vlm.config.task import ClassificationTask, Task, labels_of, prompt_of
from ray_vlm.data.balance import code_tags
from ray_vlm.data.index import NONE_KNOWN, Index, KnownSizes, build_index, join_indices, measure_row
from ray_vlm.data.preprocessing import read_preprocessing
from ray_vlm.data.records import BadRow, Image, Record, SftRecord
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.sources.formats import read_source
from ray_vlm.data.spec import SampleSpec, sample_spec
from ray_vlm.data.suspicions import tell_unused
from ray_vlm.errors import ConfigError, DataError
from ray_vlm.runs.checkpoints import fetch_folder
from ray_vlm.tasks import TASKS
from ray_vlm.tasks.classification import describe_regions


class SourceRows(NamedTuple):
    """The rows of a source or some of them, and the class names that it declares."""

    source: Source
    rows: Sequence[Record | BadRow]
    labels: list[str]


@dataclass(frozen=True)
class Parts:
    """The data of a job. `notes` are lines for the user."""

    spec: SampleSpec
    train: Index | None
    eval: Index | None
    test: Index | None
    notes: tuple[str, ...] = ()


def load_parts(
    job: JobConfig, wanted: Sequence[str], spec: SampleSpec | None = None, known: KnownSizes = NONE_KNOWN
) -> Parts:
    """Read, split and check the sources of the parts in `wanted`.

    Shares of the training rows are cut before any row is checked, so that they are the same rows whichever are bad.
    `spec`: how an adapter's training made rows, if one is evaluated. `known`: sizes of training images that could be
    read when a resumed run began. Raise `DataError` for unusable data, and `ConfigError` if the adapter's training did
    not leave out the rows that are now a share.
    """
    if job.data.test_on_eval and "test" in wanted:
        parts = load_parts(job, ["eval" if name == "test" else name for name in wanted], spec, known)
        return replace(parts, test=parts.eval)
    sources: dict[str, Source | None] = {name: getattr(job.data, name) for name in ("train", "eval", "test")}
    if job.data.test_on_eval:
        sources["test"] = None  # the same rows by another name
    if missing := [name for name in wanted if sources[name] is None]:
        raise ConfigError(f"`data.{missing[0]}` is missing. Give it a path and a format.")
    training = [s for s in (job.data.train, *job.data.mix) if s is not None]
    shares = {name: s.ratio for name, s in sources.items() if s is not None and s.ratio is not None}
    cut = any(name in shares for name in wanted)
    hinted = spec is None and isinstance(job.task, ClassificationTask) and job.task.class_regions
    rows: dict[str, list[SourceRows]] = {}
    if "train" in wanted or cut or (hinted and sources["train"] is not None):
        rows |= _split(training, shares, job.seed, job.task if job.data.stratify else None)
    for name, source in sources.items():
        # A part of the training file is always read: ids then show whether the two share rows.
        same_file = source is not None and any(s.path == source.path for s in training)
        if source is not None and source.path and name != "train" and (name in wanted or same_file):
            rows[name] = [_read(source)]
    _check_apart(rows)
    drawn = _fingerprint(rows, shares) if cut or "train" in wanted else ""
    if spec is None:
        start = read_preprocessing(fetch_folder(job.model.adapter), sample_spec(job)) if job.model.adapter else None
        spec, notes = _spec(sample_spec(job), start, rows, training)
        if hinted:
            spec = replace(spec, hints=_hints(rows.get("train", []), job.data, job.task, known))
        spec = replace(spec, split=drawn)
    else:
        notes = []
        if cut and spec.split != drawn:
            raise ConfigError(
                "data.eval or data.test is a share of the training rows, and this job draws it otherwise than the "
                "training of the adapter did. Use the same rows, shares, `data.stratify` and `seed`, or a file."
            )
    for name in wanted:
        if not any(part.rows for part in rows[name]):
            raise DataError(f"{rows[name][0].source.path}: holds no rows. Give a file with at least one.")
    builder, sizes = load_sample_builder(spec), {"train": known}
    indices = {
        name: _index(rows[name], job.data, builder, sizes.get(name, NONE_KNOWN)) for name in sources if name in wanted
    }
    notes += [*_notes(rows), *(note for index in indices.values() for note in index.notes)]
    return Parts(spec, indices.get("train"), indices.get("eval"), indices.get("test"), tuple(notes))


def _read(source: Source) -> SourceRows:
    return SourceRows(source, *read_source(source))


def _split(
    sources: Sequence[Source], shares: Mapping[str, float], seed: int, task: Task | None
) -> dict[str, list[SourceRows]]:
    """Return the training sources, and for every share its part of them. With `task`, every part has the same mix of
    its classes."""
    read = [_read(source) for source in sources]
    rows = [row for part in read for row in part.rows]
    parts = plan_split(code_groups([getattr(row, "group", "") for row in rows]), _strata(rows, task), shares, seed)
    starts = np.cumsum([0, *(len(part.rows) for part in read)])
    return {
        name: [
            part._replace(rows=[rows[i] for i in positions[(positions >= start) & (positions < end)]])
            for part, start, end in zip(read, starts, starts[1:], strict=False)
        ]
        for name, positions in parts.items()
    }


def _check_apart(rows: Mapping[str, list[SourceRows]]) -> None:
    """Raise `ConfigError` if rows of a test file also belong to another part, as ranges of tasks may overlap."""
    for test in rows.get("test", []):
        seen, path = {row.row for row in test.rows}, test.source.path
        for name in ("train", "eval"):
            for other in rows.get(name, []):
                shared = [row for row in other.rows if row.row in seen] if other.source.path == path else []
                if shared:
                    raise ConfigError(
                        f"data.test and data.{name} share {len(shared)} rows of {path}, the first with id "
                        f"{shared[0].id}. Choose ranges of tasks that do not overlap."
                    )


def _fingerprint(rows: Mapping[str, list[SourceRows]], shares: Mapping[str, float]) -> str:
    """Return a hash of the rows that training leaves out as shares; empty without shares."""
    if not shares:
        return ""
    digest = hashlib.sha256(repr(sorted(shares)).encode())
    for name in sorted(shares):
        digest.update(repr([(row.row, row.id) for part in rows[name] for row in part.rows]).encode())
    return digest.hexdigest()[:16]


def _spec(
    spec: SampleSpec, start: SampleSpec | None, rows: Mapping[str, list[SourceRows]], training: Sequence[Source]
) -> tuple[SampleSpec, list[str]]:
    """Return the job's `spec` with class names, and notes. The names come from the training data, or without it from
    the parts that are read.

    `start`: of the adapter that the job starts from, if any. Pairs hold their own wording, so DPO keeps that.
    """
    if start is not None and spec.kind == "pair":
        return start, []
    named, notes = rows.get("train", []), []
    if not named and not labels_of(spec.task) and training and training[0].path:
        try:
            named = [_read(source) for source in training]
        except DataError:
            notes.append("class names come from the rows that are measured: data.train cannot be read")
    named = named or [read for reads in rows.values() for read in reads]
    spec = spec.with_labels(label for part in named for label in part.labels)
    if not labels_of(spec.task) and "train" in rows:
        notes += tell_unused(spec.labels, (row for read in rows.values() for part in read for row in part.rows))
    return spec, notes + _changed(start, spec)


def _changed(start: SampleSpec | None, spec: SampleSpec) -> list[str]:
    """Return what the job sets differently from the training of the adapter that it starts from."""
    if start is None:
        return []
    before, now = (load_sample_builder(s) for s in (start, spec))
    pairs = {
        "class names": (start.labels, spec.labels),
        "prompt": (prompt_of(start.task), prompt_of(spec.task)),
        "form of boxes": (before.codec_name, now.codec_name),
        "image sizes": (before.image_spec, now.image_spec),
    }
    changed = [name for name, (old, new) in pairs.items() if old != new]
    return [f"model.adapter was trained with other {', '.join(changed)}"] if changed else []


def _hints(read: Sequence[SourceRows], data: Data, task: Task, known: KnownSizes) -> str:
    """Describe where each class usually is in the training rows."""
    measured = (measure_row(row, data, known) for part in read for row in part.rows)
    return describe_regions([row for row in measured if isinstance(row, SftRecord)], task)


def _index(read: Sequence[SourceRows], data: Data, builder: SampleBuilder, known: KnownSizes) -> Index:
    filled = [(number, part) for number, part in enumerate(read) if part.rows]
    built = [build_index(p.source, data, builder, (p.rows, p.labels), number, known) for number, p in filled]
    return join_indices(built)


def _strata(rows: Sequence[Record | BadRow], task: Task | None) -> np.ndarray:
    """Return the code of the rarest class of each row, as `plan_split` takes it; without a task that of all rows."""
    if task is None:
        return np.zeros(len(rows), np.int32)
    return rarest_tags(*code_tags(() if isinstance(row, BadRow) else row_tags(task, row) for row in rows))


def rarest_tags(kinds: Sequence[tuple[str, ...]], kind_of: np.ndarray) -> np.ndarray:
    """Return for each row the code of the tag that the fewest rows have, of its own tags, `int32 [rows]`.

    `kinds`, `kind_of`: as in `plan_balance`. Codes are in the order of the names; a row without tags has the first.
    """
    counts = Counter[str]()
    for row_classes, count in zip(kinds, np.bincount(kind_of, minlength=len(kinds)).tolist(), strict=True):
        counts.update(dict.fromkeys(row_classes, count))
    rarest = [min(row_classes, key=lambda tag: (counts[tag], tag), default="") for row_classes in kinds]
    return code_texts(rarest)[kind_of]


def code_texts(texts: Sequence[str]) -> np.ndarray:
    """Return a code for each text, in the order of the distinct texts, `int32`."""
    codes = {text: code for code, text in enumerate(sorted(set(texts)))}
    return np.fromiter((codes[text] for text in texts), np.int32, len(texts))


def code_groups(groups: Sequence[str]) -> np.ndarray:
    """Return a code for each row's group, `int64 [rows]`; -1 for rows without one, whose text is empty."""
    codes: dict[str, int] = {"": -1}
    return np.fromiter((codes.setdefault(group, len(codes) - 1) for group in groups), np.int64, len(groups))


def row_tags(task: Task, record: Record) -> tuple[str, ...]:
    """Return the classes and conditions of a record; pairs and prompts have none."""
    if not isinstance(record, SftRecord):
        return ()
    return TASKS[task.name].tags(record)


def plan_split(
    group_of: np.ndarray, stratum_of: np.ndarray, shares: Mapping[str, float], seed: int
) -> dict[str, np.ndarray]:
    """Return the sorted positions of each part's rows: `train` and every name in `shares`.

    `group_of`: `int [rows]`, any code of each row's group, -1 for none; rows of a group stay together, and take the
    stratum of the group's first row. `stratum_of`: `int [rows]`, the code of each row's stratum, in the order of the
    names. Within a stratum, units are dealt to the parts in an order drawn from `seed`, so every part has the mix of
    all rows. Raise `ConfigError` if a part would be empty.
    """
    if not shares:
        return {"train": np.arange(len(group_of))}
    unit_of, first = _units(group_of)
    order = np.lexsort((np.random.default_rng([seed, 7]).random(len(first)), stratum_of[first]))
    part = np.zeros(len(first), np.int8)
    left, remaining = order, 1.0
    for number, share in enumerate(shares.values(), 1):
        ratio = min(share / remaining, 1.0) if remaining > 0 else 1.0
        # The rounded number of units taken so far; where it grows, the part takes a unit. 1e-9: halves round down.
        turn = np.floor((np.arange(len(left)) + 1) * ratio + 0.5 - 1e-9)
        taken = np.diff(turn, prepend=np.floor(0.5 - 1e-9)) > 0
        part[left[taken]] = number
        left, remaining = left[~taken], remaining - share
    names = ("train", *shares)
    part_of = part[unit_of]
    out = {name: np.flatnonzero(part_of == number) for number, name in enumerate(names)}
    empty = [name for name, positions in out.items() if not len(positions)]
    if empty:
        raise ConfigError(
            f"data: {len(first)} rows (or groups of rows) cannot be split into {', '.join(names)} with shares "
            f"{dict(shares)}: {empty[0]} would be empty. Use another share, or a file of its own."
        )
    return out


def _units(group_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each row's unit, a group or a row without one, and each unit's first row.

    Units are numbered in the order of their first rows, which the draw of the parts depends on.
    """
    grouped = np.flatnonzero(group_of >= 0)
    if not len(grouped):
        return (rows := np.arange(len(group_of))), rows
    codes = group_of[grouped]
    if codes.max() > 2 * len(group_of):  # codes of other rows too, such as those of a larger file
        codes = np.unique(codes, return_inverse=True)[1]
    first_of = np.full(int(codes.max()) + 1, len(group_of), np.int64)
    np.minimum.at(first_of, codes, grouped)
    leader = np.arange(len(group_of))  # the first row of each row's unit
    leader[grouped] = first_of[codes]
    first = np.flatnonzero(leader == np.arange(len(group_of)))
    number = np.empty(len(group_of), np.int64)
    number[first] = np.arange(len(first))
    return number[leader], first


def _notes(rows: Mapping[str, list[SourceRows]]) -> list[str]:
    """Return notes on images that both the training rows and another part show."""
    seen = _images(rows.get("train", []))
    notes = []
    for name in ("eval", "test"):
        shared = len(seen & _images(rows.get(name, [])))
        if shared:
            notes.append(f"{shared} images of data.{name} are in data.train too; `columns.group` keeps rows together")
    return notes


def _images(read: Sequence[SourceRows]) -> set[Image]:
    records = (row for part in read for row in part.rows if not isinstance(row, BadRow))
    return {image for record in records for image in record.images}
