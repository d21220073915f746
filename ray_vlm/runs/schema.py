"""What readers of a run folder rely on: JSON whose values are of the kinds that this package writes.

Others are left out and told as faults, so that one altered setting hides nothing else of the run.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from ray_vlm.errors import RunError
from ray_vlm.runs.store import Store

_LARGEST = 1e300  # of a number: sums and differences of larger ones are infinite
_LARGEST_COUNT = 2**53  # of a whole number: floats hold no larger one
_Kinds = dict[str, Callable[[Any], bool]]  # dotted key -> whether a value is of its kind
_SHOWN = 60  # characters of a value that is left out


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    if type(value) is float:  # asked half a million times by a comparison of 50 runs
        return -_LARGEST < value < _LARGEST
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST_COUNT


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_process(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    pid: Any = value.get("pid")
    return not value or (
        _is_text(value.get("host")) and is_count(pid) and pid < 2**31 and is_number(value.get("started"))
    )


def _are_counts(value: Any) -> bool:
    return is_count(value) or (isinstance(value, list) and bool(value) and all(map(is_count, value)))


def _are_parts(value: Any) -> bool:
    parts = value.values() if isinstance(value, Mapping) else [None]
    return all(isinstance(part, Mapping) and all(map(is_count, part.values())) for part in parts)


_DATA = {
    f"data.{part}.{key}": fits
    for part in ("train", "eval", "test")
    for key, fits in (("path", _is_text), ("ratio", is_number))
}
_ATTEMPT: _Kinds = {
    "attempt": is_count,
    "started": is_number,
    "ended": is_number,
    "status": _is_text,
    "error": _is_text,
    "driver": _is_process,
    **dict.fromkeys(("from_step", "to_step", "lost_steps", "workers"), is_count),
}
_KINDS: dict[str, _Kinds] = {
    "resolved.json": {
        **dict.fromkeys(("method.name", "task.name", "model.name", "evaluate.metric"), _is_text),
        **_DATA,
        "lora": _is_mapping,
        "lora.rank": is_count,
        "lora.target": _are_texts,
        "cluster.num_workers": _are_counts,
        "cluster.gpus_per_worker": is_number,
        "cluster.cpus_per_worker": is_number,
    },
    "run.json": {
        "status": _is_text,
        "attempts": lambda value: isinstance(value, list),
        "result": _is_mapping,
        "result.num_steps": is_count,
        "versions": _is_mapping,
        "hardware.memory_gib": is_number,
    },
    "metrics.json": {"overall": _is_mapping, "num_rows": is_count, "test": _is_text, "intervals": _is_mapping},
    "an attempt": _ATTEMPT,
    "a start": {"trainable": _are_parts, "device": _is_text, "num_steps": is_count, "num_workers": is_count},
}


def load_sound(data: bytes) -> Any:
    """The JSON value; halves of characters, which no file can hold, as question marks. Raises `ValueError`."""
    try:
        value = json.loads(data)
        if b"\\ud" in data or b"\\uD" in data:
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def keep_sound(what: str, values: dict[str, Any], name: str, faults: list[str]) -> dict[str, Any]:
    """`values` without what is not of its kind; `what`: which of the kinds, `name`: how faults call the file."""
    for key, fits in _KINDS[what].items():
        *path, last = key.split(".")
        section: Any = values
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and section.get(last) is not None and not fits(section[last]):
            faults.append(f"{name}: {key} is {repr(section.pop(last))[:_SHOWN]}, which no run writes; it is left out")
    return values


def keep_sound_run(values: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """The same for `run.json`, with the attempts in it."""
    values = keep_sound("run.json", values, "run.json", faults)
    listed = values.get("attempts") or []
    kept = [
        keep_sound("an attempt", entry, "run.json, attempts", faults) for entry in listed if isinstance(entry, dict)
    ]
    if len(kept) < len(listed):
        faults.append(f"run.json: {len(listed) - len(kept)} of {len(listed)} attempts are altered and left out")
    return values | {"attempts": kept} if listed else values


def keep_sound_scores(values: dict[str, Any], name: str, faults: list[str]) -> dict[str, Any]:
    """The same for `metrics.json` of an evaluation, with its numbers."""
    values = keep_sound("metrics.json", values, name, faults)
    scores = values.get("overall") or {}
    odd = [key for key, value in scores.items() if value is not None and not is_number(value)]
    if odd:
        faults.append(f"{name}: {odd[0]} is no number; it is left out")
    return values | {"overall": {key: value for key, value in scores.items() if key not in odd}} if odd else values


def check_whole(store: Store) -> None:
    """Raise `RunError` unless `resolved.json` and `run.json` of a run that is to go on are as training writes them."""
    for file in ("resolved.json", "run.json"):
        faults: list[str] = []
        try:
            values = load_sound(store.read(file) or b"")
        except ValueError:
            values = {}
            faults.append(f"{file} is missing or cut off")
        if not isinstance(values, dict):
            faults.append(f"{file} holds no object")
        elif not faults and file == "resolved.json":
            keep_sound(file, values, file, faults)
        elif not faults:
            listed = keep_sound_run(values, faults).get("attempts")
            if not isinstance(listed, list) or not all("attempt" in entry for entry in listed):
                faults.append(f"{file}: its attempts are not numbered")
        if faults:
            raise RunError(
                f"--resume: {store.address} was left half made ({faults[0]}), so what it was to learn is not known. "
                "Delete it, or give another run.name."
            )


def is_sound_line(line: Any) -> bool:
    """Whether a line of `metrics.jsonl` can be counted on: its kind, attempt and step, and what a start tells."""
    if not isinstance(line, dict):
        return False
    kind, attempt, step = line.get("kind"), line.get("attempt"), line.get("step")
    if not (type(kind) is str and type(attempt) is int and type(step) is int):
        return False
    if not (0 <= attempt < _LARGEST_COUNT and 0 <= step < _LARGEST_COUNT):
        return False
    return kind != "start" or all(line.get(key) is None or fits(line[key]) for key, fits in _KINDS["a start"].items())


def number_of(line: Mapping[str, Any], key: str) -> float:
    """The number under a key of a line, 0.0 where there is none."""
    value = line.get(key)
    return value if value is not None and is_number(value) else 0.0
