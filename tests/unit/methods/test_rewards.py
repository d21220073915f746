"""Rewards: each part against counts by hand, the order of answers, refused jobs, users' functions, the self-test."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_vlm.errors import ConfigError, DataError
from ray_vlm.methods import rewards as rewards_module
from ray_vlm.methods.reward_check import FRAME, ORDER, TRUTH, build_cases, check_rewards
from ray_vlm.methods.rewards import (
    DEFAULT_WEIGHTS,
    PARTS,
    Rewards,
    giou_matrix,
    load_rewards,
    part_scores,
    score_completions,
    total,
)
from ray_vlm.tasks import TASKS
from ray_vlm.tasks.answers import Parsed

A, B, C = (0.0, 0.0, 10.0, 10.0), (100.0, 0.0, 120.0, 20.0), (0.0, 200.0, 30.0, 240.0)
FAR = (500.0, 500.0, 520.0, 520.0)
TRUE_AB = {"boxes": (A, B), "labels": ("cat", "dog")}
LABELS = ("object=drain", "object=pipe", "condition=blocked", "condition=clear")


def _boxes(*objects: tuple[tuple, str], ok: bool = True, repairs: tuple[str, ...] = ()) -> Parsed:
    values = {"boxes": tuple(box for box, _ in objects), "labels": tuple(label for _, label in objects)}
    return Parsed(values, ok, repairs)


def _detect(parsed: Parsed, truth: dict = TRUE_AB, quality: str = "iou") -> dict[str, float]:
    return part_scores(load_rewards("detection", None, quality), parsed, truth)


def _problems(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        load_rewards(*arguments, **options)
    return "\n".join(raised.value.problems)


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objects", "bbox", "category", "completeness"),
    [
        ([(A, "cat"), (B, "dog")], 1, 1, 1),
        ([(B, "dog"), (A, "cat")], 1, 1, 1),
        ([], 0, 0, 0),
        ([(A, "cat")], 1 / 2, 1 / 2, 1 / 2),
        ([(A, "dog"), (B, "cat")], 1, 0, 1),  # hits whatever the label
        ([(A, "cat"), (B, "dog"), (FAR, "cat")], 2 / 3, 2 / 3, 2 / 3),
        ([(A, "cat"), (B, "dog")] * 2, 1 / 2, 1 / 2, 1 / 2),
        ([((0, 0, 10, 5), "cat"), (B, "dog")], 3 / 4, 1, 1),  # IoU 0.5 is a hit
        ([((0, 0, 10, 4), "cat"), (B, "dog")], 0.7, 1, 1 / 3),  # IoU 0.4 is a miss and an invented box
    ],
)
def test_detection_parts_by_hand(objects: list, bbox: float, category: float, completeness: float) -> None:
    scores = _detect(_boxes(*objects))
    assert scores == pytest.approx({"format": 1, "bbox": bbox, "category": category, "completeness": completeness})


def test_boxes_pair_by_geometry_for_the_largest_total() -> None:
    """The nearest two alone would come to 90/110 + 30/170, which is less."""
    truth = {"boxes": ((0, 0, 100, 10), (40, 0, 140, 10)), "labels": ("cat", "cat")}
    parsed = _boxes(((10, 0, 110, 10), "cat"), ((-30, 0, 70, 10), "cat"))
    assert _detect(parsed, truth)["bbox"] == pytest.approx((70 / 130 + 70 / 130) / 2)


def test_a_second_label_for_one_box_is_penalised_in_any_order() -> None:
    """The pairing takes the right label, and the other is a surplus box."""
    truth = {"boxes": (A,), "labels": ("dog",)}
    for objects in ([(A, "cat"), (A, "dog")], [(A, "dog"), (A, "cat")]):
        scores = _detect(_boxes(*objects), truth)
        assert [scores[k] for k in ("bbox", "category", "completeness")] == pytest.approx([0.5, 0.5, 0.5])


def test_two_objects_with_one_box_can_be_answered_correctly() -> None:
    truth = {"boxes": (A, A), "labels": ("rider", "horse")}
    assert _detect(_boxes((A, "horse"), (A, "rider")), truth)["category"] == 1.0


@pytest.mark.parametrize("quality", ["iou", "giou"])
def test_no_object(quality: str) -> None:
    nothing: dict = {"boxes": (), "labels": ()}
    assert set(_detect(_boxes(), nothing, quality).values()) == {1.0}
    assert _detect(_boxes((A, "cat")), nothing, quality) == {"format": 1, "bbox": 0, "category": 0, "completeness": 0}


def test_repeated_and_empty_boxes_of_the_text_are_penalised() -> None:
    """Parsing drops them, so evaluation does not see them; without a penalty a model would learn to repeat itself."""
    one = '{"bbox_2d": [100, 100, 300, 300], "label": "cat"}'
    empty = '{"bbox_2d": [5, 5, 5, 5], "label": "cat"}'
    truth = {"boxes": ((100, 100, 300, 300),), "labels": ("cat",)}
    for text in (f"[{one}, {one}]", f"[{one}, {empty}]"):
        parsed = TASKS["detection"].parse(text, (FRAME,))
        assert len(parsed.values["boxes"]) == 1
        assert _detect(parsed, truth)["completeness"] == 0.5
    assert _detect(TASKS["detection"].parse(f"[{empty}]", (FRAME,)), {"boxes": (), "labels": ()})["bbox"] == 0.0


@pytest.mark.parametrize("quality", ["iou", "giou"])
def test_the_order_of_boxes_does_not_matter(quality: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        corners = rng.integers(0, 6, (9, 2)) * 10.0  # a coarse grid: many ties
        boxes = [(x, y, x + w, y + h) for (x, y), w, h in zip(corners, *rng.integers(1, 4, (2, 9)) * 10.0, strict=True)]
        objects = list(zip(boxes, rng.choice(["cat", "dog"], 9).tolist(), strict=True))
        right, predicted = objects[:4], objects[4:]
        first = _shuffled_scores(rng, right, predicted, quality)
        for _ in range(3):
            assert _shuffled_scores(rng, right, predicted, quality) == first
        assert all(0 <= value <= 1 for value in first.values())


def _shuffled_scores(rng: np.random.Generator, right: list, predicted: list, quality: str) -> dict[str, float]:
    right = [right[i] for i in rng.permutation(len(right))]
    predicted = [predicted[i] for i in rng.permutation(len(predicted))]
    truth = {"boxes": [list(box) for box, _ in right], "labels": [label for _, label in right]}
    return _detect(_boxes(*predicted), truth, quality)


def test_giou_against_the_definition() -> None:
    rng = np.random.default_rng(1)
    low = rng.uniform(0, 50, (2, 20, 2))
    a, b = (np.concatenate([x, x + rng.uniform(1, 30, x.shape)], -1).tolist() for x in low)
    gious = giou_matrix(a, b)
    for i, p in enumerate(a):
        for j, q in enumerate(b):
            wide, tall = min(p[2], q[2]) - max(p[0], q[0]), min(p[3], q[3]) - max(p[1], q[1])
            inter = max(wide, 0) * max(tall, 0)
            union = (p[2] - p[0]) * (p[3] - p[1]) + (q[2] - q[0]) * (q[3] - q[1]) - inter
            hull = (max(p[2], q[2]) - min(p[0], q[0])) * (max(p[3], q[3]) - min(p[1], q[1]))
            assert gious[i, j] == pytest.approx(inter / union - (hull - union) / hull)


def test_giou_rises_where_iou_is_zero() -> None:
    truth = {"boxes": (A,), "labels": ("cat",)}
    steps = [(x, 0.0, x + 10.0, 10.0) for x in (300.0, 100.0, 30.0, 10.0, 9.0, 5.0, 0.0)]
    iou, giou = ([_detect(_boxes((box, "cat")), truth, q)["bbox"] for box in steps] for q in ("iou", "giou"))
    assert iou[:4] == [0.0] * 4
    assert all(a < b for a, b in pairwise(giou))
    assert giou[-1] == 1.0


def test_with_giou_any_overlap_scores_higher_than_none() -> None:
    """Thin boxes that cross have a lower GIoU than boxes side by side, and are nearer all the same."""
    flat, tall, beside = (0, 45, 100, 55), (95, 50, 105, 150), (0, 55, 100, 65)
    assert giou_matrix([flat], [tall])[0, 0] < giou_matrix([flat], [beside])[0, 0]
    truth = {"boxes": (flat,), "labels": ("cat",)}
    crossing, near = (_detect(_boxes((box, "cat")), truth, "giou")["bbox"] for box in (tall, beside))
    assert crossing > near > 0
    assert _detect(_boxes((beside, "cat")), truth, "giou")["category"] == 0.0  # its label was not earned


def test_format_is_half_where_something_was_understood() -> None:
    assert _detect(_boxes((A, "cat"), ok=False))["format"] == 0.5
    assert _detect(_boxes(ok=False))["format"] == 0.0
    assert _detect(TASKS["detection"].parse("[]", (FRAME,)))["format"] == 1.0
    named = load_rewards("classification", None)
    truth = {"attributes": {"object": "drain"}}
    texts = {'so: {"object": "pipe"}': 0.5, 'so: {"other": "pipe"}': 0.0, '{"object": "pipe"}': 1.0}
    texts['{"object": "pipe", "why": "round"}'] = 0.5  # an attribute that was not asked for
    for text, score in texts.items():
        assert part_scores(named, TASKS["classification"].parse(text, ()), truth)["format"] == score


def test_classification_parts() -> None:
    rewards = load_rewards(
        "classification", {"class": 1, "conditions": 1, "flow": 1, "rust": 1}, labels=["flow=", "rust="]
    )
    truth = {"attributes": {"object": "drain", "flow": "low", "light": "dim"}}
    parsed = Parsed({"attributes": {"object": "Drain", "flow": "high", "light": "dim"}})
    # this row has no rust, so that part counts as right
    assert part_scores(rewards, parsed, truth) == {"class": 1.0, "conditions": 0.5, "flow": 0.0, "rust": 1.0}
    alone = {"attributes": {"object": "drain"}}
    assert part_scores(rewards, Parsed({"attributes": {}}), alone)["conditions"] == 1.0


def _ground(answer: dict, box: tuple | None = None, point: tuple | None = None) -> float:
    parsed = Parsed({"output": {}, "box": None, "point": None, **answer})
    truth = {"output": {"action": "click"}, "box": box, "point": point}
    return part_scores(load_rewards("gui_steps", None), parsed, truth)["grounding"]


def test_gui_parts() -> None:
    rewards = load_rewards("gui_steps", None)
    truth = {"output": {"action": "type", "text": "hi", "field": "name"}, "box": None, "point": None}
    parsed = Parsed({"output": {"action": "click", "text": "hi"}, "box": None, "point": None})
    assert part_scores(rewards, parsed, truth) == {"format": 1.0, "action": 0.0, "argument": 0.5, "grounding": 1.0}
    assert part_scores(rewards, parsed, {**truth, "output": {"action": "back"}})["argument"] == 1.0


def test_grounding_is_one_inside_and_rises_towards_the_target() -> None:
    box = (0, 0, 30, 40)  # diagonal 50: nothing is earned from 200 px on
    assert _ground({"point": (29, 39)}, box) == 1.0
    assert _ground({"box": (10, 10, 20, 20)}, box) == 1.0
    assert _ground({"point": (115, 20)}, box) == pytest.approx(0.25)
    steps = [_ground({"point": (15 + d, 20)}, box) for d in (200, 150, 60, 16)]
    assert steps[0] == 0.0
    assert steps == sorted(steps)
    assert steps[-1] < 0.5
    assert _ground({}, box) == 0.0
    assert _ground({"point": (113, 100)}, point=(100, 100)) == 1.0
    assert 0.0 < _ground({"point": (130, 100)}, point=(100, 100)) < 0.5
    assert _ground({}) == 1.0
    assert _ground({"point": (5, 5)}) == 0.0


def test_chat_parts() -> None:
    rewards = load_rewards("chat", dict.fromkeys(PARTS["chat"], 1))
    parsed = TASKS["chat"].parse("The Red door", ())
    assert part_scores(rewards, parsed, {"answer": "red door"}) == {
        "format": 1.0,
        "exact": 0.0,
        "normalised": 1.0,
        "anls": pytest.approx(8 / 12),
    }


# --- what a job names ------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder holds `own_rewards.py` with users' functions; it is not on `sys.path`."""
    (tmp_path / "own_rewards.py").write_text(
        "NUMBER = 3\n"
        "def longer(completions, **rest):\n"
        "    return [len(c[0]['content']) for c in completions]\n"
        "async def later(completions, **rest):\n"
        "    return [1.0 for _ in completions]\n"
    )
    (tmp_path / "own_broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield tmp_path
    for name in ("own_rewards", "own_broken"):
        sys.modules.pop(name, None)


def test_defaults_are_the_parts_of_the_task() -> None:
    assert set(PARTS) == set(TASKS) == set(DEFAULT_WEIGHTS)
    assert load_rewards("detection", None).weights == {"format": 1.0, "bbox": 1.0, "category": 1.0, "completeness": 1.0}
    assert load_rewards("chat", None).weights == {"anls": 1.0}


def test_functions_are_imported_from_the_current_folder(own: Path) -> None:
    rewards = load_rewards("chat", {"own_rewards:longer": 0.5, "anls": 1}, has_truth=True)
    assert list(rewards.weights) == ["own_rewards:longer", "anls"]
    assert rewards.functions["own_rewards:longer"].__name__ == "longer"


def test_all_problems_of_a_job_at_once(own: Path) -> None:
    weights: dict[str, Any] = {
        "bbx": 1.0,
        "format": float("nan"),
        "bbox": -1.0,
        "category": "1",
        "completeness": True,
        "own_rewards:shorter": float("inf"),
        "own_rewards:NUMBER": 1,
        "own_rewards:later": 1,
        "own_broken:f": 1,
        "not_there:f": 1,
        ":f": 1,
    }
    problems = _problems("detection", weights, "diou")
    for line in (
        "method.rewards.bbx: no such part of detection. Use format, bbox, category, completeness, or module:function",
        "method.rewards.format: the weight nan is not a finite number",
        "method.rewards.bbox: the weight -1.0 would reward wrong answers",
        "method.rewards.category: the weight '1' is not",
        "method.rewards.completeness: the weight True is not",
        "method.rewards.own_rewards:shorter: the weight inf is not",
        "method.rewards.own_rewards:shorter: could not be imported (AttributeError: ",
        "method.rewards.own_rewards:NUMBER: this is of type int and cannot be called",
        "method.rewards.own_rewards:later: asynchronous",
        "method.rewards.own_broken:f: could not be imported (ZeroDivisionError: division by zero)",
        "method.rewards.not_there:f: could not be imported (ModuleNotFoundError: ",
        "method.rewards.:f: could not be imported (ValueError: ",
        "method.box_quality: 'diou' is not known",
    ):
        assert line in problems
    assert len(problems.splitlines()) == 13


def test_a_job_must_weight_something() -> None:
    for weights in ({}, {"bbox": 0}, {"bbox": 0.0, "format": 0.0}):
        assert "no part has a weight" in _problems("detection", weights)
    assert load_rewards("detection", {"bbox": 0, "completeness": 1}).weights["bbox"] == 0


def test_attributes_are_parts_of_classification_only() -> None:
    assert load_rewards("classification", {"condition": 1}, labels=LABELS).weights == {"condition": 1}
    assert "Use format, class, conditions, object, condition, or" in _problems(
        "classification", {"flow": 1}, labels=LABELS
    )
    assert "no such part of detection" in _problems("detection", {"object": 1}, labels=LABELS)


def test_rows_without_truth_take_functions_only(own: Path) -> None:
    problems = _problems("chat", {"anls": 1, "format": 0, "own_rewards:longer": 1}, has_truth=False)
    assert problems.startswith("method.rewards: anls, format compare with a truth")
    assert "anls compare with a truth" in _problems("chat", None, has_truth=False)
    rewards = load_rewards("chat", {"own_rewards:longer": 2}, has_truth=False)
    rows = score_completions(rewards, ["abc"], [Parsed()], [{}], {}, ["r1"], ["p"], [[1]])
    assert rows == [{"own_rewards:longer": 3.0}]
    assert total(rewards, rows[0]) == 6.0


# --- completions -----------------------------------------------------------------------------------------------------


def _with(function: Any, weight: float = 1.0, **built_in: float) -> Rewards:
    return Rewards("chat", {"my:own": weight, **built_in}, {"my:own": function})


def _score(rewards: Rewards, texts: tuple[str, ...] = ("red", "blue"), **columns: list) -> list[dict[str, Any]]:
    parsed = [TASKS["chat"].parse(text, ()) for text in texts]
    truths = [{"answer": "red"}] * len(texts)
    ids = [f"row-{i}" for i, _ in enumerate(texts)]
    return score_completions(
        rewards, texts, parsed, truths, columns, ids, ["p"] * len(texts), [[i] for i in range(len(texts))]
    )


def test_functions_are_called_once_as_trl_calls_them() -> None:
    calls: list[dict] = []

    def function(**arguments: Any) -> list[Any]:
        calls.append(arguments)
        return [np.float32(0.5), None]

    rows = _score(_with(function, anls=2.0), colour=["r", "b"], prompts=["not", "these"])
    assert rows == [{"my:own": 0.5, "anls": 1.0}, {"my:own": None, "anls": 0.0}]
    assert [list(row) for row in rows] == [["my:own", "anls"]] * 2
    assert len(calls) == 1
    parsed = calls[0].pop("parsed")
    assert [p.values["answer"] for p in parsed] == ["red", "blue"]
    assert calls[0] == {
        "prompts": ["p", "p"],
        "completions": [[{"role": "assistant", "content": "red"}], [{"role": "assistant", "content": "blue"}]],
        "completion_ids": [[0], [1]],
        "truth": [{"answer": "red"}] * 2,
        "row_id": ["row-0", "row-1"],
        "colour": ["r", "b"],
    }


def test_a_column_of_the_rows_replaces_a_built_in_argument() -> None:
    rows = _score(_with(lambda truth, **_: truth), truth=[3, 4])
    assert rows == [{"my:own": 3.0}, {"my:own": 4.0}]


def test_total_weighs_the_parts_that_have_a_value() -> None:
    rewards = _with(lambda **_: [], weight=-0.5, anls=2.0, format=0.0)
    assert total(rewards, {"my:own": 1.0, "anls": 0.25, "format": 1.0}) == 0.0
    assert total(rewards, {"my:own": None, "anls": 0.25, "format": 1.0}) == 0.5


def _raises(**_: Any) -> list[float]:
    raise KeyError("colour")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_raises, "reward 'my:own', row 'row-0' (the first of 2 completions): raised KeyError: 'colour'"),
        (lambda completions: [1, 1], "row 'row-0' (the first of 2 completions): raised TypeError: "),
        (lambda **_: [1.0], "reward 'my:own', row 'row-0' (the first of 2 completions): returned 1 values"),
        (lambda **_: 1.0, "reward 'my:own', row 'row-0' (the first of 2 completions): returned type float"),
        (lambda **_: None, "reward 'my:own', row 'row-0' (the first of 2 completions): returned type NoneType"),
        (lambda **_: [1.0, float("nan")], "reward 'my:own', row 'row-1': returned nan, not a finite number"),
        (lambda **_: [1.0, float("-inf")], "reward 'my:own', row 'row-1': returned -inf, not a finite number"),
        (lambda **_: [1.0, "good"], "reward 'my:own', row 'row-1': returned 'good', not a finite number"),
        (lambda **_: [1.0, None], "row 'row-1': my:own returned None for it, and no other reward scores it"),
    ],
)
def test_a_bad_function_is_named_with_its_row(function: Any, reason: str) -> None:
    with pytest.raises(DataError) as raised:
        _score(_with(function))
    assert reason in str(raised.value)


