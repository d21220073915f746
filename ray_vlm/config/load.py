"""Read a job: defaults < YAML file < `key=value` overrides. All problems are collected and reported together.

`load_job("jobs/demo_sft.yaml", ["train.learning_rate=2e-4"])` returns a frozen `JobConfig` or raises `ConfigError`.
"""

import copy
import difflib
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ray_vlm.config.check import check_job
from ray_vlm.config.paths import resolve_paths
from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import ConfigError
from ray_vlm.runs.keys import describe_no_section, split_setting

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_MAX_DEPTH = 32  # levels of a file; the schema has four, and `method.trl` may have more
_MAX_VALUES = 20_000  # values of a file with its aliases expanded: a few lines can expand to billions
_SHARES = (("data", "eval"), ("data", "test"))  # settings that may be a number
SourceLocations = dict[tuple[str | int, ...], str]  # dotted path -> "jobs/x.yaml:12" or "override 'a=b'"


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that reads `1e-4` as a number and reports the line of a value that cannot be built."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError, AttributeError, OverflowError, TypeError) as error:
            raise yaml.constructor.ConstructorError(None, None, f"bad value: {error}", node.start_mark) from None


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Load the job in `path`, apply `overrides`, and check every rule of `check.py`. Raises `ConfigError`.

    Files that the job names are looked for in the current folder, then in that of the job file.
    """
    text = read_text(Path(path))
    values, locations, problems = parse_yaml(text, str(path))
    for override in overrides:
        problems += _apply_override(values, locations, override)
    job, errors = _validate(values)
    problems += [_explain(e, locations, str(path)) for e in errors]
    if job is not None:
        unread = {".".join(str(part) for part in e["loc"] if isinstance(part, str)) for e in errors}
        broken = check_job(job, unread)
        problems += [
            f"{_describe_location(locations, tuple(key.split('.')), str(path))}: {text}" for key, text in broken
        ]
    if job is None or problems:
        raise ConfigError(problems)
    return resolve_paths(job, path)


def _validate(values: dict) -> tuple[JobConfig | None, list[ErrorDetails]]:
    """Validate the values; return the job and pydantic's errors.

    After errors the values are validated again without the bad ones, so that the rules across sections can be checked
    too and all problems are reported together. The job is None if that fails as well.
    """
    try:
        return JobConfig.model_validate(values), []
    except ValidationError as error:
        errors = error.errors()
    pruned = copy.deepcopy(values)
    for e in errors:
        _prune(pruned, e["loc"])
    try:
        return JobConfig.model_validate(pruned), errors
    except ValidationError:
        return None, errors


def _prune(values: dict, path: tuple) -> None:
    """Remove the value at `path`, or the deepest mapping entry on the way to it."""
    inner, parent, key = values, values, path[0] if path else None
    for part in path:
        if not isinstance(inner, dict) or part not in inner:
            break
        parent, key, inner = inner, part, inner[part]
    parent.pop(key, None)


def dump_job(job: JobConfig) -> dict[str, Any]:
    """Return the job as plain data with every default; `load_resolved` reads it back."""
    return job.model_dump(mode="json")


def load_resolved(values: dict[str, Any]) -> JobConfig:
    """Build a `JobConfig` from the values of `dump_job`. Raises `ConfigError` if they were altered."""
    try:
        return JobConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_explain(e, {}, "the resolved job") for e in error.errors()]) from None


def fill_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of `dump_job`, possibly of an earlier version, with defaults for settings that it lacked."""
    try:
        return dump_job(load_resolved(values))
    except ConfigError:
        return values


