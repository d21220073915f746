"""A job's sources -> the index of each part: train (with what is mixed in), eval and test, from files or as shares.

`plan_split` decides alone; `load_parts` reads. A share is of groups where rows belong together, so no split cuts them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ray_vlm.config.data import Source
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.formats import read_rows
from ray_vlm.data.index import Index, build_index, join_indices, recount
from ray_vlm.data.records import SftRecord
from ray_vlm.data.rows import RowSpec, row_spec
from ray_vlm.data.source import prepare_source
from ray_vlm.errors import ConfigError, DataError
from ray_vlm.tasks import TASKS
from ray_vlm.tasks.classification import describe_regions


@dataclass(frozen=True)
class Parts:
    """What a job's data came to. `notes` are lines that a person should see."""

    spec: RowSpec
    train: Index | None
    eval: Index | None
    test: Index | None
    notes: tuple[str, ...] = ()


def load_parts(job: JobConfig, wanted: Sequence[str], spec: RowSpec | None = None) -> Parts:
    """Read, check and split the sources of the parts that are `wanted` (and of those that they are a share of).

    `spec`: how an adapter's training made rows, where one is evaluated. Raises `DataError` on anything unusable.
    """
    sources = {name: getattr(job.data, name) for name in ("train", "eval", "test")}
    missing = [name for name in wanted if sources[name] is None]
    if missing:
        raise ConfigError(f"`data.{missing[0]}` is missing. Give it a path and a format.")
    shares = {name: s.ratio for name, s in sources.items() if s is not None and s.ratio is not None}
    read_train = "train" in wanted or any(name in shares for name in wanted)
    indices: dict[str, Index | None] = dict.fromkeys(sources)
    train_rows = _read([sources["train"], *job.data.mix], job) if read_train and sources["train"] else []
    if spec is None:
        spec = _spec(job, sources, train_rows, wanted)
    if train_rows:
        whole = _index(train_rows, job, spec)
        parts = plan_split([r.group for r in whole.records], _strata(whole, job), shares, job.seed)
        indices |= {name: whole.subset(positions) for name, positions in parts.items()}
        if spec.task.class_regions and not spec.hints and indices["train"] is not None:
            spec = replace(spec, hints=describe_regions(indices["train"].records, spec.task))
            indices = {name: index and recount(index, spec) for name, index in indices.items()}
    for name in wanted:
        if name not in shares and name != "train":
            indices[name] = _index(_read([sources[name]], job), job, spec)
    kept = {name: index if name in wanted else None for name, index in indices.items()}
    return Parts(spec, kept["train"], kept["eval"], kept["test"], tuple(_notes(kept)))


def _read(sources: Sequence[Source], job: JobConfig) -> list[tuple[Source, list, list[str]]]:
    out = []
    for source in sources:
        prepare_source(source)
        rows, labels = read_rows(source, job.task)
        out.append((source, rows, labels))
    return out


def _spec(job: JobConfig, sources: Mapping[str, Source | None], train_rows: list, wanted: Sequence[str]) -> RowSpec:
    """The job's spec: class names come from the training data, or where that is not there from what is read."""
    read = train_rows
    if not read and not job.task.labels:
        first = sources["train"]
        try:
            read = _read([s for s in (first, *job.data.mix) if s is not None and s.path], job)
        except DataError:
            read = []
        read = read or _read([s for name in wanted if (s := sources[name]) is not None], job)
    names = dict.fromkeys(label for _, _, labels in read for label in labels)
    return row_spec(job, list(names))


def _index(read: list, job: JobConfig, spec: RowSpec) -> Index:
    return join_indices([build_index(s, job.data, spec, (rows, labels), i) for i, (s, rows, labels) in enumerate(read)])


def _strata(index: Index, job: JobConfig) -> list[str]:
    """The rarest class of each row; all alike where the split does not look at classes."""
    if not job.data.stratify:
        return [""] * len(index)
    tags = [row_tags(job, record) for record in index.records]
    rows = Counter(tag for of_row in tags for tag in set(of_row))
    return [min(of_row, key=lambda tag: (rows[tag], tag), default="") for of_row in tags]


def row_tags(job: JobConfig, record: SftRecord) -> tuple[str, ...]:
    """The classes and conditions of a record."""
    return TASKS[job.task.name].tags(record)


def plan_split(
    groups: Sequence[str], strata: Sequence[str], shares: Mapping[str, float], seed: int
) -> dict[str, np.ndarray]:
    """Positions of each part's rows, sorted: `train` and every name in `shares`.

    Rows of one group (text that is not empty) stay together, and take the stratum of the group's first row. Within a
    stratum units go to the parts in turn, in an order drawn from `seed`, so every part has the mix of the whole.
    Raises `ConfigError` where a part would be empty.
    """
    if not shares:
        return {"train": np.arange(len(groups))}
    unit_of, units = _units(groups)
    first = np.full(units, len(groups), np.int64)
    np.minimum.at(first, unit_of, np.arange(len(groups)))
    codes = {name: code for code, name in enumerate(sorted(set(strata)))}
    stratum = np.fromiter((codes[name] for name in strata), np.int32, len(strata))[first]
    order = np.lexsort((np.random.default_rng([seed, 7]).random(units), stratum))
    part = np.zeros(units, np.int64)
    left, whole = order, 1.0
    for number, (_, share) in enumerate(shares.items(), 1):
        ratio = min(share / whole, 1.0) if whole > 0 else 1.0
        turn = np.floor((np.arange(len(left)) + 1) * ratio + 0.5 - 1e-9)
        taken = np.diff(turn, prepend=np.floor(0.5 - 1e-9)) > 0
        part[left[taken]] = number
        left, whole = left[~taken], whole - share
    names = ("train", *shares)
    out = {name: np.flatnonzero(part[unit_of] == number) for number, name in enumerate(names)}
    empty = [name for name, positions in out.items() if not len(positions)]
    if empty:
        raise ConfigError(
            f"data: {units} rows (or groups of rows) cannot be split into {', '.join(names)} with shares "
            f"{dict(shares)}: {empty[0]} would be empty. Use another share, or a file of its own."
        )
    return out


def _units(groups: Sequence[str]) -> tuple[np.ndarray, int]:
    """The number of each row's unit, and how many units there are."""
    if not any(groups):
        return np.arange(len(groups)), len(groups)
    numbers: dict[str, int] = {}
    unit_of = np.empty(len(groups), np.int64)
    for i, group in enumerate(groups):
        unit_of[i] = numbers.setdefault(group or f"\0{i}", len(numbers))
    return unit_of, len(numbers)


def _notes(parts: Mapping[str, Index | None]) -> list[str]:
    """What is odd about the parts beside one another: images that two of them share, classes that one lacks."""
    notes = []
    train = parts["train"]
    seen = {image for record in train.records for image in record.images} if train else set()
    for name in ("eval", "test"):
        index = parts[name]
        if index is None or train is None:
            continue
        shared = sum(any(image in seen for image in record.images) for record in index.records)
        if shared:
            notes.append(f"{shared} of {len(index)} rows of data.{name} show an image that data.train shows too")
    return notes
