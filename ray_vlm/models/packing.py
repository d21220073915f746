"""Which rows lie behind one another, so that few positions of a batch hold nothing."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Folding:
    """`share`: rows that begin alike go through their beginning once. `pack`: short rows lie behind one another."""

    share: bool = False
    pack: bool = False


def plan_packs(sizes: Sequence[int]) -> list[list[int]]:
    """Numbers of rows, pack by pack, no pack longer than the longest row.

    The largest first, each where it leaves the least room (best-fit decreasing; Johnson 1973).
    """
    width = max(sizes)
    packs: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        fitting = [(left, i) for i, left in enumerate(room) if left >= sizes[number]]
        if fitting:
            _, best = min(fitting)
            packs[best].append(number)
            room[best] -= sizes[number]
        else:
            packs.append([number])
            room.append(width - sizes[number])
    return packs
