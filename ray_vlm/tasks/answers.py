"""What the tasks share: an answer as text, an answer as understood, and JSON read out of whatever a model wrote."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_vlm.config.schema import Task

Turns = tuple[tuple[str, str], ...]  # (role, text); `<image>` stands for an image
IMAGE = "<image>"
_FENCE = re.compile(r"```(?:json)?")  # no repeats beside each other: a model may write a page of spaces
_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALVES = re.compile(rf"{_HIGH}(?!{_LOW})|(?<!{_HIGH}){_LOW}")  # of a character; no file can hold them
_KEY = re.compile(r'":\s*$')
_BRACKET, _LIST = re.compile(r"[\[{]"), re.compile(r"\[\s*\{")  # where a value may begin, and a list of objects
_TRIES = 2000  # places where an object may begin that are looked at in a broken answer
_DEEPEST = 64  # levels of lists and objects that an answer may have
_DECODER = json.JSONDecoder(strict=False)


@dataclass(frozen=True)
class PromptContext:
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


def final_text(text: str) -> str:
    """The final answer of a model that reasons first: what follows the last `</think>`, and of that what the last
    `<answer>` holds. Empty if the reasoning never ends; a text without these marks is returned as it is."""
    if "</think>" in text:
        text = text.rpartition("</think>")[2]
    elif "<think>" in text:
        return ""
    return text.rpartition("<answer>")[2].partition("</answer>")[0] if "<answer>" in text else text


def read_json(text: str, first_object: bool = False) -> tuple[Any, list[str]]:
    """The JSON value in an answer and what was wrong with its form; None where there is none. Never raises.

    Reasoning before the answer and a fence around it belong to the form. Text around it, or an end that was cut off, is
    a repair. Of several lists or objects the last one counts, since drafts come before the final answer, or of objects
    the first (`first_object`); of a list that was cut off the whole objects are kept.
    """
    value, repairs = _read_json(final_text(text), first_object)
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
    value, whole = _last_value(text, first_object)
    if whole:
        return value, [*repairs, "text around the JSON"]
    if value:
        return value, [*repairs, "JSON cut off or broken; whole objects kept"]
    return None, [*repairs, "no JSON in it"]


def _last_value(text: str, first_object: bool) -> tuple[Any, bool]:
    """The last list of objects in a text or, where there is none, the last (or first) object, and whether it is whole:
    of a list that is cut off or broken, its whole objects. Something empty counts where there is nothing else."""
    lists, objects, empty = list[list](), list[dict](), list[Any]()
    broken: list[dict] | None = None  # objects of the list that begins last and does not end
    end = 0
    for _, match in zip(range(_TRIES), _BRACKET.finditer(text), strict=False):
        start = match.start()
        if start < end:
            continue
        try:
            found, end = _DECODER.raw_decode(text, start)
        except RecursionError:
            break
        except ValueError:
            if _LIST.match(text, start) and broken is None:
                broken = []
            continue
        inside = broken is not None and _KEY.search(text[max(0, start - 20) : start])  # a value of a broken object
        if not isinstance(found, dict) and not all(isinstance(item, dict) for item in found):
            end = match.end()  # objects may be inside
        elif not found:
            empty.append(found)
        elif isinstance(found, dict):
            (objects if broken is None else broken).append(found)
        elif not inside:
            lists.append(found)
            broken = None
    if broken:
        return broken, False
    whole = lists[-1:] or (objects[:1] if first_object else objects[-1:]) or empty[-1:]
    return (whole[0], True) if whole else (None, False)


def name_class(found: str, labels: Sequence[str]) -> str:
    """The class that an answer means: one of `labels` that is equal but for case, spaces and underscores, if only one
    is; else what was found."""
    if found in labels:
        return found
    alike = [label for label in labels if same_words(found.replace("_", " "), label.replace("_", " "))]
    return alike[0] if len(alike) == 1 else found


def same_words(a: str, b: str) -> bool:
    """Whether two texts are equal but for case and spaces."""
    return " ".join(a.casefold().split()) == " ".join(b.casefold().split())
