"""Files as popular tools write them: read as they are meant, whatever they look like."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as masks

from ray_vlm.config.data import Source
from ray_vlm.data.files import resolve_image
from ray_vlm.data.formats import read_rows
from ray_vlm.data.records import BadRow, SftRecord

DOG = [{"id": 1, "name": "dog"}]
ROBOFLOW = {"id": 0, "name": "fish", "supercategory": "none"}  # the project, before its classes


def _coco(folder: Path, annotations: list[Any], categories: list[Any] | None = None, image_id: Any = 1) -> Any:
    data = {
        "images": [{"id": image_id, "file_name": "a.jpg"}],
        "annotations": annotations,
        "categories": categories or DOG,
    }
    (folder / "rows.json").write_text(json.dumps(data))
    return read_rows(Source(path=str(folder / "rows.json")))


def _box(**options: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 10]} | options


@pytest.mark.parametrize(
    ("categories", "labels"),
    [
        ([ROBOFLOW, {"id": 1, "name": "fish", "supercategory": "fish"}], ["fish"]),
        ([ROBOFLOW, {"id": 1, "name": "eel", "supercategory": "fish"}], ["eel"]),
        ([{"id": 1, "name": "bus", "supercategory": "vehicle"}, {"id": 7, "name": "vehicle"}], ["bus"]),
        ([{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}], ["cat", "dog"]),  # a class may have no box in one file
        ([{"id": 1, "name": "person", "supercategory": "person"}, {"id": 2, "name": "bus"}], ["person", "bus"]),
        ([{"id": 1, "name": "dog"}, {"id": 2, "name": "dog"}], ["dog"]),
    ],
)  # fmt: skip
def test_groups_that_no_box_uses_are_no_classes(tmp_path: Path, categories: list[dict], labels: list[str]) -> None:
    """Roboflow writes the project's name as a category 0, above all others."""
    (row,), found = _coco(tmp_path, [_box()], categories)
    assert found == labels
    assert row.truth["labels"] == (next(c["name"] for c in categories if c["id"] == 1),)


def test_a_category_that_is_used_is_a_class_whatever_it_is_called(tmp_path: Path) -> None:
    eel = {"id": 1, "name": "eel", "supercategory": "fish"}
    (row,), labels = _coco(tmp_path, [_box(category_id=0), _box()], [ROBOFLOW, eel])
    assert labels == ["fish", "eel"]
    assert row.truth["labels"] == ("fish", "eel")


def _mask() -> np.ndarray:
    found = np.zeros((48, 64), np.uint8, order="F")
    found[10:20, 5:30] = 1
    return found


def _run_lengths() -> list[int]:
    flat = _mask().flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    return np.diff([0, *edges, len(flat)]).tolist()


@pytest.mark.parametrize(
    ("segmentation", "box"),
    [
        ([[1, 1, 10, 1, 10, 10]], (1, 1, 10, 10)),
        ([[1, 1, 10, 1, 10, 10], [20, 5, 30, 5, 30, 25.5]], (1, 1, 30, 25.5)),
        ({"size": [48, 64], "counts": _run_lengths()}, (5, 10, 30, 20)),
        ({"size": [48, 64], "counts": masks.encode(_mask())["counts"].decode()}, (5, 10, 30, 20)),
    ],
)
@pytest.mark.parametrize("bbox", [{}, {"bbox": []}, {"bbox": None}])
def test_a_mask_alone_gives_the_box_around_it(tmp_path: Path, segmentation: Any, box: tuple, bbox: dict) -> None:
    (row,), _ = _coco(tmp_path, [{"image_id": 1, "category_id": 1, "segmentation": segmentation} | bbox])
    assert row.truth["boxes"] == (tuple(map(float, box)),)


