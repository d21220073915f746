"""A file of figures that is written as they come: whatever ends the benchmark, earlier measurements stay."""

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.figures import figure
from ray_vlm.runs.paths import write_json

ALLOCATED = ": ours, allocated at the peak"  # ends the name of what is compared with a plan
ABOVE, BELOW = 0.05, 0.03  # a plan may be so much over the measured peak, and so much under it
GIB = 2**30


class FigureFile:
    """A JSON list of figures in the format of the other benchmarks; the complete file is rewritten with each figure.

    Every figure has the usual keys, and in addition `block` and, if there is a remark, `note`.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[dict[str, Any]]:
        """Return all figures so far."""
        return json.loads(self.path.read_text()) if self.path.exists() else []

    def clear(self) -> None:
        """Remove all figures."""
        write_json(self.path, [])

    def add(
        self,
        block: str,
        name: str,
        value: float,
        unit: str,
        bar: float | None = None,
        most: bool = True,
        note: str = "",
    ) -> None:
        """Write a figure. `bar` as in `benchmarks.figures.figure`; a value that is not finite becomes None and misses
        it."""
        result = figure(name, value, unit, bar, most) | {"block": block}
        if not math.isfinite(value):
            result |= {"value": None, "ok": bar is None}
        write_json(self.path, [*self.read(), result | ({"note": note} if note else {})])

    def fail(self, block: str, reason: str) -> None:
        """Write that a block did not finish, and why."""
        self.add(block, "ended as planned", 0, "", 1, most=False, note=reason)


def write_plans(figures: FigureFile, plans: dict[str, dict[str, Any]], bars: bool) -> None:
    """Write the plan of each case beside its measurement. `bars`: whether the shapes are those that the bars apply
    to."""
    for measured in figures.read():
        case, block = measured["name"].removesuffix(ALLOCATED), measured["block"]
        if case == measured["name"] or measured["value"] is None:
            continue
        if case not in plans:
            figures.add(block, f"{case}: planned", float("nan"), "GiB", note="the planner was not done")
            continue
        planned = plans[case]["allocated"] / GIB
        apart = planned / measured["value"] - 1
        figures.add(block, f"{case}: planned, allocated", planned, "GiB")
        figures.add(block, f"{case}: planned over measured", apart, "relative", ABOVE if bars else None)
        figures.add(block, f"{case}: planned under measured", -apart, "relative", BELOW if bars else None)


def write_table(figures: list[dict[str, Any]]) -> str:
    """Format all figures as a table, block by block."""
    blocks = list(dict.fromkeys(entry["block"] for entry in figures))
    figures = sorted(figures, key=lambda entry: blocks.index(entry["block"]))
    names = [f"{entry['block']}: {entry['name']}" for entry in figures]
    width = max(map(len, names), default=0)
    lines = []
    for name, entry in zip(names, figures, strict=True):
        value = "-" if entry["value"] is None else f"{entry['value']:.4g}"
        bar = "" if entry["bar"] is None else f"bar {entry['bar']:g} {'ok' if entry['ok'] else 'MISSED'}"
        lines.append(f"{name:<{width}}  {value:>10} {entry['unit']:<9} {bar} {entry.get('note', '')}".rstrip())
    return "\n".join(lines)
