"""What the tasks share: the right answer, the parsed answer, and reading JSON out of whatever a model wrote."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_vlm.config.task import Task

Turns = tuple[tuple[str, str], ...]  # (role, text); `<image>` stands for an image
IMAGE = "<image>"
_FENCE = re.compile(r"```(?:json)?")  # no adjacent repeats: a page of spaces would backtrack
_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALVES = re.compile(rf"{_HIGH}(?!{_LOW})|(?<!{_HIGH}){_LOW}")  # lone surrogates, which UTF-8 cannot encode
_KEY = re.compile(r'":\s*$')
_BRACKET, _LIST = re.compile(r"[\[{]"), re.compile(r"\[\s*\{")  # start of any value, and of a list of objects
_TRIES = 2000  # opening brackets that are tried as the start of a value in a broken answer
_DEEPEST = 64  # most levels of lists and objects in an answer
_DECODER = json.JSONDecoder(strict=False)


@dataclass(frozen=True)
class PromptContext:
    """What a question is built from: the task's options, the class names in prompt order, hints from the training data,
    and a function that counts the tokens of a text."""

    options: Task
    labels: tuple[str, ...] = ()
    hints: str = ""
    count_tokens: Callable[[str], int] = len


@dataclass(frozen=True)
class Answer:
    """The right answer. `spans` are `(start, end, tag)`: the characters `text[start:end]` name the class or condition
    `tag` and carry its weight in the loss."""

    text: str
    spans: tuple[tuple[int, int, str], ...] = ()


@dataclass(frozen=True)
class Parsed:
    """A parsed answer; the keys of `values` are defined by the task.

    `ok`: the answer had the required form; `repairs`: what was mended or dropped.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    ok: bool = True
    repairs: tuple[str, ...] = ()


def with_images(num_images: int, question: str, system: str | None) -> Turns:
    """Build one user turn, the images first and then the question, after the system message if there is one."""
    before: Turns = (("system", system),) if system else ()
    return (*before, ("user", IMAGE * num_images + question))


def final_text(text: str) -> str:
    """Return the final answer of a model that reasons first: the text after the last `</think>`, or the content of the
    last `<answer>` in it. Empty if the reasoning never ends; a text without these marks is returned unchanged."""
    if "</think>" in text:
        text = text.rpartition("</think>")[2]
    elif "<think>" in text:
        return ""
    return text.rpartition("<answer>")[2].partition("</answer>")[0] if "<answer>" in text else text


def read_json(text: str, first_object: bool = False) -> tuple[Any, list[str]]:
    """Return the JSON value in an answer, or None without one, and the repairs that were needed. Never raises.

    Reasoning before the answer and a fence around it are allowed. Text around the value and a truncated end are
    repairs. Among several lists or objects the last one is returned, since drafts precede the final answer; with
    `first_object`, the first object. A truncated list keeps its complete objects.
    """
    value, repairs = _read_json(final_text(text), first_object)
    return (None, [*repairs, "nested too deeply"]) if _is_deep(value) else (value, repairs)


def _is_deep(value: object) -> bool:
    """Whether a value is nested so deeply that copying or serialising it could exceed the recursion limit."""
    level = [value]
    for _ in range(_DEEPEST):
        inside = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        if not inside:
            return False
        level = [v for values in inside for v in values]
    return True


def _read_json(text: str, first_object: bool) -> tuple[Any, list[str]]:
    repairs: list[str] = []
    if _HALVES.search(text):
        text, repairs = _HALVES.sub("\N{REPLACEMENT CHARACTER}", text), ["half a character replaced"]
    start, end = _FENCE.search(text), text.rfind("```")
    inside = text[start.end() : end] if start and end >= start.end() else text
    try:
        return json.loads(inside, strict=False), repairs
    except (ValueError, RecursionError):
        pass
    value, complete = _last_value(text, first_object)
    if complete:
        return value, [*repairs, "text around the JSON"]
    if value:
        return value, [*repairs, "JSON cut off or broken; whole objects kept"]
    return None, [*repairs, "no JSON in it"]


def _last_value(text: str, first_object: bool) -> tuple[Any, bool]:
    """Return the last list of objects in a text, or else the last (or first) object, and whether it is complete.

    A truncated or broken list yields its complete objects and False. An empty list or object is returned only if there
    is nothing else.
    """
    lists, objects, empty = list[list](), list[dict](), list[Any]()
    broken: list[dict] | None = None  # the complete objects of the last list that has no end
    end = 0
    for _, match in zip(range(_TRIES), _BRACKET.finditer(text), strict=False):
        start = match.start()
        if start < end:
            continue
        try:
            value, end = _DECODER.raw_decode(text, start)
        except RecursionError:
            break
        except ValueError:
            if _LIST.match(text, start) and broken is None:
                broken = []
            continue
        # a list behind `"key":` in a broken object is a value of that object, not the answer
        inside = broken is not None and _KEY.search(text[max(0, start - 20) : start])
        if not isinstance(value, dict) and not all(isinstance(item, dict) for item in value):
            end = match.end()  # go on behind the bracket: the list may hold objects
        elif not value:
            empty.append(value)
        elif isinstance(value, dict):
            (objects if broken is None else broken).append(value)
        elif not inside:
            lists.append(value)
            broken = None
    if broken:
        return broken, False
    chosen = lists[-1:] or (objects[:1] if first_object else objects[-1:]) or empty[-1:]
    return (chosen[0], True) if chosen else (None, False)


def name_class(name: str, labels: Sequence[str]) -> str:
    """Return the one of `labels` that equals `name` apart from case, spaces and underscores; `name` itself if none
    does, or several do."""
    if name in labels:
        return name
    alike = [label for label in labels if same_words(name.replace("_", " "), label.replace("_", " "))]
    return alike[0] if len(alike) == 1 else name


def same_words(a: str, b: str) -> bool:
    """Whether two texts are equal apart from case and spaces."""
    return " ".join(a.casefold().split()) == " ".join(b.casefold().split())
