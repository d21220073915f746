"""GUI steps: given a goal, a screen and what was done so far, say the next step.

The answer is the row's Output as JSON, with where it points to behind it: `"bbox_2d": [...]` or `"point_2d": [...]` in
the codec's coordinates. The question tells the goal, then what was done: the last `task.short_memory` steps in full,
and before them as many earlier ones as fit into `task.long_memory_tokens`, the oldest cut first.

`truth` is `{"output": {...}, "box": Box | None, "point": Point | None}`; `context` is `{"instruction", "task", "step",
"history": (text, ...)}`, the history oldest first. Placeholders of the prompt: `{goal}`, `{long_memory}`,
`{short_memory}`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray_vlm.data.records import SftRecord
from ray_vlm.tasks.answers import Answer, Parsed, PromptContext, Turns, read_json, same_words, with_images
from ray_vlm.tasks.boxes import Frame, box_problem, iou_matrix, read_numbers

PROMPT = "Goal: {goal}\nEarlier steps: {long_memory}\nLast steps: {short_memory}\nNext step in JSON?"
_NOTHING = "none"
_POINTED = ("bbox_2d", "point_2d")


def check(record: SftRecord, labels: Sequence[str]) -> str | None:
    """Why a record cannot be learned from, if so."""
    if not record.images:
        return "a GUI step needs a screen; fill Image_id"
    taken = [key for key in _POINTED if key in record.truth["output"]]
    if taken:
        return f"Output holds {taken[0]!r}, which is written from Grounding; move it there"
    for region in (record.truth["box"], record.truth["point"]):
        if region is not None and (reason := box_problem(region, record.sizes[0])):
            return f"Grounding: {reason}; mend it, or say what its numbers mean with box_units"
    return None


def tags(record: SftRecord) -> tuple[str, ...]:
    """The action."""
    return (f"action={record.truth['output']['action']}",)


def ask(record: SftRecord, frames: Sequence[Frame], setting: PromptContext) -> Turns:
    """The screen, the goal and the memory of earlier steps."""
    short, long = split_memory(record.context["history"], setting)
    question = setting.options.prompt or PROMPT
    told = {"goal": record.context["instruction"], "long_memory": _list(long), "short_memory": _list(short)}
    pieces = question.split("{")  # one pass: a goal that holds "{short_memory}" is text, not a placeholder
    out = pieces[0]
    for piece in pieces[1:]:
        name, mark, rest = piece.partition("}")
        out += told[name] + rest if mark and name in told else "{" + piece
    return with_images(len(record.images), out, setting.options.system)


def split_memory(history: Sequence[str], setting: PromptContext) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The last steps, and those before them that fit into the token budget; both oldest first."""
    cut = max(0, len(history) - setting.options.short_memory)
    short, earlier = tuple(history[cut:]), history[:cut]
    budget, kept = setting.options.long_memory_tokens, 0
    while kept < len(earlier):
        budget -= setting.count_tokens(earlier[len(earlier) - kept - 1]) + 2  # two for its number
        if budget < 0:
            break
        kept += 1
    return short, tuple(earlier[len(earlier) - kept :])


def remember(history: Sequence[str], output: Mapping[str, Any], setting: PromptContext) -> tuple[tuple, tuple]:
    """The short and the long memory after a step: its `output` joins the history unless no action was understood."""
    done = [write_step(output)] if "action" in output else []
    return split_memory([*history, *done], setting)


def write_step(output: Mapping[str, Any]) -> str:
    """A step as a memory holds it: compact JSON."""
    return json.dumps(output, ensure_ascii=False, separators=(",", ":"))


def read_memory(memory: object, name: str) -> tuple[str, ...]:
    """Earlier steps as texts, oldest first: those of a list of texts and JSON objects, or one of these by itself.

    None and what is empty are no step. `name` is what messages call the memory. Raises `ValueError`.
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


def answer(record: SftRecord, frames: Sequence[Frame], setting: PromptContext) -> Answer:
    """The step as JSON; the whole of it is a span of its action."""
    step = dict(record.truth["output"])
    if record.truth["box"] is not None:
        step["bbox_2d"] = frames[0].encode(record.truth["box"])
    elif record.truth["point"] is not None:
        step["point_2d"] = frames[0].encode_point(record.truth["point"])
    text = json.dumps(step, ensure_ascii=False)
    return Answer(text, ((0, len(text), tags(record)[0]),))


def parse(text: str, frames: Sequence[Frame]) -> Parsed:
    """`output` (action and arguments), `box` and `point` in original pixels or None. Never raises."""
    value, repairs = read_json(text, first_object=True)  # of several steps the next one
    if isinstance(value, list) and value:
        value, repairs = value[0], [*repairs, "the first of a list of steps"]
    if not isinstance(value, dict):
        return Parsed({"output": {}, "box": None, "point": None}, False, (*repairs, "no JSON object with a step"))
    box, point = read_numbers(value, "bbox_2d", 4), read_numbers(value, "point_2d", 2)
    if any(key in value for key in _POINTED) and box is None and point is None:
        repairs.append("dropped a place that is not four or two numbers")
    values = {
        "output": {k: v for k, v in value.items() if k not in _POINTED},
        "box": frames[0].decode(box) if box else None,
        "point": frames[0].decode_point(point) if point else None,
    }
    ok = not repairs and isinstance(value.get("action"), str)
    return Parsed(values, ok, tuple(repairs))


def score(parsed: Parsed, truth: Mapping[str, Any]) -> dict[str, Any]:
    """`action`: same action; `arguments`: share of the truth's arguments that are equal (None where it has none);
    `inside`: the place pointed at lies in the true box (None where nothing is to be pointed at); `iou`: of the boxes
    (None where the truth has none); `success`: everything that applies is right."""
    found, right = parsed.values.get("output", {}), truth["output"]
    action = _same(found.get("action"), right["action"])
    names = [name for name in right if name != "action"]
    equal = [_same(found.get(name), right[name]) for name in names]
    inside, iou = _score_grounding(parsed, truth)
    extra = truth["box"] is None and truth["point"] is None and _pointed(parsed) is not None
    return {
        "action": action,
        "arguments": sum(equal) / len(equal) if equal else None,
        "inside": inside,
        "iou": iou,
        "success": action and all(equal) and inside is not False and not extra,
    }


def _same(found: Any, right: Any) -> bool:
    if isinstance(found, str) and isinstance(right, str):
        return same_words(found, right)
    return type(found) is type(right) and found == right


def _pointed(parsed: Parsed) -> tuple[float, float] | None:
    """The place that is pointed at: a point, or the centre of a box."""
    box, point = parsed.values.get("box"), parsed.values.get("point")
    return point if box is None else ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)


NEAR_PX = 14.0  # a point is hit when the answer is no farther away (half a finger's width on a small screen)


def _score_grounding(parsed: Parsed, truth: Mapping[str, Any]) -> tuple[bool | None, float | None]:
    if truth["box"] is None and truth["point"] is None:
        return None, None
    at = _pointed(parsed)
    if truth["box"] is None:
        x, y = truth["point"]
        return at is not None and (at[0] - x) ** 2 + (at[1] - y) ** 2 <= NEAR_PX**2, None
    x1, y1, x2, y2 = truth["box"]
    inside = at is not None and x1 <= at[0] <= x2 and y1 <= at[1] <= y2
    box = parsed.values.get("box")
    return inside, float(iou_matrix([truth["box"]], [box])[0, 0]) if box is not None else 0.0
