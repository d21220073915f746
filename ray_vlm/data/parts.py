"""Build the index of each part of a job: train (with its mixed sources), eval and test, from files or as shares.

Shares of the training rows are cut before any row is checked, so that they are the same rows whichever are bad.
"""

import atexit
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ray_vlm.cluster.preflight import ClusterDemand, build_demand
from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import JobConfig
from ray_vlm.config.task import ClassificationTask, Task, labels_of, prompt_of
from ray_vlm.data.build import CheckLimits, SourceShards, build_rows, build_tokens, read_labels, writing_index
from ray_vlm.data.index import Index, PartRows, check_bad, join_rows, tag_kinds, write_part
from ray_vlm.data.measure import NONE_KNOWN, KnownSizes
from ray_vlm.data.parallel import Spread, plan_spread
from ray_vlm.data.preprocessing import read_preprocessing
from ray_vlm.data.records import SftRecord
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.shards import IndexFolder, Shard, load_shard, read_record
from ray_vlm.data.sources.detect import settle_formats, settle_source
from ray_vlm.data.sources.file_set import folder_of
from ray_vlm.data.sources.formats import row_files, unique_ids
from ray_vlm.data.spec import SampleSpec, sample_spec
from ray_vlm.data.splits import plan_split, rarest_tags
from ray_vlm.data.suspicions import add_up, find_suspicions, tell_unused
from ray_vlm.errors import ConfigError, DataError
from ray_vlm.runs.checkpoints import fetch_folder
from ray_vlm.storage import full_address, join
from ray_vlm.tasks.classification import describe_regions

if TYPE_CHECKING:
    import pyarrow as pa

INDEX_FOLDER = ".index"  # of `run.output_dir`, unless `data.index_dir` says another


@dataclass(frozen=True)
class Parts:
    """The data of a job. `notes` are lines for the user."""

    spec: SampleSpec
    train: Index | None
    eval: Index | None
    test: Index | None
    notes: tuple[str, ...] = ()


