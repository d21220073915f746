"""Exports of Label Studio, JSON and JSON-MIN."""

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from ray_vlm.errors import DataError
from tests.support.annotations import make_image, objects, read_checked, reason, write

SIZES = {"original_width": 64, "original_height": 48, "image_rotation": 0}
VALUE = {"x": 25, "y": 50, "width": 12.5, "height": 25.0, "rotation": 0}  # 16, 24, 24, 36
BOX = ("dog", (16.0, 24.0, 24.0, 36.0))


def _region(kind: str = "rectanglelabels", labels: Any = ("dog",), value: Any = None, **more: Any) -> dict[str, Any]:
    value = {**(VALUE if value is None else value), kind: list(labels)}
    names = {"id": "r1", "type": kind, "from_name": "label", "to_name": "image", "origin": "manual"}
    return {**names, **SIZES, "value": value, **more}


def _task(*regions: Any, image: Any = "/data/upload/3/0a1b2c3d-a.png", number: int = 1, **more: Any) -> dict[str, Any]:
    annotation = {"id": 7, "result": list(regions), "was_cancelled": False, "ground_truth": False}
    task = {"id": number, "annotations": [annotation], "predictions": [], "data": {"image": image, "site": "north"}}
    return {**task, "file_upload": "0a1b2c3d-a.png", "meta": {}, "total_annotations": 1, **more}


def _one(tmp_path: Path, task: dict[str, Any], image: str = "0a1b2c3d-a.png", **options: Any) -> Any:
    make_image(tmp_path / image)
    write(tmp_path / "export.json", json.dumps([task]))
    (row,) = read_checked(tmp_path / "export.json", "label_studio", **options)[0].values()
    return row


def _shape(x: float, y: float, **more: Any) -> dict[str, Any]:
    return {"x": x, "y": y, **more}


@pytest.mark.parametrize(
    "regions",
    [
        [_region()],
        [_region("polygonlabels", value={"points": [[25, 50], [37.5, 60], [30, 75]], "closed": True})],
        [_region("ellipselabels", value=_shape(31.25, 62.5, radiusX=6.25, radiusY=12.5, rotation=0))],
        [
            _region("labels"),
            _region("rectangle", []),
            {"id": "r1", "type": "textarea", "value": {**VALUE, "text": ["x"]}},
        ],
        [_region(), {"type": "choices", "value": {"choices": ["night"]}, "to_name": "image", "from_name": "c"}],
        [_region(), {"type": "relation", "from_id": "a", "to_id": "b"}],
    ],
)
def test_regions_have_the_box_around_them(tmp_path: Path, regions: list[dict[str, Any]]) -> None:
    row = _one(tmp_path, _task(*regions))
    assert row.id == "0a1b2c3d-a"
    assert objects(row) == [BOX]


def test_predictions_are_not_read_and_an_empty_annotation_has_no_objects(tmp_path: Path) -> None:
    row = _one(tmp_path, _task(predictions=[{"result": [_region()]}]))
    assert objects(row) == []


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (_task(_region(value={**VALUE, "rotation": 30})), "rotated by 30 degrees"),
        (_task(_region(value={**VALUE, "width": -5})), "has width -5 and height 25; draw it again"),
        (_task(_region(value={**VALUE, "height": 0})), "has width 12.5 and height 0"),
        (_task(_region(value={**VALUE, "x": None})), "x, y, width, height of a region are .*not finite numbers"),
        (_task(_region(value={**VALUE, "x": float("nan")})), "not finite numbers"),
        (_task(_region("polygonlabels", value={"points": [[1, 2], [3, 4]]})), "not three or more"),
        (_task(_region("polygonlabels", value={"points": [[1, 2], [3, 4], 5]})), "not three or more"),
        (_task(_region("brushlabels", value={"format": "rle", "rle": [0, 1]})), "a region is a brushlabels"),
        (_task(_region("keypointlabels")), "a region is a keypointlabels"),
        (_task(_region(labels=[])), "a region has 0 labels"),
        (_task(_region(labels=["a", "b"])), "a region has 2 labels"),
        (_task(_region(labels=[""])), "the label of a region is empty"),
        (_task({**_region(), "value": {**VALUE, "rectanglelabels": "dog"}}), "not a list of names"),
        (_task(_region(image_rotation=90)), "image_rotation=90"),
        (_task(_region(item_index=1)), "item_index=1"),
        (_task(annotations=[]), "the task is not annotated"),
        (_task(annotations=[{"result": [_region()], "was_cancelled": True}]), "the task is skipped"),
        (_task(annotations="x"), "no list of annotations"),
        (_task(annotations=[{"result": None}]), "no list of regions"),
        (_task(annotations=[{"result": [_region()]}, {"result": []}]), "2 annotations that differ"),
        (_task(image="/data/upload/3/gone.png"), r"image 'data/upload/3/gone\.png' is not in .*'gone\.png'"),
        (_task(image="data:image/png;base64,AAAA"), "data: URI"),
        (_task(image=["a.png", "b.png"]), "which key of data is the image is not clear"),
        (_task(image=None), "which key of data"),
        (_task(data={"left": "a.png", "right": "b.png"}), "like images: left, right.*columns={image: NAME}"),
        (_task(image="../../secret.png"), "is not in"),
        (_task(image="a\0.png"), "NUL|not a path"),
        ({"id": 3, "image": "a.png"}, "neither annotations nor regions"),
    ],
)
def test_tasks_that_cannot_be_used_are_named(tmp_path: Path, task: dict[str, Any], why: str) -> None:
    make_image(tmp_path / "secret.png")
    assert re.search(why, reason(_one(tmp_path / "x/y", task)))


