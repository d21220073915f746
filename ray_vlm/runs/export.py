"""A run's numbers as a table: one row for each current line of `metrics.jsonl`, one column for each number."""

import csv
import io
from typing import Any

from ray_vlm.runs.read import Run

_FIRST = ("kind", "attempt", "step", "epoch", "time")
_KINDS = ("train", "epoch", "eval", "checkpoint")


def write_table(run: Run) -> str:
    """Return the table as CSV. Cells of missing and non-finite numbers are empty."""
    lines = [line for line in run.current if line["kind"] in _KINDS]
    names = [*_FIRST, *sorted({key for line in lines for key in line} - set(_FIRST))]
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(names)
    table.writerows([_cell(line.get(name)) for name in names] for line in lines)
    return out.getvalue()


def _cell(value: Any) -> Any:
    return "" if value is None else value
