"""Rare classes: how often rows are shown, and what their answer tokens weigh. Pure arithmetic on the rows' tags.

A tag is a class (`star`), or for classification and GUI steps `attribute=value` (`condition=blocked`). Settings name a
tag whole, or by its value alone. Factors go to the plan, weights to the loss.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_vlm.config.data import Data
from ray_vlm.errors import ConfigError


@dataclass(frozen=True)
class Balance:
    """What rare classes get. `factors`: `float64 [rows]`, times shown in an epoch; None: all once.

    `token_weights`: the (tag, weight) that are not 1. `table`: for each tag its rows, its share in the data and as
    shown, how often its rows are shown, the factor that it asks for itself, and its weight.
    """

    factors: np.ndarray | None
    token_weights: tuple[tuple[str, float], ...]
    table: tuple[dict[str, Any], ...]


def plan_balance(
    tags: Sequence[tuple[str, ...]], source_weights: np.ndarray, data: Data, attributes: bool = True
) -> Balance:
    """Factors and weights for rows with these tags. Raises `ConfigError` for names that no row has.

    `attributes`: tags are `attribute=value`; else a `=` is a character of a class name.
    """
    kinds = Counter(tags)
    rows, objects = Counter[str](), Counter[str]()
    for of_row, count in kinds.items():
        rows.update(dict.fromkeys(of_row, count))
        for tag in of_row:
            objects[tag] += count
    problems: list[str] = []
    weights: dict[str, float] = {}
    of = {tag: tag.partition("=")[0] if attributes and "=" in tag else "" for tag in rows}  # the attribute of a tag
    by_tag = _tag_factors(rows, of, len(tags), data, problems)
    first = next((of[of_row[0]] for of_row in tags if of_row), "")
    for key, chosen in (("class_weights", True), ("condition_weights", False)):
        counts = {tag: objects[tag] for tag in objects if (of[tag] == first) is chosen}
        weights |= _tag_weights(counts, of, getattr(data, key), f"data.{key}", problems)
    if problems:
        raise ConfigError(problems)
    factors = source_weights.astype(np.float64)
    if any(factor != 1 for factor in by_tag.values()):
        known: dict[tuple[str, ...], float] = {}
        for of_row in kinds:
            known[of_row] = _row_factor([by_tag[tag] for tag in of_row if tag in by_tag])
        factors = factors * np.fromiter((known[of_row] for of_row in tags), np.float64, len(tags))
    if factors.sum() < 1:
        raise ConfigError("data.oversample and weights leave less than one row in an epoch. Raise them.")
    even = bool((factors == 1).all())
    told = tuple((tag, weight) for tag, weight in sorted(weights.items()) if weight != 1)
    return Balance(None if even else factors, told, _table(tags, rows, factors, by_tag, weights))


def _row_factor(factors: list[float]) -> float:
    """A row is shown as often as the most that one of its tags asks for (LVIS, Gupta et al. 2019); else once."""
    return max(factors, default=1.0)


def _tag_factors(
    rows: Counter, of: Mapping[str, str], num_rows: int, data: Data, problems: list[str]
) -> dict[str, float]:
    if data.oversample is None:
        return {}
    if data.oversample == "auto":
        values = Counter(of.values())
        threshold = {tag: data.oversample_threshold or 1 / values[of[tag]] for tag in rows}
        return {tag: max(1.0, math.sqrt(threshold[tag] * num_rows / count)) for tag, count in rows.items()}
    return _by_tag(data.oversample, rows, of, "data.oversample", problems)


def _by_tag(
    given: Mapping[str, float], known: Mapping[str, int], of: Mapping[str, str], key: str, problems: list[str]
) -> dict[str, float]:
    """A setting's numbers by whole tag."""
    out = {}
    for name, value in given.items():
        found = [tag for tag in known if tag == name or (of[tag] and tag.partition("=")[2] == name)]
        if not found:
            names = ", ".join(sorted(known)[:20]) or "none"
            problems.append(f"{key}: no training row has {name!r}. There are: {names}.")
        elif len(found) > 1:
            problems.append(f"{key}: {name!r} may mean {' or '.join(sorted(found))}; write one of these.")
        elif not 0 < value <= 1000:
            problems.append(f"{key}.{name} is {value}; use a number above 0 and up to 1000.")
        else:
            out[found[0]] = float(value)
    return out


def _tag_weights(
    counts: Mapping[str, int],
    of: Mapping[str, str],
    setting: Mapping[str, float] | str | None,
    key: str,
    problems: list[str],
) -> dict[str, float]:
    """Weight of each tag; those from frequencies have a mean of 1 over all occurrences of their attribute."""
    if setting is None:
        return {}
    if isinstance(setting, Mapping):
        return _by_tag(setting, counts, of, key, problems)
    if not counts:
        problems.append(f"{key}={setting}: the rows have nothing of that kind. Leave it out.")
    power = 1.0 if setting == "inverse" else 0.5
    out: dict[str, float] = {}
    for attribute in {of[tag] for tag in counts}:
        mine = {tag: n for tag, n in counts.items() if of[tag] == attribute}
        scale = sum(mine.values()) / sum(n * n**-power for n in mine.values())
        out |= {tag: scale * n**-power for tag, n in mine.items()}
    return out


def _table(
    tags: Sequence[tuple[str, ...]],
    rows: Counter,
    factors: np.ndarray,
    by_tag: Mapping[str, float],
    weights: Mapping[str, float],
) -> tuple[dict[str, Any], ...]:
    codes: dict[tuple[str, ...], int] = {}
    code = np.fromiter((codes.setdefault(of_row, len(codes)) for of_row in tags), np.int64, len(tags))
    shown: Counter = Counter()
    for of_row, total in zip(codes, np.bincount(code, weights=factors, minlength=len(codes)).tolist(), strict=True):
        for tag in set(of_row):
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
    """The mix that training sees, one line a class or condition; nothing where there are none."""
    if not balance.table:
        return []
    width = max(len(entry["tag"]) for entry in balance.table)
    lines = [f"{'class':<{width}}  {'rows':>8} {'share':>7} {'shown':>7} {'times':>6} {'weight':>7}"]
    lines += [
        f"{e['tag']:<{width}}  {e['rows']:>8} {e['share']:>7.1%} {e['shown_share']:>7.1%} {e['times_shown']:>6.2f} "
        f"{e['weight']:>7.2f}"
        for e in balance.table
    ]
    return lines