def test_a_part_without_weight_scores_no_row() -> None:
    with pytest.raises(DataError, match=r"row 'row-0': my:own returned None"):
        _score(_with(lambda **_: [None, 1.0], anls=0.0))


def test_the_error_of_a_function_keeps_its_cause() -> None:
    with pytest.raises(DataError) as raised:
        _score(_with(_raises))
    assert isinstance(raised.value.__cause__, KeyError)


def test_no_completions() -> None:
    assert _score(_with(_raises), ()) == []


# --- the self-test ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", ["iou", "giou"])
def test_detection_answers_rise_in_order(quality: str) -> None:
    rewards = load_rewards("detection", None, quality)
    cases = build_cases("detection", ["crack"])
    assert [len(set(case.truth["labels"])) for case in cases] == [2, 3]
    for case in cases:
        totals = [total(rewards, part_scores(rewards, _parse("detection", case.answers[a]), case.truth)) for a in ORDER]
        assert totals[0] <= totals[1]
        assert all(a < b for a, b in pairwise(totals[1:])), totals
        assert totals[-1] == 4.0


def _parse(task: str, text: str) -> Parsed:
    return TASKS[task].parse(text, (FRAME,))


@pytest.mark.parametrize("task", list(PARTS))
@pytest.mark.parametrize("labels", [(), LABELS])
def test_defaults_pass_without_a_warning(task: str, labels: tuple[str, ...]) -> None:
    assert check_rewards(load_rewards(task, None, labels=labels)) == []
    assert check_rewards(load_rewards(task, dict.fromkeys(PARTS[task], 1.0), "giou", labels=labels)) == []


