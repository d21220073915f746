"""Classification: say what is shown, and in which condition.

Any number of named attributes, such as `object` and `condition`; the first is the class, the others are conditions. The
answer is one JSON object, `{"object": "toe_drain", "condition": "blocked"}`. Labels are written `attribute=value`.

`truth` is `{"attributes": {name: value}}`; `context` may hold `box`, where the object is. Placeholders of the prompt:
`{labels}`, `{position}` (where the box is, with `task.position`) and `{hints}` (where each class mostly is, with
`task.class_regions`); a prompt without the last two has them added at its end.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray_vlm.config.schema import Task
from ray_vlm.data.records import SftRecord
from ray_vlm.tasks.answers import Answer, Parsed, PromptContext, Turns, read_json, same_words, with_images
from ray_vlm.tasks.boxes import Frame, box_problem

PROMPT = "What is shown? Answer in JSON with {labels}."
POSITION = "The object's centre is at x={x:.2f}, y={y:.2f}, in the {region} of the image."


def check(record: SftRecord, labels: Sequence[str]) -> str | None:
    """Why a record cannot be learned from, if so."""
    if not record.images:
        return "a classification row needs an image"
    for tag in tags(record):
        if tag not in labels:
            return f"{tag!r} is not among the task's labels {sorted(labels)}; add it to task.labels or mend it"
    box = record.context.get("box")
    if box is not None and (reason := box_problem(box, record.sizes[0])):
        return f"{reason}; mend the box, or say what its numbers mean with box_units"
    return None


def tags(record: SftRecord) -> tuple[str, ...]:
    """`attribute=value` of every attribute, the class first."""
    return tuple(f"{name}={value}" for name, value in record.truth["attributes"].items())


def ask(record: SftRecord, frames: Sequence[Frame], setting: PromptContext) -> Turns:
    """The image, the question, and where the object is if the job wants that told."""
    question = setting.options.prompt or PROMPT
    told = {"position": _position(record, setting.options), "hints": setting.hints}
    for name, text in told.items():
        mark = "{" + name + "}"
        question = question.replace(mark, text) if mark in question else f"{question} {text}".rstrip()
    question = question.replace("{labels}", describe_labels(setting.labels))
    return with_images(len(record.images), question, setting.options.system)


def describe_labels(labels: Sequence[str]) -> str:
    """`object: a, b; condition: x, y`."""
    values = defaultdict(list)
    for label in labels:
        name, _, value = label.partition("=")
        values[name].append(value)
    return "; ".join(f"{name}: {', '.join(found)}" for name, found in values.items())


def _position(record: SftRecord, options: Task) -> str:
    box = record.context.get("box")
    if not options.position or box is None:
        return ""
    x, y = centre_of(box, record.sizes[0])
    return POSITION.format(x=x, y=y, region=region_of(x, y, options.regions))


def centre_of(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float]:
    """Centre of a box, or a point, in original pixels, as shares of the image's (width, height), 0..1."""
    x, y = (sum(box[axis::2]) / len(box[axis::2]) / size[axis] for axis in (0, 1))
    return (min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0))


def region_of(x: float, y: float, regions: Sequence[Sequence[str]]) -> str:
    """The word for the part of an image around (x, y), both 0..1."""
    row = regions[min(int(y * len(regions)), len(regions) - 1)]
    return row[min(int(x * len(row)), len(row) - 1)]


def describe_regions(records: Iterable[SftRecord], options: Task) -> str:
    """Where each class mostly is in these records, as sentences for the prompt; classes without a usual place are left
    out."""
    places: dict[str, Counter] = defaultdict(Counter)
    for record in records:
        if (box := record.context.get("box")) is not None:
            value = next(iter(record.truth["attributes"].values()))
            places[value][region_of(*centre_of(box, record.sizes[0]), options.regions)] += 1
    usual = {value: counts.most_common(1)[0] for value, counts in sorted(places.items())}
    told = [f"{value}: {region}" for value, (region, n) in usual.items() if 2 * n >= places[value].total()]
    return f"Usual places: {'; '.join(told)}." if told else ""


def answer(record: SftRecord, frames: Sequence[Frame], setting: PromptContext) -> Answer:
    """The attributes as JSON, each value a span of its tag."""
    text, spans = "{", []
    for number, (name, value) in enumerate(record.truth["attributes"].items()):
        text += f"{', ' if number else ''}{json.dumps(name, ensure_ascii=False)}: "
        written = json.dumps(value, ensure_ascii=False)
        spans.append((len(text), len(text) + len(written), f"{name}={value}"))
        text += written
    return Answer(text + "}", tuple(spans))


def parse(text: str, frames: Sequence[Frame]) -> Parsed:
    """`attributes`: name -> value. Never raises."""
    value, repairs = read_json(text)
    if isinstance(value, list) and len(value) == 1:
        value, repairs = value[0], [*repairs, "a list in place of one object"]
    if not isinstance(value, dict):
        return Parsed({"attributes": {}}, False, (*repairs, "no JSON object with the attributes"))
    found = {k: str(v) for k, v in value.items() if isinstance(v, str | int | float)}
    if len(found) < len(value):
        repairs.append("dropped attributes that are not text")
    return Parsed({"attributes": found}, not repairs, tuple(repairs))


def attributes_of(labels: Sequence[str]) -> dict[str, str]:
    """The attributes that labels `attribute=value` name, each with its first value."""
    found: dict[str, str] = {}
    for name, _, value in (label.partition("=") for label in labels):
        found.setdefault(name, value)
    return found


def check_attributes(parsed: Parsed, asked: Collection[str]) -> Parsed:
    """The answer, no longer `ok` where it lacks an attribute that was asked for or has one that was not. With nothing
    `asked` for, nothing is known of that."""
    if not parsed.ok or not asked:
        return parsed
    found = parsed.values["attributes"]
    repairs = [f"attribute {name!r} is missing" for name in asked if name not in found]
    repairs += [f"attribute {name[:80]!r} was not asked for" for name in found if name not in asked]
    return replace(parsed, ok=not repairs, repairs=(*parsed.repairs, *repairs))


def score(parsed: Parsed, truth: Mapping[str, Any]) -> dict[str, Any]:
    """`correct`: name -> whether the value is right (case and spaces aside); `all`: whether every one is."""
    found = parsed.values.get("attributes", {})
    correct = {k: k in found and same_words(found[k], v) for k, v in truth["attributes"].items()}
    return {"correct": correct, "all": all(correct.values())}
