"""Split rows into train, eval and test: pure arithmetic on the group and the rarest class of each row.

A share is drawn from groups if rows belong together, so no split separates them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from ray_vlm.errors import ConfigError


def rarest_tags(kinds: Sequence[tuple[str, ...]], kind_of: np.ndarray) -> np.ndarray:
    """Return for each row the code of the tag that the fewest rows have, of its own tags, `int32 [rows]`.

    `kinds`, `kind_of`: as in `plan_balance`. Codes are in the order of the names; a row without tags has the first.
    """
    counts = Counter[str]()
    for row_classes, count in zip(kinds, np.bincount(kind_of, minlength=len(kinds)).tolist(), strict=True):
        counts.update(dict.fromkeys(row_classes, count))
    rarest = [min(row_classes, key=lambda tag: (counts[tag], tag), default="") for row_classes in kinds]
    return code_texts(rarest)[kind_of]


def code_texts(texts: Sequence[str]) -> np.ndarray:
    """Return a code for each text, in the order of the distinct texts, `int32`."""
    codes = {text: code for code, text in enumerate(sorted(set(texts)))}
    return np.fromiter((codes[text] for text in texts), np.int32, len(texts))


def plan_split(
    group_of: np.ndarray, stratum_of: np.ndarray, shares: Mapping[str, float], seed: int
) -> dict[str, np.ndarray]:
    """Return the sorted positions of each part's rows: `train` and every name in `shares`.

    `group_of`: `int [rows]`, any code of each row's group, -1 for none; rows of a group stay together, and take the
    stratum of the group's first row. `stratum_of`: `int [rows]`, the code of each row's stratum, in the order of the
    names. Within a stratum, units are dealt to the parts in an order drawn from `seed`, so every part has the mix of
    all rows. Raise `ConfigError` if a part would be empty.
    """
    if not shares:
        return {"train": np.arange(len(group_of))}
    unit_of, first = _units(group_of)
    order = np.lexsort((np.random.default_rng([seed, 7]).random(len(first)), stratum_of[first]))
    part = np.zeros(len(first), np.int8)
    left, remaining = order, 1.0
    for number, share in enumerate(shares.values(), 1):
        ratio = min(share / remaining, 1.0) if remaining > 0 else 1.0
        # The rounded number of units taken so far; where it grows, the part takes a unit. 1e-9: halves round down.
        turn = np.floor((np.arange(len(left)) + 1) * ratio + 0.5 - 1e-9)
        taken = np.diff(turn, prepend=np.floor(0.5 - 1e-9)) > 0
        part[left[taken]] = number
        left, remaining = left[~taken], remaining - share
    names = ("train", *shares)
    part_of = part[unit_of]
    out = {name: np.flatnonzero(part_of == number) for number, name in enumerate(names)}
    empty = [name for name, positions in out.items() if not len(positions)]
    if empty:
        raise ConfigError(
            f"data: {len(first)} rows (or groups of rows) cannot be split into {', '.join(names)} with shares "
            f"{dict(shares)}: {empty[0]} would be empty. Use another share, or a file of its own."
        )
    return out


def _units(group_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each row's unit, a group or a row without one, and each unit's first row.

    Units are numbered in the order of their first rows, which the draw of the parts depends on.
    """
    grouped = np.flatnonzero(group_of >= 0)
    if not len(grouped):
        return (rows := np.arange(len(group_of))), rows
    codes = group_of[grouped]
    if codes.max() > 2 * len(group_of):  # codes of other rows too, such as those of a larger file
        codes = np.unique(codes, return_inverse=True)[1]
    first_of = np.full(int(codes.max()) + 1, len(group_of), np.int64)
    np.minimum.at(first_of, codes, grouped)
    leader = np.arange(len(group_of))  # the first row of each row's unit
    leader[grouped] = first_of[codes]
    first = np.flatnonzero(leader == np.arange(len(group_of)))
    number = np.empty(len(group_of), np.int64)
    number[first] = np.arange(len(first))
    return number[leader], first
