"""Dotted keys of settings, such as `train.learning_rate`, or `data.oversample.toe-drain` with a class name."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_PART = r"""(?:"[^"]+"|'[^']+'|[^.=]+)"""
_KEY = re.compile(rf"\w+(?:\.{_PART})*")
_PARTS = re.compile(_PART)
_SETTING = re.compile(rf"({_KEY.pattern})=(.*)", re.DOTALL)


def split_key(key: str) -> tuple[str, ...] | None:
    """Return the parts of a dotted key; None if it is not valid. A part that contains dots must be quoted."""
    if not _KEY.fullmatch(key):
        return None
    return tuple(part[1:-1] if part[0] == part[-1] and part[0] in "\"'" else part for part in _PARTS.findall(key))


def setting(job: Mapping[str, Any], key: str) -> Any:
    """Return a resolved job's value under a dotted key, or None."""
    value: Any = job
    for part in split_key(key) or ():
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def split_setting(text: str) -> tuple[tuple[str, ...], str] | None:
    """Return the parts of the key, and the value, of `key=value`; None if it is not valid."""
    match = _SETTING.fullmatch(text)
    parts = split_key(match[1]) if match else None
    return (parts, match[2]) if match and parts else None


def describe_no_section(parts: Sequence[str], depth: int, value: object) -> str:
    """Return the error for setting `parts` whose first `depth` parts are a single value and not a section."""
    key = ".".join(parts[:depth])
    inside = ": {".join(parts[depth:])
    return (
        f"`{key}` is {value!r}, not a section, so it has no `{parts[depth]}`. Give all of it: "
        f"{key}={{{inside}: ...{'}' * (len(parts) - depth)}"
    )