@pytest.mark.parametrize("task", list(PARTS))
def test_every_part_but_format_sees_a_wrong_answer(task: str) -> None:
    """Otherwise the self-test could not notice that the part is broken."""
    rewards = load_rewards(task, dict.fromkeys(PARTS[task], 1.0))
    for part in PARTS[task][1:]:
        for case in build_cases(task, LABELS)[:1]:
            scores = {a: part_scores(rewards, _parse(task, t), case.truth)[part] for a, t in case.answers.items()}
            assert scores[TRUTH] == 1.0
            assert min(scores.values()) < 1.0


def _upside_down(name: str, part: str) -> Any:
    original = getattr(rewards_module, name)
    return lambda *arguments: {**(scores := original(*arguments)), part: 1 - scores[part]}


@pytest.mark.parametrize(
    ("task", "part"), [(t, p) for t, parts in PARTS.items() for p in parts if p != "format"], ids=lambda v: v
)
def test_a_part_that_is_broken_refuses_to_train(task: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards_module, f"_{task}", _upside_down(f"_{task}", part))
    rewards = load_rewards(task, dict.fromkeys(PARTS[task], 1.0))
    with pytest.raises(ConfigError, match=f"method.rewards: {part} gives the answer .* and the truth 0.000"):
        check_rewards(rewards)
    rewards = load_rewards(task, {p: float(p != part) for p in PARTS[task]})  # it only logs
    check_rewards(rewards)


