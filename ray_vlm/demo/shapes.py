"""Draw the demo's scenes: coloured shapes on many backgrounds, written as a COCO file and a folder of JPEGs.

Two domains share the drawing code. The shipped tiny model was trained on `studio`: filled shapes on clean, textured and
noisy backgrounds. The demo fine-tunes it on `site`: hollow, worn shapes on dark concrete and brick with glare and
stains, and a rare class, the star, that no studio scene contains. Everything is a pure function of (domain, split,
seed), so every machine draws the same scenes.
"""

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ray_vlm.errors import DataError

SCALE = 4  # shapes are drawn this many times larger and then reduced, for smooth edges


@dataclass(frozen=True)
class Domain:
    """The appearance of a kind of scene. `classes` maps a label to its relative frequency among the objects."""

    classes: dict[str, float]
    backgrounds: tuple[str, ...]
    hollow: bool
    max_objects: int = 4
    sides: tuple[int, int] = (96, 144)  # shortest and longest image side, pixels
    sizes: tuple[float, float] = (0.28, 0.52)  # object side as a share of the shorter image side


_STUDIO = {"circle": 1.0, "square": 1.0, "triangle": 1.0, "cross": 1.0, "ring": 1.0, "diamond": 1.0}
DOMAINS = {
    # The base's first lessons; without them training takes several times as long until the images have any effect.
    "lesson_1": Domain(_STUDIO, ("clean",), hollow=False, max_objects=1, sides=(96, 96)),
    "lesson_2": Domain(_STUDIO, ("clean", "gradient", "noise"), hollow=False, max_objects=2, sides=(96, 128)),
    "studio": Domain(
        classes=_STUDIO,
        backgrounds=("clean", "gradient", "stripes", "blobs", "noise"),
        hollow=False,
    ),
    "site": Domain(
        classes={"circle": 1.0, "square": 1.0, "triangle": 1.0, "cross": 1.0, "star": 0.65},
        backgrounds=("concrete", "brick"),
        hollow=True,
    ),
}
RARE_CLASS = "star"
NUM_IMAGES = {"train": 2000, "eval": 64, "test": 240, "more": 400}  # more: further scenes, for the stages after SFT


def draw_file(path: str) -> None:
    """Draw the scenes of `.../<domain>/<split>.json`; a job's `create` calls this on first use."""
    file = Path(path)
    if file.parent.name not in DOMAINS or file.stem not in NUM_IMAGES:
        raise DataError(f"{path}: no such scenes. Use <{'|'.join(DOMAINS)}>/<{'|'.join(NUM_IMAGES)}>.json.")
    draw(file.parent, file.parent.name, file.stem, NUM_IMAGES[file.stem])


def draw_scene(domain: Domain, rng: np.random.Generator) -> tuple[Image.Image, list[tuple[str, list[float]]]]:
    """Draw one scene: an RGB image and its objects, `(label, [x1, y1, x2, y2])` in pixels."""
    width, height = (int(rng.integers(domain.sides[0], domain.sides[1] + 1)) for _ in range(2))
    background = draw_background(str(rng.choice(domain.backgrounds)), width, height, rng)
    canvas = Image.fromarray(background).resize((width * SCALE, height * SCALE), Image.Resampling.BILINEAR)
    labels, shares = zip(*domain.classes.items(), strict=True)
    weights = np.array(shares) / sum(shares)
    objects: list[tuple[str, list[float]]] = []
    for _ in range(int(rng.integers(1, domain.max_objects + 1))):
        box = _free_box(domain, width, height, [b for _, b in objects], rng)
        if box is None:
            continue
        label = str(rng.choice(labels, p=weights))
        drawn = draw_shape(canvas, label, box, colour_on(background, box, rng), domain.hollow, rng)
        objects.append((label, drawn))
    image = canvas.resize((width, height), Image.Resampling.BOX)
    if domain.hollow:  # a little out of focus, as photos from a site are
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.0, 0.6))))
    return image, objects


def draw(folder: str | Path, domain: str, split: str, num_images: int, seed: int = 0) -> Path:
    """Write `<folder>/<split>.json` (COCO) and its JPEGs under `<folder>/<split>/`; return the JSON's path."""
    folder, kind = Path(folder), DOMAINS[domain]
    (folder / split).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, zlib.crc32(f"{domain}/{split}".encode())])
    ids = {label: i + 1 for i, label in enumerate(kind.classes)}
    images: list[dict] = []
    annotations: list[dict] = []
    for i in range(num_images):
        image, objects = draw_scene(kind, rng)
        name = f"{split}/{i:05d}.jpg"
        image.save(folder / name, quality=int(rng.integers(60, 96)))
        images.append({"id": i, "file_name": name, "width": image.width, "height": image.height})
        for label, (x1, y1, x2, y2) in objects:
            annotations.append(
                {"id": len(annotations), "image_id": i, "category_id": ids[label], "iscrowd": 0}
                | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            )
    coco = {"images": images, "annotations": annotations}
    coco["categories"] = [{"id": i, "name": label} for label, i in ids.items()]
    path = folder / f"{split}.json"
    path.write_text(json.dumps(coco))
    return path


def _free_box(domain: Domain, width: int, height: int, taken: list, rng: np.random.Generator) -> list[float] | None:
    """Return a box that overlaps each of `taken` by less than 5 % of the smaller one, or None after 20 tries."""
    short = min(width, height)
    for _ in range(20):
        side = rng.uniform(*domain.sizes) * short
        w, h = side * rng.uniform(0.8, 1.0), side * rng.uniform(0.8, 1.0)
        x, y = rng.uniform(1, width - w - 1), rng.uniform(1, height - h - 1)
        if all(_overlap([x, y, x + w, y + h], other) < 0.05 for other in taken):
            return [x, y, x + w, y + h]
    return None


