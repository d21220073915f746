"""`ray-vlm runs` shows, plots and compares finished, failed and active runs; `ray-vlm export` writes their weights.

`runs` reads only run folders, or a `training_log.json` alone.
"""

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ray_vlm.cli.parser import RunVerb

if TYPE_CHECKING:
    from ray_vlm.runs.read import Run

_OUTPUTS = "outputs"  # the folder in which a run is looked up by its name


def add_runs_verbs(verbs: argparse._SubParsersAction) -> None:
    """Add `ray-vlm runs list|show|plot|export|compute|compare`."""
    runs = verbs.add_parser("runs", help="list, show, plot, export and compare runs, and compute their cost")
    actions = runs.add_subparsers(metavar="ACTION", required=True)
    every = actions.add_parser("list", help="all runs in a folder or of a sweep, the newest first")
    every.add_argument(
        "folder", nargs="?", default=_OUTPUTS, help=f"a folder, or a sweep in {_OUTPUTS}/ (default: {_OUTPUTS})"
    )
    every.set_defaults(verb=_list)
    _action(actions, "show", "one screen about a run", _show, many=False)
    plot = _action(actions, "plot", "curves of one or several runs on one picture", _plot, many=True)
    plot.add_argument("--metric", action="append", default=[], metavar="NAME", help="draw this number; may be repeated")
    plot.add_argument(
        "--output",
        metavar="PATH",
        help=".png or .svg; in a folder, such as plots/, both, named by the runs (default: both, beside the first run)",
    )
    export = _action(actions, "export", "a run's numbers as a table", _export, many=False)
    _add_optional_path(export, "--csv", "a file, a folder, or - for the terminal (default: metrics.csv in the run)")
    cost = _action(actions, "compute", "cost of runs: hours, tokens, FLOPs, time by activity", _compute, many=True)
    cost.add_argument("--json", metavar="PATH", help="also write all of it as JSON")
    compare = _action(actions, "compare", "settings that differ, and metrics side by side", _compare, many=True)
    where = "a file, or a folder (default: compare-A-vs-B.html beside the first)"
    _add_optional_path(compare, "--html", f"also a page with curves and images: {where}")


def _add_optional_path(action: argparse.ArgumentParser, option: str, text: str) -> None:
    """Add an option whose value is a path; without a value it is False. `text`: its help."""
    action.add_argument(option, nargs="?", const=False, metavar="PATH", help=text)


def _action(
    actions: argparse._SubParsersAction, name: str, text: str, run: RunVerb, many: bool
) -> argparse.ArgumentParser:
    action = actions.add_parser(name, help=text)
    if many:
        text = f"run folders, files training_log.json, or names in {_OUTPUTS}/"
        action.add_argument("runs", nargs="+", metavar="RUN", help=text)
    else:
        text = f"a run folder, a file training_log.json, or a name in {_OUTPUTS}/"
        action.add_argument("run", metavar="RUN", help=text)
    action.set_defaults(verb=run)
    return action


def find_run(name: str) -> str:
    """Return the path or URI of a run. `name` is one itself, the name of a run in `outputs/`, or the name of a trial
    there if only one has it. A name that matches nothing is returned unchanged."""
    from ray_vlm.runs.read import find_runs
    from ray_vlm.storage import is_remote

    direct, inside = Path(name), Path(_OUTPUTS) / name
    if is_remote(name) or name.startswith(("file://", "~")) or direct.is_file() or direct.is_absolute():
        return name
    if inside.exists() and not (direct.is_dir() and find_runs(name)):  # a folder of data may have the same name
        return str(inside)
    if not direct.exists():
        named = [address for address in find_runs(_OUTPUTS) if address.endswith(f"/{name}")]
        return named[0] if len(named) == 1 else name
    return name


