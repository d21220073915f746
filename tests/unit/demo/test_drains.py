"""Drawn inspection photos: the same every time, exact shares, boxes that hold the paint, classes told by position."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_vlm.demo.drains import CENTRES, COLUMNS, RARE_CLASS, SHAPES, SIDES, SPLITS, draw, draw_file, draw_photo
from ray_vlm.errors import DataError


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _box(row: dict[str, str]) -> list[float]:
    return [float(row[name]) for name in ("x1", "y1", "x2", "y2")]


SHIPPED = {"train": 6000, "eval": 160, "test": 1600}
FEWER = {"train": 1200, "eval": 160, "test": 400}


@pytest.fixture(scope="module", params=[FEWER, pytest.param(SHIPPED, marks=pytest.mark.slow)], ids=["fewer", "all"])
def drains(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photos: a quarter of them and less, or all."""
    folder = tmp_path_factory.mktemp("demo") / "drains"
    for split, number in request.param.items():
        if number == SPLITS[split].num_images:
            draw_file(str(folder / f"{split}.csv"))
        else:
            draw(folder, split, number)
    return folder


def test_photos_repeat_and_splits_and_seeds_differ(tmp_path: Path) -> None:
    first, again = (draw(tmp_path / name, "train", 12) for name in ("a", "b"))
    assert first.read_bytes() == again.read_bytes()
    for row in _rows(first):
        assert (tmp_path / "a" / row["image"]).read_bytes() == (tmp_path / "b" / row["image"]).read_bytes()
    others = (draw(tmp_path / "c", "train", 12, seed=1), draw(tmp_path / "d", "test", 12))
    assert all(_rows(other)[0] != _rows(first)[0] for other in others)


def test_rare_things_are_as_rare_as_said(drains: Path) -> None:
    assert {split: spec.num_images for split, spec in SPLITS.items()} == SHIPPED
    rows = _rows(drains / "train.csv")
    classes = Counter(row["object"] for row in rows)
    rare, other, blocked = {6000: (180, 1455, 480), 1200: (36, 291, 96)}[len(rows)]
    assert classes == {label: rare if label == RARE_CLASS else other for label in SHAPES}
    assert Counter(row["condition"] for row in rows) == {"blocked": blocked, "clear": len(rows) - blocked}
    for split in ("eval", "test"):
        rows = _rows(drains / f"{split}.csv")
        counts = tuple(sum(w in row.values() for row in rows) for w in (RARE_CLASS, "blocked"))
        assert counts == {160: (13, 40), 1600: (128, 400), 400: (32, 100)}[len(rows)]


def test_the_condition_is_independent_of_the_class(drains: Path) -> None:
    for split in SPLITS:
        rows = _rows(drains / f"{split}.csv")
        classes = Counter(row["object"] for row in rows)
        blocked = Counter(row["object"] for row in rows if row["condition"] == "blocked")
        for label, number in classes.items():
            assert abs(blocked[label] - number * SPLITS[split].blocked) < 1


def test_rows_are_in_no_order(drains: Path) -> None:
    rows = _rows(drains / "train.csv")
    assert set(SHAPES) == {row["object"] for row in rows[:150]}
    assert "blocked" in {row["condition"] for row in rows[:150]}


def test_boxes_are_inside_their_photos_and_position_tells_the_crosses_apart(drains: Path) -> None:
    assert SHAPES["cross"] == SHAPES["diamond"]
    for split in SPLITS:
        for row in _rows(drains / f"{split}.csv"):
            assert tuple(row) == COLUMNS
            x1, y1, x2, y2 = _box(row)
            with Image.open(drains / row["image"]) as image:
                width, height = image.size
            assert SIDES[0] <= min(width, height) <= max(width, height) <= SIDES[1]
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            centre = (y1 + y2) / 2 / height
            assert row["object"] != "cross" or centre < 0.4
            assert row["object"] != "diamond" or centre > 0.6
    assert set(CENTRES) == {"cross", "diamond"}


def test_the_others_are_anywhere(drains: Path) -> None:
    rows = [row for row in _rows(drains / "train.csv") if row["object"] == "circle"]
    centres = np.array([(_box(row)[1] + _box(row)[3]) / 2 for row in rows])
    assert centres.min() < 35
    assert centres.max() > 65
    assert ((centres > 45) & (centres < 55)).any()


@pytest.mark.parametrize("label", SHAPES)
def test_a_blocked_drain_is_brighter_inside(label: str) -> None:
    """Earth is lighter than concrete and brick, so what is inside the outline tells the condition."""
    inside: dict[str, list[float]] = {"clear": [], "blocked": []}
    for seed in range(20):
        for condition, values in inside.items():
            image, box = draw_photo(label, condition, np.random.default_rng(seed))
            x, y = round((box[0] + box[2]) / 2), round((box[1] + box[3]) / 2)
            values.append(float(np.asarray(image)[y - 2 : y + 3, x - 2 : x + 3].mean()))
    assert np.mean(np.array(inside["blocked"]) > np.array(inside["clear"])) >= 0.9
    assert np.median(inside["blocked"]) > np.median(inside["clear"]) + 25


def test_unknown_photos_are_refused(tmp_path: Path) -> None:
    for name in ("drains/other.csv", "drains/train.json", "sewers/train.csv"):
        with pytest.raises(DataError, match=r"Use drains/<train\|eval\|test>\.csv"):
            draw_file(str(tmp_path / name))