def test_a_part_that_gives_all_the_same_refuses_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards_module, "iou_matrix", lambda a, b: np.ones((len(a), len(b))))
    with pytest.raises(ConfigError, match=r"the answer 'shifted' earns 4.000 in all, and the truth 4.000"):
        check_rewards(load_rewards("detection", None))


def test_a_part_that_gives_nan_refuses_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards_module, "_chat", lambda *_: dict.fromkeys(PARTS["chat"], float("nan")))
    with pytest.raises(ConfigError, match="anls gives the answer"):
        check_rewards(load_rewards("chat", None))


@pytest.mark.parametrize("task", list(PARTS))
def test_format_alone_refuses_to_train(task: str) -> None:
    with pytest.raises(ConfigError, match="Weight a part that tells them apart"):
        check_rewards(load_rewards(task, {"format": 1.0}))


def test_labels_alone_do_not_teach_where_boxes_are() -> None:
    with pytest.raises(ConfigError, match="the answer 'shifted' earns"):
        check_rewards(load_rewards("detection", {"category": 1.0}))


def test_errors_that_a_job_ignores_on_purpose_are_warnings() -> None:
    warnings = check_rewards(load_rewards("classification", {"class": 1.0}, labels=LABELS))
    assert len(warnings) == 1
    assert "'wrong conditions' as much as the truth" in warnings[0]
    assert "'wrong class'" in check_rewards(load_rewards("classification", {"condition": 1.0}, labels=LABELS))[0]
    assert "'wrong place'" in check_rewards(load_rewards("gui_steps", {"action": 1.0, "argument": 1.0}))[0]
    assert check_rewards(load_rewards("classification", {"object": 1, "condition": 1}, labels=LABELS)) == []
    assert check_rewards(load_rewards("classification", {"class": 1.0}, labels=["object=a", "object=b"])) == []


