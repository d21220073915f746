"""One question of an application as a record: images in any form, and what each task is to be told."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_vlm.data.images import read_size
from ray_vlm.data.records import SftRecord
from ray_vlm.tasks.answers import IMAGE
from ray_vlm.tasks.boxes import box_problem
from ray_vlm.tasks.gui_steps import read_memory


@dataclass(frozen=True)
class Ask:
    """One question. `images`: a path, an address, encoded bytes, a PIL image or an array `uint8 [h, w, 3]`, or a list
    of these; `told`: what the task's question needs beside them, as `Predictor.predict` takes it."""

    images: Any
    told: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""

    def __post_init__(self) -> None:
        images = self.images if isinstance(self.images, list | tuple) else (self.images,)
        object.__setattr__(self, "images", tuple(images))


def name_of(ask: Ask, row: int) -> str:
    """What messages call a question: its own name, that of its first image, or its number."""
    return ask.id or next((str(image) for image in ask.images if isinstance(image, str | Path)), f"input {row}")


def build_question(ask: Ask, row: int, task: str, max_image_pixels: int) -> SftRecord:
    """The record that asks. Raises `ValueError`, `OSError` or `TypeError` with the reason where it cannot be made."""
    images = tuple(_encoded(image) for image in ask.images)
    sizes = tuple(read_size(image, max_image_pixels) for image in images)
    truth, context = _TELL[task](ask.told, sizes)
    return SftRecord(name_of(ask, row), row, images, sizes, truth, context)


def _encoded(image: Any) -> str | bytes:
    """An image as records hold it: a path, an address, or bytes of a file."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return str(image)
    from PIL import Image

    if not isinstance(image, Image.Image):
        try:
            image = Image.fromarray(image)
        except (TypeError, AttributeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{type(image).__name__} is no image ({error}); give a path, bytes, PIL or uint8"
            ) from None
    out = io.BytesIO()
    (image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGB")).save(out, "PNG", compress_level=1)
    return out.getvalue()


Sizes = Sequence[tuple[int, int]]
Told = Mapping[str, Any]


def _only(told: Told, *names: str) -> None:
    if unknown := [name for name in told if name not in names]:
        raise ValueError(f"{', '.join(unknown)} means nothing to this task; it takes {', '.join(names) or 'an image'}")


def _tell_nothing(told: Told, sizes: Sizes) -> tuple[dict, dict]:
    _only(told)
    _one(sizes)
    return {"boxes": (), "labels": ()}, {}


def _tell_box(told: Told, sizes: Sizes) -> tuple[dict, dict]:
    _only(told, "box")
    _one(sizes)
    box = told.get("box")
    if box is None:
        return {"attributes": {}}, {}
    box = tuple(float(v) for v in box)
    if len(box) != 4 or (problem := box_problem(box, sizes[0])):
        raise ValueError(f"box {list(box)} is not x1, y1, x2, y2 in pixels" + (f": {problem}" if len(box) == 4 else ""))
    return {"attributes": {}}, {"box": box}


def _tell_question(told: Told, sizes: Sizes) -> tuple[dict, dict]:
    _only(told, "question")
    question = told.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("chat needs a question")
    tags = "" if IMAGE in question else IMAGE * len(sizes)
    return {"answer": ""}, {"turns": (("user", tags + question),)}


def _tell_goal(told: Told, sizes: Sizes) -> tuple[dict, dict]:
    _only(told, "goal", "history")
    _one(sizes)
    goal, history = told.get("goal"), read_memory(told.get("history"), "history")
    if not isinstance(goal, str) or not goal.strip():
        raise ValueError("a GUI step needs a goal")
    context = {"instruction": goal, "task": "", "step": len(history), "history": history}
    return {"output": {"action": ""}, "box": None, "point": None}, context


def _one(sizes: Sizes) -> None:
    if len(sizes) != 1:
        raise ValueError(f"{len(sizes)} images, and this task looks at one")


_TELL = {
    "detection": _tell_nothing,
    "classification": _tell_box,
    "chat": _tell_question,
    "gui_steps": _tell_goal,
}
