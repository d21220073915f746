"""Record changes to how files become rows, so that a resumed run can report which apply to it."""

from collections.abc import Iterable
from dataclasses import dataclass

_TABLES = ("llava", "messages", "objects", "image_csv", "gui_csv", "preference", "prompt")


@dataclass(frozen=True)
class Rule:
    """A change. `number`: it does not apply to checkpoints with a `RULES` below this. `formats`: the formats of the
    sources that it concerns."""

    number: int
    formats: tuple[str, ...]
    text: str


CHANGED = (
    Rule(1, ("coco",), "a group that no box uses, and labelme's _background_, are no class"),
    Rule(1, ("coco",), "an annotation without bbox has the box around its segmentation"),
    Rule(1, ("coco",), "a crowd may be written as text, and crowds=objects counts crowds as objects"),
    Rule(1, ("coco",), "an id 1.0 is 1, and annotations of images that are not listed are one bad row"),
    Rule(1, ("coco",), "sizes that contradict the image are refused until box_frame says whose the boxes are"),
    Rule(1, ("llava", "messages"), "rows that share an id are kept, with their number behind it"),
    Rule(1, _TABLES[:3], "rows with video or audio, or with an image in a column that is not read, are bad rows"),
    Rule(1, _TABLES, "numbers of a ClassLabel column in Parquet are its names"),
    Rule(1, ("coco", *_TABLES), "boxes within one pixel are refused until box_units says what their numbers are"),
    Rule(1, ("coco", *_TABLES), "images below one visual token, AVIF, and names with backslashes or %20 are read"),
)
RULES = max(rule.number for rule in CHANGED)  # what checkpoints keep


def rules_since(number: int, formats: Iterable[str]) -> list[str]:
    """Return the changes after `number` for sources of these formats."""
    known = set(formats)
    return [rule.text for rule in CHANGED if rule.number > number and not known.isdisjoint(rule.formats)]
