"""Photo-like JPEGs of several sizes, and COCO rows over them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ray_vlm.config.data import Source
from ray_vlm.config.schema import Model
from ray_vlm.config.task import DetectionTask
from ray_vlm.data.spec import SampleSpec

SIZES = {"12mp": (4000, 3000), "2mp": (1600, 1200), "0.3mp": (640, 480)}
FILES = 8  # distinct images
LABELS = ("dog", "cat", "car")


def write_images(folder: Path, size: tuple[int, int], count: int) -> None:
    """Write photo-like JPEGs: smooth shapes with noise."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        path = folder / f"{number}.jpg"
        if number >= FILES:
            path.write_bytes((folder / f"{number % FILES}.jpg").read_bytes())
            continue
        coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        noise = rng.integers(-12, 13, (size[1], size[0], 1), np.int16)
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=85)


def write_rows(folder: Path, size: tuple[int, int], rows: int, files: int) -> Source:
    """Write a COCO file over the images in `folder`, with three boxes each."""
    images = [{"id": i, "file_name": f"{i % files}.jpg"} for i in range(rows)]
    box = [0.1 * size[0], 0.2 * size[1], 0.3 * size[0], 0.4 * size[1]]
    boxes = [
        {"image_id": i, "category_id": c, "bbox": [c * 10 + v for v in box]} for i in range(rows) for c in (1, 2, 3)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(LABELS, 1)]
    path = folder / "rows.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return Source(path=str(path))


def make_spec(model: Path) -> SampleSpec:
    """Return the spec of the tiny Qwen3-VL with the image limits that real models are trained with."""
    return SampleSpec(Model(name=str(model), load_in_4bit=False), DetectionTask(), LABELS, max_pixels=1280 * 1024)
