"""Drawn GUI tasks: the same every time, one screen a task, buttons where they are said to be, cells that parse."""

import csv
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_vlm.demo.screens import COLUMNS, ICONS, NUM_TASKS, ORDERS, TITLE_BAR, draw, draw_file, draw_screen
from ray_vlm.errors import DataError


def _tasks(path: Path) -> list[list[dict[str, str]]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [list(steps) for _, steps in itertools.groupby(rows, key=lambda row: row["Task_id"])]


@pytest.fixture(scope="module")
def screens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "screens"
    for split in NUM_TASKS:
        draw_file(str(folder / f"{split}.csv"))
    return folder


def test_tasks_repeat_and_splits_and_seeds_differ(tmp_path: Path) -> None:
    first, again = (draw(tmp_path / name, "train", 5) for name in ("a", "b"))
    assert first.read_bytes() == again.read_bytes()
    for row in itertools.chain(*_tasks(first)):
        assert (tmp_path / "a" / row["Image_id"]).read_bytes() == (tmp_path / "b" / row["Image_id"]).read_bytes()
    others = (draw(tmp_path / "c", "train", 5, seed=1), draw(tmp_path / "d", "test", 5))
    assert all(other.read_bytes() != first.read_bytes() for other in others)
    assert (tmp_path / "c/train/0000_1.png").read_bytes() != (tmp_path / "a/train/0000_1.png").read_bytes()


def test_a_task_is_a_click_on_each_button_in_order_and_done(screens: Path) -> None:
    for split, number in NUM_TASKS.items():
        tasks = _tasks(screens / f"{split}.csv")
        assert len(tasks) == len({steps[0]["Task_id"] for steps in tasks}) == number
        for steps in tasks:
            assert all(tuple(row) == COLUMNS for row in steps)
            assert len({row["Instruction"] for row in steps}) == 1
            outputs = [json.loads(row["Output"]) for row in steps]
            assert [output["action"] for output in outputs] == ["click", "click", "click", "done"]
            assert len({output["target"] for output in outputs[:3]} & set(ICONS)) == 3
            assert list(outputs[3]) == ["action"]
            tops = [json.loads(row["Grounding"])["bbox"][1] for row in steps[:3]]
            assert tops == sorted(tops, reverse="bottom" in steps[0]["Instruction"])


def test_only_memory_tells_the_steps_apart(screens: Path) -> None:
    for steps in _tasks(screens / "train.csv"):
        assert len({row["Image_id"] for row in steps}) == 4
        assert len({(screens / row["Image_id"]).read_bytes() for row in steps}) == 1


def test_groundings_are_boxes_inside_the_screen(screens: Path) -> None:
    for row in itertools.chain(*_tasks(screens / "train.csv")):
        grounding = json.loads(row["Grounding"])
        if json.loads(row["Output"])["action"] == "done":
            assert grounding == {}
            continue
        x1, y1, x2, y2 = grounding["bbox"]
        with Image.open(screens / row["Image_id"]) as image:
            assert 0 <= x1 < x2 <= image.width
            assert TITLE_BAR <= y1 < y2 <= image.height
        assert 30 <= x2 - x1 <= 40
        assert 30 <= y2 - y1 <= 40


def test_buttons_hold_their_icons_and_never_overlap() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        image, buttons = draw_screen(rng)
        assert len(buttons) == 3
        for a, b in itertools.combinations(buttons.values(), 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        pixels = np.asarray(image).astype(int)
        outside = np.ones(pixels.shape[:2], bool)
        outside[:TITLE_BAR] = False
        for x1, y1, x2, y2 in buttons.values():
            outside[y1:y2, x1:x2] = False
            colours = pixels[y1:y2, x1:x2].reshape(-1, 3)
            assert (colours.max(axis=1) - colours.min(axis=1) > 50).mean() > 0.1
        assert len(np.unique(pixels[outside], axis=0)) == 1


def test_both_orders_every_icon_and_every_place(screens: Path) -> None:
    tasks = _tasks(screens / "train.csv")
    orders = Counter(steps[0]["Instruction"] for steps in tasks)
    assert set(orders) == set(ORDERS)
    assert min(orders.values()) > 0.4 * len(tasks)
    assert len({json.loads(steps[0]["Output"])["target"] for steps in tasks}) == len(ICONS)
    lefts = [json.loads(steps[0]["Grounding"])["bbox"][0] for steps in tasks]
    assert min(lefts) < 5
    assert max(lefts) > 50


def test_unknown_screens_are_refused(tmp_path: Path) -> None:
    for name in ("screens/other.csv", "screens/train.json", "windows/train.csv"):
        with pytest.raises(DataError, match=r"Use screens/<train\|eval\|test>\.csv"):
            draw_file(str(tmp_path / name))
