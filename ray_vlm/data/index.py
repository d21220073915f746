"""The index of a part of a job: its usable rows in columns on disk, from which a record is made by its number.

A part is a choice of rows of the shards of its sources (`shards.py`). Its files lie in a folder that is named by their
content. An `Index` pickles as the address of that folder, and every process maps the same files.
"""

import hashlib
import io
import json
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ray_vlm.data.images import read_image
from ray_vlm.data.plan import Plan
from ray_vlm.data.plan_files import drop_pages, map_array
from ray_vlm.data.read_order import Units, find_units
from ray_vlm.data.records import BadRow, Image, Record, name_file
from ray_vlm.data.rows import Rows
from ray_vlm.data.shards import (
    IndexFolder,
    Shard,
    content_of,
    load_shard,
    pack_renamed,
    read_bad,
    read_encoded,
    read_images,
    read_record,
)
from ray_vlm.data.spec import Sample
from ray_vlm.errors import DataError, RunError
from ray_vlm.storage import stamp_file

if TYPE_CHECKING:
    from ray_vlm.data.samples import SampleBuilder

ROWS_VERSION = 2  # of `Index.fingerprint`
_TOKENS = ("image", "prompt", "answer")
_READ = 32  # shards that a process has read before it gives their pages back
_SHOWN = 20  # bad rows in an error; with `quarantine`, `bad_rows.jsonl` has all of them


