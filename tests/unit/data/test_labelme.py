"""labelme's files, of its first versions and of now."""

import base64
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.data import Source
from ray_vlm.data.sources.formats import SourceReader, source_version
from ray_vlm.errors import DataError
from tests.support.annotations import make_image, objects, read_checked, reason, write

RECTANGLE = [[30.5, 40], [10, 20.5]]  # drawn from the lower right corner


def _shape(points: Any, kind: str | None = "rectangle", label: Any = "dog", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}, **more}


def _file(*shapes: Any, **more: Any) -> str:
    data = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": "a.png", "imageData": None}
    return json.dumps(data | {"imageHeight": 48, "imageWidth": 64} | more)


def _one(tmp_path: Path, content: str | bytes, **options: Any) -> Any:
    make_image(tmp_path / "a.png")
    write(tmp_path / "a.json", content)
    rows, _ = read_checked(tmp_path, "labelme", **options)
    (row,) = rows.values()
    return row


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        (_shape(RECTANGLE), (10.0, 20.5, 30.5, 40.0)),
        (_shape([[10, 20], [30, 20], [30, 40], [10, 40]]), (10.0, 20.0, 30.0, 40.0)),
        (_shape([[10, 20], [30, 25], [15, 40]], "polygon"), (10.0, 20.0, 30.0, 40.0)),
        (_shape([[10, 20], [30, 25], [15, 40]], None), (10.0, 20.0, 30.0, 40.0)),
        ({"label": "dog", "points": [[10, 20], [30, 25], [15, 40]], "line_color": None}, (10.0, 20.0, 30.0, 40.0)),
        (_shape([[30, 20], [33, 24]], "circle"), (25.0, 15.0, 35.0, 25.0)),
        (_shape([[10, 20], [29, 39]], "mask", mask="iVBOR"), (10.0, 20.0, 30.0, 40.0)),  # its last pixel counts
        (_shape([[-0.4, 20], [64.3, 40]]), (-0.4, 20.0, 64.3, 40.0)),
    ],
)
def test_shapes_have_the_box_around_them(tmp_path: Path, shape: dict[str, Any], box: tuple[float, ...]) -> None:
    row = _one(tmp_path, _file(shape))
    assert row.id == "a"
    assert objects(row) == [("dog", box)]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (_file(_shape([[1, 2]], "point")), r"shapes\[0\]: 'dog' is a point, which has no box"),
        (_file(_shape(RECTANGLE), _shape(RECTANGLE, "line")), r"shapes\[1\]: 'dog' is a line, which has no box"),
        (_file(_shape(RECTANGLE, "linestrip")), "is a linestrip"),
        (_file(_shape(RECTANGLE, "rotation")), "is a 'rotation', which is not read"),
        (_file(_shape([[1, 2]])), "is a rectangle of 1 points"),
        (_file(_shape(RECTANGLE, "polygon")), "is a polygon of 2 points"),
        (_file(_shape([])), "not a list of"),
        (_file(_shape([[1, "2"], [3, 4]])), "not a list of"),
        (_file(_shape([[1, float("nan")], [3, 4]])), "in finite numbers"),
        (_file(_shape(RECTANGLE, label="")), "label is empty"),
        (_file(_shape(RECTANGLE, label=None)), "label is empty"),
        (_file(_shape(RECTANGLE, label="__ignore__")), "marks what is no object"),
        (_file(_shape(RECTANGLE, label="a\0b")), "NUL"),
        (_file("x"), r"shapes\[0\] is 'x', not an object"),
        (json.dumps({"images": []}), "no list `shapes`"),
        ("[]", "no JSON object"),
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (_file(_shape(RECTANGLE)).encode("utf-16"), "not UTF-8"),
        (_file(imagePath=None), "image is not named"),
        (_file(imagePath="/data/gone.png"), "'gone.png' were tried|gone.png"),
        (_file(imagePath="https://x.org/b.png"), "not read|lies outside|b.png"),
        (_file(imagePath=None, imageData="no base64!"), "imageData is not base64"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, content: str | bytes, why: str) -> None:
    assert re.search(why, reason(_one(tmp_path, content)))


def test_shapes_of_one_group_and_label_are_one_object(tmp_path: Path) -> None:
    """A dog behind a pole is drawn in two parts; its owner of the same group is another object."""
    shapes = [
        _shape([[1, 2], [5, 6]], group_id=3),
        _shape([[1, 2], [5, 6]]),
        _shape([[8, 4], [9, 9]], group_id=3),
        _shape([[20, 2], [25, 6]], label="person", group_id=3),
        _shape([[1, 2], [5, 6]]),
    ]
    assert objects(_one(tmp_path, _file(*shapes))) == [
        ("dog", (1.0, 2.0, 9.0, 9.0)),
        ("dog", (1.0, 2.0, 5.0, 6.0)),
        ("person", (20.0, 2.0, 25.0, 6.0)),
        ("dog", (1.0, 2.0, 5.0, 6.0)),
    ]


