"""A search space: a YAML file of dotted keys, each with a distribution, a list to go through, or a formula.

    train.learning_rate: {loguniform: [2.0e-5, 1.0e-3]}
    lora.rank: {choice: [8, 16, 32]}
    lora.alpha: 2 * lora.rank              # derived
    data.shuffle: true                     # the same in every trial

Distributions are Ray Tune's, by its names: `uniform`, `quniform` (third number: the step), `loguniform`, `qloguniform`,
`randint` (upper bound excluded), `qrandint`, `lograndint`, `choice`; `grid` tries every value of its list; `value` is
the same in every trial, for texts. Everything here is plain data; `search.py` hands it to Ray.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_vlm.config.load import dump_job, load_job, parse_yaml, read_text
from ray_vlm.errors import ConfigError
from ray_vlm.runs.keys import describe_no_section, split_key
from ray_vlm.runs.read import setting
from ray_vlm.tune.formula import compute, is_finite, read_formula

NUMBERS = {"uniform": 2, "quniform": 3, "loguniform": 2, "qloguniform": 3, "randint": 2, "qrandint": 3, "lograndint": 2}
LISTS = ("choice", "grid")
FIXED, DERIVED = "value", "derived"
_OWN_SECTIONS = ("tune", "cluster", "run", "track")  # a trial must not change where and on what it runs
_BY_CLASS = tuple(("data", name) for name in ("oversample", "class_weights", "condition_weights"))


@dataclass(frozen=True)
class Setting:
    """One key. `kind`: a distribution of `NUMBERS` or `LISTS`, `value` or `derived`; `args`: its numbers, its values,
    the one value, or the formula."""

    key: str
    kind: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Space:
    """Settings in the order of the file."""

    settings: tuple[Setting, ...]
    path: str = ""

    @property
    def searched(self) -> tuple[Setting, ...]:
        """What is drawn or gone through."""
        return tuple(s for s in self.settings if s.kind not in (FIXED, DERIVED))

    @property
    def grid_size(self) -> int:
        """How many trials it takes to try every combination of the grids."""
        return math.prod(len(s.args) for s in self.settings if s.kind == "grid")


def load_space(path: str | Path) -> Space:
    """The space in a YAML file. Raises `ConfigError` with all that is wrong in it."""
    values, places, problems = parse_yaml(read_text(Path(path)), str(path), "a space is a mapping of keys")
    settings = []
    for key, told in values.items():
        try:
            settings.append(_read(str(key), told))
        except ValueError as error:
            problems.append(f"{places.get((str(key),), str(path))}: `{key}`: {error}")
    space = Space(tuple(settings), str(path))
    if not problems and not space.searched:
        problems.append(
            f"{path}: nothing to search. Give a key a distribution, such as lora.rank: {{choice: [8, 16]}}."
        )
    if problems:
        raise ConfigError(problems)
    return space


def _read(key: str, told: Any) -> Setting:
    parts = split_key(key)
    if parts is None:
        raise ValueError("a key is written section.key, with quotes around a name that holds a dot")
    if parts[0] in _OWN_SECTIONS:
        raise ValueError(
            f"`{parts[0]}` says where and on what a trial runs, and is the same for all. Set it in the job"
        )
    _check_plain(told)
    if isinstance(told, str):
        read_formula(told)
        return Setting(key, DERIVED, (told,))
    if not isinstance(told, dict):
        return Setting(key, FIXED, (told,))
    if len(told) != 1 or (kind := next(iter(told))) not in (*NUMBERS, *LISTS, FIXED):
        known = ", ".join((*NUMBERS, *LISTS, FIXED))
        raise ValueError(f"{json.dumps(told)} is no distribution; give one of {known}")
    given = told[kind]
    if kind == FIXED:
        return Setting(key, kind, (given,))
    if not isinstance(given, list) or not given:
        raise ValueError(f"{kind} needs a list of values, not {given!r}")
    if kind in LISTS:
        if len({json.dumps(v, sort_keys=True) for v in given}) < len(given):
            raise ValueError(f"{kind} {given} lists a value twice")
        return Setting(key, kind, tuple(given))
    _check_numbers(kind, given)
    return Setting(key, kind, tuple(given))


def _check_plain(value: Any) -> None:
    """Raises `ValueError` for what JSON cannot carry to a trial: YAML also has dates, bytes, sets and odd keys."""
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"the key {odd[0]!r} is not a text. Put quotes around it")
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            _check_plain(entry)
    elif not (value is None or isinstance(value, str | int | float)):
        raise ValueError(f"{value!r} is a {type(value).__name__}. Use text (in quotes), numbers, true, false or null")


def _check_numbers(kind: str, given: Sequence[Any]) -> None:
    """Raises `ValueError` where Ray would fail in the middle of a sweep, or draw nonsense."""
    if len(given) != NUMBERS[kind] or any(isinstance(v, bool) or not isinstance(v, int | float) for v in given):
        raise ValueError(f"{kind} needs {NUMBERS[kind]} numbers, not {given}")
    if not all(is_finite(v) for v in given):
        raise ValueError(f"{kind} {given} is without end")
    low, high = given[:2]
    if "int" in kind and not all(isinstance(v, int) for v in given):
        raise ValueError(f"{kind} needs whole numbers, not {given}")
    if low >= high:
        raise ValueError(f"{kind} {given} is empty: its lower end is not below the upper one")
    if "log" in kind and low <= 0:
        raise ValueError(f"{kind} {given}: there is no logarithm of {low}. Use a lower end above 0")
    if len(given) == 3 and not 0 < given[2] <= high - low:
        raise ValueError(f"{kind} {given}: the step {given[2]} does not fit between the ends")


def resolve(space: Space, drawn: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of the space with a trial's value: `drawn` by the search, the same for all, or computed.

    `job`: the job as plain data, for what formulas name beside the space. Raises `ValueError` that names the key.
    """
    values = {s.key: drawn[s.key] if s.kind not in (FIXED, DERIVED) else s.args[0] for s in space.settings}
    derived = {s.key: s.args[0] for s in space.settings if s.kind == DERIVED}
    known = {k: v for k, v in values.items() if k not in derived}
    while derived:
        ready = [key for key, text in derived.items() if not set(read_formula(text)) & set(derived)]
        if not ready:
            raise ValueError(f"{', '.join(derived)} are computed from one another")
        for key in ready:
            text = derived.pop(key)
            names = {name: known[name] if name in known else setting(job, name) for name in read_formula(text)}
            try:
                known[key] = compute(text, names)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
    return {s.key: _whole(known[s.key]) for s in space.settings}


