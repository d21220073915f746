"""Validation of a run's JSON files: values must have the types that this package writes.

Other values are dropped and reported as faults, so that one altered value does not hide the rest of the run.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from ray_vlm.errors import RunError
from ray_vlm.storage import Store

_LARGEST = 1e300  # largest valid number: sums of larger ones could be infinite
_LARGEST_COUNT = 2**53  # largest valid count: floats are exact up to here
_SHOWN = 60  # characters shown of a value that is dropped


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is a finite number."""
    if type(value) is float:  # a fast path: a comparison of 50 runs makes half a million calls
        return -_LARGEST < value < _LARGEST
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def is_count(value: object) -> TypeGuard[int]:
    """Return whether `value` is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST_COUNT


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def is_process(value: object) -> TypeGuard[dict[str, Any]]:
    """Return whether `value` has a process's `host`, `pid` and `started`."""
    if not isinstance(value, dict):
        return False
    host, pid = value.get("host"), value.get("pid")
    return isinstance(host, str) and is_count(pid) and pid < 2**31 and is_number(value.get("started"))


def _are_counts(value: object) -> bool:
    return is_count(value) or (isinstance(value, list) and bool(value) and all(map(is_count, value)))


def _are_parts(value: object) -> bool:
    parts = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(part, dict) and all(map(is_count, part.values())) for part in parts)


# Of each file: dotted key -> type of a valid value, or a function that returns whether a value is valid.
_KINDS: dict[str, dict[str, type | Callable[[object], bool]]] = {
    "resolved.json": {
        **dict.fromkeys(("method.name", "task.name", "model.name", "evaluate.metric"), str),
        **{f"data.{part}.path": str for part in ("train", "eval", "test")},
        **{f"data.{part}.ratio": is_number for part in ("train", "eval", "test")},
        "lora": dict,
        "lora.rank": is_count,
        "lora.target": _are_texts,
        "cluster.num_workers": _are_counts,
        "cluster.gpus_per_worker": is_number,
        "cluster.cpus_per_worker": is_number,
        "method.samplers": _are_counts,
        **{f"method.{name}_per_sampler": is_number for name in ("cpus", "gpus")},
    },
    "run.json": {
        "status": str,
        "attempts": list,
        "result": dict,
        "result.num_steps": is_count,
        "versions": dict,
        "hardware.memory_gib": is_number,
        "samplers": dict,
    },
    "metrics.json": {"overall": dict, "num_rows": is_count, "test": str, "intervals": dict},
    "an attempt": {
        **dict.fromkeys(("attempt", "from_step", "to_step", "lost_steps", "workers"), is_count),
        **dict.fromkeys(("started", "ended"), is_number),
        **dict.fromkeys(("status", "error"), str),
        "driver": lambda value: value == {} or is_process(value),
    },
    "a start": {"trainable": _are_parts, "device": str, "num_steps": is_count, "num_workers": is_count},
}


def _fits(value: object, kind: type | Callable[[object], bool]) -> bool:
    return value is None or (isinstance(value, kind) if isinstance(kind, type) else kind(value))


def load_sound(data: bytes) -> Any:
    """Parse JSON; lone surrogates, which cannot be encoded, become question marks. Raises `ValueError`."""
    try:
        value = json.loads(data)
        if b"\\ud" in data or b"\\uD" in data:
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def load_object(store: Store, name: str, faults: list[str]) -> dict[str, Any]:
    """Return the object in a JSON file; empty, and one more fault, for a file without one."""
    try:
        value = load_sound(store.read(name) or b"")
    except ValueError:
        faults.append(f"{name} is missing or cut off")
        return {}
    if not isinstance(value, dict):
        faults.append(f"{name} holds no object")
        return {}
    return value


def keep_sound(what: str, values: dict[str, Any], name: str, faults: list[str]) -> dict[str, Any]:
    """Return `values` without invalid ones. `what`: a key of `_KINDS`; `name`: of the file in `faults`."""
    for key, kind in _KINDS[what].items():
        *path, last = key.split(".")
        section: Any = values
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and not _fits(section.get(last), kind):
            faults.append(f"{name}: {key} is {repr(section.pop(last))[:_SHOWN]}, which is not valid; it is ignored")
    return values


def load_resolved(store: Store, faults: list[str]) -> dict[str, Any]:
    """Return the valid values of `resolved.json`."""
    return keep_sound("resolved.json", load_object(store, "resolved.json", faults), "resolved.json", faults)


def load_manifest(store: Store, faults: list[str]) -> dict[str, Any]:
    """Return the valid values of `run.json`, including its attempts."""
    values = keep_sound("run.json", load_object(store, "run.json", faults), "run.json", faults)
    listed = values.get("attempts") or []
    attempts = [
        keep_sound("an attempt", entry, "run.json, attempts", faults) for entry in listed if isinstance(entry, dict)
    ]
    if len(attempts) < len(listed):
        faults.append(f"run.json: {len(listed) - len(attempts)} of {len(listed)} attempts are altered and ignored")
    return values | {"attempts": attempts} if listed else values


def load_scores(store: Store, name: str, faults: list[str]) -> dict[str, Any]:
    """Return the valid values of an evaluation's `metrics.json`, including its scores."""
    values = keep_sound("metrics.json", load_object(store, name, faults), name, faults)
    scores = values.get("overall") or {}
    odd = [key for key, value in scores.items() if not _fits(value, is_number)]
    if odd:
        faults.append(f"{name}: {odd[0]} is no number; it is ignored")
    return values | {"overall": {key: value for key, value in scores.items() if key not in odd}} if odd else values


def check_whole(store: Store) -> None:
    """Raise `RunError` unless `resolved.json` and `run.json` of a run to resume are complete and valid."""
    faults: list[str] = []
    load_resolved(store, faults)
    attempts = load_manifest(store, faults).get("attempts")
    if attempts is None or not all("attempt" in entry for entry in attempts):
        faults.append("run.json: its attempts are not numbered")
    if faults:
        raise RunError(
            f"--resume: {store.address} is incomplete ({faults[0]}), so it cannot be resumed. "
            "Delete it, or give another run.name."
        )


def is_sound_line(line: object) -> TypeGuard[dict[str, Any]]:
    """Return whether a line of `metrics.jsonl` is valid: its kind, attempt and step, and the values of a start line."""
    if not isinstance(line, dict):
        return False
    kind, attempt, step = line.get("kind"), line.get("attempt"), line.get("step")
    if not (type(kind) is str and type(attempt) is int and type(step) is int):
        return False
    if not (0 <= attempt < _LARGEST_COUNT and 0 <= step < _LARGEST_COUNT):
        return False
    return kind != "start" or all(_fits(line.get(key), fits) for key, fits in _KINDS["a start"].items())


def number_of(line: Mapping[str, Any], key: str) -> float:
    """Return the number under a key of a line, or 0.0 if there is none."""
    value = line.get(key)
    return value if is_number(value) else 0.0
