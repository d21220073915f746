"""Draw a prediction on its image."""

import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_vlm.evaluate.prediction import Prediction, in_words

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

    ImageLike = str | Path | bytes | PIL.Image.Image | np.ndarray  # a path, encoded bytes, or decoded pixels

COLOURS = ("#f04438", "#12b76a", "#2563eb", "#e08a00", "#c2568f", "#38a3d9", "#7c3aed", "#8a6d3b")  # by class


def draw_values(image: "ImageLike", values: Mapping[str, Any], classes: Sequence[str] = ()) -> "PIL.Image.Image":
    """Draw parsed values on an image and return it as a PIL image: labelled boxes, the box or point of a GUI step, and
    the rest of the answer as text in a strip below.

    `classes`: the task's labels in order. A label has the same colour on every image, as long as `classes` is the same.
    """
    from PIL import Image, ImageDraw

    picture = Image.fromarray(_pixels(image))
    unit = max(1, round(max(picture.size) / 300))
    draw = ImageDraw.Draw(picture)
    labels = list(values.get("labels", ()))
    for box, label in zip(values.get("boxes", ()), labels, strict=True):
        _box(draw, box, colour_of(label, classes), unit, label)
    if values.get("box") is not None:
        _box(draw, values["box"], COLOURS[0], unit, "")
    if values.get("point") is not None:
        x, y = values["point"]
        draw.ellipse([x - 4 * unit, y - 4 * unit, x + 4 * unit, y + 4 * unit], outline=COLOURS[0], width=2 * unit)
    return _caption(picture, in_words(values, labels=False), unit)


def colour_of(label: str, classes: Sequence[str]) -> str:
    """Return the colour of a label: by its position in `classes`, or by its checksum where it is none of them."""
    number = classes.index(label) if label in classes else zlib.crc32(label.encode("utf-8", "replace"))
    return COLOURS[number % len(COLOURS)]


def draw_predictions(predictions: Sequence[Prediction], count: int = 8) -> "list[tuple[str, PIL.Image.Image]]":
    """Return captions and images of the first few predictions whose images are files."""
    shown = [(p, p.images[0]) for p in predictions if p.images and p.images[0] is not None][:count]
    classes = sorted({label for p in predictions for label in p.truth.get("labels", ())})
    return [(f"{p.id}: {in_words(p.truth)}", draw_values(image, p.parsed, classes)) for p, image in shown]


def _pixels(image: "ImageLike") -> "np.ndarray":
    """Return `uint8 [h, w, 3]`."""
    import numpy as np
    from PIL import Image

    from ray_vlm.data.images import decode

    if isinstance(image, Image.Image):
        return np.array(image.convert("RGB"))
    return image if isinstance(image, np.ndarray) else decode(image if isinstance(image, bytes) else str(image))


def _box(draw: "ImageDraw", box: Sequence[float], colour: str, unit: int, label: str) -> None:
    (x1, x2), (y1, y2) = sorted(box[::2]), sorted(box[1::2])  # a model may swap the corners, and PIL refuses x2 < x1
    draw.rectangle([x1, y1, x2, y2], outline=colour, width=2 * unit)
    if label:
        font = _font(7 * unit + 5)
        left, top, right, bottom = draw.textbbox((x1, max(0, y1 - 8 * unit - 8)), label, font=font)
        draw.rectangle([left - unit, top - unit, right + unit, bottom + unit], fill=colour)
        draw.text((x1, max(0, y1 - 8 * unit - 8)), label, fill="white", font=font)


def _caption(picture: "PIL.Image.Image", text: str, unit: int) -> "PIL.Image.Image":
    """Return the picture with a strip of text below it; the picture itself where the text is empty."""
    from PIL import Image, ImageDraw

    if not text:
        return picture
    font = _font(7 * unit + 5)
    probe = ImageDraw.Draw(picture)
    width, lines = picture.width - 8 * unit, [""]
    for word in text[:500].split():
        longer = f"{lines[-1]} {word}".strip()
        if probe.textlength(longer, font=font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    height = (10 * unit + 8) * len(lines) + 4 * unit
    out = Image.new("RGB", (picture.width, picture.height + height), "#18202a")
    out.paste(picture, (0, 0))
    ImageDraw.Draw(out).multiline_text((4 * unit, picture.height + 2 * unit), "\n".join(lines), fill="white", font=font)
    return out


@lru_cache(maxsize=16)
def _font(size: int) -> "FreeTypeFont":
    """Return a font with the characters of most labels, the same as in the package's other pictures."""
    from matplotlib import font_manager
    from PIL import ImageFont

    from ray_vlm.runs.plot import font_families

    return ImageFont.truetype(font_manager.findfont(font_families()[-1]), size)
