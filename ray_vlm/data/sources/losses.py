"""What a data set would lose if it were written in another format: pure functions of its records."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ray_vlm.data.records import PreferenceRecord, PromptRecord, Record, SftRecord
from ray_vlm.data.sources.fields import is_empty, shown
from ray_vlm.data.sources.output import (
    LONE_GROUP,
    NOT_XML,
    ROW_COLUMNS,
    RowsProfile,
    as_json,
    class_name,
    file_key,
    group_of,
    is_larger,
    label_of,
    own_name,
    safe_name,
    yolo_name,
)
from ray_vlm.data.suspicions import unit_problem
from ray_vlm.errors import DataError
from ray_vlm.runs.text import plural

Kind = Literal["detection", "classification", "GUI steps", "chat", "chat with regions", "preferences", "prompts"]
_BACKGROUND = ("_background_", "__ignore__")  # names that COCO files have for no class


@dataclass(frozen=True)
class Holding:
    """What a format holds of rows of its kind.

    `name`: returns the name of a row's image where the row's id is that name; None: ids have a field. `groups`,
    `lists_labels`: it has a field for the group, a list of classes. `units`: it says the units of its boxes, so that
    shares are not mistaken for pixels. `strips`: spaces around names of classes are lost. `is_xml`: texts are of XML.
    `cells`: a question and an answer are cells, which must not be blank.
    """

    kinds: tuple[Kind, ...]
    name: Callable[[Record], str] | None = None
    groups: bool = True
    lists_labels: bool = False
    units: bool = False
    strips: bool = True
    is_xml: bool = False
    cells: bool = False


_DETECTION: tuple[Kind, ...] = ("detection",)
_CHAT: tuple[Kind, ...] = ("chat",)
HOLDINGS: dict[str, Holding] = {
    "coco": Holding(_DETECTION, lists_labels=True, strips=False),
    "yolo": Holding(_DETECTION, yolo_name, groups=False, lists_labels=True, units=True),
    "voc": Holding(_DETECTION, own_name, groups=False, is_xml=True),
    "label_studio": Holding(_DETECTION, own_name),
    "labelme": Holding(_DETECTION, own_name, groups=False),
    "cvat": Holding(_DETECTION, own_name, groups=False, lists_labels=True, is_xml=True),
    "hf_objects": Holding(_DETECTION),
    "objects": Holding(_DETECTION),
    "image_csv": Holding(("classification",)),
    "image_folder": Holding(("classification",), class_name, groups=False),
    "gui_csv": Holding(("GUI steps",)),
    "llava": Holding(_CHAT),
    "messages": Holding(("chat", "chat with regions")),
    "openai": Holding(_CHAT),
    "query_response": Holding(("chat", "chat with regions"), cells=True),
    "alpaca": Holding(_CHAT, cells=True),
    "preference": Holding(("preferences",)),
    "prompt": Holding(("prompts",)),
    "rec": Holding(("prompts",)),
}


def kind_of(record: Record) -> Kind:
    """Return what a record is an example of."""
    if isinstance(record, PreferenceRecord):
        return "preferences"
    if isinstance(record, PromptRecord):
        return "prompts"
    if "answer" in record.truth:
        return "chat with regions" if record.context.get("refs") or record.context.get("boxes") else "chat"
    if "attributes" in record.truth:
        return "classification"
    return "GUI steps" if "output" in record.truth else "detection"


def formats_of(kind: Kind) -> list[str]:
    """Return the formats that hold rows of a kind."""
    return [name for name, holding in HOLDINGS.items() if kind in holding.kinds]


class LossSurvey:
    """Goes through the rows of a data set and collects what a format would lose of them.

    `labels`: the class names that the data set declares, in order. `inside`: images and classes are written into a
    Parquet file. `add` raises `DataError` for a row that the format cannot hold at all.
    """

    def __init__(self, format: str, labels: Sequence[str] = (), inside: bool = False):
        self.format, self.labels = format, tuple(labels)
        self.holding = replace(HOLDINGS[format], lists_labels=True) if inside else HOLDINGS[format]
        self._rows: dict[str, list[str]] = defaultdict(list)  # by loss: the first id
        self._counts: dict[str, int] = defaultdict(int)
        self._files: set[str] = set()  # that ids name: `file_key`, without suffix
        self._used: set[str] = set()
        self._steps: dict[str, list[str]] = defaultdict(list)  # by task: its steps so far
        self._attributes: tuple[str, ...] | None = None
        self._numeric, self._grouped = True, False
        self.num_rows = 0

    def add(self, record: Record) -> None:
        """Look at the next row."""
        self.num_rows += 1
        kind = kind_of(record)
        if kind not in self.holding.kinds:
            others = ", ".join(formats_of(kind))
            raise DataError(
                f"row {record.row} (id {record.id}): {kind} cannot be written as {self.format}. Use one of: {others}."
            )
        self._check_needs(record)
        self._numeric = self._numeric and _is_canonical(record.id)
        self._grouped = self._grouped or bool(group_of(record))
        for loss in (*self._identity(record), *self._content(record, kind)):
            self._rows[loss] = self._rows[loss] or [record.id]
            self._counts[loss] += 1

    def _check_needs(self, record: Record) -> None:
        """Raise `DataError` if the row could not be read again."""
        lacking = ""
        if isinstance(record, PromptRecord) and self.format == "rec" and is_empty(record.columns.get("solution")):
            lacking = "has no solution"
        if self.holding.cells and isinstance(record, SftRecord) and not record.context["turns"][-1][1].strip():
            lacking = "has a blank question"
        if self.format == "labelme" and isinstance(record, SftRecord):
            lacking = next((f"has the class {name}" for name in record.truth["labels"] if name in _BACKGROUND), "")
        if lacking:
            raise DataError(f"row {record.row} (id {record.id}): it {lacking}, which {self.format} does not read.")

    def profile(self) -> RowsProfile:
        """Return what a writer has to know of all rows."""
        if self.holding.lists_labels and not self.labels:
            raise DataError(f"no row has a box, and {self.format} needs at least one class. Use another format.")
        return RowsProfile(self.labels, self._attributes or (), self._numeric, self._grouped)

    def lines(self) -> list[str]:
        """Return a line for each kind of loss, with the number of rows and the id of the first."""
        lines = [
            f"{self._counts[loss]:,} of {self.num_rows:,} rows (the first: {shown(self._rows[loss][0])}): {loss}"
            for loss in self._rows
        ]
        return [*lines, *self._lost_labels()]

    def _lost_labels(self) -> Iterator[str]:
        if self.holding.kinds != _DETECTION:
            return
        unused = [label for label in self.labels if label not in self._used]
        if self.holding.lists_labels:
            unused = [label for label in unused if self.format == "coco" and label in _BACKGROUND]
        if unused:
            names = ", ".join(map(shown, unused[:3]))
            yield f"the list with {plural(len(unused), 'class name')} that no row uses ({names})"

    @property
    def reorders_labels(self) -> bool:
        """Whether the class names would be read in another order, that of the alphabet. It is kept by the task's
        setting `labels`, so nothing is lost that a job cannot have."""
        detection = self.holding.kinds == _DETECTION
        return detection and not self.holding.lists_labels and list(self.labels) != sorted(self.labels)

    def _identity(self, record: Record) -> Iterator[str]:
        """Yield what is lost of a row's id and group."""
        task = record.context.get("task", "") if isinstance(record, SftRecord) else ""
        group = group_of(record)
        if group and not self.holding.groups and group != task:
            yield "the group, which keeps rows together in every split"
        if self.format == "coco" and group.startswith(LONE_GROUP):
            yield "the group, whose name is one that rows without a group get"
        if self.holding.name is not None:
            stem = self.holding.name(record)
            file = file_key(f"{label_of(record)}/{stem}" if self.format == "image_folder" else stem)
            # What the reader puts before a name may stand before it already.
            if not f"/{record.id}".endswith(f"/{stem}") or file in self._files:
                yield "the id, which is no name that a file of its own can have"
            self._files.add(file)
        elif self.format == "coco" and record.id != record.id.strip():
            yield "spaces around the id"

    def _content(self, record: Record, kind: Kind) -> Iterator[str]:
        if isinstance(record, PromptRecord):
            yield from self._of_prompt(record)
        elif isinstance(record, SftRecord):
            if not self.holding.units and unit_problem(record):
                yield "the unit of its boxes, all in the image's first pixel, which would be taken for shares"
            if kind == "detection":
                yield from self._of_boxes(record)
            elif kind == "classification":
                yield from self._of_attributes(record)
            elif kind == "GUI steps":
                yield from self._of_step(record)
            elif self.holding.cells and _has_blank_system(record):
                yield "the blank system turn"

    def _of_boxes(self, record: SftRecord) -> Iterator[str]:
        names = set(record.truth["labels"])
        self._used |= names
        if self.holding.strips and any(name != name.strip() for name in names):
            yield "spaces around the name of a class"
        if self.holding.is_xml and any(NOT_XML.search(name) for name in names):
            yield "a character in the name of a class that XML does not have"
        if self.format == "yolo":
            objects = list(zip(record.truth["labels"], record.truth["boxes"], strict=True))
            if len(set(objects)) < len(objects):
                yield "a box that is there twice with one class"
            if record.sizes and any(is_larger(box, record.sizes[0]) for box in record.truth["boxes"]):
                yield "the parts outside its image of a box that is larger"

    def _of_attributes(self, record: SftRecord) -> Iterator[str]:
        attributes = record.truth["attributes"]
        if self._attributes is None:
            self._attributes = tuple(attributes)
        if self.format == "image_csv":
            if set(self._attributes) != set(attributes):
                yield f"its attributes are not {', '.join(self._attributes)}, which the first row has"
            if any(not name.strip() or name != name.strip() for name in attributes):
                yield "spaces around the name of an attribute"
            return
        first, *others = attributes
        if others:
            yield f"the attributes beside the first ({', '.join(others)[:80]})"
        if first != "label":
            yield f"the name of the attribute, {shown(first)}, which would be 'label'"
        if record.context.get("box") is not None:
            yield "the box"
        if safe_name(attributes[first]) != attributes[first]:
            yield "the class, whose name is no name of a folder"

    def _of_step(self, record: SftRecord) -> Iterator[str]:
        """Yield what is lost if earlier steps of a task are not among the rows, as where they were bad."""
        context = record.context
        history = self._steps[context["task"]]
        if list(context["history"]) != history or context["step"] != len(history):
            yield "its number and earlier steps, which are not among the rows"
        output = json.dumps(record.truth["output"], ensure_ascii=False, separators=(",", ":"))
        history.append(output)

    def _of_prompt(self, record: PromptRecord) -> Iterator[str]:
        if names := [name for name in record.columns if name in ROW_COLUMNS[self.format]]:
            yield f"the columns {', '.join(names)}, whose names mean something else in the format"
        for name, value in record.columns.items():
            if not _is_json(value):
                yield f"the column {shown(name)} as it is: it would be a text"


def list_losses(records: Iterable[Record], format: str, labels: Sequence[str] = ()) -> list[str]:
    """Return what a format would lose of records, a line for each kind of loss; empty if it holds all of them.

    `labels`: the class names that the data set declares, in order. Raise `DataError` for rows that the format cannot
    hold at all.
    """
    survey = LossSurvey(format, labels)
    for record in records:
        survey.add(record)
    return survey.lines()


def _has_blank_system(record: SftRecord) -> bool:
    role, text = record.context["turns"][0]
    return role == "system" and not text.strip()


def _is_canonical(text: str) -> bool:
    """Return whether an id is a whole number as JSON writes it."""
    return text.isascii() and text.isdecimal() and len(text) < 16 and str(int(text)) == text


def _is_json(value: Any) -> bool:
    """Return whether a value is the same after it was written as JSON and read again."""
    try:
        return bool(json.loads(as_json(value)) == value)
    except (TypeError, ValueError, RecursionError):
        return False
