"""Build the shards of the index: read and check the rows of a source and tokenise them, in many processes.

A piece of rows is the unit of work. What is done stays: a build that was interrupted goes on with the missing pieces,
and two runs that build one index at once write the same files.
"""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from ray_vlm.config.data import Source
from ray_vlm.config.schema import Model
from ray_vlm.data.images import SizeCache
from ray_vlm.data.measure import NONE_KNOWN, KnownSizes, measure_row
from ray_vlm.data.parallel import Spread
from ray_vlm.data.preprocessing import RULES
from ray_vlm.data.records import BadRow, ImageRange, Record
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.shards import (
    VERSION,
    IndexedRow,
    IndexFolder,
    load_shard,
    open_shard,
    pack_rows,
    pack_tokens,
    read_records,
)
from ray_vlm.data.sources.creation import prepare_source
from ray_vlm.data.sources.detect import settle_source
from ray_vlm.data.sources.formats import (
    SourceReader,
    labels_of_piece,
    merge_labels,
    source_version,
)
from ray_vlm.data.sources.pieces import Piece
from ray_vlm.data.spec import EncodedRow, SampleSpec
from ray_vlm.data.suspicions import regions_of, summarise
from ray_vlm.errors import DataError, RayVlmError, RunError
from ray_vlm.machine import installed_version
from ray_vlm.models.load import resolve_name
from ray_vlm.models.processor import fingerprint_processor
from ray_vlm.runs.console import Progress, lasting
from ray_vlm.storage import describe_file, is_remote
from ray_vlm.tasks import row_tags

logger = logging.getLogger(__name__)
PIECE_ROWS = 16384  # rows of a piece: some seconds of work; a process maps a file for each piece that it reads
_THREADS, _TURN = 8, 64  # threads that wait for image headers, and rows that each takes at a time
_REMOTE_THREADS, _REMOTE_TURN = 32, 4  # the same for an object store
_BATCH = 256  # rows that are tokenised at a time
_KNOWN = "+known-"  # in the names of shards with rows whose images are gone
_BAD_NAME = "image "  # how reasons against names of images begin, which depend on the folder as it is now


@dataclass(frozen=True)
class SourceShards:
    """The row shards of a source in order: their names, the rows of each, and the class names that it declares."""

    source: Source
    names: tuple[str, ...]
    counts: tuple[int, ...]
    labels: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """All rows of the source, with bad ones."""
        return sum(self.counts)


@dataclass(frozen=True)
class CheckLimits:
    """The settings of `data` that decide whether a row can be used."""

    max_image_pixels: int
    on_bad_box: str


class ShardInfo(NamedTuple):
    """A row shard: the fingerprint of its piece, its name, its number of rows, and their class names."""

    piece: str
    name: str
    num_rows: int
    labels: list[str]


@dataclass(frozen=True)
class RowsWork:
    """Reads and checks one piece after another, and writes their row shards into `<folder>/<key>/`.

    `known`: as in `build_rows`.
    """

    reader: SourceReader
    limits: CheckLimits
    task: str
    folder: IndexFolder
    key: str
    known: KnownSizes = field(default_factory=dict)

    def __call__(self, piece: Piece) -> ShardInfo:
        rows = self.reader.read(piece)
        sizes = SizeCache(self.limits.max_image_pixels).read_size  # of this piece alone: files may change later

        def check(some: Sequence[Record | BadRow]) -> list[Record | BadRow]:
            limits = self.limits
            return [measure_row(r, limits.max_image_pixels, limits.on_bad_box, self.known, sizes) for r in some]

        remote = is_remote(self.reader.source.image_root or self.reader.source.paths[0])
        threads, turn = (_REMOTE_THREADS, _REMOTE_TURN) if remote else (_THREADS, _TURN)
        turns = [rows[i : i + turn] for i in range(0, len(rows), turn)]
        with ThreadPoolExecutor(threads) as pool:
            checked = list(chain.from_iterable(pool.map(check, turns)))
        labels = labels_of_piece(piece, rows)
        summary = summarise(self.reader.source, zip(rows, checked, strict=True), labels)
        summary.faults = _faults(rows, checked)
        summary.files = self.reader.files_of(piece)
        indexed = [_index(read, good, self.task) for read, good in zip(rows, checked, strict=True)]
        # Another state of the images gives another file, since the tokens of each are kept too.
        state = f"+{_digest(sorted(summary.faults.items()))}" if summary.faults else "+"
        rescued = f"{_KNOWN}{_digest(sorted(self.known.items()))}" if self.known else ""
        name = f"{self.key}/{piece.fingerprint}{state}{rescued}.arrow"
        self.folder.write(name, pack_rows(indexed, summary))
        return ShardInfo(piece.fingerprint, name, len(rows), labels)


