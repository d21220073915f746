"""Which rows lie behind one another, so that few positions of a batch hold nothing."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

_WIDEST = 8192  # tokens: the mask of a pack has a value for every two of them


@dataclass(frozen=True)
class PackingOptions:
    """`share`: rows that begin alike go through their beginning once. `pack`: short rows lie behind one another.
    `hidden`: width of the language model, by which attention is dear or cheap beside the rest."""

    share: bool = False
    pack: bool = False
    hidden: int = 4096


def plan_packs(sizes: Sequence[int], hidden: int) -> list[list[int]]:
    """Numbers of rows, pack by pack: of all numbers of packs the cheapest.

    Rows are dealt to packs the largest first, each to the shortest pack (Graham 1969): packs of like length. A token
    costs its pack's `length / (6 hidden)` of what it costs without attention: a layer has 12 `hidden`^2 weights, and
    attention looks at the whole pack.
    """
    ranked = sorted(range(len(sizes)), key=lambda n: (-sizes[n], n))
    most = max(max(sizes), _WIDEST)
    ways = [_deal(sizes, ranked, count) for count in range(1, len(sizes) + 1)]
    found = [(_cost(sizes, packs, hidden), packs) for packs in ways]
    return min((cost, packs) for (cost, width), packs in found if width <= most)[1]


def _deal(sizes: Sequence[int], ranked: Sequence[int], count: int) -> list[list[int]]:
    packs: list[list[int]] = [[] for _ in range(count)]
    lengths = [(0, number) for number in range(count)]
    for row in ranked:
        length, number = heapq.heappop(lengths)
        packs[number].append(row)
        heapq.heappush(lengths, (length + sizes[row], number))
    return packs


def _cost(sizes: Sequence[int], packs: Sequence[Sequence[int]], hidden: int) -> tuple[float, int]:
    """Of the packs, and tokens of the longest."""
    width = max(sum(sizes[row] for row in pack) for pack in packs)
    return len(packs) * width * (1 + width / (6 * hidden)), width
