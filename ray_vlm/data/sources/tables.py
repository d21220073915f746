"""Read JSON, JSONL, CSV, TSV and Parquet as rows of named cells. A line that cannot be read becomes a `BadRow`."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ray_vlm.config.paths import describe_search
from ray_vlm.data.records import BadRow
from ray_vlm.errors import DataError
from ray_vlm.storage import open_file, read_bytes, split_options

if TYPE_CHECKING:
    from pyarrow import RecordBatch

MAX_LINE_BYTES = 16 * 2**20
_BOM = b"\xef\xbb\xbf"
_BATCH_ROWS = 256  # Parquet rows converted to Python values at a time; rows may hold images
NumberedRow = tuple[int, dict[str, Any]]  # counted from 0 in the file, with cells by column
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Table:
    """The rows of a file in order.

    `columns` are all names in order of appearance. `has_schema`: the columns belong to the file (CSV, Parquet), so a
    missing one is a fault of the file and not of its rows.
    """

    rows: list[NumberedRow | BadRow]
    columns: tuple[str, ...]
    has_schema: bool


_YOLO = " YOLO's labels are files for each image: convert the data set to COCO (format=coco)."
_TOOLS = {  # advice for other suffixes
    ".yaml": _YOLO,
    ".yml": _YOLO,
    ".txt": _YOLO,
    ".xml": " Pascal VOC has a file for each image: convert the data set to COCO (format=coco).",
    ".tfrecord": " TFRecord is not read: convert it to Parquet or COCO.",
    ".arrow": " Load it with `datasets` and write it by `to_parquet`.",
    ".tar": " WebDataset is not read: unpack it, and write the rows as JSONL.",
}


def read_table(address: str) -> Table:
    """Read the rows of a file by its suffix. Raise `DataError` if the whole file cannot be used."""
    suffix = PurePosixPath(split_options(address)[0]).suffix.lower()
    if suffix == ".parquet":
        table = _read_parquet(address)
    elif suffix in _SEPARATORS:
        table = _read_csv(_read_lines(address), _SEPARATORS[suffix], address)
    elif suffix in (".jsonl", ".ndjson"):
        table = _table(_json_lines(_read_lines(address)))
    elif suffix == ".json":
        table = _table(_json_entries(read_json(address), address))
    else:
        raise DataError(
            f"{address}: rows are not read from {suffix or 'a name without a suffix'}. Give a .json, .jsonl, .ndjson, "
            f".csv, .tsv or .parquet file.{_TOOLS.get(suffix, '')}"
        )
    if not table.rows:
        raise DataError(f"{address}: holds no rows. Give a file with at least one.")
    return table


def read_json(address: str) -> Any:
    """Read the value in a UTF-8 JSON file. Raise `DataError`."""
    try:
        return json.loads(_read_file(address).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{address}: not readable as UTF-8 JSON ({error}). Mend it and save it as UTF-8.") from None


def _read_file(address: str) -> bytes:
    try:
        return read_bytes(address)
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(address, error) from None


def _unreadable(address: str, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{address}: no such file. Give `path` the location of the rows.{describe_search(address)}")
    if isinstance(error, IsADirectoryError):
        return DataError(f"{address}: a folder. Give `path` the file with the rows.")
    return DataError(f"{address}: not readable ({error}). Give `path` a file that this machine can read.")


def _table(rows: Iterator[NumberedRow | BadRow]) -> Table:
    listed = list(rows)
    names = {name: None for row in listed if not isinstance(row, BadRow) for name in row[1]}
    return Table(listed, tuple(names), False)


def _read_lines(address: str) -> list[bytes]:
    data = _read_file(address)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{address}: not UTF-8 but UTF-16. Save it as UTF-8.")
    end = b"\n" if b"\n" in data else b"\r"  # only very old files end lines with a carriage return alone
    return [line + b"\n" for line in data.removeprefix(_BOM).split(end)]


def _json_entries(value: object, address: str) -> Iterator[NumberedRow | BadRow]:
    entries = value.get("data") if isinstance(value, dict) else value
    if not isinstance(entries, list):
        raise DataError(f"{address}: expected a JSON list of objects, or an object with that list under `data`.")
    for row, entry in enumerate(entries):
        if not isinstance(entry, dict):
            yield BadRow(row, "", f"entry {row} is {_kind(entry)}; a row is a JSON object {{...}}")
        elif reason := text_fault(entry):
            yield BadRow(row, "", f"entry {row} {reason}")
        else:
            yield row, entry


def _json_lines(lines: list[bytes]) -> Iterator[NumberedRow | BadRow]:
    row = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        value, reason = _json_line(line)
        yield BadRow(row, "", f"line {number} {reason}") if reason else (row, value)
        row += 1


def _json_line(line: bytes) -> tuple[Any, str | None]:
    """Return the object in a line, or why there is none."""
    if len(line) > MAX_LINE_BYTES:
        return None, f"is {len(line)} bytes long, above {MAX_LINE_BYTES}; keep images in files of their own"
    if b"\0" in line:
        return None, "holds NUL characters; write the file again"
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        return None, f"is not JSON ({error}); mend it, one object a line"
    if not isinstance(value, dict):
        return None, f"is {_kind(value)}; a row is a JSON object {{...}}"
    return value, text_fault(value) if b"\\u" in line else None


def _kind(value: object) -> str:
    kinds = {list: "a list", dict: "an object", str: "a text", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")


def text_fault(value: object) -> str | None:
    """Return why a text somewhere in a value cannot be used (NUL characters, half a surrogate pair), or None."""
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if isinstance(current, dict):
            waiting += [*current, *current.values()]
        elif isinstance(current, list | tuple):
            waiting += current
        elif isinstance(current, str):
            if "\0" in current:
                return "holds NUL characters in a text; remove them"
            if not current.isascii() and any("\ud800" <= c <= "\udfff" for c in current):
                return "holds half a surrogate pair in a text, which is not Unicode; write the text again"
    return None


def _read_csv(lines: list[bytes], separator: str, address: str) -> Table:
    texts = [line.decode("utf-8", "surrogateescape") for line in lines]
    records = _csv_records(texts, separator)
    _, _, header = next(((a, b, c) for a, b, c in records if c), (0, 0, []))
    if isinstance(header, str):
        raise DataError(f"{address}: the first line is not a CSV header ({header}). Mend its quotes.")
    names = [name.strip() for name in header]
    if not any(names) or text_fault(names):
        raise DataError(f"{address}: the first line must be a header with the names of the columns, as UTF-8 text.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not all(names):
        raise DataError(f"{address}: the header has {twice or 'a column'} twice or empty. Give each column one name.")
    rows: list[NumberedRow | BadRow] = []
    for start, end, cells in records:
        if cells:
            size = max(map(len, lines[start:end]))
            value, reason = _csv_row(cells, names, size)
            rows.append(BadRow(len(rows), "", f"line {start + 1} {reason}") if reason else (len(rows), value))
    return Table(rows, tuple(names), True)


def _csv_records(lines: list[str], separator: str) -> Iterator[tuple[int, int, list[str] | str]]:
    """Yield the first line, the line behind the last, and the cells or why there are none; a blank line has no cells.

    After a broken record, reading continues at the line behind its first, so that an unclosed quote does not swallow
    the rest of the file.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    at = 0
    while at < len(lines):
        reader = csv.reader((lines[i] for i in range(at, len(lines))), delimiter=separator, strict=True)
        start, end = at, at
        try:
            for cells in reader:
                start, end = end, at + reader.line_num
                yield start, end, cells if any(cells) or len(cells) > 1 else []
            return
        except csv.Error as error:
            yield end, end + 1, str(error)
            at = end + 1