def _index(read: Record | BadRow, checked: Record | BadRow, task: str) -> IndexedRow:
    tags_read = () if isinstance(read, BadRow) else row_tags(task, read)
    if isinstance(checked, BadRow):
        return IndexedRow(read, checked, tags_read)
    return IndexedRow(read, checked, tags_read, row_tags(task, checked), len(regions_of(checked)))


def _faults(rows: Sequence[Record | BadRow], checked: Sequence[Record | BadRow]) -> dict[str, list[int] | None]:
    """Return the images of rows that cannot be used, each with its file's size and time: if these change, the rows are
    checked again."""
    faults: dict[str, list[int] | None] = {}
    for read, result in zip(rows, checked, strict=True):
        if isinstance(read, BadRow):
            if read.reason.startswith(_BAD_NAME):
                faults[""] = None
        elif isinstance(result, BadRow):
            faults |= {image: _stamp(image) for image in read.images if isinstance(image, str)}
            if any(isinstance(image, ImageRange) for image in read.images):
                faults[""] = None  # its tar is as it was, but reading from a store may have failed
    return faults


def _holds(folder: IndexFolder, name: str) -> bool:
    """Return whether a row shard can be used and the images of its bad rows are as they were."""
    if (shard := open_shard(folder, name)) is None:
        return False
    return all(path and _stamp(path) == stamp for path, stamp in shard.summary().faults.items())


def _stamp(image: str) -> list[int] | None:
    try:
        return list(describe_file(image)[1:])
    except (OSError, ValueError):
        return None


def build_rows(
    source: Source,
    limits: CheckLimits,
    task: str,
    folder: IndexFolder,
    spread: Spread,
    known: KnownSizes = NONE_KNOWN,
) -> SourceShards:
    """Read and check a source, except what the folder has already. Raise `DataError` if the file cannot be used, and
    `RunError` if the index cannot be written.

    `known`: sizes of images that could be read when a resumed run began.
    """
    with lasting(f"reading {source.name}"):
        prepare_source(source)
        source = settle_source(source)
    before = source_version(source)
    listing = _listing_name(source, limits, task, before)
    with writing_index(folder):
        shards = _read_listing(folder, listing, source)
        if shards is None:
            shards = _read_source(_rows_work(source, limits, task, folder), spread)
            if (after := source_version(source)) != before:
                changed = _first_changed(before, after) or source.name
                raise DataError(f"{changed}: it has changed while it was read. Start again when it is complete.")
            about = [source.model_dump(mode="json"), before, shards.names, shards.counts, shards.labels]
            folder.write(listing, json.dumps(about).encode())
        return _with_known(shards, limits, task, folder, known) if known else shards


def read_labels(source: Source, limits: CheckLimits, task: str, folder: IndexFolder) -> Sequence[str]:
    """Return the class names that a source declares, from the index if it has them. Rows are not checked. Raise
    `DataError` if the file cannot be used."""
    prepare_source(source)
    source = settle_source(source)
    shards = _read_listing(folder, _listing_name(source, limits, task, source_version(source)), source)
    if shards is not None:
        return shards.labels
    reader = SourceReader(source)
    labels = [labels_of_piece(piece, reader.read(piece)) for piece in reader.pieces(PIECE_ROWS)]
    return merge_labels(source, labels, reader.declared)


def _rows_work(source: Source, limits: CheckLimits, task: str, folder: IndexFolder) -> RowsWork:
    """Return what reads a source. The folder of its row shards depends on the settings, on the version of ray_vlm, and
    on the folder or the tar of the images, since rows hold their paths or positions in it."""
    reader = SourceReader(source)
    root = reader.root if isinstance(reader.root, str) else [reader.root.address, *reader.root.version]
    return RowsWork(reader, limits, task, folder, f"rows/{_digest([*_settings(source, limits, task), root])}")


