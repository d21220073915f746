"""Detect the format of a source from its files: their names, the keys of JSON objects, and the columns of some rows."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ray_vlm.config.check import check_job
from ray_vlm.config.data import FormatName, Source
from ray_vlm.config.row_files import split_suffix
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.records import BadRow
from ray_vlm.data.sources.creation import prepare_source
from ray_vlm.data.sources.files import find_files
from ray_vlm.data.sources.folder_evidence import (
    Sign,
    folder_signs,
    has_tables,
    is_saved,
    json_sign,
    list_folder,
    metadata_of,
    xml_sign,
    yaml_sign,
)
from ray_vlm.data.sources.hub import is_hub
from ray_vlm.data.sources.pieces import unreadable_file
from ray_vlm.data.sources.row_evidence import NOT_ATTRIBUTES, Match, RowMarks, labels_of_rows, match_row
from ray_vlm.data.sources.tables import no_rows, open_table
from ray_vlm.errors import ConfigError, DataError
from ray_vlm.storage import is_remote, join, local_path, split_options

logger = logging.getLogger(__name__)
_ROWS, _IMAGE_ROWS = 200, 20  # that are looked at; those of Parquet and Arrow may hold images
_MOST = 0.75  # of the rows that must be of the format; the others are bad rows of it
_BINARY = (".parquet", ".arrow", ".feather")
_FIX = "Set `format` of the source, or name its columns in `columns`."


class Detected(NamedTuple):
    """A format, and what speaks for it, as the end of a sentence that begins with "since"."""

    format: FormatName
    reason: str


def detect_format(source: Source) -> Detected:
    """Return the format that a source looks like. Raise `DataError` if its files cannot be read, are of no format, or
    may be of several; it names the likeliest ones.

    Only names and the first rows are looked at: whether all rows can be used is for the reader to say.
    """
    ends = dict.fromkeys((source.paths[0], source.paths[-1]))
    each = [_detect(source.model_copy(update={"path": address})) for address in ends]
    if each[0].format != each[-1].format:
        first, last = each[0], each[-1]
        raise DataError(
            f"{source.name}: the files differ: {source.paths[0]} looks like {first.format}, since {first.reason}; "
            f"{source.paths[-1]} like {last.format}, since {last.reason}. Give each format an entry of data.mix."
        )
    return each[0]


def describe_likely(source: Source) -> str:
    """Return a sentence with the format that a source looks like, for errors; empty if it is the one that the source
    has, or not clear."""
    try:
        detected = detect_format(source)
    except DataError:
        return ""
    if detected.format == source.format:
        return ""
    return f" It looks like format={detected.format}: {detected.reason}."


def settle_source(source: Source, name: str = "") -> Source:
    """Return a source with the format that it looks like in place of `auto`; a line says which. Raise `DataError` as
    `detect_format` does. `name`: of the source in the job."""
    if source.format != "auto" or not source.path:
        return source
    prepare_source(source)
    detected = detect_format(source)
    logger.info(f"{name or source.name}: format {detected.format}, since {detected.reason}")
    return source.model_copy(update={"format": detected.format})


def settle_formats(job: JobConfig, raise_faults: bool = True) -> JobConfig:
    """Return the job with the formats that its sources look like in place of `auto`.

    Raise `DataError` as `detect_format` does, with the faults of all sources; without `raise_faults` a source with one
    keeps `auto`, and its reader will name the fault. Raise `ConfigError` where the job's method or task takes no such
    rows.
    """
    data = job.data
    problems: list[str] = []

    def settle(source: Source | None, name: str) -> Source | None:
        try:
            return source and settle_source(source, name)
        except DataError as error:
            problems.extend(error.problems)
            return source

    settled: dict[str, Any] = {part: settle(getattr(data, part), f"data.{part}") for part in ("train", "eval", "test")}
    settled["mix"] = tuple(settle(value, f"data.mix[{i}]") for i, value in enumerate(data.mix))
    if problems and raise_faults:
        raise DataError(list(dict.fromkeys(problems)))
    if all(getattr(data, part) == value for part, value in settled.items()):
        return job
    job = job.model_copy(update={"data": data.model_copy(update=settled)})
    if broken := check_job(job):
        raise ConfigError([f"{key}: {text}" for key, text in broken])
    return job


def _detect(source: Source) -> Detected:
    """Return the format of a source of one path."""
    (address,) = find_files(source)[:1] if is_hub(source) else source.paths
    if _is_folder(address):
        return _detect_folder(source, address)
    if is_hub(source):
        return _detect_file(source, address)
    # A data.yaml and a file of CVAT have splits inside; whether others may have one is for their reader to say.
    return _detect_file(source, find_files(source.model_copy(update={"split": None}))[0])


def _is_folder(address: str) -> bool:
    if not is_remote(address):
        return Path(local_path(address)).is_dir()
    name = split_options(address)[0]
    return not name.startswith("hf://") and not PurePosixPath(name).suffix and not set("*?[") & set(name)


def _detect_folder(source: Source, address: str) -> Detected:
    try:
        listing = list_folder(address)
    except (OSError, ValueError, ImportError) as error:
        raise unreadable_file(address, error) from None
    if not listing.files:
        raise DataError(f"{source.name}: an empty folder. Give `path` the location of the rows.")
    if is_saved(listing):
        return _detect_rows(source, find_files(source)[0])
    signs = folder_signs(listing)
    good = [sign for sign in signs if not sign.fault]
    whole = [sign for sign in good if sign.format != "image_folder"]
    if len(whole) > 1 or (len(good) > 1 and whole):
        raise _unclear(source, [(sign.format, sign.reason) for sign in (*whole, *good)])
    named = {"coco": False, "cvat": "annotations.xml" in listing.files}  # whether the folder stands for its one file
    if whole and not named.get(whole[0].format, True):
        raise DataError(
            f"{source.name}: a folder, and in it {whole[0].reason}, so its format is {whole[0].format}. Give that "
            "file as `path`."
        )
    if whole:
        return Detected(whole[0].format, whole[0].reason)
    if broken := [sign for sign in signs if sign.fault and sign.format != "image_folder"]:
        raise _faulty(source, [*broken, *(sign for sign in signs if sign not in broken)])
    if tables := metadata_of(listing.files):
        raise DataError(
            f"{source.name}: {tables[0]} lists what the images are. Give {join(address, tables[0])} as `path`, with "
            "format=image_csv for classes, or auto."
        )
    if good and has_tables(listing):
        raise DataError(
            f"{source.name}: {good[0].reason} (format=image_folder), and it has tables too, which may list them "
            "(format=image_csv, and others). Set `format`, or give the file with the rows as `path`."
        )
    if good:
        return Detected(good[0].format, good[0].reason)
    if has_tables(listing):
        return _detect_rows(source, find_files(source)[0])
    if signs:
        raise _faulty(source, signs)
    raise DataError(
        f"{source.name}: a folder that is of no known format: it has neither rows, nor annotations, nor a folder of "
        f"images for each class; it begins with {', '.join(sorted(listing.files)[:3])}. Give the file with the rows."
    )


def _detect_file(source: Source, address: str) -> Detected:
    if split_options(address)[0].lower().endswith((".data", ".names")):
        return Detected("yolo", f"{PurePosixPath(address).name} is darknet's description of a data set")
    path, sign = PurePosixPath(split_options(address)[0]), None
    suffix, packed = split_suffix(address)
    if packed and suffix in (".yaml", ".yml", ".xml"):
        raise DataError(f"{address}: {suffix} inside {packed} is not read. Unpack it.")
    if suffix in (".yaml", ".yml"):
        if (sign := yaml_sign(address, path.name)) is None:
            raise DataError(
                f"{address}: neither `names` nor `train` in it, and YAML is read of YOLO alone (format=yolo). Give the "
                "data.yaml of the data set, or the file with the rows."
            )
    elif suffix == ".xml":
        sign = xml_sign(address, path.name)
    elif suffix == ".json":
        sign = json_sign(address, path.name)
    if sign is None:
        return _detect_rows(source, address)
    if sign.fault:
        raise _faulty(source, [sign])
    return Detected(sign.format, sign.reason)


def _detect_rows(source: Source, address: str) -> Detected:
    table = open_table(address)
    suffix, _ = split_suffix(address)
    piece = next(iter(table.pieces(_IMAGE_ROWS if suffix in _BINARY else _ROWS)), None)
    if piece is None:
        raise no_rows(source.name)
    read = table.read(piece)
    rows = [row[1] for row in read if not isinstance(row, BadRow)]
    if not rows:
        reason = next((row.reason for row in read if isinstance(row, BadRow)), "")
        raise DataError(f"{source.name}: none of its first {len(read)} rows can be read: {reason}.")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return detect_rows(source, [RowMarks(_renamed(row, source), [*names, *source.columns]) for row in rows])


def _renamed(cells: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Return cells under the names that `columns` gives them."""
    taken = set(source.columns.values())
    named = {name: cells.get(column) for name, column in source.columns.items()}
    return {name: value for name, value in cells.items() if name not in taken} | named


