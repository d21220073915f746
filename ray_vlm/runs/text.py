"""Numbers, times and tables for a terminal. Text from files is shown without control characters."""

import time
import unicodedata
from collections.abc import Sequence

_WIDEST = 48  # characters of a cell


def plain_text(text: str) -> str:
    """Return the text with every control character as `?`, because a terminal would execute them."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c for c in text)


def format_number(value: float | None) -> str:
    """Format a number in few characters; `-` for None."""
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def format_setting(value: object) -> str:
    """Format a setting in few characters; `-` for None."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value is None else plain_text(str(value).replace("'", ""))


def format_duration(seconds: float) -> str:
    """Format a duration: 42 s, 12:05 min, 3:07 h."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60}:{total % 60:02d} min"
    return f"{total // 3600}:{total % 3600 // 60:02d} h"


def format_date(seconds: float | None) -> str:
    """Format seconds since 1970 in local time; `-` for None."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of equal length as columns, the first aligned to the left, the others to the right."""
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


def plural(number: int | str, word: str) -> str:
    """Return `1 step`, `2 steps`."""
    return f"{number} {word}{'' if number == 1 else 's'}"
