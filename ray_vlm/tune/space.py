"""A search space: a YAML file of dotted keys, each with a distribution, a grid, a formula, or a fixed value.

    train.learning_rate: {loguniform: [2.0e-5, 1.0e-3]}
    lora.rank: {choice: [8, 16, 32]}
    lora.alpha: 2 * lora.rank              # derived
    data.shuffle: {value: full}            # the same in every trial

Distributions are Ray Tune's, by its names: `uniform`, `quniform` (third number: the step), `loguniform`, `qloguniform`,
`randint` (upper bound excluded), `qrandint`, `lograndint`, `choice`; `grid` tries every value of its list; `value` is
the same in every trial, for texts. A formula is arithmetic on settings: numbers, `+ - * / // % **`, brackets, settings
by their dotted keys, and `min`, `max`, `round`, `int`, `sqrt`. No text is ever evaluated as Python. Everything here is
plain data; `search.py` passes it to Ray.
"""

import ast
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simpleeval

from ray_vlm.config.load import dump_job, load_job, parse_yaml, read_text
from ray_vlm.errors import ConfigError
from ray_vlm.runs.keys import describe_no_section, split_key
from ray_vlm.runs.read import setting

NUMBERS = {"uniform": 2, "quniform": 3, "loguniform": 2, "qloguniform": 3, "randint": 2, "qrandint": 3, "lograndint": 2}
LISTS = ("choice", "grid")
FIXED, DERIVED = "value", "derived"
_OWN_SECTIONS = ("tune", "cluster", "run", "track")  # a trial must not change where and on what it runs
_BY_CLASS = tuple(("data", name) for name in ("oversample", "class_weights", "condition_weights"))
_LARGEST = 1e12  # result of a power: 9**9**9 would take for ever
_MOST_DIGITS = 15  # second argument of `round`: round(5, -999999999) would take for ever
_LONGEST = 200  # characters of a formula


@dataclass(frozen=True)
class Setting:
    """One key. `kind`: a distribution of `NUMBERS` or `LISTS`, `value` or `derived`; `args`: the distribution's numbers
    or values, the fixed value, or the formula."""

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
        """Settings with a distribution or a grid."""
        return tuple(s for s in self.settings if s.kind not in (FIXED, DERIVED))

    @property
    def grid_size(self) -> int:
        """Number of trials that try every combination of the grids once."""
        return math.prod(len(s.args) for s in self.settings if s.kind == "grid")


def load_space(path: str | Path, job_path: str | Path, overrides: Sequence[str]) -> Space:
    """Read the space in a YAML file for a job. Raise `ConfigError` with every problem of the file itself and every
    setting that the job's schema or rules refuse, all at once."""
    space, problems, unreadable = _read_space(path)
    try:
        job = dump_job(load_job(job_path, overrides))
        problems += _find_refused(_without(space, unreadable, job), job_path, overrides, job)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return space


def _read_space(path: str | Path) -> tuple[Space, list[str], list[str]]:
    """Return the settings that can be read, the problems, and the keys of the settings that cannot be read."""
    values, lines, problems = parse_yaml(read_text(Path(path)), str(path), "a space is a mapping of keys")
    settings, unreadable = [], []
    for key, value in values.items():
        try:
            settings.append(_read(str(key), value))
        except ValueError as error:
            problems.append(f"{lines.get((str(key),), str(path))}: `{key}`: {error}")
            unreadable.append(str(key))
    space = Space(tuple(settings), str(path))
    if not problems and not space.searched:
        problems.append(
            f"{path}: nothing to search. Give a key a distribution, such as lora.rank: {{choice: [8, 16]}}."
        )
    return space, problems, unreadable


def _without(space: Space, unreadable: Sequence[str], job: Mapping[str, Any]) -> Space:
    """Return the space with the job's own values for settings that cannot be read and for formulas that use them, so
    that their keys are checked too."""
    unknown = set(unreadable)
    derived = {s.key: set(read_formula(s.args[0])) for s in space.settings if s.kind == DERIVED}
    while dependent := {key for key, names in derived.items() if names & unknown} - unknown:
        unknown |= dependent
    settings = [s for s in space.settings if s.key not in unknown]
    keys = [key for key in sorted(unknown) if _can_be_set(key, job)]
    return Space((*settings, *(Setting(key, FIXED, (value_of(job, key),)) for key in keys)), space.path)


def _can_be_set(key: str, job: Mapping[str, Any]) -> bool:
    """Return whether the job has the section around a key, or no such section exists, which its schema then tells."""
    parts = split_key(key)
    if parts is None or parts[0] in _OWN_SECTIONS:
        return False
    section: Any = job
    for part in parts[:-1]:
        section = section.get(part) if isinstance(section, Mapping) else None
    return isinstance(section, Mapping) or parts[0] not in job or parts[:2] in _BY_CLASS