def _whole(value: Any) -> Any:
    """2.0 for what may be a whole number is 2: `lora.alpha` of `2 * lora.rank` is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def value_of(job: Mapping[str, Any], key: str) -> Any:
    """What a resolved job has under the key of a space; rows and tokens of a class that it does not name count once."""
    value, parts = setting(job, key), split_key(key) or ()
    return 1.0 if value is None and len(parts) == 3 and parts[:2] in _BY_CLASS else value


def own_values(space: Space, job: Mapping[str, Any]) -> dict[str, Any] | None:
    """The job's own values of what is searched, or None where one of them lies outside the space."""
    values = {s.key: value_of(job, s.key) for s in space.searched}
    return values if all(_holds(s, values[s.key]) for s in space.searched) else None


def _holds(setting: Setting, value: Any) -> bool:
    if setting.kind in LISTS:
        return value in setting.args
    low, high = _ends(setting)
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def write_overrides(values: Mapping[str, Any]) -> list[str]:
    """A trial's values as `load_job` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def examples(space: Space) -> Iterator[dict[str, Any]]:
    """Draws that touch every end and every value of each setting, the others at their first."""
    ends = {s.key: list(s.args) if s.kind in LISTS else _ends(s) for s in space.searched}
    first = {key: values[0] for key, values in ends.items()}
    yield first
    for key, values in ends.items():
        for value in values[1:]:
            yield first | {key: value}


def _ends(setting: Setting) -> list[Any]:
    low, high = setting.args[:2]
    return [low, high - 1 if setting.kind in ("randint", "lograndint") else high]


def check_space(space: Space, job_path: str, overrides: Sequence[str]) -> None:
    """Raise `ConfigError` with every setting of the space that the job's schema or rules refuse."""
    job = dump_job(load_job(job_path, overrides))
    problems = list(_without_section(space, job))
    for drawn in examples(space) if not problems else ():
        try:
            values = resolve(space, drawn, job)
        except ValueError as error:
            problems.append(f"{space.path}: {error}")
            values = drawn
        try:
            load_job(job_path, [*overrides, *write_overrides(values)])
        except ConfigError as error:
            problems += [f"{space.path}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _without_section(space: Space, job: Mapping[str, Any]) -> Iterator[str]:
    """Keys inside what the job has as a single value: `data.oversample: auto`, or a share as `data.test: 0.1`."""
    for key in (s.key for s in space.settings):
        parts, value = split_key(key) or (), job
        for depth, part in enumerate(parts[:-1]):
            value = value.get(part)  # type: ignore[assignment]
            if value is None:
                break
            if not isinstance(value, Mapping):
                told = describe_no_section(parts, depth + 1, value)
                yield f"{space.path}: `{key}`: {told} in the job, or search all of it: {{choice: [...]}}"
                break