@pytest.mark.parametrize(
    "segmentation",
    [
        "x", [[1, 1, 10]], [[1, 2]], [3], [["a", 1, 2, 3]], {}, {"size": [0, 0], "counts": "x"}, {"counts": "abc"},
        {"size": [48, 64]}, {"size": [48, 64], "counts": [1, -1]}, {"size": "ab", "counts": [1]},
        {"size": [48, 64], "counts": [5]}, {"size": [48, 64], "counts": "\u00e9"}, {"size": [2**40, 1], "counts": "1"},
    ],
)  # fmt: skip
def test_a_mask_that_cannot_be_read_is_a_bad_row(tmp_path: Path, segmentation: Any) -> None:
    (row,), _ = _coco(tmp_path, [{"image_id": 1, "category_id": 1, "segmentation": segmentation}])
    assert isinstance(row, BadRow)
    assert "bbox" in row.reason


def test_ids_that_passed_through_a_table_are_whole_numbers(tmp_path: Path) -> None:
    (row,), _ = _coco(tmp_path, [_box(image_id=1.0, category_id=1.0)])
    assert (row.id, row.truth["labels"]) == ("1", ("dog",))
    (row,), _ = _coco(tmp_path, [_box()], [{"id": 1.0, "name": "dog"}], image_id=1.0)
    assert (row.id, row.truth["labels"]) == ("1", ("dog",))


def test_annotations_of_other_images_are_bad_rows_that_harm_no_other(tmp_path: Path) -> None:
    rows, _ = _coco(tmp_path, [_box(), _box(image_id=99), _box(image_id=1.5)])
    assert isinstance(rows[0], SftRecord)
    assert "image_id 1.5" in rows[2].reason
    assert rows[1] == BadRow(2, "", "annotation 1 has image_id 99, which no image has; remove it or add the image")


@pytest.mark.parametrize("crowd", [1, "1", True])
def test_a_crowd_is_no_object_however_it_is_written(tmp_path: Path, crowd: Any) -> None:
    (row,), _ = _coco(tmp_path, [_box(iscrowd=crowd), _box(iscrowd=0, bbox=[3, 3, 3, 3])])
    assert row.truth["boxes"] == ((3.0, 3.0, 6.0, 6.0),)


@pytest.mark.parametrize("name", ["images\\a b.jpg", "images/a%20b.jpg", "images\\a%20b.jpg", ".\\images\\a b.jpg"])
def test_names_as_windows_and_the_web_write_them(tmp_path: Path, name: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a b.jpg").write_bytes(b"")
    assert resolve_image(str(tmp_path), name) == str(tmp_path / "images" / "a b.jpg")


def test_a_name_that_is_there_as_it_stands_is_that_file(tmp_path: Path) -> None:
    for name in ("a%20b.jpg", "a b.jpg", "c\\d.jpg"):
        (tmp_path / name).write_bytes(b"")
    assert resolve_image(str(tmp_path), "a%20b.jpg").endswith("a%20b.jpg")
    assert resolve_image(str(tmp_path), "c\\d.jpg").endswith("c\\d.jpg")


@pytest.mark.parametrize(
    "name", ["..\\secret.jpg", "..%2fsecret.jpg", "%2e%2e/secret.jpg", "a%00.jpg", "\\..\\secret.jpg"]
)
def test_another_spelling_does_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"")
    (tmp_path / "in").mkdir()
    with suppress(ValueError):  # refused, or the name of a file inside that is not there
        assert resolve_image(str(tmp_path / "in"), name).startswith(str(tmp_path / "in") + "/")


def test_several_questions_about_one_image_may_share_its_id(tmp_path: Path) -> None:
    """As in LLaVA's own mixtures; they stay on one side of every split."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    rows = [{"id": name, "image": "a.jpg", "conversations": turns} for name in ("7", "7", "7#2", "8", 7)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found, _ = read_rows(Source(path=str(tmp_path / "rows.json"), format="llava"))
    assert [(row.id, row.group) for row in found] == [("7", "7"), ("7#3", "7"), ("7#2", ""), ("8", ""), ("7#4", "7")]
