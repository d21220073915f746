"""Balance rare classes: how often rows are shown, and how much their answer tokens weigh. Pure arithmetic on tags.

A tag is a class (`star`), or for classification and GUI steps `attribute=value` (`condition=blocked`). Settings name a
whole tag, or its value alone. The plan uses the repeat factors, the loss the weights.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_vlm.config.data import Data
from ray_vlm.errors import ConfigError
from ray_vlm.runs.text import format_table


@dataclass(frozen=True)
class Balance:
    """The repeat factors and weights of a run.

    `repeat_factors`: `float64 [rows]`, how often each row is shown in an epoch; None: each once. `token_weights`: the
    (tag, weight) pairs whose weight is not 1. `table`: for each tag its rows, its share of the data and of the rows
    shown, how often its rows are shown, its own factor, and its weight.
    """

    repeat_factors: np.ndarray | None
    token_weights: tuple[tuple[str, float], ...]
    table: tuple[dict[str, Any], ...]


def plan_balance(
    tags: Sequence[tuple[str, ...]], source_weights: np.ndarray, data: Data, attributes: bool = True
) -> Balance:
    """Compute repeat factors and weights for rows with these tags. Raise `ConfigError` for names that no row has.

    `attributes`: tags are `attribute=value`; otherwise a `=` is part of a class name.
    """
    kinds = Counter(tags)
    rows, objects = Counter[str](), Counter[str]()
    for row_tags, count in kinds.items():
        rows.update(dict.fromkeys(row_tags, count))
        for tag in row_tags:
            objects[tag] += count
    problems: list[str] = []
    weights: dict[str, float] = {}
    attribute_of = {tag: tag.partition("=")[0] if attributes and "=" in tag else "" for tag in rows}
    by_tag = _tag_factors(rows, attribute_of, len(tags), data, problems)
    first = next((attribute_of[row_tags[0]] for row_tags in tags if row_tags), "")
    for key, chosen in (("class_weights", True), ("condition_weights", False)):
        counts = {tag: objects[tag] for tag in objects if (attribute_of[tag] == first) is chosen}
        weights |= _tag_weights(counts, attribute_of, getattr(data, key), f"data.{key}", problems)
    if problems:
        raise ConfigError(problems)
    factors = source_weights.astype(np.float64)
    if any(factor != 1 for factor in by_tag.values()):
        # A row's factor is the largest of its tags' (LVIS, Gupta et al. 2019).
        factor_of: dict[tuple[str, ...], float] = {}
        for row_tags in kinds:
            factor_of[row_tags] = max((by_tag[tag] for tag in row_tags if tag in by_tag), default=1.0)
        factors = factors * np.fromiter((factor_of[row_tags] for row_tags in tags), np.float64, len(tags))
    if factors.sum() < 1:
        raise ConfigError("data.oversample and weights leave less than one row in an epoch. Raise them.")
    even = bool((factors == 1).all())
    token_weights = tuple((tag, weight) for tag, weight in sorted(weights.items()) if weight != 1)
    return Balance(None if even else factors, token_weights, _table(tags, rows, factors, by_tag, weights))


def _tag_factors(
    rows: Counter, attribute_of: Mapping[str, str], num_rows: int, data: Data, problems: list[str]
) -> dict[str, float]:
    if data.oversample is None:
        return {}
    if data.oversample == "auto":
        values = Counter(attribute_of.values())
        threshold = {tag: data.oversample_threshold or 1 / values[attribute_of[tag]] for tag in rows}
        return {tag: max(1.0, math.sqrt(threshold[tag] * num_rows / count)) for tag, count in rows.items()}
    return _by_tag(data.oversample, rows, attribute_of, "data.oversample", problems)


def _by_tag(
    setting: Mapping[str, float],
    known: Mapping[str, int],
    attribute_of: Mapping[str, str],
    key: str,
    problems: list[str],
) -> dict[str, float]:
    """Return a setting's numbers by whole tag; append what is wrong to `problems`."""
    out = {}
    for name, value in setting.items():
        matches = [tag for tag in known if tag == name or (attribute_of[tag] and tag.partition("=")[2] == name)]
        if not matches:
            names = ", ".join(sorted(known)[:20]) or "none"
            problems.append(f"{key}: no training row has {name!r}. There are: {names}.")
        elif len(matches) > 1:
            problems.append(f"{key}: {name!r} may mean {' or '.join(sorted(matches))}; write one of these.")
        elif not 0 < value <= 1000:
            problems.append(f"{key}.{name} is {value}; use a number above 0 and up to 1000.")
        else:
            out[matches[0]] = float(value)
    return out


def _tag_weights(
    counts: Mapping[str, int],
    attribute_of: Mapping[str, str],
    setting: Mapping[str, float] | str | None,
    key: str,
    problems: list[str],
) -> dict[str, float]:
    """Return the weight of each tag. Weights from frequencies average 1 over all occurrences of an attribute."""
    if setting is None:
        return {}
    if isinstance(setting, Mapping):
        return _by_tag(setting, counts, attribute_of, key, problems)
    if not counts:
        problems.append(f"{key}={setting}: the rows have nothing of that kind. Leave it out.")
    power = 1.0 if setting == "inverse" else 0.5
    out: dict[str, float] = {}
    for attribute in {attribute_of[tag] for tag in counts}:
        tag_counts = {tag: n for tag, n in counts.items() if attribute_of[tag] == attribute}
        scale = sum(tag_counts.values()) / sum(n * n**-power for n in tag_counts.values())
        out |= {tag: scale * n**-power for tag, n in tag_counts.items()}
    return out


def _table(
    tags: Sequence[tuple[str, ...]],
    rows: Counter,
    factors: np.ndarray,
    by_tag: Mapping[str, float],
    weights: Mapping[str, float],
) -> tuple[dict[str, Any], ...]:
    codes: dict[tuple[str, ...], int] = {}
    code = np.fromiter((codes.setdefault(row_tags, len(codes)) for row_tags in tags), np.int64, len(tags))
    shown: Counter = Counter()
    for row_tags, total in zip(codes, np.bincount(code, weights=factors, minlength=len(codes)).tolist(), strict=True):
        for tag in set(row_tags):
            shown[tag] += total
    total = float(factors.sum()) or 1.0
    return tuple(
        {
            "tag": tag,
            "rows": rows[tag],
            "share": rows[tag] / len(tags),
            "shown_share": shown[tag] / total,
            "times_shown": shown[tag] / rows[tag],
            "factor": by_tag.get(tag, 1.0),
            "weight": weights.get(tag, 1.0),
        }
        for tag in sorted(rows, key=lambda t: (-rows[t], t))
    )


def describe_balance(balance: Balance) -> list[str]:
    """Describe the mix that training sees, one line for each class or condition; no lines without classes."""
    if not balance.table:
        return []
    rows = [["class", "rows", "share", "shown", "times", "weight"]]
    for e in balance.table:
        shares = [f"{e['share']:.1%}", f"{e['shown_share']:.1%}"]
        rows.append([e["tag"], str(e["rows"]), *shares, f"{e['times_shown']:.2f}", f"{e['weight']:.2f}"])
    return format_table(rows).splitlines()