class ReadSource:
    """A source whose rows are in the index: columns over all of its rows, good and bad ones. `folder`: of the index."""

    def __init__(self, folder: IndexFolder, shards: SourceShards):
        self.folder, self.shards, self.source = folder, shards, shards.source

    def __len__(self) -> int:
        return self.shards.num_rows

    def open(self) -> Iterator[Shard]:
        """Map the row shards, one after another."""
        return (load_shard(self.folder, name) for name in self.shards.names)

    def column(self, name: str) -> "pa.ChunkedArray":
        """Return a column."""
        import pyarrow as pa

        return pa.chunked_array([shard.column(name) for shard in self.open()])

    @cached_property
    def renamed(self) -> Mapping[int, tuple[str, str] | str]:
        """Rows whose id is not theirs alone: row -> its new id and group, or the reason against it."""
        return unique_ids(self.source, self.column("id"), self.column("unread").to_numpy())

    @cached_property
    def rows(self) -> np.ndarray:
        """The number of each row in its file, `int64 [rows]`."""
        return self.column("row").to_numpy()

    def rows_of_files(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Return the numbers of the chosen rows in their files, by the address of each file; nothing where rows are not
        counted by files, as in folders of annotations and in GUI steps of several files."""
        files, rows = row_files(self.source), self.rows[positions]
        if len(files) == 1:
            return {full_address(files[0]): rows}
        folder, chosen, start = folder_of(files), dict[str, np.ndarray](), 0
        for name, first, count in (span for shard in self.open() for span in shard.summary().files):
            low, high = np.searchsorted(rows, (start, start + count))
            address = join(folder, name) if folder else name
            held = chosen.get(address, rows[:0])
            chosen[address] = np.append(held, rows[low:high] - start + first)
            start += count
        return chosen

    def id_of(self, position: int) -> str:
        """Return the id of a row."""
        new = self.renamed.get(position)
        return new[0] if isinstance(new, tuple) else self.column("id")[position].as_py()

    def groups(self) -> "pa.ChunkedArray":
        """Return the group of each row, empty for none."""
        groups = self.column("group")
        if not self.renamed:
            return groups
        import pyarrow as pa

        texts = groups.to_pylist()
        for position, new in self.renamed.items():
            if not isinstance(new, str):
                texts[position] = texts[position] or new[1]
        return pa.chunked_array([pa.array(texts, pa.string())])


@dataclass(frozen=True)
class ChosenRows:
    """Rows of some sources, one after another: `positions` counts them through all of these, sorted, `int64`."""

    sources: Sequence[ReadSource]
    positions: np.ndarray

    def of_each(self) -> Iterator[tuple[ReadSource, np.ndarray]]:
        """Yield each source with the positions of its chosen rows in it."""
        start = 0
        for source in self.sources:
            first, last = np.searchsorted(self.positions, (start, start + len(source)))
            yield source, self.positions[first:last] - start
            start += len(source)


def all_of(source: ReadSource) -> ChosenRows:
    """Choose all rows of a source."""
    return ChosenRows([source], np.arange(len(source)))


def load_parts(
    job: JobConfig, wanted: Sequence[str], spec: SampleSpec | None = None, known: KnownSizes = NONE_KNOWN
) -> Parts:
    """Index the sources of the parts in `wanted`, split them, and join the usable rows of each part.

    `spec`: how an adapter's training made rows, if one is evaluated. `known`: sizes of training images that could be
    read when a resumed run began. Raise `DataError` for unusable data, and `ConfigError` if the adapter's training did
    not leave out the rows that are now a share.
    """
    job = settle_formats(job)
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
    indexer = build_indexer(job.data, job.run.output_dir, job.task.name, build_demand(job))
    chosen: dict[str, ChosenRows] = {}
    if "train" in wanted or cut or (hinted and sources["train"] is not None):
        read = [indexer.read(source, known) for source in training]
        chosen |= _split(read, shares, job.seed, stratify=job.data.stratify)
    for name, source in sources.items():
        # A part of the training file is always read: ids then show whether the two share rows.
        same_file = source is not None and any(s.reads_as(source) for s in training)
        if source is not None and source.path and name != "train" and (name in wanted or same_file):
            chosen[name] = all_of(indexer.read(source))
    _check_apart(chosen)
    drawn = _fingerprint(chosen, shares) if cut or "train" in wanted else ""
    notes: list[str] = []
    if spec is None:
        start = read_preprocessing(fetch_folder(job.model.adapter), sample_spec(job)) if job.model.adapter else None
        spec, notes = _spec(sample_spec(job), start, chosen, training, indexer)
        if hinted:
            spec = replace(spec, hints=_hints(chosen.get("train"), job.task))
        spec = replace(spec, split=drawn)
    elif cut and spec.split != drawn:
        raise ConfigError(
            "data.eval or data.test is a share of the training rows, and this job draws it otherwise than the "
            "training of the adapter did. Use the same rows, shares, `data.stratify` and `seed`, or a file."
        )
    for name in wanted:
        if not len(chosen[name].positions):
            raise DataError(f"{chosen[name].sources[0].source.name}: holds no rows. Give a file with at least one.")
    indices = {name: indexer.join(chosen[name], spec) for name in sources if name in wanted}
    seen = (note for index in indices.values() for note in index.notes)
    notes = [*notes, *_tell_shared_images(chosen), *dict.fromkeys(seen)]
    return Parts(spec, indices.get("train"), indices.get("eval"), indices.get("test"), tuple(notes))


class Indexer:
    """Builds the index of sources and parts in `folder`. `task`: the name of the job's task."""

    def __init__(self, folder: IndexFolder, data: Data, task: str, spread: Spread):
        self.folder, self.task, self.spread = folder, task, spread
        self.limits = CheckLimits(data.max_image_pixels, data.on_bad_box)
        self.max_tokens, self.on_bad_row = data.max_tokens, data.on_bad_row

    def read(self, source: Source, known: KnownSizes = NONE_KNOWN) -> ReadSource:
        """Read and check a source, unless the index has it. Raises as `build_rows` does."""
        return ReadSource(self.folder, build_rows(source, self.limits, self.task, self.folder, self.spread, known))

    def labels(self, source: Source) -> Sequence[str]:
        """Return the class names that a source declares, without checking its rows."""
        return read_labels(source, self.limits, self.task, self.folder)

    def part(self, chosen: ChosenRows, spec: SampleSpec) -> PartRows:
        """Tokenise the sources of the chosen rows, unless the index has their tokens."""
        shards: list[tuple[str, str, int, int]] = []
        renamed: dict[int, tuple[str, str] | str] = {}
        labels, notes, start = list[str](), list[str](), 0
        for number, (read, positions) in enumerate(chosen.of_each()):
            names = build_tokens(read.shards, spec, self.folder, self.spread) if len(positions) else read.shards.names
            counts = read.shards.counts
            shards += [(*pair, number) for pair in zip(read.shards.names, names, counts, strict=True)]
            renamed |= {position + start: name for position, name in read.renamed.items()}
            summary = add_up(shard.summary() for shard in read.open())
            labels += read.shards.labels
            notes += find_suspicions(read.source, summary, read.shards.labels, self.limits.on_bad_box)
            start += len(read)
        paths = [read.source.name for read in chosen.sources]
        return PartRows(self.folder, shards, chosen.positions, renamed, labels, notes, paths)

    def join(self, chosen: ChosenRows, spec: SampleSpec) -> Index:
        """Return the index of the chosen rows. Raise `DataError` for bad ones, unless the job goes on without them."""
        joined = join_rows(self.part(chosen, spec), self.max_tokens)
        check_bad(joined, self.on_bad_row)
        with writing_index(self.folder):
            return write_part(joined)


def build_indexer(data: Data, output_dir: str, task: str, demand: ClusterDemand) -> Indexer:
    """Return the indexer of a job. `output_dir`: the folder of its runs; `demand`: what it demands of a cluster."""
    folder = IndexFolder(data.index_dir or join(output_dir, INDEX_FOLDER))
    return Indexer(folder, data, task, plan_spread(demand))


def build_index(source: Source, data: Data, builder: SampleBuilder, folder: str | None = None) -> Index:
    """Return the index of all rows of one source, outside a job. Raises as `load_parts` does.

    `data`: limits, and what happens to bad rows. `folder`: of the index; None: a temporary one of this process.
    """
    if folder is None:
        folder = tempfile.mkdtemp(prefix="ray_vlm-index-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    indexer = Indexer(IndexFolder(folder), data, builder.spec.task.name, Spread())
    return indexer.join(all_of(indexer.read(settle_source(source))), builder.spec)


def _split(read: Sequence[ReadSource], shares: Mapping[str, float], seed: int, stratify: bool) -> dict[str, ChosenRows]:
    """Return the rows of the training sources that stay, and for every share its part of them. With `stratify`, every
    part has the same mix of classes."""
    count = sum(map(len, read))
    if not shares:
        return {"train": ChosenRows(read, np.arange(count))}
    strata = np.zeros(count, np.int32)
    if stratify:
        strata = rarest_tags(*tag_kinds((shard for source in read for shard in source.open()), "tags_read"))
    parts = plan_split(_code_groups(read), strata, shares, seed)
    return {name: ChosenRows(read, positions) for name, positions in parts.items()}


def _code_groups(read: Sequence[ReadSource]) -> np.ndarray:
    """Return a code for each row's group, `int64 [rows]`; -1 for rows without one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    groups = pa.chunked_array([chunk for source in read for chunk in source.groups().chunks], pa.string())
    encoded = pc.dictionary_encode(pc.if_else(pc.equal(groups, ""), None, groups))
    codes = [chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False) for chunk in encoded.chunks]
    return np.concatenate([np.zeros(0, np.int64), *codes]).astype(np.int64)


def _check_apart(chosen: Mapping[str, ChosenRows]) -> None:
    """Raise `ConfigError` if rows of a test file also belong to another part, as ranges of tasks may overlap."""
    tests = list(chosen["test"].of_each()) if "test" in chosen else []
    for test, positions in tests:
        seen = test.rows[positions]
        for name in ("train", "eval"):
            others = list(chosen[name].of_each()) if name in chosen else []
            for other, of_other in others:
                if not other.source.reads_as(test.source):
                    _check_files_apart(test, positions, other, of_other, name)
                    continue
                shared = of_other[np.isin(other.rows[of_other], seen)]
                if len(shared):
                    raise ConfigError(
                        f"data.test and data.{name} share {len(shared)} rows of {test.source.name}, the first with id "
                        f"{other.id_of(int(shared[0]))}. Choose ranges of tasks that do not overlap."
                    )


def _check_files_apart(
    test: ReadSource, positions: np.ndarray, other: ReadSource, of_other: np.ndarray, name: str
) -> None:
    """Raise `ConfigError` if rows of a file that a pattern, a list or a folder names belong to the test and to part
    `name`."""
    held = other.rows_of_files(of_other)
    for file, rows in test.rows_of_files(positions).items():
        shared = np.intersect1d(rows, held[file]) if file in held else rows[:0]
        if len(shared):
            raise ConfigError(
                f"data.test and data.{name} share {len(shared)} rows of {file}, the first is row {shared[0]} in it. "
                "Name each file in one of the two."
            )


def _fingerprint(chosen: Mapping[str, ChosenRows], shares: Mapping[str, float]) -> str:
    """Return a hash of the rows that training leaves out as shares; empty without shares."""
    if not shares:
        return ""
    digest = hashlib.sha256(repr(sorted(shares)).encode())
    for name in sorted(shares):
        rows: list[tuple[int, str]] = []
        for read, positions in chosen[name].of_each():
            ids = read.column("id").take(positions).to_pylist()
            for position, row, row_id in zip(positions.tolist(), read.rows[positions].tolist(), ids, strict=True):
                new = read.renamed.get(position)
                rows.append((row, new[0] if isinstance(new, tuple) else row_id))
        digest.update(repr(rows).encode())
    return digest.hexdigest()[:16]


def _spec(
    spec: SampleSpec,
    start: SampleSpec | None,
    chosen: Mapping[str, ChosenRows],
    training: Sequence[Source],
    indexer: Indexer,
) -> tuple[SampleSpec, list[str]]:
    """Return the job's `spec` with class names, and notes. The names come from the training data, or without it from
    the parts that are read.

    `start`: of the adapter that the job starts from, if any. Pairs hold their own wording, so DPO keeps that.
    """
    if start is not None and spec.kind == "pair":
        return start, []
    read = {name: rows.sources for name, rows in chosen.items()}
    labels, notes = [label for source in read.get("train", ()) for label in source.shards.labels], []
    if "train" not in read and not labels_of(spec.task) and training and training[0].path:
        try:
            labels = [label for source in training for label in indexer.labels(source)]
        except DataError:
            notes.append("class names come from the rows that are measured: data.train cannot be read")
    labels = labels or [label for sources in read.values() for source in sources for label in source.shards.labels]
    spec = spec.with_labels(labels)
    if not labels_of(spec.task) and "train" in read and spec.task.name == "detection":
        shards = (shard for sources in read.values() for source in sources for shard in source.open())
        used = {tag for kind in tag_kinds(shards, "tags_read")[0] for tag in kind}
        notes += tell_unused(spec.labels, used)
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


def _hints(train: ChosenRows | None, task: Task) -> str:
    """Describe where each class usually is in the training rows."""

    def records() -> Iterator[SftRecord]:
        for read, positions in train.of_each() if train is not None else ():
            wanted, start = set(positions.tolist()), 0
            for shard in read.open():
                for i, reason in enumerate(shard.column("reason").to_pylist()):
                    if reason is None and i + start in wanted and isinstance(r := read_record(shard, i), SftRecord):
                        yield r
                start += len(shard)

    return describe_regions(records(), task)


def _tell_shared_images(chosen: Mapping[str, ChosenRows]) -> list[str]:
    """Return notes on images that both the training rows and another part show."""
    if "train" not in chosen:
        return []
    seen = _image_keys(chosen["train"])
    notes = []
    for name in ("eval", "test"):
        shared = np.isin(np.unique(_image_keys(chosen[name])), seen).sum() if name in chosen else 0
        if shared:
            notes.append(f"{shared} images of data.{name} are in data.train too; `columns.group` keeps rows together")
    return notes


def _image_keys(chosen: ChosenRows) -> np.ndarray:
    """Return a hash of each image of the chosen rows, `uint64 [images]`."""
    keys = [np.zeros(0, np.uint64)]
    for read, positions in chosen.of_each():
        start = 0
        for shard in read.open():
            first, last = np.searchsorted(positions, (start, start + len(shard)))
            keys.append(shard.values_of("image_keys", positions[first:last] - start))
            start += len(shard)
    return np.concatenate(keys)