def test_several_annotations_of_a_task(tmp_path: Path) -> None:
    other = _region(labels=["cat"], id="r2")
    both = [{"result": [_region(), other]}, {"result": [{**other, "id": "z"}, _region(id="y")]}]
    assert objects(_one(tmp_path, _task(annotations=both))) == [BOX, ("cat", BOX[1])]  # another order, the same boxes
    skipped = [{"result": [], "was_cancelled": True}, {"result": [_region()]}]
    assert objects(_one(tmp_path, _task(annotations=skipped))) == [BOX]
    truth = [{"result": []}, {"result": [_region()], "ground_truth": True}, {"result": [other]}]
    assert objects(_one(tmp_path, _task(annotations=truth))) == [BOX]
    assert objects(_one(tmp_path, _task(annotations=None, completions=[{"result": [_region()]}]) | {})) == [BOX]


@pytest.mark.parametrize(
    ("value", "image"),
    [
        ("/data/upload/3/0a1b2c3d-a.png", "upload/3/0a1b2c3d-a.png"),
        ("/data/upload/3/0a1b2c3d-a.png", "images/0a1b2c3d-a.png"),  # exports with images
        ("/data/upload/3/0a1b2c3d-a.png", "a.png"),  # the file before it was uploaded
        ("/data/local-files/?d=pets/b%20c.png", "pets/b c.png"),
        ("/data/local-files/?d=home/me/pets/a.png", "pets/a.png"),
        ("/data/local-files/?d=pets\\a.png", "pets/a.png"),
        ("/data/local-files/?d=pets/a+b.png", "pets/a+b.png"),
        ("s3://bucket/pets/a.png", "pets/a.png"),
        ("gs://bucket/pets/a.png", "a.png"),
        ("https://example.org/pets/a.png?token=x", "a.png"),
        ("http://localhost:8080/data/upload/3/0a1b2c3d-a.png", "0a1b2c3d-a.png"),
        ("C:\\pets\\a.png", "a.png"),
        ("../../label-studio/media/upload/3/a.png", "a.png"),
        ("b%20c.png", "b c.png"),
        ("100%25.png", "100%.png"),
        ("caf\u00e9.png", "caf\u00e9.png"),
        ("plain", "plain"),
    ],
)
def test_names_of_images(tmp_path: Path, value: str, image: str) -> None:
    make_image(tmp_path / "x.png")
    (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / image).write_bytes((tmp_path / "x.png").read_bytes())
    write(tmp_path / "export.json", json.dumps([_task(_region(), image=value)]))
    (row,) = read_checked(tmp_path / "export.json", "label_studio")[0].values()
    assert objects(row) == [BOX]
    assert row.images == (str(tmp_path / image),)  # type: ignore[union-attr]
    assert row.id == str(Path(image).with_suffix(""))


def test_the_key_of_the_image(tmp_path: Path) -> None:
    data = {"photo": "a.png", "thumb": "b.png", "site": "north"}
    task = _task({**_region(), "to_name": "photo"}, data=data)
    assert objects(_one(tmp_path, task, "a.png")) == [BOX]  # the tag has the key's name
    make_image(tmp_path / "b.png")
    row = _one(tmp_path, task, "a.png", columns={"image": "thumb", "group": "site"})
    assert row.images == (str(tmp_path / "b.png"),)
    assert row.group == "north"


