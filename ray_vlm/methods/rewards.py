"""GRPO rewards: the weighted sum of the task's own scores and of users' functions.

Training rewards the scores that evaluation measures. `load_rewards` reads a job's rewards, and `score_completions`
scores a batch of completions, part by part; `reward_check.py` tries them before training. A built-in part scores a
parsed completion against its row's truth, from 0 to 1, with intermediate values where the task only has right and
wrong, so that a better answer always earns more.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from ray_vlm.config.check_method import PROMPT_FORMATS
from ray_vlm.config.data import Source
from ray_vlm.config.method import GrpoMethod
from ray_vlm.config.paths import import_function
from ray_vlm.data.records import Box, PromptRecord, Record
from ray_vlm.data.samples import SampleBuilder, parse_answer
from ray_vlm.errors import ConfigError, DataError
from ray_vlm.tasks import chat, classification, gui_steps
from ray_vlm.tasks.answers import Parsed
from ray_vlm.tasks.boxes import iou_matrix, match
from ray_vlm.tasks.classification import attributes_of

PARTS: dict[str, tuple[str, ...]] = {
    "detection": ("format", "bbox", "category", "completeness"),
    "classification": ("format", "class", "conditions"),
    "gui_steps": ("format", "action", "argument", "grounding"),
    "chat": ("format", "exact", "normalised", "anls"),
}
HIT_IOU = 0.5  # a box with this IoU or more is a hit
_APART = 0.1  # with `giou`: the most that a box without overlap earns, and the least that one with overlap earns
_TIE = 1e-9  # added for a right label, to prefer it among pairings of the same quality
_DIAGONALS = 4.0  # a step that points this many diagonals away from its target earns nothing for it
DEFAULT_WEIGHTS: dict[str, dict[str, float]] = {
    **{task: dict.fromkeys(parts, 1.0) for task, parts in PARTS.items()},
    "chat": {"anls": 1.0},
}


@dataclass(frozen=True)
class Rewards:
    """A job's rewards: `weights` of all parts in order, and the users' `functions` among them by name.

    `box_quality`: `iou` or `giou`. `labels`: class names, `attribute=value` for classification.
    """

    task: str
    weights: Mapping[str, float]
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    box_quality: str = "iou"
    labels: tuple[str, ...] = ()


def load_rewards(
    task: str,
    weights: Mapping[str, float] | None,
    box_quality: str = "iou",
    has_truth: bool = True,
    labels: Sequence[str] = (),
) -> Rewards:
    """Load the rewards that a job names; `weights` None: `DEFAULT_WEIGHTS` of the task.

    A part is one of `PARTS[task]`, for classification also an attribute's name from `labels`, or `module:function`,
    which is imported from the current folder, what is installed, or the job file's folder. A weight of 0 only logs the
    part. `has_truth` False: the rows are prompts without a truth, which only functions can score. Raise `ConfigError`
    with all problems.
    """
    named = dict(DEFAULT_WEIGHTS[task] if weights is None else weights)
    known = (*PARTS[task], *(attributes_of(labels) if task == "classification" else ()))
    functions: dict[str, Callable[..., Any]] = {}
    problems = []
    for name, weight in named.items():
        reasons = [_weight_problem(weight, name in known)]
        if name not in known and ":" in name:
            functions[name], reason = _import_function(name)
            reasons.append(reason)
        elif name not in known:
            reasons.append(f"no such part of {task}. Use {', '.join(known)}, or module:function for one of yours.")
        problems += [f"method.rewards.{name}: {reason}" for reason in reasons if reason]
    if not has_truth and (judged := [name for name in named if name in known]):
        formats = " and ".join(PROMPT_FORMATS)
        reason = f"compare with a truth, and rows of {formats} have none. Use module:function, or rows with a truth"
        problems.append(f"method.rewards: {', '.join(judged)} {reason}.")
    if not any(named.values()):
        problems.append("method.rewards: no part has a weight, so there is nothing to learn. Give one a weight.")
    if box_quality not in ("iou", "giou"):
        problems.append(f"method.box_quality: {box_quality!r} is not known. Use iou or giou.")
    if problems:
        raise ConfigError(problems)
    return Rewards(task, named, functions, box_quality, tuple(labels))


def _weight_problem(weight: float, built_in: bool) -> str | None:
    if not _is_number(weight) or isinstance(weight, bool):
        return f"the weight {weight!r} is not a finite number. Use one such as 1.0."
    if weight < 0 and built_in:
        return f"the weight {weight} would reward wrong answers. Use 0 or more."
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _import_function(name: str) -> tuple[Any, str | None]:
    """Return the function `module:function`, and the problem with it or None."""
    try:
        function = import_function(name)
    except Exception as error:  # the module is the user's, and may raise anything
        return None, f"could not be imported ({type(error).__name__}: {error}). Mend the module or the name."
    if not callable(function):
        return None, f"this is of type {type(function).__name__} and cannot be called. Name a function."
    if inspect.iscoroutinefunction(function):
        return None, "asynchronous functions are not awaited here. Name an ordinary function."
    return function, None


def part_scores(rewards: Rewards, parsed: Parsed, truth: Mapping[str, Any]) -> dict[str, float]:
    """Score one completion with the built-in parts that the job names, each 0..1."""
    names = [name for name in rewards.weights if name not in rewards.functions]
    scores = score_parts(rewards.task, parsed, truth, rewards.box_quality) if names else {}
    return {name: scores.get(name, 1.0) for name in names}  # an attribute that the row does not have counts as right


def score_completions(
    rewards: Rewards,
    texts: Sequence[str],
    parsed: Sequence[Parsed],
    truths: Sequence[Mapping[str, Any]],
    columns: Mapping[str, list],
    ids: Sequence[str],
    prompts: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
) -> list[dict[str, float | None]]:
    """Score every part of every completion, in the order of `rewards.weights`; None where a user's function returned
    None.

    All arguments have one entry for each completion; `ids` are the rows' ids. A user's function is called once for all,
    as in TRL: `f(prompts=, completions=[[{"role": "assistant", "content": text}], ...], completion_ids=, **columns)`,
    with `truth`, `parsed` and `row_id` beside the columns (a column of the same name replaces them). Raise `DataError`,
    which names the reward and the row, if a function fails or does not return one finite number or None for each
    completion, and if no reward with a weight scores a row.
    """
    if not ids:
        return []
    extra: dict[str, list] = {"truth": list(truths), "parsed": list(parsed), "row_id": list(ids), **columns}
    batch = call_arguments(texts, prompts, completion_ids, extra)
    own = {name: ask_function(name, function, batch, ids) for name, function in rewards.functions.items()}
    weighted = [name for name, weight in rewards.weights.items() if weight]
    rows = []
    for i, row_id in enumerate(ids):
        parts = {**part_scores(rewards, parsed[i], truths[i]), **{name: values[i] for name, values in own.items()}}
        if all(parts[name] is None for name in weighted):
            reason = "returned None for it, and no other reward scores it. Return a number, or add a reward that does"
            raise DataError(f"row {row_id!r}: {', '.join(weighted)} {reason}.")
        rows.append({name: parts[name] for name in rewards.weights})
    return rows


def call_arguments(
    texts: Sequence[str], prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], extra: Mapping[str, list]
) -> dict[str, list]:
    """Return the arguments of a user's function."""
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    return {**extra, "prompts": list(prompts), "completions": completions, "completion_ids": list(completion_ids)}