def read_text(path: Path) -> str:
    """Read a job file's text. Raises `ConfigError` if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(str(p) for p in Path(path.parent).glob("*.yaml"))[:8]
        hint = f" Job files in that folder: {', '.join(near)}." if near else ""
        raise ConfigError(f"{path}: no such job file.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}).") from None


def parse_yaml(
    text: str, name: str, what: str = "a job is a mapping of sections"
) -> tuple[dict, SourceLocations, list[str]]:
    """Return the values of a file with one mapping, their locations, and the keys set twice. Raises `ConfigError`."""
    locations: SourceLocations = {}
    problems: list[str] = []
    try:
        values, entries = _construct(text)
    except (yaml.YAMLError, RecursionError, OverflowError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "problem", None) or error
        raise ConfigError(f"{where}: not valid YAML ({str(reason)[:200]}). Correct that line.") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: {what}, this is a {type(values).__name__}.")
    for path, line in entries:
        if path in locations and isinstance(path[-1], str):
            problems.append(f"{name}:{line}: `{'.'.join(map(str, path))}` is set twice; keep one.")
        locations[path] = f"{name}:{line}"
    return values, locations, problems


def _construct(text: str) -> tuple[Any, list[tuple[tuple[str | int, ...], int]]]:
    """Return the value of a YAML text, and the path and line of every entry. Raises as YAML does, also if the text
    expands to more values or levels than a job may have."""
    loader = _Loader(text)
    node = loader.get_single_node()
    entries = []
    for path, line in _entries(node, ()):
        entries.append((path, line))
        if len(entries) > _MAX_VALUES or len(path) > _MAX_DEPTH:  # an alias may be endless
            excess = (
                "nested too deeply" if len(path) > _MAX_DEPTH else f"more than {_MAX_VALUES} values, aliases included"
            )
            raise yaml.constructor.ConstructorError(None, None, excess, node.start_mark if node else None)
    return loader.construct_document(node) if node else None, entries


def _entries(node: yaml.Node | None, path: tuple) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """Yield the path and line of every entry below a node, following aliases."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inside = isinstance(key, yaml.ScalarNode)
            here = (*path, str(key.value) if inside else "?")
            yield here, key.start_mark.line + 1
            if not inside:
                yield from _entries(key, here)
            yield from _entries(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield (*path, i), value.start_mark.line + 1
            yield from _entries(value, (*path, i))


def _apply_override(values: dict, locations: SourceLocations, override: str) -> list[str]:
    if (setting := split_setting(override)) is None:
        return [f"override {_short(override)}: write it as section.key=value, such as train.learning_rate=2e-4."]
    parts, text = setting
    try:
        value, _ = _construct(text)
    except (yaml.YAMLError, RecursionError, OverflowError, ValueError):
        return [f"override {_short(override)}: the value is not valid YAML; quote it."]
    for depth, part in enumerate(parts[:-1]):
        inner: Any = values.get(part)
        if isinstance(inner, str) and part in ("method", "task"):
            inner = {"name": inner}
        elif parts[: depth + 1] in _SHARES and isinstance(inner, int | float) and not isinstance(inner, bool):
            inner = {"ratio": inner}  # `data.test: 0.1` is its short form
        elif inner is not None and not isinstance(inner, dict):
            return [f"override {_short(override)}: {describe_no_section(parts, depth + 1, inner)}"]
        values[part] = dict(inner or {})
        values = values[part]
    if parts in (("method",), ("task",)) and isinstance(values.get(parts[0]), dict):
        value = {**values[parts[0]], "name": value} if isinstance(value, str) else value
    values[parts[-1]] = value
    for path in [path for path in locations if path[: len(parts)] == parts]:
        del locations[path]  # the override replaces the file's values there
    for depth in range(1, len(parts) + 1):
        locations.setdefault(parts[:depth], f"override {_short(override)}")
    return []


def _short(value: object) -> str:
    return _REPR.repr(value)


def _describe_location(locations: SourceLocations, path: tuple, name: str) -> str:
    path = tuple(part if isinstance(part, int) else str(part) for part in path)
    for end in range(len(path), 0, -1):
        if path[:end] in locations:
            return f"{locations[path[:end]]}: `{'.'.join(map(str, path))}`"
    return f"{name}: `{'.'.join(map(str, path))}`" if path else name


def _explain(error: ErrorDetails, locations: SourceLocations, name: str) -> str:
    """Format one pydantic error as location, value, reason and fix."""
    path = tuple(error["loc"])
    where, value, kind = _describe_location(locations, path, name), error.get("input"), error["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(path[-1]), _keys_at(path[:-1]), n=1, cutoff=0.5)
        fix = f" Did you mean `{near[0]}`?" if near else f" Known here: {', '.join(_keys_at(path[:-1]))}."
        return f"{where} is not a setting.{fix}"
    if kind == "missing":
        return f"{where} is missing. {_describe(path)}"
    message = str(error["msg"]).removeprefix("Input should be ").removeprefix("Value error, ").rstrip(".")
    if kind == "invalid_key":
        return f"{where} is not a setting: keys are text."
    return f"{where} is {_short(value)}, but should be {message}. {_describe(path)}"


def _model_at(path: tuple) -> type[BaseModel] | None:
    model: Any = JobConfig
    for part in path:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return None
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return model


def _keys_at(path: tuple) -> list[str]:
    model = _model_at(path)
    return list(model.model_fields) if model else []


def _describe(path: tuple) -> str:
    names = tuple(p for p in path if isinstance(p, str))
    model = _model_at(names[:-1]) if names else None
    field = model.model_fields.get(names[-1]) if model and names else None
    return f"({field.description})" if field and field.description else ""
