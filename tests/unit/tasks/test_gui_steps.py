"""GUI steps: memory within its budget, targets in the codec's coordinates, and what counts as success."""

import copy
import json
from typing import Any

import pytest

from ray_vlm.config.task import GuiStepsTask
from ray_vlm.data.records import SftRecord
from ray_vlm.tasks import gui_steps
from ray_vlm.tasks.answers import Parsed, PromptContext
from ray_vlm.tasks.boxes import CODECS, Frame

FRAMES = (Frame((400, 200), (420, 196), CODECS["qwen2_5_vl"]),)
OUTPUT = {"action": "type", "text": "hello"}


def _record(output: dict = OUTPUT, box=(100.0, 50.0, 200.0, 100.0), point=None, history=(), goal="Say hi") -> SftRecord:
    context = {"instruction": goal, "task": "t", "step": len(history), "history": tuple(history)}
    return SftRecord("t/0", 0, ("a.png",), ((400, 200),), {"output": output, "box": box, "point": point}, context)


def _question(history: list[str], goal: str = "Say hi", **options: Any) -> str:
    setting = PromptContext(GuiStepsTask(**options), count_tokens=lambda text: len(text.split()))
    return gui_steps.ask(_record(history=history, goal=goal), FRAMES, setting)[-1][1]


def test_answer_has_the_target_in_the_codec_s_numbers_and_reads_back() -> None:
    answer = gui_steps.answer(_record(), FRAMES, PromptContext(GuiStepsTask()))
    assert answer.text == '{"action": "type", "text": "hello", "bbox_2d": [105, 49, 210, 98]}'
    assert answer.spans == ((0, len(answer.text), "action=type"),)
    parsed = gui_steps.parse(answer.text, FRAMES)
    assert parsed.ok
    assert parsed.values["box"] == pytest.approx((100.0, 50.0, 200.0, 100.0))
    assert gui_steps.score(parsed, _record().truth)["success"]
    point = gui_steps.answer(_record(box=None, point=(200.0, 100.0)), FRAMES, PromptContext(GuiStepsTask())).text
    assert '"point_2d": [210, 98]' in point
    assert gui_steps.parse(point, FRAMES).values["point"] == pytest.approx((200.0, 100.0))


def test_the_last_steps_are_short_memory_and_the_oldest_of_the_rest_are_cut_first() -> None:
    history = ["one", "two", "three", "four", "five"]
    question = _question(history, short_memory=2, long_memory_tokens=6)
    assert "Last steps: four five" in question
    assert "Earlier steps: two three" in question, "each costs its tokens and two more"
    assert "Earlier steps: none" in _question(history, short_memory=5)
    assert "Last steps: none" in _question([])
    assert "Earlier steps: none" in _question(history, short_memory=2, long_memory_tokens=0)


def test_a_goal_that_looks_like_a_placeholder_is_text() -> None:
    assert "Goal: {short_memory} {x}" in _question(["one"], goal="{short_memory} {x}")


@pytest.mark.parametrize(
    ("text", "success", "inside", "arguments"),
    [
        ('{"action": "type", "text": "hello", "bbox_2d": [105, 49, 210, 98]}', True, True, 1.0),
        ('{"action": "TYPE", "text": "Hello ", "point_2d": [150, 60]}', True, True, 1.0),
        ('{"action": "type", "text": "bye", "bbox_2d": [105, 49, 210, 98]}', False, True, 0.0),
        ('{"action": "click", "text": "hello", "bbox_2d": [105, 49, 210, 98]}', False, True, 1.0),
        ('{"action": "type", "text": "hello", "bbox_2d": [0, 0, 20, 20]}', False, False, 1.0),
        ('{"action": "type", "text": "hello"}', False, False, 1.0),
        ("nothing", False, False, 0.0),
    ],
)
def test_success_needs_action_arguments_and_target(text: str, success: bool, inside: bool, arguments: float) -> None:
    score = gui_steps.score(gui_steps.parse(text, FRAMES), _record().truth)
    assert (score["success"], score["inside"], score["arguments"]) == (success, inside, arguments)


def test_pointing_where_nothing_is_to_be_pointed_at_is_no_success() -> None:
    truth = _record({"action": "done"}, box=None).truth
    assert gui_steps.score(gui_steps.parse('{"action": "done"}', FRAMES), truth)["success"]
    assert not gui_steps.score(gui_steps.parse('{"action": "done", "point_2d": [3, 3]}', FRAMES), truth)["success"]


def test_a_point_is_hit_within_a_finger_s_width() -> None:
    truth = {"output": {"action": "a"}, "box": None, "point": (100.0, 100.0)}
    for x, hit in ((110.0, True), (120.0, False)):
        parsed = Parsed({"output": {"action": "a"}, "box": None, "point": (x, 100.0)})
        assert gui_steps.score(parsed, truth)["inside"] is hit


@pytest.mark.parametrize(
    "text", ["", "[", "[]", "[1]", "{" * 10_000, '{"action": 3}', '{"bbox_2d": "x"}', '"a"', "NaN"]
)
def test_parse_never_raises(text: str) -> None:
    parsed = gui_steps.parse(text, FRAMES)
    assert not parsed.ok
    assert not gui_steps.score(parsed, _record().truth)["success"]


def test_rows_that_cannot_be_learned_say_why() -> None:
    assert gui_steps.check(_record(), ()) is None
    assert "outside" in (gui_steps.check(_record(box=(0.0, 0.0, 900.0, 5.0)), ()) or "")
    assert "move it there" in (gui_steps.check(_record({"action": "a", "bbox_2d": [1]}), ()) or "")


@pytest.mark.parametrize(
    ("memory", "steps"),
    [
        (None, ()),
        ("", ()),
        ({}, ()),
        ([], ()),
        ("tapped Save", ("tapped Save",)),
        ({"action": "tap", "text": "ü"}, ('{"action":"tap","text":"ü"}',)),
        (["one", {"action": "tap"}, "", None], ("one", '{"action":"tap"}')),
        ((text for text in ("one", "two")), ("one", "two")),
    ],
)
def test_a_memory_is_steps_or_a_single_one(memory: Any, steps: tuple[str, ...]) -> None:
    assert gui_steps.read_memory(memory, "memory") == steps


@pytest.mark.parametrize("memory", [3, b"tap", ["one", 3], [["one"]], {"action": {1, 2}}, [{"a": b"x"}]])
def test_what_is_no_memory_is_refused(memory: Any) -> None:
    with pytest.raises(ValueError, match="short_term_memory holds"):
        gui_steps.read_memory(memory, "short_term_memory")


@pytest.mark.parametrize("depth", [70, 300, 600, 900, 5000])
@pytest.mark.parametrize("ends", ["[]", "{}"])
def test_an_answer_nested_without_end_is_no_step(depth: int, ends: str) -> None:
    """Python could neither copy nor write down what it holds."""
    inside = "[" * depth + "]" * depth if ends == "[]" else '{"a":' * depth + "1" + "}" * depth
    parsed = gui_steps.parse('{"action": "tap", "text": ' + inside + "}", FRAMES)
    json.dumps(copy.deepcopy(parsed.values))
    assert not parsed.ok
    assert parsed.repairs
