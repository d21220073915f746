"""Draw the demo's inspection photos: one drain each, the sign of its cover and whether it is blocked; CSV and JPEGs.

A cover's sign is a circle, a square, a star or a cross; a cross in the lower half has the class `diamond`, so the class
depends on the position. (Each name is a single token of the tiny model.) The class `star`, a shape that the tiny model
has never seen, and the condition `blocked` are rare in training. The eval and test splits have larger shares of both,
enough to measure them: their class mix is not that of the training rows. Everything is a pure function of (split, seed,
number of images).
"""

import csv
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ray_vlm.demo.shapes import SCALE, colour_on, draw_background, draw_shape
from ray_vlm.errors import DataError

COLUMNS = ("id", "image", "object", "condition", "x1", "y1", "x2", "y2")
SHAPES = {"circle": "circle", "square": "square", "diamond": "cross", "cross": "cross", "star": "star"}
RARE_CLASS = "star"
CENTRES = {"cross": (0.0, 0.39), "diamond": (0.61, 1.0)}  # where a centre may be, as shares of the height
SIDES = (80, 96)  # shortest and longest image side, pixels
OBJECT, DISTRACTOR = (0.46, 0.58), (0.17, 0.23)  # side of a shape as a share of the shorter image side
DISTRACTOR_SHARE = 0.3
DISTRACTORS = ("triangle",)  # no class looks like it, so what a photo shows is never in doubt


@dataclass(frozen=True)
class Split:
    """How many photos, and the shares of the rare class and of the rare condition among them."""

    num_images: int
    rare: float
    blocked: float


SPLITS = {"train": Split(6000, 0.03, 0.08), "eval": Split(160, 0.08, 0.25), "test": Split(1600, 0.08, 0.25)}


def draw_file(path: str) -> None:
    """Draw the photos of `.../drains/<split>.csv`; a job's `create` calls this on first use."""
    file = Path(path)
    if file.parent.name != "drains" or file.suffix != ".csv" or file.stem not in SPLITS:
        raise DataError(f"{path}: no such photos. Use drains/<{'|'.join(SPLITS)}>.csv.")
    draw(file.parent, file.stem, SPLITS[file.stem].num_images)


def draw(folder: str | Path, split: str, num_images: int, seed: int = 0) -> Path:
    """Write `<folder>/<split>.csv` and its JPEGs under `<folder>/<split>/`; return the CSV's path."""
    folder = Path(folder)
    (folder / split).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, zlib.crc32(f"drains/{split}".encode())])
    rows = []
    for i, (label, condition) in enumerate(_answers(SPLITS[split], num_images, rng)):
        image, box = draw_photo(label, condition, rng)
        name = f"{split}/{i:05d}.jpg"
        image.save(folder / name, quality=int(rng.integers(70, 96)))
        rows.append((f"{split}-{i:05d}", name, label, condition, *box))
    path = folder / f"{split}.csv"
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    return path


def draw_photo(label: str, condition: str, rng: np.random.Generator) -> tuple[Image.Image, list[float]]:
    """Draw one photo: an RGB image and the box of its drain, `[x1, y1, x2, y2]` in pixels."""
    width, height = (int(rng.integers(SIDES[0], SIDES[1] + 1)) for _ in range(2))
    ground = draw_background(str(rng.choice(["concrete", "brick"])), width, height, rng)
    canvas = Image.fromarray(ground).resize((width * SCALE, height * SCALE), Image.Resampling.BILINEAR)
    box = _object_box(label, width, height, rng)
    if rng.random() < DISTRACTOR_SHARE:
        small = _distractor_box(box, width, height, rng)
        if small is not None:
            draw_shape(canvas, str(rng.choice(DISTRACTORS)), small, colour_on(ground, small, rng), True, rng)
    box = draw_shape(canvas, SHAPES[label], box, colour_on(ground, box, rng), True, rng)
    if condition == "blocked":
        _fill_with_debris(canvas, SHAPES[label], box, rng)
    image = canvas.resize((width, height), Image.Resampling.BOX)
    return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.0, 0.5)))), box


def _answers(split: Split, num_images: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(object, condition) of each photo. Shares are exact, those of the conditions within each class too."""
    common = [label for label in SHAPES if label != RARE_CLASS]
    rare, blocked = round(split.rare * num_images), round(split.blocked * num_images)
    labels = sorted(common[i % len(common)] for i in range(num_images - rare)) + [RARE_CLASS] * rare
    # Evenly spaced in a list that is sorted by class: as independent of the class as whole rows allow.
    marks = [(i + 1) * blocked // num_images > i * blocked // num_images for i in range(num_images)]
    answers = [(label, "blocked" if mark else "clear") for label, mark in zip(labels, marks, strict=True)]
    return [answers[i] for i in rng.permutation(num_images)]


def _object_box(label: str, width: int, height: int, rng: np.random.Generator) -> list[float]:
    side = rng.uniform(*OBJECT) * min(width, height)
    w, h = side * rng.uniform(0.88, 1.0), side * rng.uniform(0.88, 1.0)
    low, high = CENTRES.get(label, (0.0, 1.0))
    x = rng.uniform(1, width - w - 1)
    y = rng.uniform(max(1, low * height - h / 2), min(height - h - 1, high * height - h / 2))
    return [x, y, x + w, y + h]


def _distractor_box(taken: list[float], width: int, height: int, rng: np.random.Generator) -> list[float] | None:
    """Return a small box at least 2 pixels away from `taken`, or None after 50 tries."""
    for _ in range(50):
        side = rng.uniform(*DISTRACTOR) * min(width, height)
        x, y = rng.uniform(1, width - side - 1), rng.uniform(1, height - side - 1)
        if x + side + 2 < taken[0] or x > taken[2] + 2 or y + side + 2 < taken[1] or y > taken[3] + 2:
            return [x, y, x + side, y + side]
    return None


def _fill_with_debris(canvas: Image.Image, shape: str, box: list[float], rng: np.random.Generator) -> None:
    """Draw earth with clods and stones inside the shape, up to the middle of its outline, so that this stays
    visible."""
    inset = 0.075 * min(box[2] - box[0], box[3] - box[1])
    inner = [box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset]
    black = Image.new("RGB", canvas.size)
    draw_shape(black, shape, inner, (255, 255, 255), False, rng)
    left, top, right, bottom = (round(v * SCALE) for v in box)
    earth = np.array([168, 128, 76]) + rng.uniform(-14, 14, 3)
    grains = rng.normal(0, 16, ((bottom - top) // SCALE + 1, (right - left) // SCALE + 1, 1)) + earth
    debris = Image.fromarray(np.clip(grains, 0, 255).astype(np.uint8)).resize((right - left, bottom - top))
    pen = ImageDraw.Draw(debris)
    for _ in range(int(rng.integers(16, 26))):
        x, y, radius = rng.uniform(0, right - left), rng.uniform(0, bottom - top), rng.uniform(1.0, 3.0) * SCALE
        tone = 0.35 if rng.random() < 0.7 else 1.3
        colour = tuple(int(v) for v in np.clip(earth * tone, 0, 255))
        pen.ellipse([x - radius, y - radius * 0.8, x + radius, y + radius * 0.8], fill=colour)
    canvas.paste(debris, (left, top), black.convert("L").crop((left, top, right, bottom)))
