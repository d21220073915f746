"""Mutations for `fuzz`: seeded changes of values, texts, bytes and rows. Pure functions of a numpy generator."""

import copy
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TEXTS = [
    *("\ud800", "\udc00 x", "\0", "", " ", "\n", "\t\r\n", "\ud800", "a\0b", "\x1b[31m", "\x85", "\u202e", "\ufeff"),
    *("é" * 300, "x" * 5000),
    *("nan", "-inf", "1e999", "0x", "null", "true", "[", "[1", "{}", "[]", '{"a": ', '"', "'", "%", "(", "(a+)+$"),
    *("../../etc/passwd", "/etc/passwd", "s3://bucket/x", "http://x.org/a.jpg", "data:image/png;base64,AA", "~", "."),
    *("<image>", "<image><image>", "<|im_end|>", "<|image_pad|>", "<bbox>", "{labels}", "{position", "__class__"),
    *('{"action": 3}', '["\\ud800"]', '{"a": "\\u0000"}', "[1, 2, NaN, 4]", "[1e400, 1, 2, 3]", "9" * 5000),
    *('[{"from": "human", "value": "\\ud800"}, {"from": "gpt", "value": "x"}]', '{"action": "\\udc00"}'),
]
NUMBERS: list[Any] = [0, -1, 1, 2, 3.5, -0.0, 0.1, 1e-320, 1e9, 1e308, -1e308, 2**31, 2**53 + 1, 2**63, 2**64, 10**400]
NUMBERS += [float("nan"), float("inf"), float("-inf"), 999999999999, -(10**400)]
OTHERS: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": None},
    [1, 2],
    [1, 2, 3, 4],
    {"bytes": "x"},
    ["a", 3],
]
PIECES = [
    *(b"\0", b"\xff", b"\xfe\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b'"', b"'", b"{", b"}", b"["),
    *(b"]", b",", b":", b"\\", b"\\ud800", b"\\u0000", b"\xed\xa0\x80", b"NaN", b"1e999", b"9" * 5000, b"[" * 3000),
    *(b"- ", b"? ", b"&a ", b"*a ", b"!!binary x", b"!!python/object:os.system x", b"!!timestamp x", b"<<: *a", b"|"),
    *(b"%YAML 9.9\n", b"---\n", b"...\n", b"#", b"@", b"`", b"\t", b"\x1b", b"\xc2\x85", b"\xe2\x80\xa8"),
]
WHOLES = [b"", b"\n", b"null", b"[]", b"{}", b"<html>404</html>", b"\x80\x04\x95.", b"\0" * 64, b"PK\x03\x04", b"PAR1"]


def pick(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    """Return one of the values unchanged (numpy's `choice` would cast it)."""
    return values[int(rng.integers(len(values)))]


def odd_value(rng: np.random.Generator) -> Any:
    """Return a value that no schema expects."""
    kind = int(rng.integers(10))
    if kind == 0:
        return nest(pick(rng, [1, "x", None]), int(rng.integers(2, 400)), bool(rng.integers(2)))
    return copy.deepcopy(pick(rng, TEXTS if kind < 5 else NUMBERS if kind < 8 else OTHERS))


def nest(value: Any, depth: int, lists: bool) -> Any:
    """Return the value inside `depth` lists or mappings."""
    for _ in range(depth):
        value = [value] if lists else {"a": value}
    return value


def places(tree: Any) -> list[tuple]:
    """Return the paths of all values in a tree of lists and mappings, the root's own first."""
    paths: list[tuple] = []
    waiting: list[tuple[tuple, Any]] = [((), tree)]
    while waiting:
        path, value = waiting.pop()
        paths.append(path)
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        waiting += [((*path, key), inner) for key, inner in entries]
    return paths


def break_tree(tree: Any, rng: np.random.Generator, above: int = 0) -> Any:
    """Return a copy with one to three values replaced, removed, renamed, doubled, exchanged or cut; values in the first
    `above` levels stay."""
    tree = copy.deepcopy(tree)
    for _ in range(int(rng.integers(1, 4))):
        paths = [path for path in places(tree) if len(path) > above]
        if not paths:
            break
        path = pick(rng, paths)
        if not path:
            return odd_value(rng)
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        _break_entry(parent, path[-1], rng)
    return tree


def _break_entry(parent: Any, key: Any, rng: np.random.Generator) -> None:
    kind, value = int(rng.integers(8)), parent[key]
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[pick(rng, [*TEXTS[:15], str(key).upper(), f"{key} "])] = parent.pop(key)
    elif kind == 1:
        parent.insert(key, copy.deepcopy(value))
    elif kind == 2:
        parent[key] = [value, copy.deepcopy(value)]
    elif kind == 3 and isinstance(value, str):
        parent[key] = break_text(value, rng)
    elif kind == 3 and isinstance(value, int | float):
        parent[key] = value * pick(rng, [-1, 0, 0.5, 1e6, 1e300]) if abs(value) < 1e6 else str(value)
    else:
        parent[key] = odd_value(rng)


def break_text(text: str, rng: np.random.Generator) -> str:
    """Return the text cut, or with something inserted."""
    at = int(rng.integers(len(text) + 1))
    return text[:at] if rng.random() < 0.3 else text[:at] + pick(rng, TEXTS) + text[at:]


def break_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Return the bytes with some flipped, cut, moved, doubled, zeroed or inserted; sometimes replace all of them."""
    if rng.random() < 0.03:
        return pick(rng, WHOLES)
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        kind, at = int(rng.integers(7)), int(rng.integers(len(out) + 1))
        end = min(len(out), at + int(2 ** (rng.random() * 10)))
        if kind == 0:
            for position in rng.integers(0, max(1, len(out)), int(rng.integers(1, 9))).tolist():
                out[position : position + 1] = (
                    bytes([out[position] ^ (1 << int(rng.integers(8)))]) if position < len(out) else b""
                )
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            del out[at:end]
        elif kind == 3:
            out[at:at] = out[at:end]
        elif kind == 4:
            out[at:end] = bytes(end - at)
        elif kind == 5:
            out[at:at] = pick(rng, PIECES)
        else:
            out[at:end] = rng.bytes(end - at)
    return bytes(out)


def write_rows(folder: Path, rows: Any, suffix: str) -> Path:
    """Write the rows as a file of that kind; texts that it cannot hold are left out."""
    path = folder / f"rows{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix in (".csv", ".tsv"):
        path.write_bytes(_table(rows, "," if suffix == ".csv" else "\t").encode("utf-8", "surrogatepass"))
    else:
        _write_parquet(path, rows)
    return path


def _names(rows: list[Any]) -> list[str]:
    return list(dict.fromkeys(str(name) for row in rows if isinstance(row, dict) for name in row)) or ["id"]


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _table(rows: list[Any], separator: str) -> str:
    out, names = io.StringIO(), _names(rows)
    table = csv.writer(out, delimiter=separator, lineterminator="\n")
    table.writerow(names)
    for row in rows:
        table.writerow([_cell(row.get(name)) for name in names] if isinstance(row, dict) else [_cell(row)])
    return out.getvalue()


def _write_parquet(path: Path, rows: list[Any]) -> None:
    """Columns of one kind as they are, others as JSON texts."""
    import pyarrow
    from pyarrow import parquet

    columns = {}
    for name in _names(rows):
        cells = [row.get(name) if isinstance(row, dict) else None for row in rows]
        try:
            columns[name.encode(errors="replace").decode()] = pyarrow.array(cells)
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
            columns[name.encode(errors="replace").decode()] = pyarrow.array(
                [None if cell is None else _cell(cell).encode(errors="replace").decode() for cell in cells]
            )
    try:
        parquet.write_table(pyarrow.table(columns), path)
    except pyarrow.ArrowException:  # an empty object has no columns that Parquet can hold
        parquet.write_table(pyarrow.table({"id": [str(i) for i in range(len(rows))]}), path)