def detect_rows(source: Source, rows: Sequence[RowMarks]) -> Detected:
    """Return the format that rows are of. Raise `DataError` if most of them are of none, or they may be of several."""
    attributes = labels_of_rows(rows, [name for name in source.columns if name not in ("id", "image", "group")])
    matches = [match_row(marks) for marks in rows]
    if not attributes:
        matches = [[_without_class(match) for match in of_one] for of_one in matches]
    fitting = [{match.format: match for match in of_one if not match.lacks} for of_one in matches]
    filled = [one for one in fitting if one]
    if not filled:
        raise _nearest(source, rows, matches)
    # The reader of `messages` and `openai` is one, and some rows of a file have no parts.
    sets = [{"messages" if name == "openai" else name for name in one} for one in filled]
    common = set.intersection(*sets)
    counts = Counter(name for one in sets for name in one)
    if len(common) != 1:
        ranked = sorted(common or counts, key=lambda name: (-counts[name], name))[:2]
        reasons = [next(m.reason for one in filled for m in one.values() if _same(m.format, name)) for name in ranked]
        some = "" if common else f" (in some of its first {len(rows)} rows each)"
        raise _unclear(source, list(zip(ranked, reasons, strict=True)), some)
    (name,) = common
    if len(filled) < _MOST * len(rows):
        raise DataError(
            f"{source.name}: its format is not clear: of its first {len(rows)} rows only {len(filled)} look like "
            f"{name}. {_FIX}"
        )
    chosen = next((m for one in filled for m in one.values() if name == "messages" and m.format == "openai"), None)
    chosen = chosen or next(match for one in filled for match in one.values() if match.format == name)
    reason = _describe_attributes(source, rows, attributes) if name == "image_csv" else chosen.reason
    return Detected(chosen.format, reason)


