"""GUI steps: given a goal, a screen and the steps so far, answer with the next step.

The answer is the row's Output as JSON, followed by the target on the screen: `"bbox_2d": [...]` or `"point_2d": [...]`
in the codec's coordinates and order (`tasks/codecs.py`; Gemma's key is `box_2d`, and PaliGemma's value is its tokens).
The question states the goal, the last `task.short_memory` steps in full, and as many of the steps before them as fit
into `task.long_memory_tokens`; the oldest are cut first.

`truth` is `{"output": {...}, "box": Box | None, "point": Point | None}`; `context` is `{"instruction", "task", "step",
"history": (text, ...)}`, the history oldest first. Placeholders of the prompt: `{goal}`, `{long_memory}`,
`{short_memory}`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray_vlm.config.task import GuiStepsTask, prompt_of
from ray_vlm.data.records import SftRecord
from ray_vlm.tasks.answers import Answer, Parsed, PromptContext, Turns, read_json, same_words, with_images
from ray_vlm.tasks.boxes import Frame, box_problem, iou_matrix, read_step_target, write_step_target
from ray_vlm.tasks.codecs import TARGET_KEYS

PROMPT = "Goal: {goal}\nEarlier steps: {long_memory}\nLast steps: {short_memory}\nNext step in JSON?"
_PLACEHOLDER = re.compile(r"\{(goal|long_memory|short_memory)\}")
_NOTHING = "none"


def check(record: SftRecord, labels: Sequence[str]) -> str | None:
    """Return why a record cannot be trained on, or None."""
    if not record.images:
        return "a GUI step needs a screen; fill Image_id"
    taken = [key for key in TARGET_KEYS if key in record.truth["output"]]
    if taken:
        return f"Output holds {taken[0]!r}, which is written from Grounding; move it there"
    for region in (record.truth["box"], record.truth["point"]):
        if region is not None and (reason := box_problem(region, record.sizes[0])):
            return f"Grounding: {reason}; mend it, or say what its numbers mean with box_units"
    return None


def tags(record: SftRecord) -> tuple[str, ...]:
    """Return the action as the only tag."""
    return (f"action={record.truth['output']['action']}",)


def ask(record: SftRecord, frames: Sequence[Frame], context: PromptContext) -> Turns:
    """Build the turn with the screen, the goal and the memory of earlier steps."""
    short, long = split_memory(record.context["history"], context)
    values = {"goal": record.context["instruction"], "long_memory": _list(long), "short_memory": _list(short)}
    # One pass: "{short_memory}" inside a goal is text, not a placeholder.
    question = _PLACEHOLDER.sub(lambda match: values[match[1]], prompt_of(context.options) or PROMPT)
    return with_images(len(record.images), question, context.options.system)


def split_memory(history: Sequence[str], context: PromptContext) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split into the last steps and those before them that fit into the token budget; both oldest first."""
    options = context.options
    assert isinstance(options, GuiStepsTask)
    cut = max(0, len(history) - options.short_memory)
    short, earlier = tuple(history[cut:]), history[:cut]
    budget, count = options.long_memory_tokens, 0
    while count < len(earlier):
        budget -= context.count_tokens(earlier[len(earlier) - count - 1]) + 2  # two more tokens for the step's number
        if budget < 0:
            break
        count += 1
    return short, tuple(earlier[len(earlier) - count :])


def remember(history: Sequence[str], output: Mapping[str, Any], context: PromptContext) -> tuple[tuple, tuple]:
    """Return the short and the long memory after a step. Its `output` joins the history if it has an action."""
    done = [write_step(output)] if "action" in output else []
    return split_memory([*history, *done], context)


def write_step(output: Mapping[str, Any]) -> str:
    """Write a step as compact JSON, the form of a memory's entries."""
    return json.dumps(output, ensure_ascii=False, separators=(",", ":"))