def _csv_row(cells: list[str] | str, names: list[str], size: int) -> tuple[dict[str, Any], str | None]:
    """Return cells by name, or why there are none."""
    if size > MAX_LINE_BYTES:
        return {}, f"is {size} bytes long, above {MAX_LINE_BYTES}; keep images in files of their own"
    if isinstance(cells, str):
        return {}, f"is not CSV ({cells}); write a quote inside quotes twice"
    if any("\0" in cell for cell in cells):
        return {}, "holds NUL characters; write the file again"
    if text_fault(cells):
        return {}, "is not UTF-8; save the file as UTF-8"
    if len(cells) != len(names):
        return {}, f"has {len(cells)} cells for {len(names)} columns; put quotes around cells that hold a separator"
    return dict(zip(names, cells, strict=True)), None


def _read_parquet(address: str) -> Table:
    from pyarrow import ArrowException, parquet

    rows: list[NumberedRow | BadRow] = []
    try:
        with open_file(address) as opened, parquet.ParquetFile(opened) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{address}: a column name is there twice ({', '.join(names)}). Give each one name.")
            features = _class_features(file.schema_arrow.metadata or {})
            for batch in file.iter_batches(_BATCH_ROWS):
                rows += [_parquet_row(batch, i, len(rows) + i, features) for i in range(batch.num_rows)]
    except (OSError, ValueError, ImportError, ArrowException) as error:
        raise _unreadable(address, error) from None
    return Table(rows, tuple(names), True)


def _class_features(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Return the features that `datasets` wrote into a Parquet file if any is a class; else an empty dict."""
    encoded = metadata.get(b"huggingface", b"")
    if b"ClassLabel" not in encoded:
        return {}
    try:
        features = json.loads(encoded)["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def apply_class_names(value: object, feature: object) -> Any:
    """Replace class numbers by names in a cell whose feature is a `ClassLabel` of `datasets`. A number without a name
    becomes None: -1 stands for a missing class."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = {"_type": "List", "feature": feature[0]}
    if not isinstance(feature, dict):
        return value
    kind, inside = feature.get("_type"), feature.get("feature")
    if kind == "ClassLabel":
        names = feature.get("names")
        if not isinstance(value, int) or isinstance(value, bool) or not isinstance(names, list):
            return value
        return names[value] if 0 <= value < len(names) else None
    if kind in ("Sequence", "List", "LargeList") and isinstance(value, list):
        return [apply_class_names(item, inside) for item in value]
    if kind in ("Sequence", "List", "LargeList") and isinstance(value, dict) and isinstance(inside, dict):
        return {k: apply_class_names(v, {"_type": "List", "feature": inside.get(k)}) for k, v in value.items()}
    if kind is None and isinstance(value, dict):
        return {k: apply_class_names(v, feature.get(k)) for k, v in value.items()}
    return value


def _parquet_row(batch: "RecordBatch", position: int, row: int, features: Mapping[str, Any]) -> NumberedRow | BadRow:
    try:
        cells = batch.slice(position, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow(row, "", f"row {row} holds a text that is not UTF-8 ({error.reason}); write the file again")
    if reason := text_fault(cells):
        return BadRow(row, "", f"row {row} {reason}")
    return row, apply_class_names(cells, features) if features else cells