@pytest.mark.parametrize(
    "path", ["../images/b c.png", "..\\images\\b c.png", "../images/b%20c.png", "./../images//b c.png"]
)
def test_images_lie_relative_to_the_file(tmp_path: Path, path: str) -> None:
    image = make_image(tmp_path / "images/b c.png")
    write(tmp_path / "labels/sub.1.json", _file(_shape(RECTANGLE), imagePath=path))
    rows, labels = read_checked(tmp_path, "labelme")
    assert (list(rows), labels) == (["labels/sub.1"], ["dog"])
    assert rows["labels/sub.1"].images == (str(image),)  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ["C:\\Users\\me\\a.png", "/home/me/a.png", "../../a.png"])
def test_an_image_of_another_machine_is_the_one_beside_the_file(tmp_path: Path, path: str) -> None:
    make_image(tmp_path / "a.png")
    image = make_image(tmp_path / "data/a.png")
    write(tmp_path / "data/a.json", _file(_shape(RECTANGLE), imagePath=path))
    (row,) = read_checked(tmp_path / "data", "labelme")[0].values()
    assert row.images == (str(image),)  # type: ignore[union-attr]


def test_no_image_leaves_the_folder(tmp_path: Path) -> None:
    make_image(tmp_path / "secret.png")
    write(tmp_path / "data/a.json", _file(_shape(RECTANGLE), imagePath="../secret.png"))
    (row,) = read_checked(tmp_path / "data", "labelme")[0].values()
    assert "secret.png" in reason(row)


def test_an_image_inside_the_file_is_used_if_there_is_none_beside_it(tmp_path: Path) -> None:
    inside = make_image(tmp_path / "other/x.png", (32, 16)).read_bytes()
    sizes = {"imageWidth": 32, "imageHeight": 16}
    content = _file(_shape([[1, 2], [5, 6]]), imageData=base64.b64encode(inside).decode(), **sizes)
    write(tmp_path / "data/a.json", content)
    (row,) = read_checked(tmp_path / "data", "labelme")[0].values()
    assert row.images == (inside,)  # type: ignore[union-attr]
    assert objects(row) == [("dog", (1.0, 2.0, 5.0, 6.0))]
    image = make_image(tmp_path / "data/a.png", (32, 16))
    (row,) = read_checked(tmp_path / "data", "labelme")[0].values()
    assert row.images == (str(image),)  # type: ignore[union-attr]


def test_sizes_that_differ_make_the_row_bad_until_box_frame_is_set(tmp_path: Path) -> None:
    content = _file(_shape([[10, 20], [30, 40]]), imageWidth=128, imageHeight=96)
    assert "lists 128x96 px" in reason(_one(tmp_path, content))
    assert objects(_one(tmp_path, content, box_frame="listed")) == [("dog", (5.0, 10.0, 15.0, 20.0))]
    assert objects(_one(tmp_path, _file(imageWidth=None, imageHeight=None))) == []


def test_one_file_or_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_image(tmp_path / f"{name}.png")
        write(tmp_path / f"{name}.json", _file(_shape(RECTANGLE), imagePath=f"{name}.png"))
    assert list(read_checked(tmp_path / "b.json", "labelme")[0]) == ["b"]
    source = Source(path=str(tmp_path), format="labelme")
    version = source_version(source)
    reader = pickle.loads(pickle.dumps(SourceReader(source)))
    (piece,) = SourceReader(source).pieces()
    assert [row.id for row in reader.read(piece)] == ["a", "b"]
    write(tmp_path / "a.json", _file())
    assert source_version(source) != version
    with pytest.raises(DataError, match=r"has no \.json files"):
        read_checked(make_image(tmp_path / "empty/a.png").parent, "labelme")
    with pytest.raises(DataError, match="no such folder"):
        read_checked(tmp_path / "gone", "labelme")


def test_an_image_path_of_another_image_beside_the_own_one_is_a_bad_row(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        make_image(tmp_path / name)
        write(tmp_path / f"{name[0]}.json", _file(_shape(RECTANGLE)))
    write(tmp_path / "a-labels.json", _file(_shape(RECTANGLE)))
    rows, _ = read_checked(tmp_path, "labelme")
    assert objects(rows["a"]) == objects(rows["a-labels"])
    assert "imagePath names 'a.png', and 'b.png' has the file's own name" in reason(rows["b"])