def test_json_min(tmp_path: Path) -> None:
    region = {**VALUE, **SIZES, "rectanglelabels": ["dog"]}
    polygon = {"points": [[25, 50], [37.5, 60], [30, 75]], **SIZES, "polygonlabels": ["cat"]}
    row = {"image": "/data/upload/1/a.png", "id": 4, "annotator": 1, "annotation_id": 2, "lead_time": 3.5}
    assert objects(_one(tmp_path, {**row, "tag": [region], "poly": [polygon]}, "a.png")) == [BOX, ("cat", BOX[1])]
    assert objects(_one(tmp_path, row, "a.png")) == []
    assert "no label" in reason(_one(tmp_path, {**row, "tag": [{**VALUE, **SIZES}]}, "a.png"))
    brush = {"format": "rle", "rle": [1], "brushlabels": ["dog"], **SIZES}
    assert "is a brushlabels" in reason(_one(tmp_path, {**row, "tag": [brush]}, "a.png"))


def test_sizes_that_differ_make_the_row_bad_until_box_frame_is_set(tmp_path: Path) -> None:
    task = _task({**_region(), "original_width": 128, "original_height": 96})
    assert "lists 128x96 px" in reason(_one(tmp_path, task))
    assert objects(_one(tmp_path, task, box_frame="listed")) == [BOX]
    assert objects(_one(tmp_path, task, box_frame="image")) == [BOX]
    task = _task({k: v for k, v in _region().items() if not k.startswith("original")})
    assert objects(_one(tmp_path, task)) == [BOX]  # percent need no size


def test_labels_and_files_that_cannot_be_used(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_image(tmp_path / f"{name}.png")
    tasks = [
        _task(_region(labels=[x]), image=f"{n}.png", number=i) for i, (n, x) in enumerate([("a", "z"), ("b", "k")])
    ]
    write(tmp_path / "export.json", json.dumps(tasks))
    rows, labels = read_checked(tmp_path / "export.json", "label_studio")
    assert (list(rows), labels) == (["a", "b"], ["k", "z"])
    write(tmp_path / "export.json", "{}")
    with pytest.raises(DataError, match="expected a JSON list"):
        read_checked(tmp_path / "export.json", "label_studio")
    write(tmp_path / "export.json", "[[], 3]")
    rows, _ = read_checked(tmp_path / "export.json", "label_studio", max_rows=1)
    assert "a row is a JSON object" in reason(next(iter(rows.values())))


@pytest.mark.parametrize("name", ["e.jsonl", "e.json.gz", "e.csv", "e.parquet"])
@pytest.mark.parametrize("is_min", [False, True])
def test_other_files_of_rows(tmp_path: Path, name: str, is_min: bool) -> None:
    """Tables hold JSON as text (CSV, as Label Studio exports it) or every key in each object (Parquet)."""
    make_image(tmp_path / "[a].png")
    polygon = _region("polygonlabels", value={"points": [[25, 50], [37.5, 60], [30, 75]], "closed": True}, id="r2")
    rows: list[dict[str, Any]] = [_task(_region(), polygon, image="[a].png")]
    if is_min:
        regions = [SIZES | region["value"] for region in (_region(), polygon)]
        rows = [{"image": "[a].png", "id": 1, "label": regions, "annotation_id": 1}]
    if name.endswith(".csv"):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(
                {k: v if isinstance(v, str | int) else json.dumps(v) for k, v in rows[0].items()} for _ in "a"
            )
    elif name.endswith(".parquet"):
        rows[0].pop("predictions", None), rows[0].pop("meta", None)  # Parquet has no empty objects
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows) if "jsonl" in name else json.dumps(rows)
        write(tmp_path / name, gzip.compress(text.encode()) if name.endswith(".gz") else text)
    (row,) = read_checked(tmp_path / name, "label_studio")[0].values()
    assert objects(row) == [BOX, BOX]


@pytest.mark.parametrize("empty", [None, ""])
def test_a_row_of_json_min_without_an_annotation_is_bad(tmp_path: Path, empty: Any) -> None:
    row = _one(tmp_path, {"image": "0a1b2c3d-a.png", "id": 1, "annotation_id": empty})
    assert "neither annotations nor regions" in reason(row)
