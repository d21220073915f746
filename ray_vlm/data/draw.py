"""Draw boxes, points and labels on images: the one look of previews, predictions and reports."""

import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_vlm.data.inspect.check import plain, shorten
from ray_vlm.data.records import InnerImage
from ray_vlm.runs.plot import COLOURS, INK, font_families

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    from PIL.ImageFont import FreeTypeFont

    # A path, encoded bytes, a position in a file, or decoded pixels.
    ImageLike = str | Path | bytes | InnerImage | PIL.Image.Image | np.ndarray

WHITE = "#ffffff"
MIN_SIDE = 360  # pixels of a picture's longer side in which labels are readable
_LEADING = 5  # pixels between lines of type
_MOST_LINES = 12  # of a caption
_FEW = 8  # regions in an image whose labels are not small

Area = tuple[float, float, float, float]  # left, top, right, bottom
Region = tuple[float, ...]  # a box (four numbers) or a point (two), in pixels
Line = tuple[str, int, str]  # text, its size in pixels, its colour


def regions_of(values: Mapping[str, Any]) -> list[tuple[Region, str]]:
    """Return the regions of a truth or of parsed values: boxes with their labels, the box or point of a GUI step with
    its action."""
    boxes = zip(values.get("boxes", ()), values.get("labels", ()), strict=True)
    action = str((values.get("output") or {}).get("action", ""))
    steps = [(values[key], action) for key in ("box", "point") if values.get(key) is not None]
    return [(tuple(region), label) for region, label in (*boxes, *steps)]


def colour_of(label: str, classes: Sequence[str]) -> str:
    """Return the colour of a label: by its position among the sorted `classes`, or by its checksum where it is none of
    them."""
    number = sorted(classes).index(label) if label in classes else zlib.crc32(label.encode("utf-8", "replace"))
    return COLOURS[number % len(COLOURS)]


def draw_values(
    image: "ImageLike",
    values: Mapping[str, Any],
    classes: Sequence[str] = (),
    caption: str = "",
    truth: Mapping[str, Any] | None = None,
    min_side: int = 1,
    max_side: int = 1 << 30,
    size: tuple[int, int] | None = None,
) -> "PIL.Image.Image":
    """Draw the regions of parsed values on an image, and the caption in a strip below; return a PIL image.

    `classes`: the task's labels. A label has the same colour on every image, as long as they are the same. `truth`: its
    regions are drawn below, in white. `min_side`, `max_side`: limits of the picture's longer side. `size`: width and
    height of the image that coordinates belong to, if `image` is a stand-in.
    """
    pixels = _decode(image)
    width, height = size or (pixels.shape[1], pixels.shape[0])
    scale = min(max(width, height, min_side), max_side) / max(width, height)
    picture = resize(pixels, width * scale, height * scale)
    unit = max(picture.size) / 480
    stroke, type_size = max(2, round(4 * unit)), max(10, round(21 * unit))
    true = [(tuple(scale * v for v in region), "") for region, _ in regions_of(truth or {})]
    regions = [(tuple(scale * v for v in region), label) for region, label in regions_of(values)]
    draw_regions(picture, true, [INK] * len(true), 2 * stroke + 1, type_size)
    draw_regions(picture, true, [WHITE] * len(true), 2 * stroke, type_size)
    draw_regions(picture, regions, [colour_of(label, classes) for _, label in regions], stroke, type_size)
    if not caption:
        return picture
    lines = wrap(plain(" ".join(caption.split())), type_size, picture.width - type_size, _MOST_LINES)
    return stack([picture, draw_lines([(line, type_size, WHITE) for line in lines], picture.width, INK)])


def resize(pixels: "np.ndarray", width: float, height: float) -> "PIL.Image.Image":
    """Return `uint8 [h, w, 3]` as a picture of another size; much enlarged, its pixels stay sharp squares."""
    from PIL import Image

    how = Image.Resampling.NEAREST if width >= 2 * pixels.shape[1] else Image.Resampling.BICUBIC
    return Image.fromarray(pixels).resize((max(1, round(width)), max(1, round(height))), how)


def draw_regions(
    picture: "PIL.Image.Image",
    regions: Sequence[tuple[Region, str]],
    colours: Sequence[str],
    width: int,
    type_size: int,
) -> None:
    """Draw boxes and points with lines of `width` pixels, and their labels where there is room for them."""
    from PIL import ImageDraw

    pen = ImageDraw.Draw(picture)
    for (region, _), colour in zip(regions, colours, strict=True):
        if len(region) == 4:
            (x1, x2), (y1, y2) = sorted(region[::2]), sorted(region[1::2])  # a model may swap the corners
            pen.rectangle((x1, y1, x2, y2), outline=colour, width=width)
        else:
            pen.circle(region, 3 * width, outline=WHITE, width=width + 2)
            pen.circle(region, 3 * width - 1, outline=colour, width=width)
            pen.circle(region, width - 1, fill=colour)
    type_size = type_size if len(regions) <= _FEW else round(0.75 * type_size)
    tags = [draw_tag(label, colour, type_size) for (_, label), colour in zip(regions, colours, strict=True)]
    named = [(region, tag) for (region, label), tag in zip(regions, tags, strict=True) if label]
    areas = place_labels([region for region, _ in named], [tag.size for _, tag in named], picture.size)
    for (_, tag), area in zip(named, areas, strict=True):
        if area is not None:  # otherwise only its colour names the class
            picture.paste(tag, (round(area[0]), round(area[1])))


def draw_tag(label: str, colour: str, type_size: int) -> "PIL.Image.Image":
    """Return the picture of a label on its colour."""
    name, (red, green, blue) = shorten(label, 28), bytes.fromhex(colour[1:])
    ink = INK if 0.299 * red + 0.587 * green + 0.114 * blue > 100 else WHITE
    return draw_lines([(name, type_size, ink)], round(load_font(type_size, name).getlength(name)) + 8, colour)


def place_labels(
    regions: Sequence[Region], sizes: Sequence[tuple[float, float]], room: tuple[int, int]
) -> list[Area | None]:
    """Find an area in the picture for the label of each region that covers no other label: above the region, below,
    inside or beside it. Return None for a label without room."""
    areas: list[Area | None] = []
    for region, (wide, tall) in zip(regions, sizes, strict=True):
        x1, y1, x2, y2 = region if len(region) == 4 else (*(v - 9 for v in region), *(v + 9 for v in region))
        corners = [(x1, y1 - tall), (x2 - wide, y1 - tall), (x1, y2 + 1), (x2 - wide, y2 + 1), (x1, y1), (x2 + 1, y1)]
        corners = [
            (min(max(x, 0), room[0] - 1 - wide), y) for x, y in (*corners, (x1 - wide, y1), (x2 - wide, y2 - tall))
        ]
        tries = [(x, y, x + wide, y + tall) for x, y in corners if x >= 0 <= y < room[1] - tall]
        areas.append(next((a for a in tries if not any(b is not None and _touch(a, b) for b in areas)), None))
    return areas


def _touch(a: Area, b: Area) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def _decode(image: "ImageLike") -> "np.ndarray":
    """Return `uint8 [h, w, 3]`."""
    import numpy as np
    from PIL import Image

    from ray_vlm.data.images import decode

    if isinstance(image, Image.Image):
        return np.array(image.convert("RGB"))
    return image if isinstance(image, np.ndarray) else decode(str(image) if isinstance(image, Path) else image)


def draw_lines(lines: Sequence[Line], width: int, background: str = WHITE) -> "PIL.Image.Image":
    """Return a picture of lines of text."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (width, sum(size + _LEADING for _, size, _ in lines)), background)
    pen, y = ImageDraw.Draw(picture), 1
    for text, size, colour in lines:
        pen.text((4 if background != WHITE else 0, y), text, font=load_font(size, text), fill=colour)
        y += size + _LEADING
    return picture


def stack(pictures: "Sequence[PIL.Image.Image]", gap: int = 0, across: bool = False) -> "PIL.Image.Image":
    """Return one picture of several, one below the other or side by side, on white."""
    from PIL import Image

    axis = 0 if across else 1
    size = [max(picture.size[i] for picture in pictures) for i in (0, 1)]
    size[axis] = sum(picture.size[axis] + gap for picture in pictures) - gap
    out, at = Image.new("RGB", (size[0], size[1]), WHITE), 0
    for picture in pictures:
        out.paste(picture, (at, 0) if across else (0, at))
        at += picture.size[axis] + gap
    return out


def wrap(text: str, size: int, width: float, most: int) -> list[str]:
    """Wrap into at most `most` lines, at spaces if possible; the last ends in … if text is left over."""
    font, rest = load_font(size, text), text.strip()
    lines: list[str] = []
    while rest and len(lines) < most:
        end = _count_fitting(rest[:400], font, width)
        cut = rest.rfind(" ", end // 2, end + 1) if end < len(rest) else end
        cut = end if cut <= 0 else cut
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    if rest:
        end = _count_fitting(lines[-1], font, width - font.getlength(" …"))
        lines[-1] = f"{lines[-1][:end].rstrip()} …"
    return lines or [""]


def _count_fitting(text: str, font: "FreeTypeFont", width: float) -> int:
    """Return how many characters fit into the width, at least 1."""
    return max(1, bisect_right(range(1, len(text) + 1), width, key=lambda end: font.getlength(text[:end])))


def load_font(size: int, text: str) -> "FreeTypeFont":
    """Return a font that has the text's letters, if one is installed."""
    return _load_font(size, any(c >= "\u2e80" for c in text))


@lru_cache(maxsize=16)
def _load_font(size: int, eastern: bool) -> "FreeTypeFont":
    from matplotlib import font_manager
    from PIL import ImageFont

    family = font_families()[-1 if eastern else 0]
    return ImageFont.truetype(font_manager.findfont(family), size)