def _describe_attributes(source: Source, rows: Sequence[RowMarks], labels: Sequence[str]) -> str:
    """Return what rows of classification have, with the columns that are attributes too unless `columns` names some."""
    reason = f"rows have an image and {_quoted(labels)}"
    if not source.columns.keys().isdisjoint(labels):
        return reason
    others = dict.fromkeys(name for marks in rows for name in marks.cells if name not in (*labels, *NOT_ATTRIBUTES))
    named = ", ".join(f"`{name}`" for name in others)[:200]
    return (
        f"{reason}; other columns become attributes too unless `columns` names the right ones: {named}"
        if others
        else reason
    )


def _same(name: str, other: str) -> bool:
    return name == other or {name, other} == {"messages", "openai"}


def _without_class(match: Match) -> Match:
    if match.format != "image_csv" or match.lacks:
        return match
    return replace(match, shared=1, lacks="a column with classes, such as `label`")


def _quoted(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names[:2])


def _nearest(source: Source, rows: Sequence[RowMarks], matches: Sequence[Sequence[Match]]) -> DataError:
    """Return the error for rows of no format, which names the two that they share most with."""
    best: dict[str, Match] = {}
    for match in (match for of_one in matches for match in of_one if match.shared):
        if match.format not in best or match.shared > best[match.format].shared:
            best[match.format] = match
    near = sorted(best.values(), key=lambda match: -match.shared)[:2]
    columns = ", ".join(dict.fromkeys(name for marks in rows for name in marks.cells))[:300]
    if not near:
        return DataError(
            f"{source.name}: its rows are of no known format; they have {columns or 'no filled cells'}. {_FIX}"
        )
    likely = "; or ".join(f"{match.format}, which needs {match.lacks}" for match in near)
    return DataError(f"{source.name}: its format is not clear; rows have {columns}. It may be {likely}. {_FIX}")


def _unclear(source: Source, likely: Sequence[tuple[str, str]], some: str = "") -> DataError:
    """Return the error for a source that may be of several formats, each with what speaks for it."""
    named = "; or ".join(f"{name}, since {reason}" for name, reason in dict(likely).items())
    return DataError(
        f"{source.name}: its format is not clear. It may be {named}{some}. Set `format` of the source to the one that "
        "is meant."
    )


def _faulty(source: Source, signs: Sequence[Sign]) -> DataError:
    """Return the error for a source that looks like a format and cannot be of it."""
    named = "; or ".join(f"{sign.format}, but {sign.fault or 'others speak against it'}" for sign in signs[:2])
    return DataError(
        f"{source.name}: its format is not clear. It looks like {named}. Mend or remove that, or set `format`."
    )
