"""Small data sets of annotation tools: images, and rows as the index keeps them."""

from pathlib import Path
from typing import Any

from PIL import Image

from ray_vlm.config.data import Source
from ray_vlm.data.measure import measure_row
from ray_vlm.data.records import BadRow, SftRecord
from ray_vlm.data.sources.formats import read_rows


def make_image(path: Path, size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "gray").save(path)
    return path


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_checked(path: Path, format: str, **options: Any) -> tuple[dict[str, SftRecord | BadRow], list[str]]:
    """Return the rows by id, checked against their images, and the class names."""
    rows, labels = read_rows(Source.model_validate({"path": str(path), "format": format, **options}))
    checked: Any = [measure_row(row, 10**8) for row in rows]
    assert [row.row for row in checked] == list(range(len(checked)))
    assert len({row.id for row in checked}) == len(checked)
    return {row.id: row for row in checked}, labels


def objects(row: Any) -> list[tuple[str, tuple[float, ...]]]:
    """Return the labels and boxes of a good row, rounded to a thousandth of a pixel."""
    assert isinstance(row, SftRecord), row
    boxes = [tuple(round(v, 3) for v in box) for box in row.truth["boxes"]]
    return list(zip(row.truth["labels"], boxes, strict=True))


def reason(row: Any) -> str:
    assert isinstance(row, BadRow), row
    return row.reason