def ask_function(name: str, function: Callable, batch: Mapping[str, list], ids: Sequence[str]) -> list[float | None]:
    """Return the values of a user's function for all completions. Raise `DataError` if it fails or returns others."""
    where = f"reward {name!r}, row {ids[0]!r} (the first of {len(ids)} completions)"
    try:
        values = function(**batch)
    except Exception as error:  # the function is the user's, and may raise anything
        raise DataError(f"{where}: raised {type(error).__name__}: {error}. Mend the function.") from error
    if not isinstance(values, list | tuple):
        raise DataError(f"{where}: returned type {type(values).__name__}. Return a list with one number a completion.")
    if len(values) != len(ids):
        raise DataError(f"{where}: returned {len(values)} values. Return a list with one number a completion.")
    for row_id, value in zip(ids, values, strict=True):
        if value is not None and not _is_number(value):
            reason = f"returned {value!r}, not a finite number. Return a number, or None where it does not apply."
            raise DataError(f"reward {name!r}, row {row_id!r}: {reason}")
    return [None if value is None else float(value) for value in values]


def total(rewards: Rewards, parts: Mapping[str, float | None]) -> float:
    """Return the reward: the weighted sum of the parts, without those that are None or missing."""
    scored = {name: value for name, value in parts.items() if value is not None}
    return float(sum(weight * scored[name] for name, weight in rewards.weights.items() if name in scored))


