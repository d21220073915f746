"""The output of every benchmark: a table for people, and with `--json PATH` a list of figures for programs."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def figure(name: str, value: float, unit: str, bar: float | None = None, most: bool = True) -> dict[str, Any]:
    """Return one measured number. `bar` is the highest allowed value (with `most=False`, the lowest); None: no bar."""
    ok = bar is None or (value <= bar if most else value >= bar)
    plain = value if isinstance(value, int) else float(value)  # numpy's numbers are none of JSON's
    return {"name": name, "value": plain, "unit": unit, "bar": bar, "ok": bool(ok)}


def report_against(compare: Callable[[Sequence[Path], bool], Sequence[dict[str, Any]]]) -> None:
    """Report the figures of `compare(checkouts, quick)`; the checkouts are given by `--against`, once for each."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--against", type=Path, action="append", default=[])
    own, rest = parser.parse_known_args()
    report(lambda quick: compare(own.against, quick), rest, about=sys.modules[compare.__module__].__doc__)


def report(
    measure: Callable[[bool], Sequence[dict[str, Any]]],
    argv: Sequence[str] | None = None,
    full: Callable[[], Sequence[dict[str, Any]]] | None = None,
    about: str | None = None,
) -> None:
    """Run `measure(quick)`, or `full()` for `--full`, print the figures, and exit with 1 if a bar is missed. `about`:
    the text of `--help`, by default that of the module of `measure`."""
    parser = argparse.ArgumentParser(description=about or sys.modules[measure.__module__].__doc__)
    parser.add_argument("--quick", action="store_true", help="a shorter run")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    if full is not None:
        parser.add_argument("--full", action="store_true", help="the whole of it; may take an hour")
    args = parser.parse_args(argv)
    figures = list(full() if full is not None and args.full else measure(args.quick))
    width = max(len(f["name"]) for f in figures)
    for f in figures:
        bar = "" if f["bar"] is None else f"bar {f['bar']:g}  {'ok' if f['ok'] else 'MISSED'}"
        print(f"{f['name']:<{width}}  {f['value']:>12.4g} {f['unit']:<8} {bar}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    raise SystemExit(0 if all(f["ok"] for f in figures) else 1)
