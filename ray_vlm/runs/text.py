"""Numbers, times and tables for a terminal. Text from files is shown without control characters."""

import time
import unicodedata
from collections.abc import Collection, Sequence

from ray_vlm.logs import terminal_columns

_WIDEST = 48  # characters of a cell


def plain_text(text: str) -> str:
    """Return the text with every control character as `?`, because a terminal would execute them."""
    if text.isprintable():
        return text
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


def format_table(
    rows: Sequence[Sequence[str]], left: Collection[int] = (0,), longest: int = _WIDEST, heads: int = 1
) -> str:
    """Format rows of equal length as columns: those in `left` aligned to the left, the others to the right.

    On a terminal that is too narrow each row is a list of its cells by name. `heads`: rows of names above the others;
    `longest`: characters of a cell, of which the middle is left out beyond.
    """
    cells = [[_short(plain_text(cell), longest) for cell in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) > (columns := terminal_columns()):
        names = [" ".join(filter(None, column)) for column in zip(*cells[:heads], strict=True)]
        return "\n".join([names[0], *(_format_list(row, names, columns) for row in cells[heads:])])
    lines = []
    for row in cells:
        pads = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        columns_of_row = [cell + pads[i] if i in left else pads[i] + cell for i, cell in enumerate(row)]
        lines.append("  ".join(columns_of_row).rstrip())
    return "\n".join(lines)


def _format_list(row: Sequence[str], names: Sequence[str], columns: int) -> str:
    import textwrap

    # Spaces inside an item must not be broken.
    named = [f"{name}: {cell}" if name else cell for name, cell in zip(names[1:], row[1:], strict=True) if cell]
    items = [item.replace(" ", "\xa0") for item in named]
    text = textwrap.fill(", ".join(items), max(8, columns - 4), break_long_words=False, break_on_hyphens=False)
    return f"{row[0]}\n{textwrap.indent(text, '    ')}".replace("\xa0", " ")


def _width(text: str) -> int:
    """Return the columns of a text in a terminal, where Chinese, Japanese and Korean characters take two."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest // 2 - 2]}...{text[-(longest // 2 - 1) :]}"


def format_markdown(rows: Sequence[Sequence[object]], numbers: bool = False) -> str:
    """Format rows, of which the first is the head, as a Markdown table. `numbers`: all columns but the first are
    aligned to the right."""
    lines = ["".join(f"| {plain_markdown(cell)} " if cell != "" else "| " for cell in row) + "|" for row in rows]
    rule = "|---" + ("|---:" if numbers else "|---") * (len(rows[0]) - 1) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def plain_markdown(value: object) -> str:
    """Return text that cannot break out of a cell of a table or become markup."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def plural(number: int | str, word: str) -> str:
    """Return `1 step`, `2 steps`."""
    return f"{number} {word}{'' if number == 1 else 's'}"
