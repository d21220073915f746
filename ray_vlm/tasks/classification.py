"""Classification: name what an image shows, and its condition.

Any number of named attributes, such as `object` and `condition`; the first is the class, the others are conditions. The
answer is one JSON object, `{"object": "toe_drain", "condition": "blocked"}`. Labels are written `attribute=value`.

`truth` is `{"attributes": {name: value}}`; `context` may hold `box`, the object's box. Placeholders of the prompt:
`{labels}`, `{position}` (the position of the box, with `task.position`) and `{hints}` (the usual region of each class,
with `task.class_regions`). The last two are appended to a prompt that does not contain them.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray_vlm.config.task import ClassificationTask, Task, prompt_of
from ray_vlm.data.records import SftRecord
from ray_vlm.tasks.answers import Answer, Parsed, PromptContext, Turns, read_json, same_words, with_images
from ray_vlm.tasks.boxes import Frame, box_problem

PROMPT = "What is shown? Answer in JSON with {labels}."
POSITION = "The object's centre is at x={x:.2f}, y={y:.2f}, in the {region} of the image."


def check(record: SftRecord, labels: Sequence[str]) -> str | None:
    """Return why a record cannot be trained on, or None."""
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
    """Return `attribute=value` of every attribute, the class first."""
    return tuple(f"{name}={value}" for name, value in record.truth["attributes"].items())


def ask(record: SftRecord, frames: Sequence[Frame], context: PromptContext) -> Turns:
    """Build the turn with the image, the question and, with `task.position`, the position of the object."""
    question = prompt_of(context.options) or PROMPT
    additions = {"position": _position(record, context.options), "hints": context.hints}
    for name, text in additions.items():
        mark = "{" + name + "}"
        question = question.replace(mark, text) if mark in question else f"{question} {text}".rstrip()
    question = question.replace("{labels}", describe_labels(context.labels))
    return with_images(len(record.images), question, context.options.system)


def describe_labels(labels: Sequence[str]) -> str:
    """List the labels by attribute: `object: a, b; condition: x, y`."""
    values_of = defaultdict(list)
    for label in labels:
        name, _, value = label.partition("=")
        values_of[name].append(value)
    return "; ".join(f"{name}: {', '.join(values)}" for name, values in values_of.items())


def _position(record: SftRecord, options: Task) -> str:
    box = record.context.get("box")
    if not isinstance(options, ClassificationTask) or not options.position or box is None:
        return ""
    x, y = centre_of(box, record.sizes[0])
    return POSITION.format(x=x, y=y, region=region_of(x, y, options.regions))


def centre_of(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float]:
    """Return the centre of a box or a point (original pixels) as shares of the image's `size` (width, height), 0..1."""
    x, y = (sum(box[axis::2]) / len(box[axis::2]) / size[axis] for axis in (0, 1))  # xs are at 0, 2; ys at 1, 3
    return (min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0))


def region_of(x: float, y: float, regions: Sequence[Sequence[str]]) -> str:
    """Return the name of the region of an image that contains (x, y), both 0..1."""
    row = regions[min(int(y * len(regions)), len(regions) - 1)]
    return row[min(int(x * len(row)), len(row) - 1)]


def describe_regions(records: Iterable[SftRecord], options: Task) -> str:
    """Describe the region in which each class mostly is, for the prompt. A class is left out if no region holds half of
    its objects."""
    counts_of: dict[str, Counter] = defaultdict(Counter)  # class -> region -> objects
    for record in records:
        if (box := record.context.get("box")) is not None:
            value = next(iter(record.truth["attributes"].values()))
            counts_of[value][region_of(*centre_of(box, record.sizes[0]), options.regions)] += 1
    usual = {value: counts.most_common(1)[0] for value, counts in sorted(counts_of.items())}
    hints = [f"{value}: {region}" for value, (region, n) in usual.items() if 2 * n >= counts_of[value].total()]
    return f"Usual places: {'; '.join(hints)}." if hints else ""


def answer(record: SftRecord, frames: Sequence[Frame], context: PromptContext) -> Answer:
    """Write the attributes as JSON, each value a span of its tag."""
    text, spans = "{", []
    for number, (name, value) in enumerate(record.truth["attributes"].items()):
        text += f"{', ' if number else ''}{json.dumps(name, ensure_ascii=False)}: "
        written = json.dumps(value, ensure_ascii=False)
        spans.append((len(text), len(text) + len(written), f"{name}={value}"))
        text += written
    return Answer(text + "}", tuple(spans))


def parse(text: str, frames: Sequence[Frame]) -> Parsed:
    """Parse `attributes`, name -> value. Never raises."""
    value, repairs = read_json(text)
    if isinstance(value, list) and len(value) == 1:
        value, repairs = value[0], [*repairs, "a list in place of one object"]
    if not isinstance(value, dict):
        return Parsed({"attributes": {}}, False, (*repairs, "no JSON object with the attributes"))
    attributes = {k: str(v) for k, v in value.items() if isinstance(v, str | int | float)}
    if len(attributes) < len(value):
        repairs.append("dropped attributes that are not text")
    return Parsed({"attributes": attributes}, not repairs, tuple(repairs))


def attributes_of(labels: Sequence[str]) -> dict[str, str]:
    """Return the attributes that labels `attribute=value` name, each with its first value."""
    first_values: dict[str, str] = {}
    for name, _, value in (label.partition("=") for label in labels):
        first_values.setdefault(name, value)
    return first_values


def check_attributes(parsed: Parsed, expected: Collection[str]) -> Parsed:
    """Return the answer with `ok=False` if it lacks an `expected` attribute or has another one. Without any `expected`
    the answer is returned unchanged."""
    if not parsed.ok or not expected:
        return parsed
    attributes = parsed.values["attributes"]
    repairs = [f"attribute {name!r} is missing" for name in expected if name not in attributes]
    repairs += [f"attribute {name[:80]!r} was not asked for" for name in attributes if name not in expected]
    return replace(parsed, ok=not repairs, repairs=(*parsed.repairs, *repairs))


def score(parsed: Parsed, truth: Mapping[str, Any]) -> dict[str, Any]:
    """Score an answer. `correct`: name -> whether the value is right, but for case and spaces; `all`: all are."""
    predicted = parsed.values.get("attributes", {})
    correct = {k: k in predicted and same_words(predicted[k], v) for k, v in truth["attributes"].items()}
    return {"correct": correct, "all": all(correct.values())}