def _read(name: str) -> "Run":
    """Read a run. Raises `RunError` with the folders in which it was looked for."""
    from ray_vlm.errors import RunError
    from ray_vlm.runs.read import complete_log, find_runs, is_log, read_run
    from ray_vlm.storage import is_remote, local_path

    address = find_run(name)
    if not is_remote(address) and not Path(local_path(address)).exists():
        raise RunError(
            f"{name}: no run here: there is no such file or folder, nor a run of that name in {_OUTPUTS}/. "
            "`ray-vlm runs list` shows the runs there; give the path of a run elsewhere."
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
    """Read all runs; a folder of runs stands for each run in it. Raises `RunError` with every run that fails."""
    from ray_vlm.errors import RunError
    from ray_vlm.runs.read import find_runs, is_log

    runs, problems = [], []
    gc.disable()  # it would repeatedly scan half a million records, a fifth of the time
    for name in names:
        try:
            address = find_run(name)
            inside = [] if is_log(address) else find_runs(address)
            runs += [_read(each) for each in inside or [name]]
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
    for path, form in _pictures(args.output, runs):
        _write(path, plot_runs(runs, run_titles(runs), args.metric, form))
        print(f"picture: {path}")


def _pictures(output: str | None, runs: "Sequence[Run]") -> list[tuple[str, str]]:
    """Return the path and the format of each picture."""
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
    """Whether an output path is a folder: an existing one, or one written with a slash at its end."""
    return output.endswith(("/", os.sep)) or Path(output).is_dir()


def _beside(runs: "Sequence[Run]", stem: str, ending: str) -> str:
    """Return the default path of an output: in the folder of a single run, or beside the first of several and named
    after them. Beside a `training_log.json` it has the log's name; for a remote run it is in the current folder."""
    from ray_vlm.runs.compare import join_titles
    from ray_vlm.storage import is_remote, split_address

    first = runs[0]
    if len(runs) > 1:
        folder, name = Path(first.folder) if first.log else Path(first.address).parent, f"{stem}-{join_titles(runs)}"
    elif first.log:
        folder, name = Path(first.folder), f"{Path(split_address(first.address)[1]).stem}-{stem}"
    else:
        folder, name = Path(first.address), stem
    return f"{name}.{ending}" if is_remote(first.address) else str(folder / f"{name}.{ending}")


def _export(args: argparse.Namespace) -> None:
    from ray_vlm.runs.compare import join_titles
    from ray_vlm.runs.show import write_table

    run = _read(args.run)
    if args.csv == "-":
        sys.stdout.write(write_table(run))
        return
    path = args.csv or _beside([run], "metrics", "csv")
    path = str(Path(path) / f"{join_titles([run])}.csv") if _is_folder(path) else path
    _write(path, write_table(run).encode())
    print(f"table: {path}")


def _compute(args: argparse.Namespace) -> None:
    import json

    from ray_vlm.runs.compare import run_titles
    from ray_vlm.runs.compute import measure_compute, sum_compute, write_markdown

    runs = _read_all(args.runs)
    costs = [measure_compute(run) for run in runs]
    titles = list(run_titles(runs))
    if len(runs) > 1:
        costs.append(sum_compute(runs, costs))
        titles = [*titles, "all"]
    print(write_markdown(titles, costs), end="")
    if args.json:
        by_title = dict(zip(titles, costs, strict=True))
        _write(args.json, (json.dumps(by_title, indent=1) + "\n").encode())


def _compare(args: argparse.Namespace) -> None:
    from ray_vlm.config.load import fill_defaults
    from ray_vlm.runs.compare import compare_runs, describe_comparison, join_titles

    # Earlier versions wrote fewer settings, or those of all methods: neither is a difference between runs.
    runs = [replace(run, job=fill_defaults(dict(run.job))) for run in _read_all(args.runs)]
    comparison = compare_runs(runs)
    print(describe_comparison(comparison))
    if args.html is not None:
        from ray_vlm.evaluate.compare import write_comparison

        path = args.html or _beside([*runs, *runs[: len(runs) == 1]], "compare", "html")
        path = str(Path(path) / f"compare-{join_titles(runs)}.html") if _is_folder(path) else path
        _write(path, write_comparison(runs, comparison).encode())
        print(f"\npage: {path}")


def _write(path: str, data: bytes) -> None:
    from ray_vlm.errors import RunError

    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error}). Give another path.") from None


def add_export_verb(verbs: argparse._SubParsersAction) -> None:
    """Add `ray-vlm export RUN|SWEEP [--merged]`."""
    export = verbs.add_parser("export", help="a run's adapter with a model card, or merged into one model")
    export.add_argument(
        "run", metavar="RUN", help="a run, or a sweep for its best trial: a folder, or a name in outputs/"
    )
    export.add_argument("--merged", action="store_true", help="one model, merged into the base without quantisation")
    export.add_argument("--weights", choices=["best", "final"], help="default: best, or final where there is no best")
    export.add_argument(
        "--precision", choices=["bf16", "fp16", "fp32"], help="of a merged model (default: the run's train.precision)"
    )
    export.add_argument("--output", metavar="FOLDER", help="a new folder (default: export/ in the run)")
    export.set_defaults(verb=_export_run)


def _export_run(args: argparse.Namespace) -> None:
    from ray_vlm.evaluate.export import export_run
    from ray_vlm.tune.sweep import find_best

    run = find_best(find_run(args.run))
    export_run(run, args.output, args.merged, args.weights, precision=args.precision)
