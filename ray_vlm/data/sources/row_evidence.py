"""Tell from the cells of rows which formats they are of. Pure functions over a few rows."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_vlm.config.data import FormatName
from ray_vlm.data.sources import fields

Cells = Mapping[str, Any]
Roles = list[str]
Needs = Mapping[str, Callable[[str], bool]]  # columns, each with a check of a cell

_USER, _ASSISTANT = ("human", "user"), ("gpt", "assistant")
_ROLES = (*_USER, *_ASSISTANT, "system", "developer")
_GUI = ("Task_id", "Image_id", "Instruction", "Output", "Grounding")
_CLASSES = ("category", "categories", "category_id", "label", "labels", "class", "classes", "name")
_STUDIO_MARKS = ("annotation_id", "annotator", "lead_time")  # columns of Label Studio's shorter exports
# Names of columns with a class.
_LABELS = (
    *("label", "labels", "class", "class_name", "category", "species", "cls", "attribute"),
    *("fine_label", "coarse_label"),
)
# Columns with texts to learn, coordinates or results, which are no attributes of an image.
_NOT_LABELS = (
    *("conversations", "messages", "prompt", "problem", "question", "questions", "answer", "answers", "query"),
    *("response", "instruction", "input", "output", "completion", "solution", "chosen", "rejected", "caption"),
    *("rejected_response", "captions", "text", "description", "url", "html", "objects", "annotations", "history"),
    *("xmin", "xmax", "ymin", "ymax", "x_min", "x_max", "y_min", "y_max", "bbox_x", "segmentation", "score", "width"),
    *("height", "normal_caption", *_STUDIO_MARKS),
)
_ABOUT = ("split", "set", "subset", "fold", "usage", "dataset", "source", "license", "site", "format")  # of no class
NOT_ATTRIBUTES = ("id", "image", "file_name", "images", "group", "bbox", "x1", "y1", "x2", "y2")
_ANSWERS = ("response", "output", "completion", "messages", "conversations")
_COORDINATES = re.compile(r"[\s\[\](){}<>,.;:0-9|-]*\d[\s\[\](){}<>,.;:0-9|-]*")
_MARKUP = re.compile(r"</?\w+>|<\|[\w]+\|>|```(?:json)?|\"(?:bbox_2d|bbox|box)\"")
_LONGEST_LABEL, _LONGEST_ANSWER = 100, 200  # characters of a class, and of an answer that is only coordinates
_FEWEST_ROWS = 4  # in which repeated values show that they are classes


@dataclass(frozen=True)
class Match:
    """How a row agrees with a format. `lacks`: what it would need, empty if it is such a row; `shared`: how many of its
    marks it has; `reason`: what it has."""

    format: FormatName
    reason: str
    shared: int
    lacks: str = ""


def is_coordinates(value: object) -> bool:
    """Return whether a value is a box or a point and nothing else: numbers, or a text of these."""
    if isinstance(value, list | tuple):
        return len(value) in (2, 4) and all(fields.is_number(part) for part in value)
    if not isinstance(value, str) or len(value) > _LONGEST_ANSWER:
        return False
    plain = _MARKUP.sub("", value).strip()
    return bool(_COORDINATES.fullmatch(plain)) and len(re.findall(r"\d+(?:\.\d+)?", plain)) in (2, 4)


class RowMarks:
    """What a row has: its filled cells, with JSON in texts parsed."""

    def __init__(self, cells: Cells, names: Sequence[str]):
        """`names`: all columns of the rows."""
        self.cells = {name: _parsed(value) for name, value in cells.items() if not fields.is_empty(value)}
        self.names = {*names, *cells}

    def has(self, *names: str) -> bool:
        """Return whether one of some cells is filled."""
        return any(name in self.cells for name in names)

    def is_text(self, name: str) -> bool:
        """Return whether a cell is a text."""
        return isinstance(self.cells.get(name), str)

    def roles(self, name: str) -> Roles:
        """Return the roles of the turns in a cell; none if it holds no turns."""
        turns = self.cells.get(name)
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            return []
        roles = [turn.get("role", turn.get("from")) for turn in turns]
        return [str(role) for role in roles] if all(role in _ROLES for role in roles) else []

    def is_answered(self, name: str) -> bool:
        """Return whether the last of the turns in a cell is the assistant's."""
        return (self.roles(name) or [""])[-1] in _ASSISTANT

    def is_asked(self, name: str) -> bool:
        """Return whether a cell is a prompt: a text, or turns of which the last is the user's."""
        return self.is_text(name) or (self.roles(name) or [""])[-1] in _USER

    def last_answer(self) -> object:
        """Return what the last turn says, a text or numbers; None without turns."""
        for name in ("conversations", "messages"):
            if self.is_answered(name):
                turn = self.cells[name][-1]
                return turn.get("content", turn.get("value"))
        return None

    def pair(self) -> str | None:
        """Return a filled column of one of two answers, such as `rejected_response`, or None."""
        return next((name for name in self.cells if name.lower().startswith(("chosen", "reject"))), None)


