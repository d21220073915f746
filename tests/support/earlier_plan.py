"""What decided the order of rows, their split and their balance before they took columns of codes. Runs of those
versions are resumed, so results stay the same to the bit: this is a copy, and stays as it is."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_vlm.config.data import Data
from ray_vlm.data.balance import Balance, _tag_factors, _tag_weights
from ray_vlm.errors import ConfigError


def epoch_order(
    num_rows: int, shuffle: bool, seed: int, epoch: int, factors: np.ndarray | None = None, most: int | None = None
) -> np.ndarray:
    """Return the order of an epoch, `int64 [rows shown]`; without shuffling, file order with repeats adjacent.

    `most`: the largest number of rows. Only fractions whose sum is not a whole number can exceed it, by one row.
    """
    rng = np.random.default_rng([seed, epoch])
    if factors is None:
        return rng.permutation(num_rows) if shuffle else np.arange(num_rows)
    times = np.floor(factors).astype(np.int64)
    fraction = factors - times
    candidates = rng.permutation(np.flatnonzero(fraction))
    if len(candidates):
        reach = np.cumsum(fraction[candidates])
        reach[-1] = _round_sum(reach[-1])
        start = rng.random()
        if most is not None and times.sum() + math.floor(reach[-1] + start) > most:
            start = 0.0
        times[candidates] += np.diff(np.floor(reach + start), prepend=0.0).astype(np.int64)
    order = np.repeat(np.arange(num_rows), times)
    return rng.permutation(order) if shuffle else order


def _round_sum(total: float) -> float:
    """Return `total`, or the whole number that it would be without the rounding errors of the sum."""
    near = round(total)
    return float(near) if abs(total - near) < 1e-6 else float(total)


def plan_split(
    groups: Sequence[str], strata: Sequence[str], shares: Mapping[str, float], seed: int
) -> dict[str, np.ndarray]:
    """Return the sorted positions of each part's rows: `train` and every name in `shares`.

    Rows of one group (non-empty text) stay together, and take the stratum of the group's first row. Within a stratum,
    units are dealt to the parts in an order drawn from `seed`, so every part has the mix of all rows. Raise
    `ConfigError` if a part would be empty.
    """
    if not shares:
        return {"train": np.arange(len(groups))}
    unit_of, units = _units(groups)
    first = np.full(units, len(groups), np.int64)
    np.minimum.at(first, unit_of, np.arange(len(groups)))
    codes = {name: code for code, name in enumerate(sorted(set(strata)))}
    stratum = np.fromiter((codes[name] for name in strata), np.int32, len(strata))[first]
    order = np.lexsort((np.random.default_rng([seed, 7]).random(units), stratum))
    part = np.zeros(units, np.int64)
    left, remaining = order, 1.0
    for number, (_, share) in enumerate(shares.items(), 1):
        ratio = min(share / remaining, 1.0) if remaining > 0 else 1.0
        # The rounded number of units taken so far; where it grows, the part takes a unit. 1e-9: halves round down.
        turn = np.floor((np.arange(len(left)) + 1) * ratio + 0.5 - 1e-9)
        taken = np.diff(turn, prepend=np.floor(0.5 - 1e-9)) > 0
        part[left[taken]] = number
        left, remaining = left[~taken], remaining - share
    names = ("train", *shares)
    out = {name: np.flatnonzero(part[unit_of] == number) for number, name in enumerate(names)}
    empty = [name for name, positions in out.items() if not len(positions)]
    if empty:
        raise ConfigError(
            f"data: {units} rows (or groups of rows) cannot be split into {', '.join(names)} with shares "
            f"{dict(shares)}: {empty[0]} would be empty. Use another share, or a file of its own."
        )
    return out


def _units(groups: Sequence[str]) -> tuple[np.ndarray, int]:
    """Return the number of each row's unit, and how many units there are."""
    if not any(groups):
        return np.arange(len(groups)), len(groups)
    numbers: dict[str, int] = {}
    unit_of = np.empty(len(groups), np.int64)
    for i, group in enumerate(groups):
        unit_of[i] = numbers.setdefault(group or f"\0{i}", len(numbers))
    return unit_of, len(numbers)


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