class IndexedRows(Rows):
    """The records of an index, all of one kind. Each is made when it is asked for; nothing is kept."""

    def __init__(self, folder: IndexFolder, name: str):
        self.folder, self.name = folder, name
        self._maps: dict[str, tuple[mmap.mmap, np.ndarray]] = {}
        self._read: list[Shard] = []  # of the last rows

    def __reduce__(self) -> tuple[type["IndexedRows"], tuple[IndexFolder, str]]:
        return IndexedRows, (self.folder, self.name)

    @cached_property
    def about(self) -> dict[str, Any]:
        """The part's `about.json`: its shards, class names, notes and bad rows."""
        return json.loads(self.path("about.json").read_bytes())

    def path(self, name: str) -> Path:
        """Return the path of one of the part's files. Raise `DataError` if there is none."""
        try:
            return self.folder.path(f"{self.name}/{name}")
        except OSError as error:
            raise DataError(
                f"{self.folder.address}/{self.name}: a file of the index cannot be read ({error}). Start again, or go "
                "on with --resume: it is made again. All machines must see data.index_dir."
            ) from None

    def array(self, name: str) -> np.ndarray:
        """Map one of the part's arrays. Raise `DataError` if it cannot be used."""
        if name not in self._maps:
            path = self.path(f"{name}.npy")
            try:
                self._maps[name] = map_array(path)
            except ValueError as error:
                raise DataError(f"{path}: damaged ({error}). Start again, or go on with --resume.") from None
        return self._maps[name][1]

    @cached_property
    def positions(self) -> np.ndarray:
        """The position of each row among all rows of the sources, `int64 [rows]`."""
        return self.array("positions")

    def _position(self, number: int) -> int:
        """Return the position of one row; its page is given back, as in `Shard.drop_pages`."""
        position = int(self.positions[number])
        drop_pages(self._maps["positions"][0])
        return position

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(count for _, _, count, _ in self.about["shards"])])

    @cached_property
    def _renamed(self) -> "tuple[np.ndarray, Shard] | None":
        """Positions of the rows whose id in the source is not theirs alone, and their ids and groups."""
        if not self.about["renamed"]:
            return None
        shard = Shard(self.path("renamed.arrow"))
        return shard.numbers("position"), shard

    def __len__(self) -> int:
        return self.about["num_rows"]

    def where(self, number: int) -> tuple[str, str, int, int]:
        """Return the row shard, the token shard and the source of a row, and its position in the shards."""
        position = self._position(number)
        index = int(np.searchsorted(self._starts, position, side="right")) - 1
        rows, tokens, _, source = self.about["shards"][index]
        return rows, tokens, source, position - int(self._starts[index])

    @overload
    def __getitem__(self, number: int) -> Any: ...
    @overload
    def __getitem__(self, number: slice) -> list[Any]: ...
    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        number %= len(self)
        rows, _, source, position = self.where(number)
        shard = load_shard(self.folder, rows)
        record = read_record(shard, position, source)
        shard.drop_pages()
        return record if self._renamed is None else self._rename(record, self._position(number))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def _rename(self, record: Record, position: int) -> Record:
        if self._renamed is None:
            return record
        positions, shard = self._renamed
        i = int(np.searchsorted(positions, position))
        if i == len(positions) or positions[i] != position:
            return record
        name, group = shard.column("id")[i].as_py(), shard.column("group")[i].as_py()
        return replace(record, id=name, group=record.group or group)

    def used(self) -> Iterator[tuple[Shard, Shard, np.ndarray, np.ndarray]]:
        """Yield each row shard with rows of the part, its token shard, the numbers of these rows, and their positions
        in the shards."""
        edges = np.searchsorted(self.positions, self._starts)
        for number, (rows, tokens, _, _) in enumerate(self.about["shards"]):
            first, last = int(edges[number]), int(edges[number + 1])
            if first < last:
                local = self.positions[first:last] - self._starts[number]
                yield load_shard(self.folder, rows), load_shard(self.folder, tokens), np.arange(first, last), local

    def hash_prompts(self) -> str:
        """Return a hash of what a model is asked: ids and groups of rows, tokens of prompts, names and sizes of images,
        and size and time of their files."""
        digest, stamps = hashlib.sha256(), lru_cache(None)(stamp_file)
        for shard, encoded, _, local in self.used():
            offsets, ids = encoded.lists("ids")
            for first, length in zip(offsets[local], encoded.numbers("prompt_length")[local], strict=True):
                digest.update(ids[first : first + length].tobytes())
            digest.update(encoded.values_of("image_runs", local).tobytes())
            digest.update(shard.values_of("sizes", local).tobytes())
            paths = shard.column("paths").take(local).to_pylist()
            keys = shard.values_of("image_keys", local).tolist()  # for images that have no file of their own
            stamped = [[(path, path and stamps(path)) for path in row_paths] for row_paths in paths]
            names = [shard.column(name).take(local).to_pylist() for name in ("id", "group")]
            digest.update(repr((names, stamped, keys)).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def images(self, number: int) -> tuple[Image, ...]:
        """Return where the images of a row are."""
        rows, _, _, position = self.where(number)
        shard = load_shard(self.folder, rows)
        _, images, _ = read_images(shard, position)
        shard.drop_pages()
        return images

    def sample(self, builder: "SampleBuilder", number: int, images: Sequence[Image] | None = None) -> Sample:
        """Return what is trained of a row, from its token ids and its images; no record is made."""
        rows, tokens, _, position = self.where(number)
        shard = load_shard(self.folder, rows)
        name, listed, sizes = read_images(shard, position)
        encoded = load_shard(self.folder, tokens)
        sample = builder.sample(read_encoded(encoded, position), images or listed, sizes, name)
        self._read += (shard, encoded)
        if len(self._read) > _READ:
            read, self._read = self._read, []
            for one in set(read):
                one.drop_pages()
        return replace(sample, number=number)


def share_plan(plan: Plan, rows: IndexedRows) -> Plan:
    """Return the plan with its arrays in files beside the part's, which all processes of a node map. Raise `RunError`
    if they cannot be written."""
    stored = plan.store(rows.folder.folder(rows.name), local_copy=partial(_fetch, rows.folder, rows.name))
    if stored.folder is not None:
        try:
            rows.folder.publish(rows.name, stored.folder.names)
        except OSError as error:
            raise RunError(
                f"data.index_dir={rows.folder.address!r} cannot be written ({error}). Mend it, or set another folder."
            ) from error
    return stored


def _fetch(folder: IndexFolder, part: str, _: str) -> Path:
    """Return the folder of a part on this node, with the arrays of its plans."""
    return folder.fetch(part, folder.names(part))


class Index:
    """The usable rows of a part, in file order.

    `records`: a record by its number. `image_tokens`, `prompt_tokens` (without images) and `answer_tokens` are
    `int32 [rows]`, mapped.
    """

    def __init__(self, folder: IndexFolder, name: str):
        self.records = IndexedRows(folder, name)
        self.image_tokens, self.prompt_tokens, self.answer_tokens = (
            self.records.array(f"{kind}_tokens") for kind in _TOKENS
        )

    def __reduce__(self) -> tuple[type["Index"], tuple[IndexFolder, str]]:
        return Index, (self.records.folder, self.records.name)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names that the sources declare."""
        return tuple(self.records.about["labels"])

    @property
    def notes(self) -> tuple[str, ...]:
        """What looks odd about the sources."""
        return tuple(self.records.about["notes"])

    @cached_property
    def bad(self) -> tuple[BadRow, ...]:
        """The rows that were left out."""
        return tuple(BadRow(*row) for row in self.records.about["bad"])

    @property
    def tokens(self) -> np.ndarray:
        """All tokens of each row, `int64 [rows]`."""
        return self.image_tokens + self.prompt_tokens + self.answer_tokens.astype(np.int64)

    @property
    def token_costs(self) -> np.ndarray:
        """Work of each row, `float32 [rows]`: its tokens, with image tokens counted twice for the image encoder."""
        return (self.tokens + self.image_tokens).astype(np.float32)

    @cached_property
    def kinds(self) -> tuple[list[tuple[str, ...]], np.ndarray]:
        """The distinct tuples of classes and conditions, and the number of each row's, `int32 [rows]`."""
        return tag_kinds(self._shards(), "tags", self.records.positions)

    @cached_property
    def sources(self) -> np.ndarray:
        """The position of each row's source among those mixed, `int32 [rows]`."""
        shards = self.records.about["shards"]
        numbers = np.repeat([source for *_, source in shards], [count for _, _, count, _ in shards])
        return numbers[self.records.positions].astype(np.int32)

    def image_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (width, height) of every image, `int64 [images, 2]`, and the row of each, `int64 [images]`."""
        sizes, rows = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.int64)]
        for shard, _, numbers, local in self.records.used():
            sizes.append(shard.values_of("sizes", local).reshape(-1, 2))
            rows.append(np.repeat(numbers, np.diff(shard.lists("sizes")[0])[local] // 2))
        return np.concatenate(sizes).astype(np.int64), np.concatenate(rows)

    def file_sizes(self) -> dict[str, tuple[int, int]]:
        """Return (width, height) of every image in a file of its own, by its path."""
        sizes: dict[str, tuple[int, int]] = {}
        for shard, _, _, local in self.records.used():
            paths = shard.column("paths").take(local).flatten().to_pylist()
            sides = shard.values_of("sizes", local).reshape(-1, 2).tolist()
            sizes |= {path: (w, h) for path, (w, h) in zip(paths, sides, strict=True) if path is not None}
        return sizes

    def with_regions(self) -> Iterator[Record]:
        """Yield the records that have boxes or points."""
        for shard, _, numbers, local in self.records.used():
            for i in numbers[shard.numbers("num_regions")[local] > 0].tolist():
                yield self.records[i]

    def units(self) -> Units:
        """Return the rows that are read together, since their images lie in one row group of a Parquet file."""
        used = ((shard, local) for shard, _, _, local in self.records.used())
        return find_units(self._shards(), used, len(self))

    def fingerprint(self, version: int = ROWS_VERSION) -> str:
        """Return a hash of the rows in the order of the plan's row numbers: ids, names and sizes of images, and
        contents. `version`: that of the run that is resumed; 1 takes as long as reading all rows."""
        if version == 1:
            return fingerprint_records(self.records)
        digest = hashlib.sha256()
        for shard, _, _, local in self.records.used():
            digest.update(shard.numbers("digest")[local].tobytes())
        return digest.hexdigest()[:16]

    def _shards(self) -> Iterator[Shard]:
        return (load_shard(self.records.folder, name) for name, *_ in self.records.about["shards"])


def tag_kinds(
    shards: Iterable[Shard], column: str, positions: np.ndarray | None = None
) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """Return the distinct tuples of tags in a column of row shards, and the number of each row's, `int32 [rows]`.
    `positions`: of the rows that are wanted."""
    numbers: dict[tuple[str, ...], int] = {}
    codes = [np.zeros(0, np.int32)]
    for shard in shards:
        kinds, kind_of = shard.tags(column)
        codes.append(np.array([numbers.setdefault(kind, len(numbers)) for kind in kinds], np.int32)[kind_of])
    joined = np.concatenate(codes)
    if positions is None:
        return list(numbers), joined
    used, first, kind_of = np.unique(joined[positions], return_index=True, return_inverse=True)
    order = np.argsort(first)  # the order of appearance
    kinds = list(numbers)
    return [kinds[used[i]] for i in order], np.argsort(order).astype(np.int32)[kind_of]


@dataclass(frozen=True)
class PartRows:
    """Rows of some sources, chosen for a part.

    `shards`: (row shard, token shard, rows, source) of each, in order. `chosen`: positions of the part's rows among
    theirs, sorted, `int64`. `renamed`: position -> (id, group) of rows whose id is not theirs alone, or the reason
    against it. `paths`: of the sources.
    """

    folder: IndexFolder
    shards: Sequence[tuple[str, str, int, int]]
    chosen: np.ndarray
    renamed: Mapping[int, tuple[str, str] | str]
    labels: Sequence[str]
    notes: Sequence[str]
    paths: Sequence[str]


@dataclass(frozen=True)
class JoinedRows:
    """The usable rows of a part.

    `positions`: as in `PartRows.chosen`. `tokens`: of images, prompt and answer, `int32 [rows, 3]`. `chosen`: rows by
    source; `usable`: those of them that can be used.
    """

    part: PartRows
    positions: np.ndarray
    tokens: np.ndarray
    bad: tuple[BadRow, ...]
    chosen: Mapping[int, int]
    usable: Mapping[int, int]


def join_rows(part: PartRows, max_tokens: int | None) -> JoinedRows:
    """Join what row shards and token shards say of a part's rows."""
    tokens, positions = [np.zeros((0, 3), np.int32)], [np.zeros(0, np.int64)]
    bad: list[BadRow] = []
    chosen, usable = Counter[int](), Counter[int]()
    starts = np.cumsum([0, *(count for _, _, count, _ in part.shards)])
    edges = np.searchsorted(part.chosen, starts)
    for number, (row_name, token_name, _, source) in enumerate(part.shards):
        start = int(starts[number])
        local = part.chosen[edges[number] : edges[number + 1]] - start
        if not len(local):
            continue
        shard, encoded = load_shard(part.folder, row_name), load_shard(part.folder, token_name)
        counts = np.stack([encoded.numbers(f"{kind}_tokens") for kind in _TOKENS], axis=1)
        reasons = _reasons(shard, encoded, local, counts, max_tokens)
        names = (
            {i: part.renamed[i + start] for i in local.tolist() if i + start in part.renamed} if part.renamed else {}
        )
        for i, name in names.items():
            if isinstance(name, str):
                reasons.setdefault(i, name)
        good = local[~np.isin(local, list(reasons))] if reasons else local
        positions.append(good + start)
        tokens.append(counts[good])
        files = shard.summary().files if reasons else ()
        for i in sorted(reasons):
            row, new = read_bad(shard, i, source), names.get(i, "")
            reason = name_file(reasons[i], files, i)
            bad.append(replace(row, id=row.id if isinstance(new, str) else new[0], reason=reason))
        chosen[source] += len(local)
        usable[source] += len(good)
    return JoinedRows(part, np.concatenate(positions), np.concatenate(tokens), tuple(bad), chosen, usable)


def _reasons(
    shard: Shard, encoded: Shard, local: np.ndarray, tokens: np.ndarray, max_tokens: int | None
) -> dict[int, str]:
    """Return why rows at the positions `local` of a shard cannot be used. `tokens`: of images, prompt and answer,
    `int32 [rows, 3]`."""
    reasons: dict[int, str] = {}
    for column in (shard.column("reason"), encoded.column("reason")):
        for i in local[column.is_valid().to_numpy(zero_copy_only=False)[local]].tolist():
            reasons.setdefault(i, column[i].as_py())
    if max_tokens is not None:
        for i in local[tokens[local].sum(axis=1) > max_tokens].tolist():
            reason = (
                f"{tokens[i].sum()} tokens ({tokens[i, 0]} of images), above data.max_tokens={max_tokens}; lower "
                "data.max_pixels, or raise the limit"
            )
            reasons.setdefault(i, reason)
    return reasons


def check_bad(joined: JoinedRows, on_bad_row: str) -> None:
    """Raise `DataError` with all reasons if a row is bad and `on_bad_row` is `raise`, or if a source has no usable
    row."""
    problems: list[str] = []
    for source, count in joined.chosen.items():
        path, bad = joined.part.paths[source], [row for row in joined.bad if row.source == source]
        if bad and on_bad_row == "raise":
            problems += describe_bad(bad, count, path)
        elif not joined.usable[source]:
            problems.append(f"{path}: no usable row among {count}. {'; '.join(row.reason for row in bad[:3])}")
    if problems:
        raise DataError(problems)


def describe_bad(bad: Iterable[BadRow], num_rows: int, path: str) -> list[str]:
    """Return one line for each of the first bad rows, and a last line with the fix."""
    bad = list(bad)
    lines = [f"{path}: row {b.row} (id {b.id or '?'}): {b.reason}" for b in bad[:_SHOWN]]
    more = f" ({len(bad) - _SHOWN} more not shown)" if len(bad) > _SHOWN else ""
    lines.append(
        f"{path}: {len(bad)} of {num_rows} rows are bad{more}. Mend or remove them, or set "
        "data.on_bad_row=quarantine to write them to bad_rows.jsonl and go on without them."
    )
    return lines


def write_part(joined: JoinedRows) -> Index:
    """Write the files of a part into a folder named by their content, unless it is there already. Raise `OSError`."""
    part, positions, renamed = joined.part, joined.positions, {}
    if part.renamed:
        shared = np.fromiter(part.renamed, np.int64, len(part.renamed))
        names = {i: part.renamed[i] for i in positions[np.isin(positions, shared)].tolist()}
        renamed = {i: name for i, name in names.items() if not isinstance(name, str)}
    about = {
        "num_rows": len(positions),
        "shards": [list(shard) for shard in part.shards],
        "labels": list(dict.fromkeys(part.labels)),
        "notes": list(part.notes),
        "bad": [[row.row, row.id, row.reason, row.source] for row in joined.bad],
        "renamed": len(renamed),
    }
    files = {"positions.npy": _array(positions)}
    files |= {f"{kind}_tokens.npy": _array(joined.tokens[:, number]) for number, kind in enumerate(_TOKENS)}
    if renamed:
        files["renamed.arrow"] = pack_renamed(renamed)
    text = json.dumps(about).encode()
    digest = hashlib.sha256(text)
    for data in files.values():
        digest.update(data)
    name = f"parts/{digest.hexdigest()[:16]}"
    sizes = part.folder.store.files(name)
    for file, data in {**files, "about.json": text}.items():  # about.json last: with it the part is whole
        if sizes.get(file) != len(data):  # it is not there, or the machine went down while it was written
            part.folder.write(f"{name}/{file}", data)
    return Index(part.folder, name)


def _array(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(values))
    return buffer.getvalue()


def fingerprint_records(records: Iterable[Record]) -> str:
    """Return the fingerprint that runs of earlier versions keep."""
    digest = hashlib.sha256()
    for r in records:
        names = [Path(i).name if isinstance(i, str) else hashlib.sha256(read_image(i)).hexdigest() for i in r.images]
        digest.update(repr((r.id, r.row, names, r.sizes, content_of(r))).encode())
    return digest.hexdigest()[:16]