def score_parts(task: str, parsed: Parsed, truth: Mapping[str, Any], box_quality: str = "iou") -> dict[str, float]:
    """Score every part in `PARTS[task]`, each 0..1; for classification also every attribute by its name, unless a part
    has that name. The order of boxes does not matter. `box_quality`: `iou` or `giou`."""
    if task == "detection":
        scores = _detection(parsed, truth, box_quality)
    else:
        scores = {"classification": _classification, "gui_steps": _gui_steps, "chat": _chat}[task](parsed, truth)
    return {**scores, "format": _format(task, parsed, truth)}


def _format(task: str, parsed: Parsed, truth: Mapping[str, Any]) -> float:
    """Return 1.0 for the expected format, 0.5 if something could still be parsed, else 0.0."""
    values = parsed.values
    understood = {
        "detection": lambda: bool(values.get("boxes")),
        "classification": lambda: any(name in values.get("attributes", {}) for name in truth["attributes"]),
        "gui_steps": lambda: any(name in values.get("output", {}) for name in truth["output"]),
        "chat": lambda: bool(values.get("answer")),
    }
    named = task != "classification" or truth["attributes"].keys() == values.get("attributes", {}).keys()
    return 1.0 if parsed.ok and named else 0.5 * understood[task]()


def _detection(parsed: Parsed, truth: Mapping[str, Any], box_quality: str) -> dict[str, float]:
    """Score `bbox` (quality of one-to-one pairs) and `category` (pairs that overlap and have the right label), both
    divided by the larger number of objects, and `completeness` (hits over hits, misses and other predicted boxes).

    Objects that parsing dropped as duplicates or as empty count as predicted boxes.
    """
    true, predicted = _objects(truth), _objects(parsed.values)
    num_predicted = len(predicted) + sum(repair.startswith("dropped ") for repair in parsed.repairs)
    if not true or not predicted:
        return dict.fromkeys(("bbox", "category", "completeness"), float(not true and not num_predicted and parsed.ok))
    true_boxes, boxes = [box for box, _ in true], [box for box, _ in predicted]
    ious = iou_matrix(true_boxes, boxes)
    quality = ious if box_quality == "iou" else _graded(ious, giou_matrix(true_boxes, boxes))
    agree = (ious > 0) & np.array([[label == name for _, label in predicted] for _, name in true])
    pairs = match(quality + _TIE * agree)
    most, hits = max(len(true), num_predicted), sum(ious[pair] >= HIT_IOU for pair in pairs)
    return {
        "bbox": float(sum(quality[pair] for pair in pairs) / most),
        "category": float(sum(agree[pair] for pair in pairs) / most),
        "completeness": float(hits / (len(true) + num_predicted - hits)),
    }


def _objects(values: Mapping[str, Any]) -> list[tuple[Box, str]]:
    """Return labelled boxes, sorted, so that the order in the answer does not matter."""
    boxes = (tuple(float(v) for v in box) for box in values.get("boxes", ()))
    return sorted(zip(boxes, values.get("labels", ()), strict=True))  # type: ignore[arg-type]


