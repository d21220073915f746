"""Comparison of runs: settings that differ, and metrics side by side with the best marked. Pure functions."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_vlm.runs.monitor import LOWER_IS_BETTER, NOT_MEASURES
from ray_vlm.runs.plot import main_key, points_of, smooth
from ray_vlm.runs.read import Run, is_number, setting
from ray_vlm.runs.text import format_duration, format_number, format_table, plain_text
from ray_vlm.storage import split_options

_PREFERRED = ("best", "final")  # the evaluation that represents a run: the first of these that exists
SETTINGS, _VALIDATION = "settings that differ", "validation at the step of best/"
_LONGEST_NAME = 80  # characters of titles in a file's name
_MOST_COLUMNS = 5  # runs in columns of a terminal; more runs are shown in rows


@dataclass(frozen=True)
class Line:
    """One setting or number of all runs, None if a run lacks it; `best`: positions of the best values."""

    title: str
    values: tuple[Any, ...]
    best: tuple[int, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Titles of the runs, notes on their comparability, and lines by section."""

    titles: tuple[str, ...]
    notes: tuple[str, ...]
    sections: Mapping[str, tuple[Line, ...]]


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Return everything that `runs compare` shows, in the order of `runs`."""
    titles, chosen = run_titles(runs), [test_of(run) for run in runs]
    same_task = len({setting(run.job, "task.name") for run in runs}) == 1
    validated = {tuple(setting(run.job, f"data.eval.{key}") for key in ("path", "ratio")) for run in runs}
    same_method = len({setting(run.job, "method.name") for run in runs}) == 1
    tests = {(metrics["test"], metrics.get("num_rows")) for _, metrics in chosen if metrics}
    sections = {
        SETTINGS: differing_settings(runs),
        "on data.test": _measures([metrics.get("overall", {}) for _, metrics in chosen], same_task and len(tests) == 1),
        _VALIDATION: _measures([run.best or {} for run in runs], same_task and same_method and len(validated) == 1),
        "training": _training(runs),
    }
    return Comparison(titles, _notes(runs, titles, chosen, same_task, tests), {k: v for k, v in sections.items() if v})


def run_titles(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return each run's name with the shortest part of its path that makes the titles unique."""
    parts = [_path_of(run) for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        titles = ["/".join(part[-count:]) for part in parts]
        if len(set(titles)) == len(titles):
            return tuple(titles)
    return tuple(f"{title} ({i + 1})" for i, title in enumerate(titles))


def _path_of(run: Run) -> list[str]:
    """Return the parts of the run's address; for a training log alone, of its folder, followed by the run's name."""
    parts = split_options(run.folder)[0].rstrip("/").split("/")
    return [*parts, run.log] if run.log and parts[-1] != run.log else parts


def join_titles(runs: Sequence[Run]) -> str:
    """Return a file name made of the runs' titles, different for other runs."""
    titles = dict.fromkeys(run_titles(runs) if len(runs) > 1 else [runs[0].name])
    stem = "-vs-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", title).strip("-") or "run" for title in titles)
    if len(stem) <= _LONGEST_NAME:
        return stem
    digest = hashlib.sha256("\0".join(titles).encode()).hexdigest()[:8]
    return f"{stem[:_LONGEST_NAME]}-and-others-{digest}"


def test_of(run: Run) -> tuple[str, dict[str, Any]]:
    """Return the name and `metrics.json` of the evaluation that represents the run; ("", {}) without one."""
    names = [name for name in _PREFERRED if name in run.evaluations] or sorted(run.evaluations)
    if not names:
        return "", {}
    return names[0], {"test": None} | run.evaluations[names[0]]


