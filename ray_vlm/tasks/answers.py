"""What the tasks share: an answer as text, an answer as understood, and JSON read out of whatever a model wrote."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_vlm.config.schema import Task

Turns = tuple[tuple[str, str], ...]  # (role, text); `<image>` stands for an image
IMAGE = "<image>"
_FENCE = re.compile(r"```(?:json)?")  # no repeats beside each other: a model may write a page of spaces
_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALVES = re.compile(rf"{_HIGH}(?!{_LOW})|(?<!{_HIGH}){_LOW}")  # of a character; no file can hold them
_TRIES = 2000  # places where an object may begin that are looked at in a broken answer
_DEEPEST = 64  # levels of lists and objects that an answer may have
_DECODER = json.JSONDecoder(strict=False)


@dataclass(frozen=True)
class Setting:
    """How a job asks: the task's options, class names in prompt order, what the training data hints at, and a function
    that counts the tokens of a text."""

    options: Task
    labels: tuple[str, ...] = ()
    hints: str = ""
    count_tokens: Callable[[str], int] = len


@dataclass(frozen=True)
class Answer:
    """The right answer. `spans` are `(start, end, tag)`: these characters say that class or condition, and carry its
    weight in the loss."""

    text: str
    spans: tuple[tuple[int, int, str], ...] = ()


@dataclass(frozen=True)
class Parsed:
    """What was understood of an answer; `values` are the task's own.

    `ok`: it was the promised form; `repairs`: what had to be mended or dropped.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    ok: bool = True
    repairs: tuple[str, ...] = ()


def with_images(num_images: int, question: str, system: str | None) -> Turns:
    """One question behind its images, after the system message if there is one."""
    before: Turns = (("system", system),) if system else ()
    return (*before, ("user", IMAGE * num_images + question))


def read_json(text: str) -> tuple[Any, list[str]]:
    """The JSON value in an answer and what was wrong with its form; None where there is none. Never raises.

    A fence around it belongs to the form. Text around it, or an end that was cut off, is a repair; of a list that was
    cut off the whole objects are kept.
    """
    value, repairs = _read_json(text)
    return (None, [*repairs, "nested too deeply"]) if _is_deep(value) else (value, repairs)


def _is_deep(value: Any) -> bool:
    """Whether a value is nested so deeply that what copies, compares or writes it would fail."""
    level = [value]
    for _ in range(_DEEPEST):
        inside = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        if not inside:
            return False
        level = [v for values in inside for v in values]
    return True


def _read_json(text: str) -> tuple[Any, list[str]]:
    repairs: list[str] = []
    if _HALVES.search(text):
        text, repairs = _HALVES.sub("\N{REPLACEMENT CHARACTER}", text), ["half a character replaced"]
    start, end = _FENCE.search(text), text.rfind("```")
    inside = text[start.end() : end] if start and end >= start.end() else text
    try:
        return json.loads(inside, strict=False), repairs
    except (ValueError, RecursionError):
        pass
    found, value = _first_value(text)
    if found:
        return value, [*repairs, "text around the JSON"]
    if objects := list(_objects(text)):
        return objects, [*repairs, "JSON cut off or broken; whole objects kept"]
    return None, [*repairs, "no JSON in it"]


def _first_value(text: str) -> tuple[bool, Any]:
    """The first list of objects, or the first object outside any list, that is whole."""
    for match in _tries(re.compile(r"[\[{]").finditer(text)):
        try:
            value, _ = _DECODER.raw_decode(text, match.start())
        except RecursionError:
            return False, None
        except ValueError:
            if match.group() == "[":
                return False, None  # its objects are picked out one by one
            continue
        if isinstance(value, dict) or all(isinstance(item, dict) for item in value):
            return True, value
    return False, None


def _objects(text: str) -> Iterator[dict]:
    end = 0
    for match in _tries(re.finditer(r"\{", text)):
        if match.start() < end:
            continue
        try:
            value, end = _DECODER.raw_decode(text, match.start())
        except RecursionError:
            return
        except ValueError:
            continue
        yield value


def _tries(matches: Iterator[re.Match]) -> Iterator[re.Match]:
    for _, match in zip(range(_TRIES), matches, strict=False):
        yield match


def same_words(a: str, b: str) -> bool:
    """Whether two texts are equal but for case and spaces."""
    return " ".join(a.casefold().split()) == " ".join(b.casefold().split())
