"""`ray-vlm runs`: look at finished, failed and living runs, and compare them. Reads run folders, or a
`training_log.json` alone, and nothing else."""

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
    every = actions.add_parser("list", help="all runs under a folder, or of a sweep, the newest first")
    every.add_argument(
        "folder", nargs="?", default=_OUTPUTS, help=f"a folder, or a sweep in {_OUTPUTS}/ (default: {_OUTPUTS})"
    )
    every.set_defaults(verb=_list)
    _action(actions, "show", "one screen on a run", _show, many=False)
    plot = _action(actions, "plot", "curves of one or several runs on one picture", _plot, many=True)
    plot.add_argument("--metric", action="append", default=[], metavar="NAME", help="draw this number; may be repeated")
    plot.add_argument(
        "--output",
        metavar="PATH",
        help=".png or .svg; in a folder, such as plots/, both, named by the runs (default: both, beside the first run)",
    )
    export = _action(actions, "export", "a run's numbers as a table", _export, many=False)
    export.add_argument(
        "--csv",
        nargs="?",
        const="",
        metavar="PATH",
        help="where to: a file, a folder, or - for the terminal (default: metrics.csv in the run)",
    )
    cost = _action(actions, "compute", "what runs cost: hours, tokens, FLOPs, where the time went", _compute, many=True)
    cost.add_argument("--json", metavar="PATH", help="also everything as JSON")
    compare = _action(actions, "compare", "settings that differ, and metrics side by side", _compare, many=True)
    compare.add_argument(
        "--html",
        nargs="?",
        const="",
        metavar="PATH",
        help="also a page with curves and images: a file, or a folder (default: compare-A-vs-B.html beside the first)",
    )


def _action(
    actions: argparse._SubParsersAction, name: str, text: str, run: object, many: bool
) -> argparse.ArgumentParser:
    action = actions.add_parser(name, help=text)
    if many:
        told = f"run folders, files training_log.json, or names in {_OUTPUTS}/"
        action.add_argument("runs", nargs="+", metavar="RUN", help=told)
    else:
        told = f"a run folder, a file training_log.json, or a name in {_OUTPUTS}/"
        action.add_argument("run", metavar="RUN", help=told)
    action.set_defaults(verb=run)
    return action


def find_run(name: str) -> str:
    """The address of a run: `name` itself where that is a path, or one of that name in the usual folder, also a trial
    of a sweep where no other has its name. What is not found is returned as it is."""
    from ray_vlm.runs.read import find_runs
    from ray_vlm.runs.store import is_remote

    here, inside = Path(name), Path(_OUTPUTS) / name
    if is_remote(name) or name.startswith(("file://", "~")) or here.is_file() or here.is_absolute():
        return name
    if inside.exists() and not (here.is_dir() and find_runs(name)):  # a folder of data may have the same name
        return str(inside)
    if not here.exists():
        named = [address for address in find_runs(_OUTPUTS) if address.endswith(f"/{name}")]
        return named[0] if len(named) == 1 else name
    return name


def _read(name: str) -> "Run":
    """The run. Raises `RunError` that says where it was looked for."""
    from ray_vlm.errors import RunError
    from ray_vlm.runs.read import complete_log, find_runs, is_log, read_run
    from ray_vlm.runs.store import is_remote, local_path

    address = find_run(name)
    if not is_remote(address) and not Path(local_path(address)).exists():
        raise RunError(
            f"{name}: no run here: there is no such file or folder, nor a run of that name in {_OUTPUTS}/. "
            "`ray-vlm runs list` shows those that there are; give the path of one that lies elsewhere."
        )
    try:
        run = read_run(address)
    except RunError:
        if inside := [] if is_log(address) else find_runs(address):
            raise RunError(
                f"{address} is a folder of {len(inside)} runs: `ray-vlm runs list {name}` shows them. Give one of "
                f"them, such as {inside[0]}."
            ) from None
        raise
    complete_log(run)
    return run


def _read_all(names: Sequence[str]) -> "list[Run]":
    """All runs, of a folder of runs each in it; every one that cannot be read is named at once."""
    from ray_vlm.errors import RunError
    from ray_vlm.runs.read import find_runs, is_log

    runs, problems = [], []
    gc.disable()  # it would look at half a million lines again and again: a fifth of the time
    for name in names:
        try:
            address = find_run(name)
            found = [] if is_log(address) else find_runs(address)
            runs += [_read(each) for each in found or [name]]
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

    folder = find_run(args.folder)
    runs = [read_run(address) for address in find_runs(folder)]
    here = os.getcwd() + os.sep
    also = "" if args.folder == _OUTPUTS else f", nor in {_OUTPUTS}/ under that name"
    print(describe_runs(runs, here) if runs else f"no runs under {folder}{also}; `ray-vlm train JOB` makes one")


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
    from ray_vlm.runs.compare import join_titles

    forms = ("png", "svg")
    if output is None:
        return [(_beside(runs, "plot", form), form) for form in forms]
    if _is_folder(output):
        return [(str(Path(output) / f"{join_titles(runs)}.{form}"), form) for form in forms]
    form = Path(output).suffix.lower().removeprefix(".")
    if form not in forms:
        raise ConfigError(
            f"--output {output}: its name ends in neither .png nor .svg. Give such a file, or a folder: {output}/"
        )
    return [(output, form)]


def _is_folder(output: str) -> bool:
    """Whether a place for results is a folder: one that is there, or that is written as one."""
    return output.endswith(("/", os.sep)) or Path(output).is_dir()


def _beside(runs: "Sequence[Run]", stem: str, ending: str) -> str:
    """In the folder of the one run, or beside the first of several and named by them; in the current folder for one
    kept elsewhere. Beside a `training_log.json` it has the log's name."""
    from ray_vlm.runs.compare import join_titles
    from ray_vlm.runs.store import is_remote

    first = runs[0]
    if len(runs) > 1:
        folder, name = Path(first.folder) if first.log else Path(first.address).parent, f"{stem}-{join_titles(runs)}"
    elif first.log:
        folder, name = Path(first.folder), f"{Path(first.address.partition('?')[0]).stem}-{stem}"
    else:
        folder, name = Path(first.address), stem
    return f"{name}.{ending}" if is_remote(first.address) else str(folder / f"{name}.{ending}")


def _export(args: argparse.Namespace) -> None:
    from ray_vlm.runs.compare import join_titles
    from ray_vlm.runs.export import write_table

    run = _read(args.run)
    if args.csv == "-":
        sys.stdout.write(write_table(run))
        return
    place = args.csv or _beside([run], "metrics", "csv")
    place = str(Path(place) / f"{join_titles([run])}.csv") if _is_folder(place) else place
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
    from ray_vlm.runs.compare import compare_runs, describe_comparison, join_titles

    runs = _read_all(args.runs)
    comparison = compare_runs(runs)
    print(describe_comparison(comparison))
    if args.html is not None:
        from ray_vlm.evaluate.compare import write_comparison

        place = args.html or _beside([*runs, *runs[: len(runs) == 1]], "compare", "html")
        place = str(Path(place) / f"compare-{join_titles(runs)}.html") if _is_folder(place) else place
        _write(place, write_comparison(runs, comparison).encode())
        print(f"\npage: {place}")


def _write(place: str, data: bytes) -> None:
    from ray_vlm.errors import RunError

    try:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).write_bytes(data)
    except OSError as error:
        raise RunError(f"{place} cannot be written ({error}). Give another place.") from None