def test_weights_that_reverse_the_order_are_a_warning() -> None:
    (warning,) = check_rewards(load_rewards("detection", {"completeness": 1.0}))
    assert warning.startswith("with these weights the answer 'shifted' earns no more than the answer 'invented'")


def test_a_function_that_does_not_score_the_truth_highest_is_a_warning(own: Path) -> None:
    (warning,) = check_rewards(load_rewards("detection", {"bbox": 1.0, "own_rewards:longer": 0.1}))
    assert warning.startswith("reward 'own_rewards:longer' is not won by the truth")
    assert warning.endswith("it gives 'duplicated' more, 'shifted' as much, 'invented' more.")
    assert check_rewards(load_rewards("detection", {"bbox": 1.0, "own_rewards:longer": 0.0})) == []


def test_a_penalty_is_judged_with_its_sign(own: Path) -> None:
    (warning,) = check_rewards(load_rewards("detection", {"bbox": 1.0, "own_rewards:longer": -0.1}))
    assert "'empty' more" in warning
    assert "'duplicated'" not in warning


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_raises, "raised KeyError: 'colour'. Mend the function. It was tried on made-up records"),
        (lambda **_: [1.0], "returned 1 values"),
        (lambda row_id, **_: [float("nan")] * len(row_id), "row 'made-up record 1, truth': returned nan"),
        (lambda row_id, **_: [None] * len(row_id), "does not score the truth of made-up records"),
    ],
)
def test_a_function_that_fails_is_a_warning(function: Any, reason: str) -> None:
    (warning,) = check_rewards(_with(function, anls=1.0))
    assert "reward 'my:own'" in warning
    assert reason in warning


def test_a_function_that_knows_the_truth_passes() -> None:
    def exact(completions: list, truth: list, **_: Any) -> list[float]:
        return [float(c[0]["content"] == t["answer"]) for c, t in zip(completions, truth, strict=True)]

    assert check_rewards(_with(exact)) == []
    warnings = check_rewards(_with(exact, format=0.5))  # format alone would be refused; the function tells them apart
    assert len(warnings) == 2
    assert all("a function of yours must tell them apart" in warning for warning in warnings)


def test_it_imports_nothing_heavy() -> None:
    heavy = ("torch", "ray", "trl", "transformers", "datasets", "matplotlib", "scipy")
    code = f"import sys, json, ray_vlm.methods.rewards; print(json.dumps([m for m in {heavy!r} if m in sys.modules]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == []
