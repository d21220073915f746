"""Balance rare classes, and the work of the ranks. Pure arithmetic on tags and costs.

Classes are balanced by how often rows are shown, and by how much their answer tokens weigh. A tag is a class (`star`),
or for classification and GUI steps `attribute=value` (`condition=blocked`). Settings name a whole tag, or its value
alone. The plan uses the repeat factors and deals rows to ranks, the loss uses the weights.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_vlm.errors import ConfigError
from ray_vlm.runs.text import format_table

if TYPE_CHECKING:
    from ray_vlm.config.data import Data  # loads pydantic, and the gate of each worker needs the plan's module

_ROWS_AT_ONCE = 2**20  # rows among which kinds are looked for; sorting all would take seconds


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


def code_tags(tags: Iterable[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """Return the distinct tuples of tags in the order in which they first appear, and for each row its position among
    them, `int32 [rows]`."""
    codes: dict[tuple[str, ...], int] = {}
    kind_of = np.fromiter((codes.setdefault(row_tags, len(codes)) for row_tags in tags), np.int32)
    return list(codes), kind_of


def plan_balance(
    kinds: Sequence[tuple[str, ...]],
    kind_of: np.ndarray,
    source_weights: np.ndarray,
    data: "Data",
    attributes: bool = True,
) -> Balance:
    """Compute repeat factors and weights. Raise `ConfigError` for names that no row has.

    `kinds`: the distinct tuples of tags in any order; `kind_of`: `int [rows]`, the position of each row's tags among
    them. `source_weights`: `[rows]`. `attributes`: tags are `attribute=value`; otherwise a `=` is part of a class name.
    """
    count_of, order = np.bincount(kind_of, minlength=len(kinds)), _appearance(kind_of)
    rows, objects = Counter[str](), Counter[str]()
    for kind in order:
        count = int(count_of[kind])
        rows.update(dict.fromkeys(kinds[kind], count))
        for tag in kinds[kind]:
            objects[tag] += count
    problems: list[str] = []
    weights: dict[str, float] = {}
    attribute_of = {tag: tag.partition("=")[0] if attributes and "=" in tag else "" for tag in rows}
    by_tag = _tag_factors(rows, attribute_of, len(kind_of), data, problems)
    first = next((attribute_of[kinds[kind][0]] for kind in order if kinds[kind]), "")
    for key, chosen in (("class_weights", True), ("condition_weights", False)):
        counts = {tag: objects[tag] for tag in objects if (attribute_of[tag] == first) is chosen}
        weights |= _tag_weights(counts, attribute_of, getattr(data, key), f"data.{key}", problems)
    if problems:
        raise ConfigError(problems)
    factors = source_weights.astype(np.float64)
    if any(factor != 1 for factor in by_tag.values()):
        # A row's factor is the largest of its tags' (LVIS, Gupta et al. 2019).
        factor_of = [max((by_tag[tag] for tag in row_tags if tag in by_tag), default=1.0) for row_tags in kinds]
        factors *= np.array(factor_of, np.float64)[kind_of]
    if factors.sum() < 1:
        raise ConfigError("data.oversample and weights leave less than one row in an epoch. Raise them.")
    even = bool((factors == 1).all())
    token_weights = tuple((tag, weight) for tag, weight in sorted(weights.items()) if weight != 1)
    shown_of = np.bincount(kind_of, weights=factors, minlength=len(kinds))
    shown: dict[str, float] = dict.fromkeys(rows, 0.0)
    for kind in order:
        for tag in set(kinds[kind]):
            shown[tag] += shown_of[kind].item()
    table = _table(rows, shown, len(kind_of), float(factors.sum()) or 1.0, by_tag, weights)
    return Balance(None if even else factors, token_weights, table)


def _appearance(kind_of: np.ndarray) -> list[int]:
    """Return the kinds that rows have, in the order of their first rows."""
    order: dict[int, None] = {}
    distinct = int(np.count_nonzero(np.bincount(kind_of)))
    for start in range(0, len(kind_of), _ROWS_AT_ONCE):
        if len(order) == distinct:
            break
        kinds, first = np.unique(kind_of[start : start + _ROWS_AT_ONCE], return_index=True)
        order |= dict.fromkeys(kinds[np.argsort(first)].tolist())
    return list(order)


def _tag_factors(
    rows: Counter, attribute_of: Mapping[str, str], num_rows: int, data: "Data", problems: list[str]
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
    rows: Mapping[str, int],
    shown: Mapping[str, float],
    num_rows: int,
    total: float,
    by_tag: Mapping[str, float],
    weights: Mapping[str, float],
) -> tuple[dict[str, Any], ...]:
    """Return the table of `Balance`. `rows`, `shown`: how many rows have a tag, and how often they are shown together;
    `total`: how often all are."""
    return tuple(
        {
            "tag": tag,
            "rows": rows[tag],
            "share": rows[tag] / num_rows,
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


def deal(rows: np.ndarray, costs: np.ndarray | None, world_size: int) -> list[np.ndarray]:
    """Return the rows of each rank, equally many to within one. `costs`: of each of these rows.

    With costs, the most expensive row goes to the rank with the least cost so far that has room (Graham's LPT rule with
    capacities). Each rank's rows are sorted by cost: micro-batches hold rows of similar length, and the k-th of every
    rank take about as long.
    """
    if costs is None:
        return np.array_split(rows, world_size)
    order = np.argsort(-costs, kind="stable")
    room = [len(part) for part in np.array_split(rows, world_size)]
    loads = [(0.0, rank) for rank in range(world_size) if room[rank]]
    rows_of: list[list[int]] = [[] for _ in range(world_size)]
    for row, cost in zip(rows[order].tolist(), costs[order].tolist(), strict=True):
        total, rank = heapq.heappop(loads)
        rows_of[rank].append(row)
        if len(rows_of[rank]) < room[rank]:
            heapq.heappush(loads, (total + cost, rank))
    return [np.array(part, np.int64) for part in rows_of]


def min_parts(sizes: np.ndarray, budget: int) -> int:
    """Return the fewest groups of `sizes` such that none, padded to its longest, exceeds `budget` tokens."""
    ranked, parts, first = np.sort(sizes)[::-1], 0, 0
    while first < len(ranked):
        first += max(1, budget // max(1, int(ranked[first])))
        parts += 1
    return max(1, parts)


def group_alike(sizes: np.ndarray, parts: int, budget: int) -> list[np.ndarray]:
    """Return positions of `sizes` in `parts` groups of similar sizes with the least padding, each within `budget`
    tokens when padded to its longest.

    `parts`: at least `min_parts`; some groups are empty if there are fewer sizes.
    """
    ranked, count = np.argsort(-sizes, kind="stable"), len(sizes)
    used = min(parts, count)
    # Dynamic programming over the sorted sizes: `cost[end]` is the fewest padded tokens of ranked[:end] so far.
    first, end = np.ogrid[:count, : count + 1]
    padded = (end - first) * np.append(sizes[ranked], 0)[:count, None].astype(float)  # of ranked[first:end] as a group
    padded[(end <= first) | ((padded > budget) & (end - first > 1))] = np.inf
    cost, starts = np.full(count + 1, np.inf), []
    cost[0] = 0.0
    for _ in range(used):
        total = cost[:count, None] + padded
        starts.append(total.argmin(axis=0))
        cost = total.min(axis=0)
    groups, end_of = [], count
    for start in reversed(starts):
        groups.append(np.sort(ranked[start[end_of] : end_of]))
        end_of = int(start[end_of])
    return groups[::-1] + [np.array([], np.int64)] * (parts - used)
