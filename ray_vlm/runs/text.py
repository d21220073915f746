"""Numbers, times and tables for a terminal. What came from files is shown without control characters."""

import time
import unicodedata
from collections.abc import Sequence
from typing import Any

_WIDEST = 48  # characters of a cell


def plain_text(text: str) -> str:
    """The text with every control character as `?`: a terminal would obey them."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c for c in text)


def format_number(value: float | None) -> str:
    """A number in few characters; `-` for none."""
    if value is None:
        return "-"
    if isinstance(value, int) or (abs(value) >= 1000 and float(value).is_integer()):
        return f"{value:,.0f}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def format_setting(value: object) -> str:
    """A setting in few characters; `-` for null."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value is None else plain_text(str(value).replace("'", ""))


def format_duration(seconds: float) -> str:
    """A duration: 42 s, 12:05 min, 3:07 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def format_date(seconds: float | None) -> str:
    """A moment, in local time; `-` for none."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as aligned columns, the first to the left, the others to the right."""
    cells = [[_short(plain_text(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *rest = (
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def _short(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST // 2 - 2]}...{text[-(_WIDEST // 2 - 1) :]}"


def plural(number: Any, word: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {word}{'' if number == 1 else 's'}"
