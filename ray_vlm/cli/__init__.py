"""The command line `ray-vlm`. Nothing heavy is imported until a verb needs it, so `--help` is quick.

Exit codes: 0 success; 1 failure; 2 an invalid job or command line, nothing was started; 130 Ctrl-C; 141 the reader of
its output closed the pipe.
"""

import argparse
import json
import logging
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path

from ray_vlm import __version__
from ray_vlm.cli.cluster import add_jobs_verbs, add_submit_verb
from ray_vlm.cli.data import add_data_verbs
from ray_vlm.cli.memory import add_memory_verb
from ray_vlm.cli.parser import VerbParser, job_verb
from ray_vlm.cli.predict import add_predict_verb
from ray_vlm.cli.runs import add_export_verb, add_runs_verbs
from ray_vlm.cli.starter import add_starter_verbs
from ray_vlm.logs import TERMINAL

_READER_LEFT = 141  # a shell's exit code for a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code. If the reader of its output closes the pipe (`| head`), end quietly."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else list(argv))
        finally:
            sys.stdout.flush()  # a closed pipe is noticed here, not when Python exits
    except BrokenPipeError:
        if not _reader_left():
            raise
        return _READER_LEFT


def _reader_left() -> bool:
    """Whether the output's pipe is closed. If so, further output is discarded."""
    closed = [stream.fileno() for stream in (sys.stdout, sys.stderr) if _is_cut(stream.fileno())]
    devnull = os.open(os.devnull, os.O_WRONLY)
    for number in closed:
        os.dup2(devnull, number)
    os.close(devnull)
    return bool(closed)


def _is_cut(number: int) -> bool:
    """Whether the other end of a pipe is closed. A second write cannot tell: Python has dropped the failed buffer."""
    pipe = select.poll()
    pipe.register(number, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in pipe.poll(0))