def giou_matrix(a: Sequence[Box], b: Sequence[Box]) -> np.ndarray:
    """Return the generalised IoU of every pair, `float64 [len(a), len(b)]`, in (-1, 1]: the IoU less the share of the
    smallest enclosing box that neither covers (Rezatofighi et al. 2019, arXiv:1902.09630)."""
    ious = iou_matrix(a, b)
    first, second = np.asarray(a, float).reshape(-1, 1, 4), np.asarray(b, float).reshape(1, -1, 4)
    areas = (first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1)
    enclosing = (np.maximum(first[..., 2:], second[..., 2:]) - np.minimum(first[..., :2], second[..., :2])).prod(-1)
    return ious - 1 + areas / (1 + ious) / enclosing  # the union is (sum of both areas) / (1 + IoU)


def _graded(ious: np.ndarray, gious: np.ndarray) -> np.ndarray:
    """Return the quality of every pair, 0..1: it grows as boxes come nearer, and any overlap is better than none."""
    return np.where(ious > 0, _APART + (1 - _APART) * ious, _APART * (1 + np.minimum(gious, 0)))


def _classification(parsed: Parsed, truth: Mapping[str, Any]) -> dict[str, float]:
    correct = {k: float(v) for k, v in classification.score(parsed, truth)["correct"].items()}
    first, *others = correct.values()
    return {**correct, "class": first, "conditions": sum(others) / len(others) if others else 1.0}


def _gui_steps(parsed: Parsed, truth: Mapping[str, Any]) -> dict[str, float]:
    scores = gui_steps.score(parsed, truth)
    arguments, inside = scores["arguments"], scores["inside"]
    return {
        "action": float(scores["action"]),
        "argument": 1.0 if arguments is None else arguments,
        "grounding": 1.0 if inside else _nearness(parsed, truth["box"], truth["point"]),
    }


def _nearness(parsed: Parsed, box: Box | None, point: Sequence[float] | None) -> float:
    """Score an answer that does not point into its target: under 0.5, and less with the distance. Return 1.0 if there
    is no target and the answer points at nothing."""
    near = gui_steps.NEAR_PX
    region = parsed.values.get("box") or parsed.values.get("point")
    if box is None and point is None:
        return float(region is None)
    if region is None:
        return 0.0
    target = box or (point[0] - near, point[1] - near, point[0] + near, point[1] + near)  # type: ignore[index]
    distance = math.dist(_centre(region), _centre(target))
    return max(0.0, 0.5 * (1 - distance / (_DIAGONALS * math.dist(target[:2], target[2:]))))


def _centre(region: Sequence[float]) -> tuple[float, float]:
    return (region[0] + region[-2]) / 2, (region[1] + region[-1]) / 2


def _chat(parsed: Parsed, truth: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in chat.score(parsed, truth).items()}


def score_answers(
    rewards: Rewards,
    records: Sequence[Record],
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    prompts: Sequence[Any],
    builder: SampleBuilder,
) -> list[dict[str, float | None]]:
    """Return every part of the reward of each answer (text and token ids) to its record. Raise `DataError` as
    `score_completions` does."""
    distinct = {id(record): record for record in records}  # `records` has each record once for each answer
    truth = {
        key: {} if isinstance(record, PromptRecord) else builder.truth(record)  # type: ignore[arg-type]
        for key, record in distinct.items()
    }
    parsed = [parse_answer(text, r, builder) for text, r in zip(texts, records, strict=True)]
    truths = [truth[id(record)] for record in records]
    columns: dict[str, list[Any]] = {}
    if isinstance(records[0], PromptRecord):
        names = {name for r in records for name in r.columns}  # type: ignore[union-attr]
        columns = {name: [r.columns.get(name) for r in records] for name in sorted(names)}  # type: ignore[union-attr]
    else:
        columns["context"] = [r.context for r in records]  # type: ignore[union-attr]
    return score_completions(rewards, texts, parsed, truths, columns, [r.id for r in records], prompts, ids)


def job_rewards(task: str, method: GrpoMethod, source: Source | None, labels: Sequence[str] = ()) -> Rewards:
    """Return the rewards that score the answers of a GRPO job. Raise `ConfigError` for those that cannot.

    `source`: the training rows; rows of the formats `prompt` and `rec` have no truth.
    """
    has_truth = source is None or source.format not in PROMPT_FORMATS
    return load_rewards(task, method.rewards, method.box_quality, has_truth, labels)