def _read(key: str, value: object) -> Setting:
    """Parse one entry of the file. Raise `ValueError` with the reason."""
    parts = split_key(key)
    if parts is None:
        raise ValueError("a key is written section.key, with quotes around a name that holds a dot")
    if parts[0] in _OWN_SECTIONS:
        raise ValueError(
            f"`{parts[0]}` says where and on what a trial runs, so it is the same for all. Set it in the job"
        )
    _check_plain(value)
    if isinstance(value, str):
        read_formula(value)
        return Setting(key, DERIVED, (value,))
    if not isinstance(value, dict):
        return Setting(key, FIXED, (value,))
    if len(value) != 1 or (kind := next(iter(value))) not in (*NUMBERS, *LISTS, FIXED):
        known = ", ".join((*NUMBERS, *LISTS, FIXED))
        raise ValueError(f"{json.dumps(value)} is no distribution; give one of {known}")
    args = value[kind]
    if kind == FIXED:
        return Setting(key, kind, (args,))
    if not isinstance(args, list) or not args:
        raise ValueError(f"{kind} needs a list of values, not {args!r}")
    if kind in LISTS:
        if len({json.dumps(v, sort_keys=True) for v in args}) < len(args):
            raise ValueError(f"{kind} {args} lists a value twice")
        return Setting(key, kind, tuple(args))
    _check_numbers(kind, args)
    return Setting(key, kind, tuple(args))


def _check_plain(value: object) -> None:
    """Raise `ValueError` for a value that JSON cannot hold: YAML also has dates, bytes, sets and keys that are no
    text."""
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"the key {odd[0]!r} is not a text. Put quotes around it")
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            _check_plain(entry)
    elif not (value is None or isinstance(value, str | int | float)):
        raise ValueError(f"{value!r} is a {type(value).__name__}. Use text (in quotes), numbers, true, false or null")


def _check_numbers(kind: str, args: Sequence[Any]) -> None:
    """Raise `ValueError` for numbers with which Ray would fail in the middle of a sweep, or draw nonsense."""
    if len(args) != NUMBERS[kind] or any(isinstance(v, bool) or not isinstance(v, int | float) for v in args):
        raise ValueError(f"{kind} needs {NUMBERS[kind]} numbers, not {args}")
    if not all(is_finite(v) for v in args):
        raise ValueError(f"{kind} {args} is without end: give finite numbers")
    low, high = args[:2]
    if "int" in kind and not all(isinstance(v, int) for v in args):
        raise ValueError(f"{kind} needs whole numbers, not {args}")
    if low >= high:
        raise ValueError(f"{kind} {args} is empty: its lower end is not below the upper one")
    if "log" in kind and low <= 0:
        raise ValueError(f"{kind} {args}: there is no logarithm of {low}. Use a lower end above 0")
    if len(args) == 3 and not 0 < args[2] <= high - low:
        raise ValueError(f"{kind} {args}: the step {args[2]} does not fit between the ends")


