"""The verbs of `ray-vlm`. Nothing heavy is imported until a verb needs it, so `--help` is quick.

Exit codes: 0 done, 1 it failed on the way, 2 the job or the command line was wrong and nothing was started.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ray_vlm import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # key=value after an option
        args.overrides = [*args.overrides, *rest]
    from ray_vlm.errors import Interrupted, RayVlmError

    try:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ray-vlm", description="Fine-tune vision-language models with 4-bit LoRA, on one core or a Ray cluster."
    )
    parser.add_argument("--version", action="version", version=f"ray-vlm {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    demo = verbs.add_parser("demo", help="watch a tiny model learn to find objects; a few minutes on a CPU")
    demo.add_argument("--output-dir", default="outputs", help="where the demo writes (default: outputs)")
    demo.set_defaults(verb=_demo)
    config = _job_verb(verbs, "config", "print the resolved job, every default written out", _config)
    config.add_argument("--dry-run", action="store_true", help="also read the data, plan the run, show trained tokens")
    train = _job_verb(verbs, "train", "run a job", _train)
    train.add_argument("--dry-run", action="store_true", help="print the resolved job, the plan and first records only")
    train.add_argument("--overwrite", action="store_true", help="delete the run of that name first")
    train.add_argument("--resume", action="store_true", help="go on with the run of that name, or start it")
    evaluate = _job_verb(verbs, "evaluate", "measure the base or an adapter on data.test", _evaluate)
    evaluate.add_argument("--adapter", help="a run's best/ or final/; without it, the untouched base")
    evaluate.add_argument(
        "--output", help="folder for the results (default: beside the adapter, or <output_dir>/evaluate)"
    )
    evaluate.add_argument("--against", help="folder of another evaluation to show beside this one in report.html")
    return parser


def _job_verb(verbs: argparse._SubParsersAction, name: str, text: str, run: object) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text)
    verb.add_argument("job", help="the job's YAML file")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    verb.set_defaults(verb=run)
    return verb


def _demo(args: argparse.Namespace) -> int:
    from ray_vlm.demo.story import run_demo

    return run_demo(Path(args.output_dir))


def _config(args: argparse.Namespace) -> None:
    import yaml

    from ray_vlm.config.load import dump_job, load_job

    job = load_job(args.job, args.overrides)
    print(yaml.safe_dump(dump_job(job), sort_keys=False, allow_unicode=True), end="")
    if args.dry_run:
        from ray_vlm.data.preview import describe_prepared
        from ray_vlm.train.driver import prepare

        prepared = prepare(job)
        print(describe_prepared(prepared.train, prepared.plan, prepared.spec))


def _train(args: argparse.Namespace) -> None:
    if args.dry_run:
        return _config(args)
    from ray_vlm.config.load import load_job
    from ray_vlm.train.driver import train

    job = load_job(args.job, args.overrides)
    paths = train(job, Path(args.job).read_text(encoding="utf-8"), args.overwrite, resume=args.resume)
    best = f", best {paths.place('best')}" if "best" in paths.store.names() else ""
    print(f"run folder {paths.address}: final {paths.place('final')}{best}")
    paths.discard()
    return None


def _evaluate(args: argparse.Namespace) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.evaluate.run import evaluate_and_report

    job = load_job(args.job, args.overrides)
    evaluate_and_report(job, args.adapter, args.output, args.against)
