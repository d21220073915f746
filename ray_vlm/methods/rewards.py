"""GRPO rewards: the weighted sum of the task's own scores and of users' functions.

Training rewards the scores that evaluation measures. `load_rewards` reads a job's rewards, `check_rewards` tries them
on made-up records before training, and `score_completions` scores a batch of completions, part by part.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Real
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.config.method import Method
from ray_vlm.config.paths import import_function
from ray_vlm.data.records import PromptRecord, Record
from ray_vlm.data.samples import SampleBuilder, parse_answer
from ray_vlm.errors import ConfigError, DataError
from ray_vlm.methods.reward_answers import FRAME, ORDER, TRUTH, Case, build_cases
from ray_vlm.methods.reward_parts import PARTS, score_parts
from ray_vlm.tasks import TASKS
from ray_vlm.tasks.answers import Parsed
from ray_vlm.tasks.classification import attributes_of

DEFAULT_WEIGHTS: dict[str, dict[str, float]] = {
    **{task: dict.fromkeys(parts, 1.0) for task, parts in PARTS.items()},
    "chat": {"anls": 1.0},
}
_SAME = 1e-9  # rewards that differ by less are equal


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
        reason = "compare with a truth, and rows of format prompt have none. Use module:function, or rows with a truth"
        problems.append(f"method.rewards: {', '.join(judged)} {reason}.")
    if not any(named.values()):
        problems.append("method.rewards: no part has a weight, so there is nothing to learn. Give one a weight.")
    if box_quality not in ("iou", "giou"):
        problems.append(f"method.box_quality: {box_quality!r} is not known. Use iou or giou.")
    if problems:
        raise ConfigError(problems)
    return Rewards(task, named, functions, box_quality, tuple(labels))


def _weight_problem(weight: Any, built_in: bool) -> str | None:
    if not _is_number(weight) or isinstance(weight, bool):
        return f"the weight {weight!r} is not a finite number. Use one such as 1.0."
    if weight < 0 and built_in:
        return f"the weight {weight} would reward wrong answers. Use 0 or more."
    return None


def _is_number(value: Any) -> bool:
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
    batch = _batch(texts, prompts, completion_ids, extra)
    own = {name: _ask_function(name, function, batch, ids) for name, function in rewards.functions.items()}
    weighted = [name for name, weight in rewards.weights.items() if weight]
    rows = []
    for i, row_id in enumerate(ids):
        parts = {**part_scores(rewards, parsed[i], truths[i]), **{name: values[i] for name, values in own.items()}}
        if all(parts[name] is None for name in weighted):
            reason = "returned None for it, and no other reward scores it. Return a number, or add a reward that does"
            raise DataError(f"row {row_id!r}: {', '.join(weighted)} {reason}.")
        rows.append({name: parts[name] for name in rewards.weights})
    return rows


def _batch(
    texts: Sequence[str], prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], extra: Mapping[str, list]
) -> dict[str, list]:
    """Return the arguments of a user's function."""
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    return {**extra, "prompts": list(prompts), "completions": completions, "completion_ids": list(completion_ids)}


def _ask_function(name: str, function: Callable, batch: Mapping[str, list], ids: Sequence[str]) -> list[float | None]:
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
    extra: dict[str, list] = {"truth": [case.truth for *_, case in tried], "parsed": parsed, "row_id": ids}
    try:
        values = _ask_function(name, function, _batch(texts, prompts, [list(t.encode()) for t in texts], extra), ids)
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


def job_rewards(task: str, method: Method, source: Source | None, labels: Sequence[str] = ()) -> Rewards:
    """Return the rewards that score the answers of a GRPO job. Raise `ConfigError` for those that cannot.

    `source`: the training rows; rows of format `prompt` have no truth.
    """
    has_truth = source is None or source.format != "prompt"
    return load_rewards(task, method.rewards, method.box_quality, has_truth, labels)