def read_memory(memory: object, name: str) -> tuple[str, ...]:
    """Return earlier steps as texts, oldest first, from a list of texts and JSON objects or from a single one.

    None and empty entries are skipped. `name` is the memory's name in messages. Raises `ValueError` for anything else.
    """
    single = isinstance(memory, str | bytes | Mapping) or not isinstance(memory, Iterable)
    entries: Iterable[object] = [memory] if single else memory  # type: ignore[assignment]
    steps = []
    for entry in entries:
        if not isinstance(entry, str | Mapping | None):
            raise ValueError(
                f"{name} holds {str(entry)[:80]!r} ({type(entry).__name__}); a step is a text or a JSON object, and a "
                "memory is a list of steps or a single one"
            )
        try:
            text = write_step(entry) if isinstance(entry, Mapping) and entry else entry
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{name} holds an object that cannot be written as JSON ({error}); mend it") from None
        if isinstance(text, str) and text.strip():
            steps.append(text)
    return tuple(steps)


def _list(steps: Sequence[str]) -> str:
    return " ".join(steps) if steps else _NOTHING


def answer(record: SftRecord, frames: Sequence[Frame], context: PromptContext) -> Answer:
    """Write the step as JSON; all of it is one span, of its action."""
    step = dict(record.truth["output"])
    region = record.truth["point"] if record.truth["box"] is None else record.truth["box"]
    if region is not None:
        key, value = write_step_target(region, frames[0])
        step[key] = value
    text = json.dumps(step, ensure_ascii=False)
    return Answer(text, ((0, len(text), tags(record)[0]),))


def parse(text: str, frames: Sequence[Frame]) -> Parsed:
    """Parse `output` (action and arguments), and `box` and `point` in original pixels or None. Never raises."""
    value, repairs = read_json(text, first_object=True)  # a model may answer several steps; the first is the next
    if isinstance(value, list) and value:
        value, repairs = value[0], [*repairs, "the first of a list of steps"]
    if not isinstance(value, dict):
        return Parsed({"output": {}, "box": None, "point": None}, False, (*repairs, "no JSON object with a step"))
    box, point = read_step_target(value, frames[0])
    if any(key in value for key in TARGET_KEYS) and box is None and point is None:
        repairs.append("dropped a place that is not four or two numbers")
    values = {
        "output": {k: v for k, v in value.items() if k not in TARGET_KEYS},
        "box": box,
        "point": point,
    }
    ok = not repairs and isinstance(value.get("action"), str)
    return Parsed(values, ok, tuple(repairs))


def score(parsed: Parsed, truth: Mapping[str, Any]) -> dict[str, Any]:
    """Score a step against the truth.

    `action`: same action; `arguments`: share of the truth's arguments that are equal (None if it has none); `inside`:
    the target lies in the true box, or near the true point (None if the truth has neither); `iou`: of the boxes (None
    if the truth has no box); `success`: everything that applies is right, and no target is given where none is due.
    """
    predicted, right = parsed.values.get("output", {}), truth["output"]
    action = _same(predicted.get("action"), right["action"])
    names = [name for name in right if name != "action"]
    equal = [_same(predicted.get(name), right[name]) for name in names]
    inside, iou = _score_grounding(parsed, truth)
    extra = truth["box"] is None and truth["point"] is None and _pointed(parsed) is not None
    return {
        "action": action,
        "arguments": sum(equal) / len(equal) if equal else None,
        "inside": inside,
        "iou": iou,
        "success": action and all(equal) and inside is not False and not extra,
    }


def _same(predicted: object, right: object) -> bool:
    if isinstance(predicted, str) and isinstance(right, str):
        return same_words(predicted, right)
    return type(predicted) is type(right) and predicted == right


def _pointed(parsed: Parsed) -> tuple[float, float] | None:
    """Return the position of the target: a point, or the centre of a box."""
    box, point = parsed.values.get("box"), parsed.values.get("point")
    return point if box is None else ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)


NEAR_PX = 14.0  # largest distance at which an answer hits a point (half a finger's width on a small screen)


def _score_grounding(parsed: Parsed, truth: Mapping[str, Any]) -> tuple[bool | None, float | None]:
    if truth["box"] is None and truth["point"] is None:
        return None, None
    target = _pointed(parsed)
    if truth["box"] is None:
        x, y = truth["point"]
        return target is not None and (target[0] - x) ** 2 + (target[1] - y) ** 2 <= NEAR_PX**2, None
    x1, y1, x2, y2 = truth["box"]
    inside = target is not None and x1 <= target[0] <= x2 and y1 <= target[1] <= y2
    box = parsed.values.get("box")
    return inside, float(iou_matrix([truth["box"]], [box])[0, 0]) if box is not None else 0.0
