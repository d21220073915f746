"""Detection rows as data sets of the hub have them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.data import Source
from ray_vlm.data.build import CheckLimits, build_rows, read_labels
from ray_vlm.data.parallel import Spread
from ray_vlm.data.shards import IndexFolder
from ray_vlm.data.sources.detect import detect_format
from tests.support.annotations import make_image, objects, read_checked, reason, write

BOX = ("dog", (10.0, 20.0, 30.0, 40.0))


def _objects(bbox: Any = ((10, 20, 20, 20),), category: Any = ("dog",), **more: Any) -> dict[str, Any]:
    return {"id": [1] * len(bbox), "area": [400] * len(bbox), "bbox": list(bbox), "category": list(category), **more}


def _one(tmp_path: Path, row: dict[str, Any], **options: Any) -> Any:
    make_image(tmp_path / "a.png")
    write(tmp_path / "rows.jsonl", json.dumps({"image": "a.png", "image_id": 3, **row}))
    (checked,) = read_checked(tmp_path / "rows.jsonl", "hf_objects", **options)[0].values()
    return checked


@pytest.mark.parametrize(
    "value",
    [
        _objects(),
        [{"bbox": [10, 20, 20, 20], "category": "dog", "area": 400}],
        json.dumps(_objects()),
        *({"bbox": [[10, 20, 20, 20]], key: ["dog"]} for key in ("categories", "label", "labels", "category_id")),
        {"bboxes": [[10, 20, 20, 20]], "category": ["dog"]},
        {"bbox": [[10, 20, 20, 20]], "category": ["dog"], "category_id": [None], "segmentation": []},
    ],
)
def test_boxes_are_x_y_width_height(tmp_path: Path, value: Any) -> None:
    row = _one(tmp_path, {"objects": value, "width": 64, "height": 48})
    assert row.id == "0"
    assert objects(row) == [BOX]


@pytest.mark.parametrize("value", [_objects([], []), []])
def test_an_image_without_objects(tmp_path: Path, value: Any) -> None:
    assert objects(_one(tmp_path, {"objects": value})) == []


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"objects": _objects(category=[3])}, "category 3 is a number, and the file has no name for it.*ClassLabel"),
        ({"objects": _objects(category=[""])}, "category is empty"),
        ({"objects": _objects(category=[["dog"]])}, "category"),
        ({"objects": _objects(category=[])}, "lists of different lengths"),
        ({"objects": {"bbox": [[1, 2, 3, 4]]}}, "an object has no category"),
        ({"objects": {"category": ["dog"]}}, "no list `bbox`"),
        ({"objects": _objects([[1, 2, 3]])}, "is not four finite numbers"),
        ({"objects": _objects([[1, 2, float("nan"), 4]])}, "is not four finite numbers"),
        ({"objects": [3]}, "is not "),
        ({"objects": None}, "objects None is not"),
        ({}, "objects None is not .*columns={objects: NAME}"),
        ({"image": None, "objects": _objects()}, "no image or images"),
        ({"image": ["a.png", "a.png"], "objects": _objects()}, "2 images; a detection row has one"),
        (
            {"objects": _objects([[10, 20, 60, 40]]), "width": 64, "height": 48},
            "leaves the image of 64x48 px as x, y, width, height, and fits it as corners.*format=objects",
        ),
        ({"objects": _objects(), "width": 128, "height": 96}, "the file lists 128x96 px"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, row: dict[str, Any], why: str) -> None:
    assert re.search(why, reason(_one(tmp_path, row)))


def test_crowds_are_left_out_as_in_coco(tmp_path: Path) -> None:
    value = _objects([[10, 20, 20, 20], [0, 0, 60, 40]], ["dog", "dog"], iscrowd=[0, 1])
    assert objects(_one(tmp_path, {"objects": value})) == [BOX]
    row = _one(tmp_path, {"objects": value}, crowds="objects")
    assert objects(row) == [BOX, ("dog", (0.0, 0.0, 60.0, 40.0))]


def test_units_columns_and_the_frame(tmp_path: Path) -> None:
    value = _objects([[0.25, 0.5, 0.5, 0.25]])
    assert objects(_one(tmp_path, {"objects": value}, box_units="relative_1")) == [("dog", (16.0, 24.0, 48.0, 36.0))]
    assert objects(_one(tmp_path, {"annotations": _objects()}, columns={"objects": "annotations"})) == [BOX]
    twice = {"objects": _objects([[20, 40, 40, 40]]), "width": 128, "height": 96}
    assert objects(_one(tmp_path, twice, box_frame="listed")) == [BOX]


@pytest.mark.parametrize("as_list", [False, True])
def test_parquet_of_datasets_has_class_names(tmp_path: Path, as_list: bool) -> None:
    """As cppe-5: the image's bytes, and categories as numbers of a ClassLabel inside `objects`."""
    import pyarrow
    from pyarrow import parquet

    image = make_image(tmp_path / "a.png").read_bytes()
    label = {"names": ["zebra", "dog", "cat"], "_type": "ClassLabel"}
    inner = {"bbox": {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"}, "category": label}
    lists = {name: {"feature": feature, "_type": "Sequence"} for name, feature in inner.items()}
    features = {"image": {"_type": "Image"}, "objects": [inner] if as_list else lists}
    entry: Any = {"bbox": [10.0, 20.0, 20.0, 20.0], "category": 1}
    value: Any = [entry] if as_list else {name: [part] for name, part in entry.items()}
    table = pyarrow.Table.from_pylist([{"image": {"bytes": image, "path": None}, "objects": value}])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "rows.parquet")
    rows, labels = read_checked(tmp_path / "rows.parquet", "hf_objects")
    assert labels == ["zebra", "dog", "cat"]  # in their order, also those that no row uses
    assert [objects(row) for row in rows.values()] == [[BOX]]


def test_the_index_and_shards_have_the_declared_classes(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    make_image(tmp_path / "a.png")
    names = ["zebra", "dog", "cat"]
    inner = {
        "bbox": {"feature": {"dtype": "float32", "_type": "Value"}},
        "category": {"names": names, "_type": "ClassLabel"},
    }
    features = {"image": {"dtype": "string", "_type": "Value"}, "objects": {"feature": inner, "_type": "Sequence"}}
    table = pyarrow.Table.from_pylist([{"image": "a.png", "objects": {"bbox": [[10, 20, 20, 20]], "category": [1]}}])
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    for name in ("0.parquet", "1.parquet"):
        parquet.write_table(table, tmp_path / name)
    source = Source(path=str(tmp_path / "*.parquet"), format="hf_objects")
    limits, index = CheckLimits(10**6, "raise"), IndexFolder(str(tmp_path / "index"))
    assert list(build_rows(source, limits, "detection", index, Spread()).labels) == names
    assert list(read_labels(source, limits, "detection", index)) == names
    assert list(read_labels(source, limits, "detection", IndexFolder(str(tmp_path / "empty")))) == names


def test_metadata_of_a_folder(tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")
    write(tmp_path / "metadata.jsonl", json.dumps({"file_name": "a.png", "objects": _objects()}))
    assert detect_format(Source(path=str(tmp_path / "metadata.jsonl"), format="auto")).format == "hf_objects"
    rows, _ = read_checked(tmp_path / "metadata.jsonl", "hf_objects")
    assert objects(rows["0"]) == [BOX]