def resolve(space: Space, drawn: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trial's value of every key of the space: `drawn` by the search, fixed, or computed.

    `job`: the job as plain data, for settings that formulas name and the space does not have. Raise `ValueError` with
    the key and the reason.
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


def _whole(value: object) -> object:
    """Turn 2.0 into 2: `lora.alpha` takes integers only, and formulas and `quniform` give floats."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def value_of(job: Mapping[str, Any], key: str) -> Any:
    """Return a resolved job's value of a key. The weight of a class that the job does not name is 1."""
    value, parts = setting(job, key), split_key(key) or ()
    return 1.0 if value is None and len(parts) == 3 and parts[:2] in _BY_CLASS else value


def own_values(space: Space, job: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the job's own values of the searched settings, or None where one of them lies outside the space."""
    values = {s.key: value_of(job, s.key) for s in space.searched}
    return values if all(holds(s, values[s.key]) for s in space.searched) else None


def holds(setting: Setting, value: object) -> bool:
    """Return whether the value lies within the setting's distribution."""
    if setting.kind in LISTS:
        return value in setting.args
    low, high = _ends(setting)
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def write_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return a trial's values as overrides for `load_job`."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def examples(space: Space) -> Iterator[dict[str, Any]]:
    """Yield draws that cover both ends or every value of each setting, with the others at their first value."""
    ends = {s.key: list(s.args) if s.kind in LISTS else _ends(s) for s in space.searched}
    first = {key: values[0] for key, values in ends.items()}
    yield first
    for key, values in ends.items():
        for value in values[1:]:
            yield first | {key: value}


def _ends(setting: Setting) -> list[Any]:
    low, high = setting.args[:2]
    return [low, high - 1 if setting.kind in ("randint", "lograndint") else high]


def _find_refused(space: Space, job_path: str | Path, overrides: Sequence[str], job: Mapping[str, Any]) -> list[str]:
    """Return the problems of every setting of the space that the job's schema or rules refuse. `job`: the resolved job
    without the space."""
    no_section = dict(_without_section(space, job))
    problems = list(no_section.values())
    space = Space(tuple(s for s in space.settings if s.key not in no_section), space.path)
    for drawn in examples(space):
        try:
            values = resolve(space, drawn, job)
        except ValueError as error:
            problems.append(f"{space.path}: {error}")
            values = drawn
        try:
            load_job(job_path, [*overrides, *write_overrides(values)])
        except ConfigError as error:
            problems += [f"{space.path}: {problem}" for problem in error.problems]
    return list(dict.fromkeys(problems))


def _without_section(space: Space, job: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, problem) of each key inside a setting that is a single value in the job: `data.oversample: auto`, or
    a share as `data.test: 0.1`."""
    for key in (s.key for s in space.settings):
        parts, value = split_key(key) or (), job
        for depth, part in enumerate(parts[:-1]):
            section = value.get(part)
            if section is not None and not isinstance(section, Mapping):
                problem = describe_no_section(parts, depth + 1, section)
                yield key, f"{space.path}: `{key}`: {problem} in the job, or search all of it: {{choice: [...]}}"
            if not isinstance(section, Mapping):
                break
            value = section


def read_formula(text: str) -> tuple[str, ...]:
    """Return the settings that a formula names, in order. Raise `ValueError` with what cannot be read."""
    names: dict[str, float] = {}
    _evaluate(text, lambda name: names.setdefault(name, 1.0))
    return tuple(names)


def compute(text: str, values: Mapping[str, Any]) -> int | float:
    """Compute a formula; `values` has the settings that it names. Raise `ValueError` with the reason."""
    for name in read_formula(text):
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} is {value!r}, and a formula needs a number")
    result = _evaluate(text, values.__getitem__)
    if not is_finite(result):
        raise ValueError(f"{text!r} is {'too large' if isinstance(result, int) else result}")
    return result


def _evaluate(text: str, look_up: Callable[[str], float]) -> int | float:
    """Evaluate a formula by simpleeval, of which only arithmetic is left. `look_up` returns the value of a setting."""
    if len(text) > _LONGEST:
        raise ValueError(f"a formula of {len(text)} characters; the longest has {_LONGEST}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is no formula; write arithmetic on settings, such as 2 * lora.rank") from None

    def read_number(node: ast.Constant) -> Any:
        if type(node.value) not in (int, float):
            raise simpleeval.FeatureNotAvailable
        return node.value

    def read_setting(node: ast.Name | ast.Attribute) -> float:
        name = ast.unparse(node)
        if not all(part.isidentifier() for part in name.split(".")):
            raise simpleeval.FeatureNotAvailable
        return look_up(name)

    evaluator = simpleeval.SimpleEval(_OPERATORS, _CALLS)
    evaluator.nodes = {kind: evaluator.nodes[kind] for kind in (ast.UnaryOp, ast.BinOp, ast.Call)}
    evaluator.nodes |= {ast.Constant: read_number, ast.Name: read_setting, ast.Attribute: read_setting}
    try:
        return evaluator.eval(text, tree)
    except simpleeval.InvalidExpression:
        raise ValueError(f"{text!r} is not arithmetic; use + - * / // % **, {', '.join(_CALLS)}") from None
    except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{text!r}: {error}") from None


def _power(base: float, exponent: float) -> float:
    if abs(base) > 1 and exponent * math.log10(abs(base)) > math.log10(_LARGEST):
        raise OverflowError("too large")
    result = base**exponent
    if isinstance(result, complex):
        raise ValueError("the root of a negative number")
    return result


def _round(value: float, digits: int | None = None) -> float:
    if digits is not None and abs(digits) > _MOST_DIGITS:
        raise OverflowError(f"digits are -{_MOST_DIGITS} to {_MOST_DIGITS}")
    return round(value, digits)


_OPERATORS = {
    kind: simpleeval.DEFAULT_OPERATORS[kind]
    for kind in (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.UAdd, ast.USub)
} | {ast.Pow: _power}
_CALLS = {"min": min, "max": max, "round": _round, "int": int, "sqrt": math.sqrt}


def is_finite(value: int | float) -> bool:
    """Return whether a number is finite; an integer that no float can hold is not."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
