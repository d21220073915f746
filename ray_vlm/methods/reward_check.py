"""A trial of GRPO's rewards before training, on right and wrong answers to made-up records of each task.

Answers are text in the task's format, so parsing is tried with the scores.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ray_vlm.data.records import Box
from ray_vlm.errors import ConfigError, DataError
from ray_vlm.methods.rewards import Rewards, ask_function, call_arguments, part_scores, total
from ray_vlm.tasks import TASKS
from ray_vlm.tasks.boxes import Frame, write_boxes
from ray_vlm.tasks.classification import attributes_of

FRAME = Frame((1000, 1000), (1000, 1000))
TRUTH = "truth"
ORDER = ("empty", "invented", "shifted", "duplicated", TRUTH)  # answers to a detection, from the worst to the best
_GARBAGE = "I cannot tell."
_BOXES: tuple[Box, ...] = ((100, 100, 300, 300), (600, 150, 840, 350), (420, 400, 560, 520))
_ELSEWHERE: tuple[Box, ...] = ((100, 700, 300, 900), (400, 720, 520, 900), (700, 700, 940, 860))
_SAME = 1e-9  # rewards that differ by less are equal


@dataclass(frozen=True)
class Case:
    """A record with its right answer, named `TRUTH`, first, and wrong answers, each a text by name.

    `judges`: for a wrong answer, the parts that can detect the error; a job that weights none of them ignores it on
    purpose. An answer without judges must always score less than the right one.
    """

    truth: Mapping[str, Any]
    answers: Mapping[str, str]
    judges: Mapping[str, frozenset[str]]


def build_cases(task: str, labels: Sequence[str] = ()) -> list[Case]:
    """Build made-up records of a task, with the job's class names if it has some; boxes are in pixels of `FRAME`."""
    return list(_CASES[task](labels))


def _detection(labels: Sequence[str]) -> Iterator[Case]:
    """Yield a record with two objects, and one with three."""
    names = list(dict.fromkeys((*labels, "pipe", "valve", "crack")))
    for count in (2, 3):
        right = list(zip(_BOXES[:count], names, strict=False))
        invented = [*right[:1], *zip(_ELSEWHERE, [*names[1:count], names[0]], strict=False)]
        answers = {
            TRUTH: right,
            "duplicated": right * 2,
            "shifted": [(_shift(box), name) for box, name in right],
            "invented": invented,
            "empty": [],
        }
        truth = {"boxes": _BOXES[:count], "labels": tuple(names[:count])}
        yield Case(truth, {name: write_boxes(objects, FRAME).text for name, objects in answers.items()}, {})


def _shift(box: Box) -> Box:
    """Move a box by a quarter of its width and height, which leaves an IoU of 0.39."""
    right, down = (box[2] - box[0]) / 4, (box[3] - box[1]) / 4
    return (box[0] + right, box[1] + down, box[2] + right, box[3] + down)


def _classification(labels: Sequence[str]) -> Iterator[Case]:
    right = attributes_of(labels) or {"object": "drain", "condition": "blocked"}
    first, *others = right
    answers = {TRUTH: right, "wrong class": {**right, first: f"not {right[first]}"}}
    judges = {"wrong class": frozenset({"class", first})}
    if others:
        answers["wrong conditions"] = {**right, **{name: f"not {right[name]}" for name in others}}
        judges["wrong conditions"] = frozenset({"conditions", *others})
    texts = {name: json.dumps(answer, ensure_ascii=False) for name, answer in answers.items()}
    yield Case({"attributes": right}, {**texts, "nothing understood": _GARBAGE}, judges)


def _gui_steps(labels: Sequence[str]) -> Iterator[Case]:
    """Yield a step that points at a box, and one that points at nothing."""
    box = _BOXES[0]
    for true_box in (box, None):
        right: dict[str, Any] = {"action": "click", "target": "Save"}
        points = {} if true_box is None else {"bbox_2d": FRAME.encode(true_box)}
        answers = {
            TRUTH: {**right, **points},
            "wrong action": {**right, **points, "action": "scroll"},
            "wrong argument": {**right, **points, "target": "Cancel"},
            "wrong place": {**right, "bbox_2d": FRAME.encode(_ELSEWHERE[2])},
        }
        judges = {"wrong action": {"action"}, "wrong argument": {"argument"}, "wrong place": {"grounding"}}
        texts = {name: json.dumps(answer) for name, answer in answers.items()}
        yield Case(
            {"output": right, "box": true_box, "point": None},
            {**texts, "nothing understood": _GARBAGE},
            {name: frozenset(parts) for name, parts in judges.items()},
        )


def _chat(labels: Sequence[str]) -> Iterator[Case]:
    right = "The gauge reads 42 bar."
    wrong = {"nearly right": "The gauge reads 24 bar.", "another answer": "Two cats sleep on a sofa.", "empty": ""}
    yield Case({"answer": right}, {TRUTH: right, **wrong}, {})


