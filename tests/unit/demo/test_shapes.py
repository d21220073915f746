"""Drawn scenes: the same every time, boxes where the paint is, the rare class rare and new."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ray_vlm.demo.shapes import DOMAINS, RARE_CLASS, draw, draw_scene


def test_scenes_repeat_and_splits_differ(tmp_path: Path) -> None:
    first, again = (draw(tmp_path / name, "site", "train", 6).read_text() for name in ("a", "b"))
    assert first == again
    assert (tmp_path / "a/train/00003.jpg").read_bytes() == (tmp_path / "b/train/00003.jpg").read_bytes()
    assert draw(tmp_path / "a", "site", "test", 6).read_text() != first


def test_boxes_hold_the_paint() -> None:
    """On a clean background every pixel far from it lies inside a box, and each box's edges are touched by paint."""
    import dataclasses

    domain = dataclasses.replace(DOMAINS["studio"], backgrounds=("clean",), max_objects=1)
    rng = np.random.default_rng(0)
    for _ in range(30):
        image, objects = draw_scene(domain, rng)
        pixels = np.asarray(image).astype(int)
        paint = np.abs(pixels - np.median(pixels.reshape(-1, 3), axis=0)).sum(axis=2) > 60
        ys, xs = np.nonzero(paint)
        box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert np.abs(box - np.array(objects[0][1])).max() <= 2.0


def test_the_rare_class_is_rare_and_unknown_to_the_base(tmp_path: Path) -> None:
    coco = json.loads(draw(tmp_path, "site", "test", 240).read_text())
    names = {c["id"]: c["name"] for c in coco["categories"]}
    labels = [names[a["category_id"]] for a in coco["annotations"]]
    assert 40 <= labels.count(RARE_CLASS) < min(labels.count(label) for label in set(labels) - {RARE_CLASS}) * 0.8
    assert RARE_CLASS not in DOMAINS["studio"].classes
    assert len(coco["images"]) >= 96


def test_images_are_valid_and_inside_their_limits(tmp_path: Path) -> None:
    coco = json.loads(draw(tmp_path, "studio", "train", 20).read_text())
    for row in coco["images"]:
        with Image.open(tmp_path / row["file_name"]) as image:
            assert image.size == (row["width"], row["height"])
    sizes = {(row["width"], row["height"]) for row in coco["images"]}
    assert len(sizes) > 10