def _overlap(a: list[float], b: list[float]) -> float:
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return inter / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def colour_on(ground: np.ndarray, box: list[float], rng: np.random.Generator) -> tuple[int, int, int]:
    """Draw a colour that contrasts with the part of the background, `[height, width, 3]`, that `box` covers."""
    local = ground[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])]
    return contrasting_colour(local.reshape(-1, 3).mean(axis=0), rng)


def contrasting_colour(local: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int]:
    """Draw a saturated colour at a distance above 110 (RGB) from the background's mean under the object."""
    while True:
        colour = rng.integers(0, 256, 3)
        if np.linalg.norm(colour - local) > 110 and int(colour.max()) - int(colour.min()) > 60:
            return int(colour[0]), int(colour[1]), int(colour[2])


def _outline(label: str, box: list[float]) -> list[tuple[float, float]]:
    """Return the corner points of a polygonal shape that touches all four sides of `box`."""
    x1, y1, x2, y2 = box
    cx, cy, w, h = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    if label == "square":
        return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    if label == "triangle":
        return [(cx, y1), (x2, y2), (x1, y2)]
    if label == "diamond":
        return [(cx, y1), (x2, cy), (cx, y2), (x1, cy)]
    if label == "cross":
        a, b = w / 3, h / 3
        xs, ys = (x1, x1 + a, x2 - a, x2), (y1, y1 + b, y2 - b, y2)
        order = ((1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1))
        return [(xs[i], ys[j]) for i, j in order]
    points = []
    for i in range(10):  # a star, stretched so that its tips touch the box
        radius, angle = (1.0 if i % 2 == 0 else 0.42), math.pi * (i / 5 - 0.5)
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    left, right = min(p[0] for p in points), max(p[0] for p in points)
    top, bottom = min(p[1] for p in points), max(p[1] for p in points)
    return [(x1 + (px - left) / (right - left) * w, y1 + (py - top) / (bottom - top) * h) for px, py in points]


def draw_shape(
    canvas: Image.Image,
    label: str,
    box: list[float],
    colour: tuple[int, int, int],
    hollow: bool,
    rng: np.random.Generator,
) -> list[float]:
    """Draw one shape on the enlarged canvas; return its box in image pixels, rounded to a tenth."""
    pen = ImageDraw.Draw(canvas)
    big = [v * SCALE for v in box]
    line = round(max(2.0, 0.15 * min(box[2] - box[0], box[3] - box[1])) * SCALE)
    if label in ("circle", "ring"):
        if hollow or label == "ring":
            thick = line if hollow else round(0.24 * (big[2] - big[0]))
            pen.ellipse(big, outline=colour, width=thick)
        else:
            pen.ellipse(big, fill=colour)
    elif hollow:
        points = _outline(label, [big[0] + line / 2, big[1] + line / 2, big[2] - line / 2, big[3] - line / 2])
        pen.line([*points, points[0], points[1]], fill=colour, width=line, joint="curve")
    else:
        pen.polygon(_outline(label, big), fill=colour)
    if hollow and rng.random() < 0.5:  # wear: a pale glare across the shape
        y = rng.uniform(big[1], big[3])
        pen.line([(big[0], y), (big[2], y + rng.uniform(-8, 8) * SCALE)], fill=(150, 150, 150), width=SCALE)
    return [round(v, 1) for v in box]


def draw_background(kind: str, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a background of one of the kinds in `Domain.backgrounds`: `uint8 [height, width, 3]`."""
    base = rng.uniform(40, 235, 3)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    if kind == "clean":
        base = rng.uniform(225, 255) + rng.uniform(-6, 6, 3)
        field = np.zeros((height, width))
    elif kind == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        field = 40 * (np.cos(angle) * xs / width + np.sin(angle) * ys / height)
    elif kind == "stripes":
        angle, period = rng.uniform(0, math.pi), rng.uniform(5, 16)
        field = 16 * np.sin(2 * math.pi * (np.cos(angle) * xs + np.sin(angle) * ys) / period)
    elif kind in ("blobs", "noise"):
        cell = 12 if kind == "blobs" else 1
        coarse = rng.normal(0, 20, (height // cell + 2, width // cell + 2))
        field = np.asarray(Image.fromarray(coarse.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))
    else:
        base = rng.uniform(45, 90) + rng.uniform(-12, 12, 3)
        field = rng.normal(0, 9, (height, width)) + _stain(xs, ys, width, height, rng)
        if kind == "brick":
            field = field + _mortar(xs, ys, rng)
    return np.clip(base + field[..., None], 0, 255).astype(np.uint8)


def _stain(xs: np.ndarray, ys: np.ndarray, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    cx, cy, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.2, 0.5) * width
    return rng.uniform(-30, 45) * np.exp(-((xs - cx) ** 2 + (ys - cy) ** 2) / (2 * radius**2))


def _mortar(xs: np.ndarray, ys: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    tall, long = rng.uniform(14, 24), rng.uniform(28, 48)
    row = np.floor(ys / tall)
    shifted = xs + (row % 2) * long / 2
    return np.where((ys % tall < 1.6) | (shifted % long < 1.6), 28.0, 0.0)
