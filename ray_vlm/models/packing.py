"""Pack short rows into longer ones, so that a batch has little padding."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

_WIDEST = 8192  # tokens of a pack: its mask has a value for every pair of them


@dataclass(frozen=True)
class PackingOptions:
    """`share`: rows with a common prefix compute it once. `pack`: short rows are concatenated. `hidden`: width of the
    language model, which determines the share of attention in the cost."""

    share: bool = False
    pack: bool = False
    hidden: int = 4096


def plan_packs(sizes: Sequence[int], hidden: int) -> list[list[int]]:
    """Return the numbers of the rows of each pack, for the number of packs that costs least.

    Rows are assigned the largest first, each to the shortest pack (Graham 1969), so packs have similar lengths.
    Attention adds `length / (6 hidden)` to the cost of a token: a layer has 12 `hidden`^2 weights, and attention covers
    the whole pack.
    """
    ranked = sorted(range(len(sizes)), key=lambda n: (-sizes[n], n))
    most = max(max(sizes), _WIDEST)
    candidates = [_deal(sizes, ranked, count) for count in range(1, len(sizes) + 1)]
    costs = [(_cost(sizes, packs, hidden), packs) for packs in candidates]
    return min((cost, packs) for (cost, width), packs in costs if width <= most)[1]


def _deal(sizes: Sequence[int], ranked: Sequence[int], count: int) -> list[list[int]]:
    packs: list[list[int]] = [[] for _ in range(count)]
    lengths = [(0, number) for number in range(count)]
    for row in ranked:
        length, number = heapq.heappop(lengths)
        packs[number].append(row)
        heapq.heappush(lengths, (length + sizes[row], number))
    return packs


def _cost(sizes: Sequence[int], packs: Sequence[Sequence[int]], hidden: int) -> tuple[float, int]:
    """Return the cost of the packs, and the tokens of the longest."""
    width = max(sum(sizes[row] for row in pack) for pack in packs)
    return len(packs) * width * (1 + width / (6 * hidden)), width
