"""Draw the demo's GUI tasks: a screen with three buttons to click in order, as a CSV and PNGs.

The instruction says whether to start at the top or at the bottom. The screen is the same in all steps of a task, so the
next click follows only from the memory of earlier steps. Everything is a pure function of (split, seed).
"""

import csv
import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ray_vlm.demo.shapes import SCALE, contrasting_colour, draw_shape
from ray_vlm.errors import DataError

COLUMNS = ("Task_id", "Image_id", "Instruction", "Output", "Grounding")
ICONS = ("circle", "square", "triangle", "cross", "ring", "diamond")
WIDTH, HEIGHT, TITLE_BAR = 96, 128, 11  # pixels
NUM_BUTTONS = 3
SIDES = (32, 37)  # shortest and longest side of a button, pixels
NUM_TASKS = {"train": 600, "eval": 30, "test": 100}
ORDERS = {"click all, top first": 1, "click all, bottom first": -1}  # slice step through the buttons from the top


def draw_file(path: str) -> None:
    """Draw the tasks of `.../screens/<split>.csv`; a job's `create` calls this on first use."""
    file = Path(path)
    if file.parent.name != "screens" or file.suffix != ".csv" or file.stem not in NUM_TASKS:
        raise DataError(f"{path}: no such screens. Use screens/<{'|'.join(NUM_TASKS)}>.csv.")
    draw(file.parent, file.stem, NUM_TASKS[file.stem])


def draw(folder: str | Path, split: str, num_tasks: int, seed: int = 0) -> Path:
    """Write `<folder>/<split>.csv`, one row for each step, and its PNGs under `<folder>/<split>/`; return the CSV's
    path."""
    folder = Path(folder)
    (folder / split).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, zlib.crc32(f"screens/{split}".encode())])
    rows = []
    for i in range(num_tasks):
        image, buttons = draw_screen(rng)
        instruction = str(rng.choice(list(ORDERS)))
        for step, icon in enumerate([*list(buttons)[:: ORDERS[instruction]], None], start=1):
            name = f"{split}/{i:04d}_{step}.png"
            image.save(folder / name)
            output = {"action": "click", "target": icon} if icon else {"action": "done"}
            grounding = {"bbox": buttons[icon]} if icon else {}
            answer = (json.dumps(output), json.dumps(grounding))
            rows.append((f"{split}-{i:04d}", name, instruction, *answer))
    path = folder / f"{split}.csv"
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    return path


def draw_screen(rng: np.random.Generator) -> tuple[Image.Image, dict[str, list[int]]]:
    """Draw one screen: an RGB image and its buttons from the top, icon to `[x1, y1, x2, y2]` in pixels."""
    page = _tint(rng, 226, 246)
    canvas = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), page)
    pen = ImageDraw.Draw(canvas)
    pen.rectangle(_enlarged([0, 0, WIDTH, TITLE_BAR]), fill=_tint(rng, 70, 130))
    pen.rectangle(_enlarged([5, 4, int(rng.integers(30, 60)), 7]), fill=page)
    buttons: dict[str, list[int]] = {}
    for icon, box in zip(rng.permutation(ICONS)[:NUM_BUTTONS], _button_boxes(rng), strict=True):
        face = _tint(rng, 246, 255)
        pen.rounded_rectangle(_enlarged(box), radius=6 * SCALE, fill=face, outline=(120, 120, 130), width=SCALE)
        inset = float(rng.uniform(4.0, 5.0))
        inner = [box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset]
        draw_shape(canvas, str(icon), inner, contrasting_colour(np.array(face), rng), False, rng)
        buttons[str(icon)] = box
    return canvas.resize((WIDTH, HEIGHT), Image.Resampling.BOX), buttons


def _button_boxes(rng: np.random.Generator) -> list[list[int]]:
    """Draw the boxes of the buttons, one below the other, at any horizontal position."""
    tall = (HEIGHT - TITLE_BAR) // NUM_BUTTONS
    boxes = []
    for i in range(NUM_BUTTONS):
        w, h = (int(rng.integers(SIDES[0], SIDES[1] + 1)) for _ in range(2))
        x, y = int(rng.integers(1, WIDTH - w)), TITLE_BAR + tall * i + int(rng.integers(1, tall - h))
        boxes.append([x, y, x + w, y + h])
    return boxes


def _tint(rng: np.random.Generator, low: int, high: int) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in rng.integers(low, high + 1, 3))
    return red, green, blue


def _enlarged(box: list[int]) -> list[int]:
    """Return the box on the enlarged canvas; Pillow includes the last row and column of a box."""
    return [box[0] * SCALE, box[1] * SCALE, box[2] * SCALE - 1, box[3] * SCALE - 1]