def _parsed(value: Any) -> Any:
    try:
        return fields.nested(value, "cell")
    except ValueError:
        return value


def _turns_of(marks: RowMarks, name: str, format: FormatName) -> Match:
    reason = f"rows have `{name}` with roles"
    if not marks.roles(name):
        return Match(format, reason, 0, f"`{name}` with roles")
    if not marks.is_answered(name):
        return Match(format, reason, 1, f"an answer as the last turn of `{name}`")
    if other := marks.pair():
        return Match(format, reason, 1, f"no `{other}`")
    if marks.has("solution") and not marks.has("objects"):
        return Match(format, reason, 1, "no `solution`, which such rows do not learn")
    if marks.has("normal_caption") or (isinstance(marks.last_answer(), list) and is_coordinates(marks.last_answer())):
        return Match(format, reason, 1, "texts as answers, and no `normal_caption`")
    return Match(format, reason, 2)


def _llava(marks: RowMarks) -> Match:
    return _turns_of(marks, "conversations", "llava")


def _messages(marks: RowMarks) -> Match:
    turns = marks.cells.get("messages")
    parts = [p for t in turns if isinstance(t, dict) for p in _parts(t)] if isinstance(turns, list) else []
    if any(part.get("type") in ("image_url", "input_image", "input_text") for part in parts):
        return Match("openai", "`messages` have parts of OpenAI's, such as `image_url`", *_rest(marks))
    return _turns_of(marks, "messages", "messages")


def _rest(marks: RowMarks) -> tuple[int, str]:
    match = _turns_of(marks, "messages", "openai")
    return match.shared, match.lacks