def flatten(job: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a resolved job with dotted keys; lists stay lists."""
    flat: dict[str, Any] = {}
    for key, value in job.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing_settings(runs: Sequence[Run]) -> tuple[Line, ...]:
    """Return the settings that differ between the runs, except those of the section `run`."""
    jobs = [flatten(run.job) for run in runs]
    unset = {key for job in jobs for key, value in job.items() if value is None}
    jobs = [_fold(job, unset) for job in jobs]
    keys = dict.fromkeys(key for job in jobs for key in job if not key.startswith("run."))
    absent = object()
    lines = []
    for key in keys:
        values = [job.get(key, absent) for job in jobs]
        if len({json.dumps(v, sort_keys=True) if v is not absent else "" for v in values}) > 1:
            lines.append(Line(key, tuple(None if v is absent else _tell_setting(v) for v in values)))
    return tuple(lines)


def _fold(job: Mapping[str, Any], unset: set[str]) -> dict[str, Any]:
    """Return the job with each section in `unset` (null in some run) as one setting: its path, or `given`."""
    folded: dict[str, Any] = {}
    for key, value in job.items():
        parents = [key[:i] for i, letter in enumerate(key) if letter == "."]
        section = next((parent for parent in parents if parent in unset), None)
        if section is None:
            folded[key] = value
        else:
            folded.setdefault(section, job.get(f"{section}.path") or "given")
    return folded


def _tell_setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _measures(scores: Sequence[Mapping[str, Any]], may_mark: bool) -> tuple[Line, ...]:
    names = dict.fromkeys(name for numbers in scores for name in numbers if name not in NOT_MEASURES)
    lines = []
    for name in names:
        values = tuple(numbers[name] if is_number(numbers.get(name)) else None for numbers in scores)
        if any(value is not None for value in values):
            lines.append(Line(name, values, best_of(name, values) if may_mark else ()))
    return tuple(lines)


def best_of(name: str, values: Sequence[float | None]) -> tuple[int, ...]:
    """Return the positions of the best value, several for equal ones; none if all values are equal."""
    known = [value for value in values if value is not None]
    if len(set(known)) < 2:
        return ()
    best = min(known) if name.endswith(LOWER_IS_BETTER) else max(known)
    return tuple(i for i, value in enumerate(values) if value == best)


def _training(runs: Sequence[Run]) -> tuple[Line, ...]:
    def last(run: Run) -> float | None:
        points = smooth(points_of(run.current, "train", main_key(run.current)))
        return points[-1][1] if points else None

    def speed(run: Run) -> float | None:
        speeds = [value for _, value in points_of(run.current, "train", "tokens_per_s")]
        return sorted(speeds)[len(speeds) // 2] if speeds else None

    same = len({main_key(run.current) for run in runs}) == 1
    ends = tuple(last(run) for run in runs)
    return (
        Line("status", tuple(run.status for run in runs)),
        Line("steps", tuple(str(run.step) for run in runs)),
        Line(f"{main_key(runs[0].current) if same else 'loss or reward'}, smoothed, at the end", ends),
        Line("tokens/s, median", tuple(speed(run) for run in runs)),
        Line("time", tuple(format_duration(run.wall_s) for run in runs)),
        Line("attempts", tuple(str(run.num_attempts) for run in runs)),
    )


def _notes(
    runs: Sequence[Run],
    titles: Sequence[str],
    chosen: Sequence[tuple[str, dict[str, Any]]],
    same_task: bool,
    tests: set[tuple[object, object]],
) -> tuple[str, ...]:
    """Return notes on what makes numbers incomparable and on files that could not be read."""
    notes = []
    if not same_task:
        tasks = ", ".join(sorted({str(setting(run.job, "task.name")) for run in runs}))
        notes.append(f"The runs are of different tasks ({tasks}): no number is marked as the best.")
    if len(tests) > 1:
        descriptions = "; ".join(
            f"{title}: {metrics['test']}, {metrics.get('num_rows')} rows"
            for title, (_, metrics) in zip(titles, chosen, strict=True)
            if metrics
        )
        notes.append(f"Test rows differ, so their numbers are not comparable ({descriptions}).")
    for title, run, (name, metrics) in zip(titles, runs, chosen, strict=True):
        if metrics.get("rows_chose_best"):
            notes.append(f"{title} was tested on the validation rows, which also chose its best/ (data.test_on_eval).")
        if run.log:
            notes.append(
                f"{title}: {run.address} is a training log without its run's folder, so it has no numbers on data.test."
            )
        elif not name:
            weights = next((name for name in _PREFERRED if name in run.folders), "best")
            notes.append(
                f"{title} has no evaluation; `ray-vlm evaluate JOB --adapter {run.address}/{weights}` makes one."
            )
        elif name != "best":
            notes.append(f"{title}: its numbers on data.test are those of evaluate/{name}.")
        notes += [f"{title}: {fault}." for fault in run.faults]
    return tuple(notes)


def describe_comparison(comparison: Comparison) -> str:
    """Return the comparison as text for a terminal; the best value of a line has a star."""
    blocks = []
    for heading, lines in comparison.sections.items():
        table = [[heading, *comparison.titles], *(_cells(line) for line in lines)]
        if len(comparison.titles) > _MOST_COLUMNS:
            table = [list(column) for column in zip(*table, strict=True)]
        blocks.append(format_table(table))
    notes = [f"note: {plain_text(note)}" for note in comparison.notes]
    return "\n\n".join(blocks + (["\n".join(notes)] if notes else []))


def _cells(line: Line) -> list[str]:
    texts = [v if isinstance(v, str) else format_number(v) for v in line.values]
    return [line.title, *(f"{text}{'*' if i in line.best else ''}" for i, text in enumerate(texts))]
