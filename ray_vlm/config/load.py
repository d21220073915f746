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
from ray_vlm.config.section import has_alternatives, sections_of, without_variant
from ray_vlm.errors import ConfigError
from ray_vlm.runs.keys import describe_no_section, split_setting
from ray_vlm.runs.text import plural

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_MAX_DEPTH = 32  # levels of a file; the schema has four, and `method.trl` may have more
_MAX_VALUES = 20_000  # values of a file with its aliases expanded: a few lines can expand to billions
_SHARES = (("data", "eval"), ("data", "test"))  # settings that may be a number
_ORDER = ("data", "shuffle")  # may be a word
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
        unread = {".".join(part for part in without_variant(e["loc"]) if isinstance(part, str)) for e in errors}
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
        errors = _merge_alternatives(error.errors())
    pruned = copy.deepcopy(values)
    for e in errors:
        _prune(pruned, without_variant(e["loc"]))
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
        errors = _merge_alternatives(error.errors())
        raise ConfigError([_explain(e, {}, "the resolved job") for e in errors]) from None


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
        fix = (
            "Put quotes around a value that begins with `*`"
            if "undefined alias" in str(reason)
            else "Correct that line"
        )
        raise ConfigError(f"{where}: not valid YAML ({str(reason)[:200]}). {fix}.") from None
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
        # `*.jsonl` is a pattern here: there is nothing that an alias of YAML could stand for.
        value = text if text.startswith("*") else _construct(text)[0]
    except (yaml.YAMLError, RecursionError, OverflowError, ValueError):
        return [f"override {_short(override)}: the value is not valid YAML; quote it."]
    for depth, part in enumerate(parts[:-1]):
        inner: Any = values.get(part)
        if isinstance(inner, str) and part in ("method", "task"):
            inner = {"name": inner}
        elif parts[: depth + 1] in _SHARES and isinstance(inner, int | float) and not isinstance(inner, bool):
            inner = {"ratio": inner}  # `data.test: 0.1` is its short form
        elif parts[: depth + 1] == _ORDER and not isinstance(inner, dict):
            inner = None  # `data.shuffle.window=512` replaces `full`
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


def _merge_alternatives(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Return pydantic's errors with those of one setting that takes values of several types as one error: pydantic
    reports one for each type, and puts its name behind the setting's."""
    merged: list[ErrorDetails] = []
    by_setting: dict[tuple[int | str, ...], list[ErrorDetails]] = {}
    for error in errors:
        setting = _find_alternatives(error["loc"])
        if setting is None:
            merged.append(error)
        else:
            by_setting.setdefault(setting, []).append(error)
    for setting, group in by_setting.items():
        # Errors of values inside: their type fits, and its content does not.
        inside = [error for error in group if len(error["loc"]) > len(setting) + 1]
        merged += [{**error, "loc": (*setting, *error["loc"][len(setting) + 1 :])} for error in inside]
        # If one of the types fits, its limits are the reason; otherwise the description says what it may be.
        limits = [e for e in group if not e["type"].endswith("_type") and e["type"] != "literal_error"]
        if len(limits) == 1 and not inside:
            merged.append({**limits[0], "loc": setting})
        elif not inside:
            merged.append({**group[0], "loc": setting, "type": "no_alternative"})
    return merged


def _find_alternatives(location: tuple[int | str, ...]) -> tuple[int | str, ...] | None:
    """Return the part of a location that is a setting with values of several types, if something is behind it."""
    for end in range(1, len(location)):
        if isinstance(location[end - 1], str):
            fields = [s.model_fields.get(str(location[end - 1])) for s in _sections_at(location[: end - 1])]
            if any(field is not None and has_alternatives(field.annotation) for field in fields):
                return location[:end]
    return None


def _explain(error: ErrorDetails, locations: SourceLocations, name: str) -> str:
    """Format one pydantic error as location, value, reason and fix."""
    path, kind, value = error["loc"], error["type"], error["input"]
    if kind == "union_tag_invalid":
        where = _describe_location(locations, (*path, "name"), name)
        return f"{where} is {_short(value['name'])}, but should be one of {error['ctx']['expected_tags']}."
    where = _describe_location(locations, without_variant(path), name)
    if kind == "extra_forbidden":
        return f"{where}{_explain_key(path)}"
    if kind == "missing":
        return f"{where} is missing. {_describe(path)}"
    message = str(error["msg"]).removeprefix("Input should be ").removeprefix("Value error, ").rstrip(".")
    if kind == "no_alternative":
        return f"{where} is {_short(value)}, which is not a valid value. {_describe(path)}"
    if kind in ("too_short", "too_long"):
        end, bound = ("least", "min_length") if kind == "too_short" else ("most", "max_length")
        values = plural(error["ctx"][bound], "value")
        return f"{where} is {_short(value)}, but should have at {end} {values}. {_describe(path)}"
    if kind == "invalid_key":
        return f"{where} is not a setting: keys are text."
    return f"{where} is {_short(value)}, but should be {message}. {_describe(path)}"


def _explain_key(path: tuple) -> str:
    """Return why there is no such setting, and which one may be meant."""
    key, variants = str(path[-1]), _sections_at(path[:1])
    known = [name for section in _sections_at(path[:-1]) for name in section.model_fields]
    users = [section.model_fields["name"].default for section in variants if key in section.model_fields]
    if len(variants) > 1 and users:
        return f": {path[1]} does not use it; {' and '.join(users)} {'do' if users[1:] else 'does'}. Remove it."
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    fix = f"Did you mean `{near[0]}`?" if near else f"Known here: {', '.join(known)}."
    return f" is not a setting. {fix}"


def _sections_at(path: tuple) -> list[type[BaseModel]]:
    """Return the section at a location of pydantic's, or all variants of a section whose settings depend on its name.

    Behind such a section's key a location has the name of the variant."""
    sections: list[type[BaseModel]] = [JobConfig]
    for part in (part for part in path if isinstance(part, str)):
        if len(sections) > 1:
            sections = [section for section in sections if section.model_fields["name"].default == part]
            continue
        field = sections[0].model_fields.get(part) if sections else None
        sections = sections_of(field.annotation) if field else []
    return sections


def _describe(path: tuple) -> str:
    names = tuple(part for part in path if isinstance(part, str))
    fields = [section.model_fields.get(names[-1]) for section in _sections_at(names[:-1])] if names else []
    return f"({fields[0].description})" if fields and fields[0] and fields[0].description else ""
