"""What the readers of Parquet and Arrow files share: pieces of groups of rows, rows of a record batch, class names, and
images inside cells.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ray_vlm.data.records import BadRow, InnerImage, LocatedBytes
from ray_vlm.data.sources.fields import text_fault
from ray_vlm.data.sources.pieces import PIECE_BYTES, NumberedRow, Piece
from ray_vlm.errors import DataError

if TYPE_CHECKING:
    from pyarrow import DataType, RecordBatch, Schema


def column_names(address: str, schema: "Schema") -> tuple[str, ...]:
    """Return the names of a file's columns. Raise `DataError` if two have one name."""
    if len(set(schema.names)) < len(schema.names):
        names = ", ".join(schema.names)
        raise DataError(f"{address}: a column name is there twice ({names}). Give each one name.")
    return tuple(schema.names)


def cut_groups(groups: Iterable[tuple[int, int]], rows: int, version: tuple[int, int]) -> Iterator[Piece]:
    """Yield pieces of up to `rows` rows, fewer where rows are large: small groups together, large ones cut.

    `groups`: the rows and the bytes of each group of the file in order. `version` is part of the fingerprints: a change
    of the file changes all pieces.
    """
    first = end = 0
    groups = list(groups)
    row_bytes = sum(size for _, size in groups) / max(1, sum(num_rows for num_rows, _ in groups))
    for num_rows, size in groups:
        start, end = end, end + num_rows
        limit = max(1, min(rows, PIECE_BYTES * num_rows // max(1, size)))
        cuts = [start] if first < start and end - first > limit else []  # small groups before this one
        cuts += range((cuts or [first])[-1] + limit, end, limit)
        cuts += [end] if cuts and cuts[-1] > start else []
        for last in cuts:
            yield _piece(first, last, version, row_bytes)
            first = last
    if first < end:
        yield _piece(first, end, version, row_bytes)


def _piece(first: int, end: int, version: tuple[int, int], row_bytes: float) -> Piece:
    fingerprint = "{:x}_{:x}_{}_{}".format(*version, first, end)
    return Piece(first, end - first, fingerprint, num_bytes=round(row_bytes * (end - first)))


def rows_of_batch(
    batch: "RecordBatch", first: int, features: Mapping[str, Any], locate: Callable[[dict[str, Any], int], None]
) -> Iterator[NumberedRow | BadRow]:
    """Yield the rows of a batch, numbered from `first` on, with class names.

    `locate` is called with the cells of a row and its number, and gives the images in them their location.
    """
    try:
        listed = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows > 1:
            for i in range(batch.num_rows):
                yield from rows_of_batch(batch.slice(i, 1), first + i, features, locate)
            return
        fault = f"row {first} holds a text that is not UTF-8 ({error.reason}); write the file again"
        yield BadRow(first, "", fault)
        return
    for row, cells in enumerate(listed, first):
        if reason := text_fault(cells):
            yield BadRow(row, "", f"row {row} {reason}")
        else:
            locate(cells, row)
            yield row, apply_class_names(cells, features) if features else cells


def locate_images(value: object, location: Callable[[int], InnerImage], item: int = -1) -> Any:
    """Return a cell whose bytes know their location: bytes, an object with `bytes`, or a list of these.

    `location` is called with the position in a list, -1 for a cell that is no list.
    """
    if isinstance(value, bytes):
        return LocatedBytes(value, location(item)) if value else value
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return {**value, "bytes": locate_images(value["bytes"], location, item)}
    if isinstance(value, list) and item < 0:
        return [locate_images(part, location, number) for number, part in enumerate(value)]
    return value


def binary_columns(schema: "Schema") -> tuple[str, ...]:
    """Return the columns that may hold images: bytes, objects with `bytes`, and lists of these."""
    from pyarrow import types

    def is_binary(kind: "DataType") -> bool:
        if types.is_struct(kind):
            return any(field.name == "bytes" and is_binary(field.type) for field in kind)
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)

    def holds(kind: "DataType") -> bool:
        listed = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        return is_binary(kind.value_type if listed else kind)

    return tuple(field.name for field in schema if holds(field.type))


@dataclass(frozen=True)
class ValueKind:
    """What the values of a column are in Python. `parts`: of a list its values, of an object its fields by name.
    `is_class`: numbers that `datasets` replaces by the names of classes."""

    name: str
    parts: tuple[tuple[str, "ValueKind"], ...] = ()
    is_class: bool = False

    def __str__(self) -> str:
        inside = ", ".join(f"{name}: {kind}" if name else str(kind) for name, kind in self.parts)
        return self.name + (f"<{inside}>" if self.parts else "") + (" of classes" if self.is_class else "")

    def agrees(self, other: "ValueKind") -> bool:
        """Whether both are one kind. Values that are all missing are of any kind."""
        if "null" in (self.name, other.name):
            return True
        return (
            (self.name, self.is_class) == (other.name, other.is_class)
            and [name for name, _ in self.parts] == [name for name, _ in other.parts]
            and all(one.agrees(two) for (_, one), (_, two) in zip(self.parts, other.parts, strict=True))
        )


def column_kinds(schema: "Schema", features: Mapping[str, Any]) -> dict[str, ValueKind]:
    """Return the kinds of the columns. Types of which the same values are read are one: texts with narrow or wide
    offsets, whole numbers of any width."""
    return {
        field.name: replace(_kind_of(field.type), is_class="ClassLabel" in str(features.get(field.name)))
        for field in schema
    }


def _kind_of(kind: "DataType") -> ValueKind:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _kind_of(kind.value_type)
    if types.is_struct(kind):
        return ValueKind("object", tuple(sorted(((f.name, _kind_of(f.type)) for f in kind), key=lambda part: part[0])))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return ValueKind("list", (("", _kind_of(kind.value_type)),))
    names = {
        "text": types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind),
        "bytes": types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind),
        "whole number": types.is_integer(kind),
        "number": types.is_floating(kind),
    }
    return ValueKind(next((name for name, is_kind in names.items() if is_kind), str(kind)))


def class_features(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Return the features that `datasets` wrote into a file if any is a class; else an empty dict."""
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
