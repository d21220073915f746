"""Build the record of an application's question: images in any form, and the fields that each task takes."""

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
    of these; `told`: the other fields of the question, as `Predictor.predict` takes them."""

    images: Any
    told: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""

    def __post_init__(self) -> None:
        images = self.images if isinstance(self.images, list | tuple) else (self.images,)
        object.__setattr__(self, "images", tuple(images))


def name_of(ask: Ask, row: int) -> str:
    """Return the name of a question in messages: its id, the path of its first image, or its number."""
    return ask.id or next((str(image) for image in ask.images if isinstance(image, str | Path)), f"input {row}")


def build_question(ask: Ask, row: int, task: str, max_image_pixels: int) -> SftRecord:
    """Build the record of a question. Raise `ValueError`, `OSError` or `TypeError` with the reason."""
    images = tuple(_encoded(image) for image in ask.images)
    sizes = tuple(read_size(image, max_image_pixels) for image in images)
    truth, context = _READ[task](ask.told, sizes)
    return SftRecord(name_of(ask, row), row, images, sizes, truth, context)


def _encoded(image: Any) -> str | bytes:
    """Return an image as records hold it: a path, an address, or the bytes of an encoded file."""
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
Fields = Mapping[str, Any]  # `Ask.told`


def _only(fields: Fields, *names: str) -> None:
    if unknown := [name for name in fields if name not in names]:
        raise ValueError(f"{', '.join(unknown)} means nothing to this task; it takes {', '.join(names) or 'an image'}")


def _read_nothing(fields: Fields, sizes: Sizes) -> tuple[dict, dict]:
    _only(fields)
    _one(sizes)
    return {"boxes": (), "labels": ()}, {}


def _read_box(fields: Fields, sizes: Sizes) -> tuple[dict, dict]:
    _only(fields, "box")
    _one(sizes)
    box = fields.get("box")
    if box is None:
        return {"attributes": {}}, {}
    box = tuple(float(v) for v in box)
    if len(box) != 4 or (problem := box_problem(box, sizes[0])):
        raise ValueError(f"box {list(box)} is not x1, y1, x2, y2 in pixels" + (f": {problem}" if len(box) == 4 else ""))
    return {"attributes": {}}, {"box": box}


def _read_question(fields: Fields, sizes: Sizes) -> tuple[dict, dict]:
    _only(fields, "question")
    question = fields.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("chat needs a question")
    tags = "" if IMAGE in question else IMAGE * len(sizes)
    return {"answer": ""}, {"turns": (("user", tags + question),)}


def _read_goal(fields: Fields, sizes: Sizes) -> tuple[dict, dict]:
    _only(fields, "goal", "history")
    _one(sizes)
    goal, history = fields.get("goal"), read_memory(fields.get("history"), "history")
    if not isinstance(goal, str) or not goal.strip():
        raise ValueError("a GUI step needs a goal")
    context = {"instruction": goal, "task": "", "step": len(history), "history": history}
    return {"output": {"action": ""}, "box": None, "point": None}, context


def _one(sizes: Sizes) -> None:
    if len(sizes) != 1:
        raise ValueError(f"{len(sizes)} images, and this task takes one")


_READ = {
    "detection": _read_nothing,
    "classification": _read_box,
    "chat": _read_question,
    "gui_steps": _read_goal,
}