_CASES = {"detection": _detection, "classification": _classification, "gui_steps": _gui_steps, "chat": _chat}


def check_rewards(rewards: Rewards) -> list[str]:
    """Try the rewards on made-up records, and return warnings for the user, one sentence each.

    Raise `ConfigError` if the built-in parts, as the job weights them, would teach a wrong answer: one weighted part
    scores it higher than the truth, or all together do not score it lower. Warnings are about ties that the job chose
    (it weights no part that detects the error, or leaves that to functions), detection answers whose rewards do not
    rise in the order of `ORDER`, and users' functions for which the truth does not score highest or that fail.
    """
    warnings: list[str] = []
    cases = build_cases(rewards.task, rewards.labels)
    weighted = {name for name, weight in rewards.weights.items() if weight and name not in rewards.functions}
    for case in cases if weighted else ():
        scores = {
            name: part_scores(rewards, TASKS[rewards.task].parse(text, (FRAME,)), case.truth)
            for name, text in case.answers.items()
        }
        problems, ties = _wrong_wins(rewards, weighted, case, scores)
        if problems:
            raise ConfigError([f"method.rewards: {problem}" for problem in problems])
        warnings += [*ties, *_out_of_order(rewards, scores)]
    for name, function in rewards.functions.items():
        if rewards.weights[name]:
            warnings += _try_function(rewards, name, function, cases)
    return list(dict.fromkeys(warnings))


def _wrong_wins(
    rewards: Rewards, weighted: set[str], case: Case, scores: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[str]]:
    """Return (problems, warnings) about wrong answers to `case` that earn too much from the `weighted` parts."""
    problems, warnings = [], []
    truth, best = scores[TRUTH], total(rewards, scores[TRUTH])
    for name, parts in scores.items():
        for part in sorted(weighted):
            if not truth[part] >= parts[part] - _SAME:
                problems.append(f"{part} gives the answer {name!r} {parts[part]:.3f}, and the truth {truth[part]:.3f}.")
        earned = total(rewards, parts)
        if name == TRUTH or best > earned + _SAME:
            continue
        left_out = not case.judges.get(name, weighted) & weighted and weighted - {"format"}
        if left_out or any(rewards.weights[own] for own in rewards.functions):
            advice = "a function of yours must tell them apart, or this is not learned"
            warnings.append(f"the built-in parts give the answer {name!r} as much as the truth; {advice}.")
        else:
            advice = "Weight a part that tells them apart"
            problems.append(f"the answer {name!r} earns {earned:.3f} in all, and the truth {best:.3f}. {advice}.")
    return problems, warnings


def _out_of_order(rewards: Rewards, scores: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Yield a warning for neighbours in `ORDER` whose totals do not rise; the empty answer may equal the next."""
    totals = {name: total(rewards, parts) for name, parts in scores.items()}
    for worse, better in pairwise(ORDER[:-1]):  # `_wrong_wins` checks the truth
        slack = -_SAME if worse == ORDER[0] else _SAME
        if {worse, better} <= set(totals) and not totals[better] > totals[worse] + slack:
            yield f"with these weights the answer {better!r} earns no more than the answer {worse!r}, which is worse."


def _try_function(rewards: Rewards, name: str, function: Callable, cases: Sequence[Case]) -> Iterator[str]:
    """Yield a warning if a user's function fails on the made-up records, or does not score the truth highest."""
    tried = [(i, answer, text, case) for i, case in enumerate(cases, 1) for answer, text in case.answers.items()]
    texts = [text for _, _, text, _ in tried]
    ids = [f"made-up record {i}, {answer}" for i, answer, _, _ in tried]
    parsed = [TASKS[rewards.task].parse(text, (FRAME,)) for text in texts]
    prompts = [[{"role": "user", "content": "What is shown?"}] for _ in tried]
    extra: dict[str, list[Any]] = {"truth": [case.truth for *_, case in tried], "parsed": parsed, "row_id": ids}
    try:
        arguments = call_arguments(texts, prompts, [list(text.encode()) for text in texts], extra)
        values = ask_function(name, function, arguments, ids)
    except DataError as error:
        yield f"{error} It was tried on made-up records, without the columns of your rows."
        return
    scores = {(i, answer): value for (i, answer, _, _), value in zip(tried, values, strict=True)}
    beaten: dict[str, str] = {}
    for (i, answer), value in scores.items():
        best = scores[i, TRUTH]
        if answer != TRUTH and best is not None and value is not None:
            ahead = rewards.weights[name] * (value - best)
            if ahead > _SAME or (ahead >= -_SAME and answer not in beaten):
                beaten[answer] = "more" if ahead > _SAME else "as much"
    if beaten:
        comparison = ", ".join(f"{answer!r} {much}" for answer, much in beaten.items())
        yield f"reward {name!r} is not won by the truth: of answers to made-up records it gives {comparison}."
    elif all(scores[i, TRUTH] is None for i, _ in enumerate(cases, 1)):
        yield f"reward {name!r} does not score the truth of made-up records, so it could not be tried."
