"""Rows as marked pictures: what the model sees, with boxes and points read back from the text that it is trained on.

They pass through the answer's text and `task.parse`, so a wrong codec or a shifted box shows. `draw_sheet` draws them
as one PNG: a contact sheet with a legend, and the question and the answer under each image.
"""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ray_vlm.data.inspect.check import plain, shorten
from ray_vlm.data.inspect.stats import labelled_regions
from ray_vlm.data.records import Record, SftRecord
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.runs.plot import font_families
from ray_vlm.tasks.answers import IMAGE, Parsed
from ray_vlm.tasks.boxes import Frame
from ray_vlm.tasks.classification import POSITION

_QUESTION_CENTRE = re.compile(
    r"([\d.]+)".join(re.escape(piece) for piece in re.split(r"\{[xy]:\.2f\}", POSITION.partition("{region}")[0]))
)
_REGION = re.compile(
    r"\[(\d+), (\d+)(?:, (\d+), (\d+))?\]|<\|box_start\|>\((\d+),(\d+)\)(?:,\((\d+),(\d+)\))?<\|box_end\|>"
)

_COLORS = ("#e6194b", "#0a84d0", "#2e9e3f", "#e07b00", "#9b30c9", "#008f8f", "#d6358c", "#7a5c2e", "#5560e0", "#6b8e00")
_INK, _SOFT, _PANEL, _PAPER, _WRONG = "#1c2630", "#5d6873", "#eceff2", "#ffffff", "#c8102e"
# Pixels: the width of a panel, the height of its picture, the space between panels and around them.
_PANEL_WIDTH, _PICTURE, _GAP, _MARGIN = 372, 300, 20, 24
_COLUMNS = 4
_TITLE, _TEXT, _SMALL, _TINY = 22, 14, 13, 10  # pixels of type
_FEW = 8  # marks in an image whose labels are not tiny
_LEADING = 4
_SHOWN_IMAGES = 4

Area = tuple[float, float, float, float]
Pen = ImageDraw.ImageDraw


@dataclass(frozen=True)
class Annotation:
    """A box (four numbers) or a point (two) in original pixels of one image, with its class."""

    image: int
    region: tuple[float, ...]
    label: str


@dataclass(frozen=True)
class PreviewPanel:
    """One row. `head`: lines on the row, its images and how exactly regions were read back; `images`: `uint8 [h, w, 3]`
    as the model sees them; `frames`: where originals lie in them; `problem`: what failed in reading back."""

    head: tuple[str, ...]
    images: tuple[np.ndarray, ...]
    frames: tuple[Frame, ...]
    marks: tuple[Annotation, ...]
    question: str
    answer: str
    problem: str = ""


def build_panels(records: Iterable[Record], builder: SampleBuilder) -> list[PreviewPanel]:
    """Build the panel of each record. Raise `DataError` if an image cannot be decoded."""
    return [
        _panel(record, builder) if isinstance(record, SftRecord) else _plain_panel(record, builder)
        for record in records
    ]


def _plain_panel(record: Record, builder: SampleBuilder) -> PreviewPanel:
    """Make the panel of a pair or a prompt: its texts, and the parsed preferred answer."""
    answers = [answer.text for answer in builder.answers(record)]
    frames, turns = builder.frames(record), builder.turns(record)
    parsed = builder.task.parse(answers[0], frames) if answers else Parsed()
    question = next((text for role, text in reversed(turns) if role == "user"), "")
    text = "  rather than  ".join(map(_one_line, answers))
    head = (f"row {record.row} (id {plain(record.id)})",)
    return PreviewPanel(head, builder.row(record).images, frames, tuple(_answered(parsed)), _one_line(question), text)


def _panel(record: SftRecord, builder: SampleBuilder) -> PreviewPanel:
    frames, turns = builder.frames(record), builder.turns(record)
    answer = builder.answer(record).text
    parsed = builder.task.parse(answer, frames)
    question = next((text for role, text in reversed(turns) if role == "user"), "")
    texts = [*(text for role, text in turns if role != "system"), answer]
    marks = (
        *_answered(parsed),
        *_classification_marks(parsed, frames, question),
        *_in_text(record, frames, texts),
    )
    images = builder.train_row(record).images
    sizes = ", ".join(
        f"{w}x{h} px -> {image.shape[1]}x{image.shape[0]}, {builder.num_image_tokens((w, h))} tokens"
        for (w, h), image in zip(record.sizes[:1], images, strict=False)
    )
    head = f"row {record.row} (id {plain(record.id)})" + (f", {len(images)} images" if len(images) > 1 else "")
    note, problem = _compare(record, frames, marks)
    if not parsed.ok or parsed.repairs:
        problem = "; ".join(["the answer is not read back as it was written", *parsed.repairs])
    return PreviewPanel(
        tuple(line for line in (head, sizes, note) if line),
        images,
        frames,
        tuple(marks),
        _one_line(question),
        _one_line(answer),
        plain(problem),
    )


def _one_line(text: str) -> str:
    return plain(" ".join(text.replace(IMAGE, " ").split()))


def _answered(parsed: Parsed) -> Iterator[Annotation]:
    """Yield the regions that the task parses from the answer."""
    values = parsed.values
    for box, label in zip(values.get("boxes", ()), values.get("labels", ()), strict=True):
        yield Annotation(0, tuple(box), label)
    for key in ("box", "point"):
        if values.get(key) is not None:
            yield Annotation(0, tuple(values[key]), str(values["output"].get("action", "")))


def _classification_marks(parsed: Parsed, frames: Sequence[Frame], question: str) -> Iterator[Annotation]:
    """Yield a classification's answer at the centre that its question states."""
    if frames and (values := parsed.values.get("attributes")) and (match := _QUESTION_CENTRE.search(question)):
        width, height = frames[0].original
        yield Annotation(0, (float(match[1]) * width, float(match[2]) * height), ", ".join(values.values()))


def _in_text(record: SftRecord, frames: Sequence[Frame], texts: Sequence[str]) -> Iterator[Annotation]:
    """Yield the regions in a chat's texts, if there are as many as the record has."""
    boxes = record.context.get("boxes", ())
    regions = [[float(v) for v in match.groups() if v] for text in texts for match in _REGION.finditer(text)]
    if boxes and len(regions) == len(boxes):
        numbers = record.context.get("image_of") or (0,) * len(boxes)
        for region, image in zip(regions, numbers, strict=True):
            read = frames[image].decode(region) if len(region) == 4 else frames[image].decode_point(region)
            yield Annotation(image, read, "in the text")


def _compare(record: SftRecord, frames: Sequence[Frame], marks: Sequence[Annotation]) -> tuple[str, str]:
    """Return how far marks lie from the regions of the data: as a note, or as a problem if too far."""
    read = [np.array(mark.region) for mark in marks]
    right = [np.array(region) for _, region, _ in labelled_regions(record)]
    if not right or "attributes" in record.truth:
        return "", ""
    near = [min((float(abs(r - b).max()) for r in read if len(r) == len(b)), default=np.inf) for b in right]
    units = [np.subtract(f.decode_point((1, 1)), f.decode_point((0, 0))).max() for f in frames]
    reach = 1 + 2.5 * float(max(units))
    if lost := sum(distance > reach for distance in near):
        return "", f"{lost} of {len(right)} regions are not read back where the data has them"
    return f"{len(right)} region{'s' if len(right) > 1 else ''} read back within {max(near):.1f} px", ""


def draw_sheet(panels: Sequence[PreviewPanel], title: str, notes: Sequence[str]) -> bytes:
    """Return the sheet as PNG, about 1600 pixels wide: title, notes, legend, and the panels in rows of four."""
    labels = sorted({mark.label for panel in panels for mark in panel.marks})
    colors = {label: _COLORS[i % len(_COLORS)] for i, label in enumerate(labels)}
    columns = min(_COLUMNS, max(1, len(panels)))
    width = max(2 * _MARGIN + columns * (_PANEL_WIDTH + _GAP) - _GAP, 900)
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    captions = [[_caption(panel) for panel in row] for row in rows]
    heights = [_PICTURE + max(sum(_line(size) for _, size, _ in lines) for lines in row) for row in captions]
    legend = _legend(labels, width)
    top = _MARGIN + _line(_TITLE) + 6 + len(notes) * _line(_TEXT) + (len(legend) * (_line(_TEXT) + 4) + 8) + 10
    sheet = Image.new("RGB", (width, top + sum(heights) + _GAP * len(rows) + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    _draw_head(pen, title, notes, legend, colors, width)
    for row, row_captions, height in zip(rows, captions, heights, strict=True):
        for column, (panel, lines) in enumerate(zip(row, row_captions, strict=True)):
            left = _MARGIN + column * (_PANEL_WIDTH + _GAP)
            _draw_pictures(sheet, panel, (left, top), colors)
            y = top + _PICTURE
            for text, size, color in lines:
                _draw_text(pen, (left, y + _LEADING), text, size, color)
                y += _line(size)
        top += height + _GAP
    out = io.BytesIO()
    sheet.save(out, format="PNG")
    return out.getvalue()


def _draw_head(
    pen: Pen, title: str, notes: Sequence[str], legend: list[list[tuple[int, str]]], colors: dict[str, str], width: int
) -> None:
    y = _MARGIN
    _draw_text(pen, (_MARGIN, y), _wrap(title, _TITLE, width - 2 * _MARGIN, 1)[0], _TITLE, _INK)
    y += _line(_TITLE) + 6
    for note in notes:
        _draw_text(pen, (_MARGIN, y), _wrap(plain(note), _TEXT, width - 2 * _MARGIN, 1)[0], _TEXT, _SOFT)
        y += _line(_TEXT)
    y += 8
    for line in legend:
        for x, label in line:
            pen.rounded_rectangle((x, y + 2, x + 14, y + 16), 3, fill=colors[label])
            _draw_text(pen, (x + 20, y), _name(label), _TEXT, _INK)
        y += _line(_TEXT) + 4


def _legend(labels: Sequence[str], width: int) -> list[list[tuple[int, str]]]:
    """Return lines of (x, label)."""
    lines: list[list[tuple[int, str]]] = []
    x = width
    for label in labels[:40]:
        wide = 44 + int(_font(_TEXT, _name(label)).getlength(_name(label)))
        if x + wide > width - _MARGIN:
            lines.append([])
            x = _MARGIN
        lines[-1].append((x, label))
        x += wide
    return lines


def _caption(panel: PreviewPanel) -> list[tuple[str, int, str]]:
    """Return lines of (text, size, colour) under a picture."""
    parts = [(line, _SMALL, _SOFT, 1) for line in panel.head]
    parts += [(panel.problem, _SMALL, _WRONG, 3)] if panel.problem else []
    parts += [(f"Q: {panel.question}", _TEXT, _SOFT, 3), (f"A: {panel.answer}", _TEXT, _INK, 8)]
    return [(line, size, color) for text, size, color, most in parts for line in _wrap(text, size, _PANEL_WIDTH, most)]


def _draw_pictures(sheet: Image.Image, panel: PreviewPanel, corner: tuple[int, int], colors: dict[str, str]) -> None:
    """Draw the row's images side by side on a panel, with their marks."""
    left, top = corner
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((left, top, left + _PANEL_WIDTH - 1, top + _PICTURE - 1), fill=_PANEL)
    shown = panel.images[:_SHOWN_IMAGES]
    if not shown:
        _draw_text(pen, (left + 12, top + 12), "no image", _TEXT, _SOFT)
    room = _PANEL_WIDTH / max(1, len(shown))
    for number, pixels in enumerate(shown):
        height, width = pixels.shape[:2]
        scale = min((room - 4 * (len(shown) > 1)) / width, _PICTURE / height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        how = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC
        at = (round(left + room * number + (room - size[0]) / 2), round(top + (_PICTURE - size[1]) / 2))
        sheet.paste(Image.fromarray(pixels).resize(size, how), at)
        marks = [mark for mark in panel.marks if mark.image == number]
        frame = panel.frames[number]
        regions = [_on_sheet(mark, frame, at, (size[0] / width, size[1] / height)) for mark in marks]
        _draw_marks(pen, marks, regions, colors, (at[0], at[1], at[0] + size[0] - 1, at[1] + size[1] - 1))


def _on_sheet(mark: Annotation, frame: Frame, at: tuple[int, int], scale: tuple[float, float]) -> tuple[float, ...]:
    """Convert a mark from pixels of the original image to pixels of the sheet."""
    shown = frame.content or frame.resized
    return tuple(
        at[i % 2] + scale[i % 2] * (value / frame.original[i % 2] * shown[i % 2] + frame.offset[i % 2])
        for i, value in enumerate(mark.region)
    )


def _draw_marks(
    pen: Pen, marks: Sequence[Annotation], regions: Sequence[tuple[float, ...]], colors: dict[str, str], picture: Area
) -> None:
    for mark, region in zip(marks, regions, strict=True):
        color = colors[mark.label]
        if len(region) == 4:
            x1, y1, x2, y2 = region
            pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=color, width=3)
        else:
            x, y = region
            pen.ellipse((x - 8, y - 8, x + 8, y + 8), outline=_PAPER, width=5)
            pen.ellipse((x - 7, y - 7, x + 7, y + 7), outline=color, width=3)
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=color)
    taken: list[Area] = []
    type_size = _SMALL if len(marks) <= _FEW else _TINY
    for mark, region in zip(marks, regions, strict=True):
        name = _name(mark.label)
        size = (_font(type_size, name).getlength(name) + 8, _line(type_size))
        area = _find_label_area(region, size, taken, picture)
        if area is None:  # the legend names the class of the colour
            continue
        taken.append(area)
        pen.rectangle(area, fill=colors[mark.label])
        _draw_text(pen, (area[0] + 4, area[1] + 1), name, type_size, _PAPER)


def _find_label_area(
    region: Sequence[float], size: tuple[float, float], taken: Sequence[Area], picture: Area
) -> Area | None:
    """Find an area for a label in the picture that covers no other: above the mark, below, inside, beside."""
    wide, tall = size
    x1, y1, x2, y2 = region if len(region) == 4 else (region[0] - 9, region[1] - 9, region[0] + 9, region[1] + 9)
    tries = [(x1, y1 - tall), (x2 - wide, y1 - tall), (x1, y2 + 1), (x2 - wide, y2 + 1), (x1, y1), (x2 + 1, y1)]
    for x, y in [*tries, (x1 - wide, y1), (x2 - wide, y2 - tall)]:
        x = min(max(x, picture[0]), picture[2] - wide)
        area = (x, y, x + wide, y + tall)
        inside = x >= picture[0] and y >= picture[1] and area[3] <= picture[3]
        if inside and not any(_touch(area, other) for other in taken):
            return area
    return None


def _touch(a: Area, b: Area) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def _name(label: str) -> str:
    return shorten(label, 28) or "?"


def _line(size: int) -> int:
    """Return the pixels from one line of type to the next."""
    return size + _LEADING + 1


def _wrap(text: str, size: int, width: float, most: int) -> list[str]:
    """Wrap into at most `most` lines, at spaces if possible; the last ends in … if text is left over."""
    font, rest = _font(size, text), text.strip()
    lines: list[str] = []
    while rest and len(lines) < most:
        end = min(len(rest), 400)
        while end > 1 and font.getlength(rest[:end]) > width:
            end = min(end - 1, int(end * width / font.getlength(rest[:end])) + 1)
        cut = rest.rfind(" ", end // 2, end + 1) if end < len(rest) else end
        cut = end if cut <= 0 else cut
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    if rest:
        last = lines[-1]
        while last and font.getlength(f"{last} …") > width:
            last = last[:-1]
        lines[-1] = f"{last.rstrip()} …"
    return lines or [""]


def _draw_text(pen: Pen, at: tuple[float, float], text: str, size: int, color: str) -> None:
    pen.text(at, text, font=_font(size, text), fill=color)


def _font(size: int, text: str) -> ImageFont.FreeTypeFont:
    """Return a font that has the text's letters, if one is installed."""
    return _load_font(size, any(c >= "\u2e80" for c in text))


@lru_cache(maxsize=16)
def _load_font(size: int, eastern: bool) -> ImageFont.FreeTypeFont:
    from matplotlib import font_manager

    families = font_families()
    path = Path(font_manager.findfont(families[-1] if eastern else families[0]))
    return ImageFont.truetype(path, size)
