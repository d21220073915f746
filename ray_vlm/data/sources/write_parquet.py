"""Write detection as one Parquet file with the images inside, as `datasets` writes it (huggingface.co/docs/datasets,
"Object detection"): categories are a `ClassLabel` with the names of all classes."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ray_vlm.data.records import Record, SftRecord
from ray_vlm.data.sources.output import Output, group_of

if TYPE_CHECKING:
    from pyarrow import Schema

_GROUP_ROWS, _GROUP_BYTES = 100, 16 * 2**20  # the most rows, and bytes of images from which on a row group ends


def write_hf_parquet(records: Iterable[Record], out: Output) -> str:
    """Write the file, named by its split, and return its name. `bbox` is [x, y, width, height]."""
    from pyarrow import RecordBatch, parquet

    name, schema = f"{out.split}.parquet", _schema(out.profile.labels)
    codes = {label: code for code, label in enumerate(out.profile.labels)}
    rows: list[dict[str, Any]] = []
    size = 0
    with parquet.ParquetWriter(out.folder / name, schema) as writer:

        def flush() -> None:
            if rows:
                writer.write_batch(RecordBatch.from_pylist(rows, schema))
                rows.clear()

        for record in records:
            row = _row(record, codes, *out.images.read(record))
            rows.append(row)
            size += len(row["image"]["bytes"])
            if len(rows) == _GROUP_ROWS or size > _GROUP_BYTES:
                flush()
                size = 0
        flush()
    out.files += 1
    return name


def _row(record: Record, codes: dict[str, int], name: str, data: bytes) -> dict[str, Any]:
    assert isinstance(record, SftRecord)
    width, height = record.sizes[0]
    boxes = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in record.truth["boxes"]]
    objects = {"bbox": boxes, "category": [codes[label] for label in record.truth["labels"]]}
    row = {"id": record.id, "group": group_of(record) or None, "image": {"bytes": data, "path": name}}
    return row | {"width": width, "height": height, "objects": objects}


def _schema(labels: Iterable[str]) -> "Schema":
    """Return the types of the columns, with the features of `datasets` in their metadata."""
    import pyarrow as pa

    def value(kind: str) -> dict[str, str]:
        return {"dtype": kind, "_type": "Value"}

    def listed(feature: dict[str, Any]) -> dict[str, Any]:
        return {"feature": feature, "_type": "Sequence"}

    category = {"names": list(labels), "_type": "ClassLabel"}
    objects = {"bbox": listed(listed(value("float64"))), "category": listed(category)}
    features: dict[str, Any] = {"id": value("string"), "group": value("string"), "image": {"_type": "Image"}}
    features |= {"width": value("int64"), "height": value("int64"), "objects": objects}
    boxes, categories = pa.list_(pa.list_(pa.float64())), pa.list_(pa.int64())
    columns = {"id": pa.string(), "group": pa.string()}
    columns["image"] = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns |= {"width": pa.int64(), "height": pa.int64()}
    columns["objects"] = pa.struct({"bbox": boxes, "category": categories})
    return pa.schema(columns, {"huggingface": json.dumps({"info": {"features": features}})})