def _parts(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = turn.get("content", turn.get("value"))
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _needing(format: FormatName, marks: RowMarks, needs: Needs, refused: Sequence[str] = ()) -> Match:
    """Return the match of a format with some columns, each with a check, in whose rows others are not filled."""
    reason = f"rows have {' and '.join(f'`{name}`' for name in needs)}"
    lacking = [name for name, check in needs.items() if not check(name)]
    shared = len(needs) - len(lacking)
    if lacking:
        return Match(format, reason, shared, f"{' and '.join(f'`{name}`' for name in lacking)} in each row")
    other = next((name for name in refused if marks.has(name)), None if format == "preference" else marks.pair())
    return Match(format, reason, shared, f"no `{other}`" if other else "")


def _query_response(marks: RowMarks) -> Match:
    needs: Needs = {"query": marks.is_text, "response": marks.is_text}
    return _needing("query_response", marks, needs, ("messages", "conversations"))


def _alpaca(marks: RowMarks) -> Match:
    needs = {"instruction": marks.is_text, "output": marks.is_text}
    return _needing("alpaca", marks, needs, ("messages", "conversations"))


def _preference(marks: RowMarks) -> Match:
    if marks.has("rejected_response") and not marks.has("chosen", "rejected"):
        needs: Needs = {"messages": marks.is_answered, "rejected_response": marks.has}
        return _needing("preference", marks, needs)
    start = "conversations" if marks.has("conversations") and not marks.has("prompt") else "prompt"
    return _needing("preference", marks, {start: marks.is_asked, "chosen": marks.has, "rejected": marks.has})


def _prompt(marks: RowMarks) -> Match:
    name = "problem" if marks.has("problem") and not marks.has("prompt") else "prompt"
    match = _needing("prompt", marks, {name: marks.is_asked}, (*_ANSWERS, "normal_caption"))
    if not match.lacks and name == "problem" and is_coordinates(marks.cells.get("solution")):
        return Match("prompt", match.reason, 1, "a `solution` that is no box")
    return match


def _rec(marks: RowMarks) -> Match:
    name = next((name for name in ("conversations", "messages") if marks.has(name)), None)
    marked = marks.has("normal_caption")
    if name is not None:
        reason = f"rows have `{name}` and a solution"
        if not marks.roles(name) or marks.pair():
            return Match("rec", reason, 0, f"`{name}` with roles and no other answers")
        answer = marks.last_answer()
        if marks.has("solution") or (isinstance(answer, list) and is_coordinates(answer)) or (marked and answer):
            return Match("rec", reason, 2)
        if is_coordinates(answer) and len(marks.roles(name)) <= 3:  # LLaVA's rows of grounding look the same
            return Match("rec", f"each row of `{name}` is one question, whose answer is only coordinates", 2)
        return Match("rec", reason, 1, "a `solution`")
    needs: Needs = {"problem": marks.is_asked, "solution": marks.has}
    match = _needing("rec", marks, needs, _ANSWERS)
    if not match.lacks and not marked and not is_coordinates(marks.cells["solution"]):
        return Match("rec", match.reason, 1, "a `solution` that is a box")
    return match


def _gui_csv(marks: RowMarks) -> Match:
    needs: Needs = {name: marks.has if name != "Grounding" else marks.names.__contains__ for name in _GUI}
    return _needing("gui_csv", marks, needs)


def _region_lists(marks: RowMarks) -> list[dict[str, Any]]:
    objects = marks.cells.get("objects")
    listed = objects if isinstance(objects, list) else [objects]
    return [part for part in listed if isinstance(part, dict)]


def _objects(marks: RowMarks) -> Match:
    reason = "`objects` have `ref` and `bbox`"
    regions = _region_lists(marks)
    if not regions or not all({"ref", "bbox"} <= part.keys() for part in regions):
        return Match("objects", reason, int(bool(regions)), "`objects` with `ref` and `bbox`")
    if not marks.has("image", "images"):
        return Match("objects", reason, 1, "`images`")
    texts = str(marks.cells.get("messages", ""))
    if "<bbox>" in texts or "<ref-object>" in texts:
        return Match("objects", reason, 1, "no `messages` with <bbox> or <ref-object>")
    if marks.has("query", "response"):
        return Match("objects", reason, 1, "no `query`")
    return Match("objects", reason, 2)


def _hf_objects(marks: RowMarks) -> Match:
    reason = "`objects` have `bbox` and a class, as detection sets on the hub"
    regions = _region_lists(marks)
    named = [not {*_CLASSES}.isdisjoint(part) for part in regions]
    if not regions or not all(named) or not all("bbox" in part for part in regions):
        return Match("hf_objects", reason, int(bool(regions)), "`objects` with `bbox` and `category`")
    if any("ref" in part for part in regions):
        return Match("hf_objects", reason, 1, "no `ref`")
    return Match("hf_objects", reason, 2, "" if marks.has("image", "images", "file_name") else "`image`")


def _label_studio(marks: RowMarks) -> Match:
    reason = "rows have `data` and `annotations`, as exports of Label Studio"
    data, annotations = marks.cells.get("data"), marks.cells.get("annotations")
    if isinstance(data, dict) and "annotations" in marks.names and isinstance(annotations, list | None):
        if all(isinstance(part, dict) and isinstance(part.get("result"), list) for part in annotations or []):
            return Match("label_studio", reason, 2)
        return Match("label_studio", reason, 1, "`annotations` with a `result`")
    drawn = [name for name, value in marks.cells.items() if _is_drawn(value)]
    if drawn and marks.has("image", "images", "file_name"):
        return Match("label_studio", f"`{drawn[0]}` lists regions with x, y, width and height, as its JSON-MIN", 2)
    if drawn:
        return Match("label_studio", reason, 1, "`image`")
    studio = isinstance(data, dict) or (marks.has("annotations") and not marks.has("images"))
    return Match("label_studio", reason, int(studio or marks.has(*_STUDIO_MARKS)), "`data` and `annotations`")


def _is_drawn(value: object) -> bool:
    keys = {"x", "y", "width", "height"}
    listed = value if isinstance(value, list) and value else [None]
    return all(isinstance(part, dict) and keys <= part.keys() and len(part.keys() - keys) > 0 for part in listed)


def _image_csv(marks: RowMarks) -> Match:
    """Return the match of a row alone; whether its values are classes is seen in many (`labels_of_rows`)."""
    reason = "rows have an image and a class"
    if not marks.has("image", "file_name"):
        return Match("image_csv", reason, int(marks.has(*_LABELS)), "`image`")
    other = next((name for name in _NOT_LABELS if marks.has(name) and name not in ("width", "height")), None)
    if other:
        return Match("image_csv", reason, 1, f"`{other}` renamed or removed, since it is no attribute of an image")
    return Match("image_csv", reason, 2)


_CHECKS: tuple[Callable[[RowMarks], Match], ...] = (
    *(_llava, _messages, _query_response, _alpaca, _preference, _prompt, _rec, _gui_csv),
    *(_objects, _hf_objects, _label_studio, _image_csv),
)


def match_row(marks: RowMarks) -> list[Match]:
    """Return how a row agrees with each format of rows."""
    return [check(marks) for check in _CHECKS]


def labels_of_rows(rows: Sequence[RowMarks], named: Sequence[str] = ()) -> list[str]:
    """Return the columns whose values are classes of images: by their names, or as short texts that are repeated.
    `named`: columns that the source names, which are attributes."""
    names = list(dict.fromkeys(name for marks in rows for name in marks.cells))
    taken = {*_NOT_LABELS, *_ABOUT, *NOT_ATTRIBUTES}
    labels = []
    for name in names:
        if name.lower() in taken and name not in named:
            continue
        values = [marks.cells[name] for marks in rows if name in marks.cells]
        if not all(isinstance(v, str | int) and len(str(v)) <= _LONGEST_LABEL for v in values):
            continue
        if name.lower() in _LABELS or name in named or _repeat(values, len(rows)):
            labels.append(name)
    return labels


def _repeat(values: Sequence[object], num_rows: int) -> bool:
    words = [value for value in values if isinstance(value, str) and re.search(r"[^\W\d_]", value)]
    pathlike = any(re.search(r"[/\\\n]|\.\w{2,4}$|\d{4}-\d\d-\d\d", word) for word in words)
    counts = Counter(words)
    return num_rows >= _FEWEST_ROWS and len(words) == num_rows and not pathlike and 2 * len(counts) <= num_rows
