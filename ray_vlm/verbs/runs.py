"""`ray-vlm runs`: look at finished, failed and living runs, and compare them. Reads run folders and nothing else."""

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray_vlm.runs.read import Run

_OUTPUTS = "outputs"  # where a run is looked for by its name


def add_runs_verbs(verbs: argparse._SubParsersAction) -> None:
    """`ray-vlm runs list|show|plot|export|compute|compare`."""
    runs = verbs.add_parser("runs", help="look at runs: list, show, plot, export, compute, compare")
    actions = runs.add_subparsers(metavar="ACTION", required=True)
    every = actions.add_parser("list", help="all runs under a folder, the newest first")
    every.add_argument("folder", nargs="?", default=_OUTPUTS, help=f"default: {_OUTPUTS}")
    every.set_defaults(verb=_list)
    _action(actions, "show", "one screen on a run", _show, many=False)
    plot = _action(actions, "plot", "curves of one or several runs on one picture", _plot, many=True)
    plot.add_argument("--metric", action="append", default=[], metavar="NAME", help="draw this number; may be repeated")
    plot.add_argument("--output", metavar="PATH", help=".png or .svg (default: both, beside the first run's numbers)")
    export = _action(actions, "export", "a run's numbers as a table", _export, many=False)
    export.add_argument(
        "--csv",
        nargs="?",
        const="",
        metavar="PATH",
        help="where to (default: metrics.csv in the run); - is the terminal",
    )
    cost = _action(actions, "compute", "what runs cost: hours, tokens, FLOPs, where the time went", _compute, many=True)
    cost.add_argument("--json", metavar="PATH", help="also everything as JSON")
    compare = _action(actions, "compare", "settings that differ, and metrics side by side", _compare, many=True)
    compare.add_argument(
        "--html",
        nargs="?",
        const="",
        metavar="PATH",
        help="also a page with curves and images (default: compare-A-B.html)",
    )


def _action(
    actions: argparse._SubParsersAction, name: str, text: str, run: object, many: bool
) -> argparse.ArgumentParser:
    action = actions.add_parser(name, help=text)
    if many:
        action.add_argument("runs", nargs="+", metavar="RUN", help=f"run folders, or names in {_OUTPUTS}/")
    else:
        action.add_argument("run", metavar="RUN", help=f"a run folder, or a name in {_OUTPUTS}/")
    action.set_defaults(verb=run)
    return action


def find_run(name: str) -> str:
    """The address of a run: a path, or the name of one in the usual folder."""
    inside = Path(_OUTPUTS) / name
    return str(inside) if not Path(name).exists() and inside.is_dir() else name


def _read(name: str) -> "Run":
    from ray_vlm.runs.read import read_run

    return read_run(find_run(name))


def _read_all(names: Sequence[str]) -> "list[Run]":
    """All runs, of a folder of runs each in it; every one that cannot be read is named at once."""
    from ray_vlm.errors import RunError
    from ray_vlm.runs.read import find_runs, read_run

    runs, problems = [], []
    gc.disable()  # it would look at half a million lines again and again: a fifth of the time
    for name in names:
        try:
            runs += [read_run(address) for address in find_runs(find_run(name))] or [_read(name)]
        except RunError as error:
            problems += error.problems
    gc.freeze()
    gc.enable()
    if problems:
        raise RunError(problems)
    return runs


def _list(args: argparse.Namespace) -> None:
    from ray_vlm.runs.read import find_runs, read_run
    from ray_vlm.runs.show import describe_runs

    runs = [read_run(address) for address in find_runs(args.folder)]
    here = os.getcwd() + os.sep
    print(describe_runs(runs, here) if runs else f"no runs under {args.folder}; `ray-vlm train JOB` makes one")


def _show(args: argparse.Namespace) -> None:
    from ray_vlm.runs.show import describe_run

    print(describe_run(_read(args.run)))


def _plot(args: argparse.Namespace) -> None:
    from ray_vlm.runs.compare import run_titles
    from ray_vlm.runs.plot import plot_runs

    runs = _read_all(args.runs)
    for place, form in _pictures(args.output, runs):
        _write(place, plot_runs(runs, run_titles(runs), args.metric, form))
        print(f"picture: {place}")


def _pictures(output: str | None, runs: "Sequence[Run]") -> list[tuple[str, str]]:
    """Where each picture goes, and its form."""
    from ray_vlm.errors import ConfigError

    if output is None:
        return [(_beside(runs, f"plot.{form}"), form) for form in ("png", "svg")]
    form = Path(output).suffix.lower().removeprefix(".")
    if form not in ("png", "svg"):
        raise ConfigError(f"--output {output}: its name ends in neither .png nor .svg.")
    return [(output, form)]


def _beside(runs: "Sequence[Run]", name: str) -> str:
    """In the folder of the one run, or beside the first of several; in the current folder for one kept elsewhere."""
    from ray_vlm.runs.store import is_remote

    first = runs[0].address
    if is_remote(first):
        return name
    return str((Path(first) if len(runs) == 1 else Path(first).parent) / name)


def _export(args: argparse.Namespace) -> None:
    from ray_vlm.runs.export import write_table

    run = _read(args.run)
    if args.csv == "-":
        sys.stdout.write(write_table(run))
        return
    place = args.csv or _beside([run], "metrics.csv")
    _write(place, write_table(run).encode())
    print(f"table: {place}")


def _compute(args: argparse.Namespace) -> None:
    import json

    from ray_vlm.runs.compare import run_titles
    from ray_vlm.runs.compute import measure_compute, sum_compute, write_markdown

    runs = _read_all(args.runs)
    found = [measure_compute(run) for run in runs]
    titles = list(run_titles(runs))
    if len(runs) > 1:
        found.append(sum_compute(runs, found))
        titles = [*titles, "all"]
    print(write_markdown(titles, found), end="")
    if args.json:
        told = dict(zip(titles, found, strict=True))
        _write(args.json, (json.dumps(told, indent=1) + "\n").encode())


def _compare(args: argparse.Namespace) -> None:
    from ray_vlm.runs.compare import compare_runs, describe_comparison

    runs = _read_all(args.runs)
    comparison = compare_runs(runs)
    print(describe_comparison(comparison))
    if args.html is not None:
        from ray_vlm.evaluate.compare import write_comparison

        place = args.html or _beside([*runs, *runs], _name_page([run.name for run in runs]))
        _write(place, write_comparison(runs, comparison).encode())
        print(f"\npage: {place}")


def _name_page(names: Sequence[str]) -> str:
    """Pages of other runs have other names, so that they do not overwrite one another."""
    more = f"-and-{len(names) - 3}-more" if len(names) > 3 else ""
    return f"compare-{'-'.join(names[:3])[:200]}{more}.html"


def _write(place: str, data: bytes) -> None:
    from ray_vlm.errors import RunError

    try:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).write_bytes(data)
    except OSError as error:
        raise RunError(f"{place} cannot be written ({error}). Give another place.") from None
