"""Dotted keys of settings, such as `train.learning_rate`, and `data.oversample.toe-drain` with a name of one's own."""

import re
from collections.abc import Sequence

_PART = r"""(?:"[^"]+"|'[^']+'|[^.=]+)"""
_KEY = re.compile(rf"\w+(?:\.{_PART})*")
_PARTS = re.compile(_PART)
_SETTING = re.compile(rf"({_KEY.pattern})=(.*)", re.DOTALL)


def split_key(key: str) -> tuple[str, ...] | None:
    """The parts of a dotted key; None for what is none. A name with dots in it stands in quotes."""
    if not _KEY.fullmatch(key):
        return None
    return tuple(part[1:-1] if part[0] == part[-1] and part[0] in "\"'" else part for part in _PARTS.findall(key))


def split_setting(text: str) -> tuple[tuple[str, ...], str] | None:
    """The parts of the key and the value of `key=value`; None for what is none."""
    found = _SETTING.fullmatch(text)
    parts = split_key(found[1]) if found else None
    return (parts, found[2]) if found and parts else None


def describe_no_section(parts: Sequence[str], depth: int, value: object) -> str:
    """Why the setting `parts` has no place where its first `depth` parts are a single value, and the way out."""
    whole = ".".join(parts[:depth])
    inside = ": {".join(parts[depth:])
    return (
        f"`{whole}` is {value!r}, not a section, so it has no `{parts[depth]}`. Give all of it: "
        f"{whole}={{{inside}: ...{'}' * (len(parts) - depth)}"
    )