def _run(arguments: Sequence[str]) -> int:
    args, rest = build_parser().parse_known_args(arguments)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        args.parser.refuse_unknown(rest)
    if rest:  # key=value after an option
        args.overrides = [*args.overrides, *rest]
    TERMINAL.setLevel(logging.DEBUG if "verbose" in args else logging.INFO)
    from ray_vlm.errors import Interrupted, RayVlmError

    try:
        if "RAY_VLM_SECRETS" in os.environ:  # this is the driver of a job that `submit` started
            from ray_vlm.cluster.environment import take_secrets

            take_secrets().apply()
        return args.verb(args) or 0
    except Interrupted as stop:
        print("\n".join(stop.problems), file=sys.stderr)
        return stop.exit_code
    except RayVlmError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class _Compatibility(argparse.Action):
    """Print the table and exit, as `--version` does: no job is needed."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> None:
        from ray_vlm.config.docs import describe_compatibility

        print("\n".join(describe_compatibility()))
        parser.exit()


def build_parser() -> VerbParser:
    """Build the parser of `ray-vlm` with all its verbs."""
    parser = VerbParser(
        prog="ray-vlm", description="Fine-tune vision-language models with 4-bit LoRA, on one core or a Ray cluster."
    )
    parser.add_argument("--version", action="version", version=f"ray-vlm {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    demo = verbs.add_parser("demo", help="watch a tiny model learn to find objects; a few minutes on a CPU")
    demo.add_argument("--output-dir", default="outputs", help="where the demo writes (default: outputs)")
    demo.add_argument("--all", action="store_true", help="continue with DPO and GRPO; 5 minutes in all")
    demo.set_defaults(verb=_demo)
    config = job_verb(verbs, "config", "print the resolved job with every default", _config)
    config.add_argument("--dry-run", action="store_true", help="first read the data, print the plan and first records")
    config.add_argument("--compatibility", action=_Compatibility, nargs=0, help="print what can be combined, and exit")
    add_computing_verbs(verbs)
    add_starter_verbs(verbs, build_parser)
    add_data_verbs(verbs)
    add_memory_verb(verbs)
    add_runs_verbs(verbs)
    add_submit_verb(verbs, add_computing_verbs)
    add_jobs_verbs(verbs)
    return parser


def add_computing_verbs(verbs: argparse._SubParsersAction) -> None:
    """Add the verbs that `ray-vlm submit` runs on a cluster, with the same arguments."""
    train = job_verb(verbs, "train", "run a job", _train)
    train.add_argument("--dry-run", action="store_true", help="print the plan, first records and the resolved job only")
    _add_existing_options(train, "run")
    evaluate = job_verb(verbs, "evaluate", "measure the base or an adapter on data.test", _evaluate)
    evaluate.add_argument(
        "--adapter",
        action="append",
        default=[],
        help="a run, its best/ or final/, an exported adapter or a whole model; may be repeated; without it, the base",
    )
    evaluate.add_argument("--base", action="store_true", help="beside adapters, also the base without an adapter")
    evaluate.add_argument("--base-unquantised", action="store_true", help="also the base without quantisation")
    evaluate.add_argument(
        "--output", help="folder for the results (default: beside the adapter, or <output_dir>/evaluate)"
    )
    evaluate.add_argument(
        "--both-memories",
        action="store_true",
        help="GUI steps: with earlier steps from the data and with the model's own, in one report",
    )
    evaluate.add_argument("--against", help="folder of another evaluation to show beside this one in report.html")
    pairs = job_verb(verbs, "pairs", "make preference data from a model's own answers", _pairs)
    pairs.add_argument("--output", required=True, metavar="PATH", help="the file of pairs, .jsonl")
    pairs.add_argument("--adapter", help="a run's best/ or final/ to sample (default: model.adapter, or the base)")
    pairs.add_argument("--part", choices=["train", "eval"], default="train", help="which rows (default: train)")
    pairs.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    add_predict_verb(verbs)
    tune = job_verb(verbs, "tune", "run trials of a job over a space of settings, and export the best", _tune)
    tune.add_argument("--space", required=True, metavar="FILE", help="the search space, a YAML file of tune_spaces/")
    _add_existing_options(tune, "sweep")
    add_export_verb(verbs)


def _add_existing_options(verb: argparse.ArgumentParser, what: str) -> None:
    """Add the options for a run or a sweep whose name exists already."""
    either = verb.add_mutually_exclusive_group()
    either.add_argument("--overwrite", action="store_true", help=f"delete the {what} of that name first")
    either.add_argument("--resume", action="store_true", help=f"continue the {what} of that name, or start it")


def _demo(args: argparse.Namespace) -> int:
    from ray_vlm.demo.story import run_demo

    return run_demo(Path(args.output_dir), whole=args.all)


def _config(args: argparse.Namespace) -> None:
    import yaml

    from ray_vlm.config.load import dump_job, load_job

    job = load_job(args.job, args.overrides)
    if args.dry_run:
        from ray_vlm.config.paths import absolute_paths
        from ray_vlm.data.inspect.preview import describe_prepared
        from ray_vlm.data.samples import load_sample_builder
        from ray_vlm.data.sources.detect import settle_formats
        from ray_vlm.train.prepare import prepare

        prepared = prepare(settle_formats(absolute_paths(job)))
        builder = load_sample_builder(prepared.spec)
        print(describe_prepared(prepared.train, prepared.plan, builder, prepared.balance, prepared.shuffle))
        print("\n".join(["", *(f"note: {note}" for note in prepared.notes), "# all settings, defaults written out"]))
    print(yaml.safe_dump(dump_job(job), sort_keys=False, allow_unicode=True), end="")


def _train(args: argparse.Namespace) -> None:
    if args.dry_run:
        return _config(args)
    from ray_vlm.models.libraries import no_garbage_collection

    with no_garbage_collection():
        from ray_vlm.config.load import load_job
        from ray_vlm.train.driver import train

    job = load_job(args.job, args.overrides)
    paths = train(job, Path(args.job).read_text(encoding="utf-8"), args.overwrite, resume=args.resume)
    result = json.loads(paths.run.read_text())["result"]
    best = f", best {paths.uri('best')}" if result.get("best") else ""
    print(f"run folder {paths.address}: final {paths.uri('final')}{best}")
    paths.discard()
    return None


def _evaluate(args: argparse.Namespace) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.evaluate.run import evaluate_and_report, plan_targets
    from ray_vlm.evaluate.weights import trained_weights

    job = load_job(args.job, args.overrides)
    adapters = [trained_weights(name) for name in args.adapter]
    targets = plan_targets(job, adapters, args.base, args.base_unquantised, args.both_memories)
    evaluate_and_report(targets, args.output, args.against)


def _pairs(args: argparse.Namespace) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.config.paths import absolute_paths
    from ray_vlm.data.sources.detect import settle_formats
    from ray_vlm.evaluate.pairs import make_pairs

    job = settle_formats(absolute_paths(load_job(args.job, args.overrides)))
    make_pairs(job, args.adapter, args.part, args.output, overwrite=args.overwrite)


def _tune(args: argparse.Namespace) -> None:
    from ray_vlm.tune.sweep import tune

    tune(args.job, args.overrides, args.space, args.resume, args.overwrite)