def _settings(source: Source, limits: CheckLimits, task: str) -> list[Any]:
    """Return what rows depend on beside the files of a source."""
    settings = source.model_dump(mode="json", exclude={"ratio", "weight", "create"})
    return [settings, limits.__dict__, task, [VERSION, RULES, PIECE_ROWS, installed_version("pillow")]]


def _listing_name(source: Source, limits: CheckLimits, task: str, version: list[Any]) -> str:
    return f"sources/{_digest(_settings(source, limits, task))}-{_digest(version)}.json"


def _first_changed(before: list[Any], after: list[Any]) -> str:
    """Return the address of the first file whose version changed, empty if none can be named."""
    start = next((i for i in range(0, len(before), 3) if before[i : i + 3] != after[i : i + 3]), 0)
    return str(before[start]) if start < len(before) else ""


def _is_present(about: object, version: list[Any]) -> bool:
    """Return whether the files of a source are as they were. `about`: the source as a listing has it."""
    try:
        return source_version(Source.model_validate(about)) == version
    except (ValueError, RayVlmError):
        return False


def _read_listing(folder: IndexFolder, listing: str, source: Source) -> SourceShards | None:
    """Return the shards that a listing names, if all of them still hold."""
    try:
        _, _, names, counts, labels = json.loads(folder.path(listing).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not all(_holds(folder, name) for name in names):
        return None
    return SourceShards(source, tuple(names), tuple(counts), tuple(labels))


def _read_source(work: RowsWork, spread: Spread) -> SourceShards:
    """Read a source's pieces in order; those that are there and still hold are not made again."""
    source, made = work.reader.source, defaultdict[str, list[str]](list)
    for name in work.folder.names(work.key):
        made[name.partition("+")[0]].append(f"{work.key}/{name}")
    order: list[str] = []
    done: dict[str, ShardInfo] = {}

    def missing() -> Iterator[Piece]:
        for piece in work.reader.pieces(PIECE_ROWS):
            order.append(piece.fingerprint)
            names = (name for name in made[piece.fingerprint] if _KNOWN not in name and _holds(work.folder, name))
            if (name := next(names, None)) is not None:
                shard = load_shard(work.folder, name)
                done[piece.fingerprint] = ShardInfo(piece.fingerprint, name, len(shard), shard.summary().labels)
            else:
                yield piece

    waiting, total = missing(), None
    first: list[Piece] = []
    for piece in waiting:
        first.append(piece)
        if piece.holds_rows:
            break
    else:  # all pieces are small until they are read, so they can be counted
        total = sum(piece.num_rows for piece in first) if first else None
    if first and (line := work.reader.describe_copies()) is not None:
        logger.info(line)
    progress, rows = Progress(f"checking the rows of {source.name}", total), 0
    for info in spread.run(work, chain(first, waiting)):
        done[info.piece], rows = info, rows + info.num_rows
        progress.reach(rows)
    infos = [done[piece] for piece in order]
    labels = merge_labels(source, [info.labels for info in infos], work.reader.declared)
    return SourceShards(source, tuple(i.name for i in infos), tuple(i.num_rows for i in infos), tuple(labels))


def _with_known(
    shards: SourceShards, limits: CheckLimits, task: str, folder: IndexFolder, known: KnownSizes
) -> SourceShards:
    """Return the shards with those replaced whose images are gone but have a known size. Rows are then usable that a
    run would refuse at its start, so these shards have names of their own."""
    gone = {}
    for name in shards.names:
        shard = open_shard(folder, name)
        paths = shard.summary().faults if shard is not None else {}
        if some := {path: known[path] for path in paths if path in known}:
            gone[name] = some
    if not gone:
        return shards
    work, names = _rows_work(shards.source, limits, task, folder), list(shards.names)
    for number, piece in enumerate(work.reader.pieces(PIECE_ROWS)):
        if names[number] in gone:
            names[number] = replace(work, known=gone[names[number]])(piece).name
    return replace(shards, names=tuple(names))


@dataclass(frozen=True)
class TokensWork:
    """Turns the rows of one row shard after another into token ids, and writes their token shards into
    `<folder>/<key>/`. Returns the number of rows."""

    spec: SampleSpec
    folder: IndexFolder
    key: str

    def name(self, rows: str) -> str:
        """Return the name of the token shard of a row shard."""
        return f"{self.key}/{rows.removeprefix('rows/').replace('/', '-')}"

    def __call__(self, rows: str) -> int:
        shard, builder = load_shard(self.folder, rows), load_sample_builder(self.spec)
        encoded: list[EncodedRow | str] = ["" for _ in range(len(shard))]
        good = np.flatnonzero(shard.column("reason").is_null().to_numpy(zero_copy_only=False))
        runs = np.split(good, np.flatnonzero(np.diff(good) > 1) + 1)  # of good rows without a bad one between
        records = chain.from_iterable(read_records(shard, int(run[0]), int(run[-1]) + 1) for run in runs if len(run))
        for start in range(0, len(good), _BATCH):
            some = good[start : start + _BATCH].tolist()
            for position, row in zip(some, builder.encode(list(islice(records, _BATCH))), strict=True):
                encoded[position] = row
        self.folder.write(self.name(rows), pack_tokens(encoded))
        return len(shard)


def build_tokens(shards: SourceShards, spec: SampleSpec, folder: IndexFolder, spread: Spread) -> tuple[str, ...]:
    """Tokenise the rows of a source, except what the folder has already, and return the names of the token shards in
    the order of the row shards. Raise `RunError` if the index cannot be written."""
    base = Model(name=spec.model.name, revision=spec.model.revision)
    neutral = replace(spec, model=base, token_weights=(), split="", image_keys=False)  # the rest changes no token
    files = fingerprint_processor(base, resolve_name(base.name))
    libraries = [installed_version(name) for name in ("tokenizers", "transformers", "jinja2")]
    key = f"tokens/{_digest([repr(neutral), files, VERSION, RULES, libraries])}"
    work = TokensWork(neutral, folder, key)
    with writing_index(folder):
        made = {f"{key}/{name}" for name in folder.names(key)}
        rows_of = dict(zip(shards.names, shards.counts, strict=True))
        missing = [n for n in rows_of if work.name(n) not in made or open_shard(folder, work.name(n)) is None]
        progress, rows = Progress(f"tokenising the rows of {shards.source.name}", sum(rows_of[n] for n in missing)), 0
        for count in spread.run(work, missing):
            progress.reach(rows := rows + count)
    return tuple(work.name(name) for name in shards.names)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def writing_index(folder: IndexFolder) -> Iterator[None]:
    """Turn an `OSError` of the folder in the body into a `RunError`."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"data.index_dir={folder.address!r} cannot be written or read ({error}). Free or mend it, or set "
            "data.index_dir to another folder; what is done is kept."
        ) from error


def prune(folder: IndexFolder) -> tuple[int, int]:
    """Delete files of other versions, and of sources that have changed or are gone. Return how many, and their bytes.

    Runs that still use an index of such a source need it until they end.
    """

    def plain(name: str) -> str:
        return f"{name.partition(_KNOWN)[0]}.arrow" if _KNOWN in name else name

    used, sources = set[str](), set[str]()
    for name in folder.names("sources"):
        try:
            source, version, names, _, _ = json.loads(folder.path(f"sources/{name}").read_bytes())
        except (FileNotFoundError, ValueError):
            continue
        if _is_present(source, version):
            used |= set(names)
            sources.add(f"sources/{name}")
    tokens = {name.removeprefix("rows/").replace("/", "-") for name in used}
    files, count, size = folder.store.files(), 0, 0
    parts = set[str]()  # whose shards are all used
    for name in files:
        if name.startswith("parts/") and name.endswith("/about.json"):
            with suppress(FileNotFoundError, ValueError, KeyError):
                shards = json.loads(folder.path(name).read_bytes())["shards"]
                if all(plain(rows) in used for rows, *_ in shards):
                    parts.add(name.removesuffix("/about.json"))
    for name, num_bytes in files.items():
        kind, _, rest = name.partition("/")
        if kind == "rows":
            keep = plain(name) in used
        elif kind == "tokens":
            keep = plain(rest.partition("/")[2]) in tokens
        elif kind == "parts":
            keep = name.rpartition("/")[0] in parts
        else:
            keep = kind != "sources" or name in sources
        if not keep:
            folder.store.remove(name)
            count, size = count + 1, size + num_bytes
    return count, size
