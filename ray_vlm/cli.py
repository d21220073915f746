"""The verbs of `ray-vlm`. Nothing heavy is imported until a verb needs it, so `--help` is quick.

Exit codes: 0 done, 1 it failed on the way, 2 the job or the command line was wrong and nothing was started.
"""

import argparse
import os
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
        if "RAY_VLM_SECRETS" in os.environ:  # this is the driver of a job that `submit` started
            from ray_vlm.cluster.secrets import take_secrets

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ray-vlm", description="Fine-tune vision-language models with 4-bit LoRA, on one core or a Ray cluster."
    )
    parser.add_argument("--version", action="version", version=f"ray-vlm {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    demo = verbs.add_parser("demo", help="watch a tiny model learn to find objects; a few minutes on a CPU")
    demo.add_argument("--output-dir", default="outputs", help="where the demo writes (default: outputs)")
    demo.add_argument("--all", action="store_true", help="then go on with DPO and GRPO; 12 minutes in all")
    demo.set_defaults(verb=_demo)
    config = _job_verb(verbs, "config", "print the resolved job, every default written out", _config)
    config.add_argument("--dry-run", action="store_true", help="also read the data, plan the run, show trained tokens")
    train = _job_verb(verbs, "train", "run a job", _train)
    train.add_argument("--dry-run", action="store_true", help="print the resolved job, the plan and first records only")
    either = train.add_mutually_exclusive_group()
    either.add_argument("--overwrite", action="store_true", help="delete the run of that name first")
    either.add_argument("--resume", action="store_true", help="go on with the run of that name, or start it")
    evaluate = _job_verb(verbs, "evaluate", "measure the base or an adapter on data.test", _evaluate)
    evaluate.add_argument("--adapter", help="a run's best/ or final/; without it, the untouched base")
    evaluate.add_argument(
        "--output", help="folder for the results (default: beside the adapter, or <output_dir>/evaluate)"
    )
    evaluate.add_argument("--against", help="folder of another evaluation to show beside this one in report.html")
    pairs = _job_verb(verbs, "pairs", "make preference data from a model's own answers", _pairs)
    pairs.add_argument("--output", required=True, metavar="PATH", help="the file of pairs, .jsonl")
    pairs.add_argument("--adapter", help="a run's best/ or final/ to sample (default: model.adapter, or the base)")
    pairs.add_argument("--part", choices=["train", "eval"], default="train", help="whose rows (default: train)")
    pairs.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    _add_data_verbs(verbs)
    _add_cluster_verbs(verbs)
    return parser


def _add_data_verbs(verbs: argparse._SubParsersAction) -> None:
    data = verbs.add_parser("data", help="look at a job's rows: what is bad, how they are, what the model sees")
    actions = data.add_subparsers(metavar="ACTION", required=True)
    check = _job_verb(actions, "check", "read every row of every source; exit code 1 if any is bad", _data_check)
    check.add_argument("--decode", action="store_true", help="also decode every image whole, which takes longer")
    check.add_argument("--bad-rows", metavar="PATH", help="write all bad rows there, as JSON lines")
    stats = _job_verb(actions, "stats", "classes, boxes, images, tokens, and what other limits would do", _data_stats)
    preview = _job_verb(actions, "preview", "pictures and tokens of some rows as the model gets them", _data_preview)
    preview.add_argument("--rows", type=_row_count, default=12, metavar="N", help="how many, 1 to 200 (default: 12)")
    for action, name in ((stats, "stats"), (preview, "preview")):
        action.add_argument("--output", metavar="PATH", help=f"the PNG (default: <run.output_dir>/data/{name}.png)")


def _row_count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 200:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 200")
    return int(text)


def _add_cluster_verbs(verbs: argparse._SubParsersAction) -> None:
    where = {"help": "the cluster's job server, http://HOST:8265 (default: RAY_API_SERVER_ADDRESS, or this machine)"}
    submit = verbs.add_parser("submit", help="run a verb as a Ray job on a cluster, and follow it")
    submit.add_argument("what", choices=["train", "evaluate"], metavar="VERB", help="train or evaluate")
    submit.add_argument("job", help="the job's YAML file, inside the working directory")
    submit.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    submit.add_argument("--address", **where)
    submit.add_argument("--no-wait", action="store_true", help="do not follow the log")
    submit.add_argument("--working-dir", default=".", help="the folder that travels (default: this one)")
    submit.add_argument("--runtime-env", help="default: jobs/runtime_env.yaml")
    submit.add_argument("--submission-id", help="the job's name on the cluster")
    for flag in ("--resume", "--overwrite"):
        submit.add_argument(flag, action="append_const", dest="flags", const=flag, help="handed on to train")
    for flag in ("--adapter", "--output", "--against"):
        submit.add_argument(flag, help="handed on to evaluate")
    submit.set_defaults(verb=_submit)
    jobs = verbs.add_parser("jobs", help="the jobs of a cluster").add_subparsers(metavar="ACTION", required=True)
    for name, text in (("list", "all jobs"), ("show", "one job"), ("logs", "its log"), ("stop", "end it")):
        action = jobs.add_parser(name, help=text)
        action.add_argument("--address", **where)
        action.set_defaults(verb=_jobs, action=name)
        if name != "list":
            action.add_argument("id", help="the job's name on the cluster")
        if name == "logs":
            action.add_argument("--follow", action="store_true", help="until the job ends; exit with its code")


def _job_verb(verbs: argparse._SubParsersAction, name: str, text: str, run: object) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text)
    verb.add_argument("job", help="the job's YAML file")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    verb.set_defaults(verb=run)
    return verb


def _demo(args: argparse.Namespace) -> int:
    from ray_vlm.demo.story import run_demo

    return run_demo(Path(args.output_dir), whole=args.all)


def _config(args: argparse.Namespace) -> None:
    import yaml

    from ray_vlm.config.load import dump_job, load_job

    job = load_job(args.job, args.overrides)
    print(yaml.safe_dump(dump_job(job), sort_keys=False, allow_unicode=True), end="")
    if args.dry_run:
        from ray_vlm.data.preview import describe_prepared
        from ray_vlm.train.driver import prepare

        prepared = prepare(job)
        print(describe_prepared(prepared.train, prepared.plan, prepared.spec, prepared.balance))


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


def _pairs(args: argparse.Namespace) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.evaluate.pairs import make_pairs
    from ray_vlm.train.driver import absolute_paths

    job = absolute_paths(load_job(args.job, args.overrides))
    make_pairs(job, args.adapter, args.part, args.output, overwrite=args.overwrite)


def _data_check(args: argparse.Namespace) -> int:
    from ray_vlm.config.load import load_job
    from ray_vlm.data.survey import check_sources, describe_check, describe_shares, write_bad_rows
    from ray_vlm.train.driver import absolute_paths

    job = absolute_paths(load_job(args.job, args.overrides))
    checks = []
    for check in check_sources(job, args.decode):
        print(describe_check(check), flush=True)
        checks.append(check)
    for line in describe_shares(job):
        print(line)
    if args.bad_rows:
        print(f"{write_bad_rows(args.bad_rows, checks)} bad rows written to {args.bad_rows}")
    return 0 if all(check.good for check in checks) else 1


def _data_stats(args: argparse.Namespace) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.data.stats import measure_rows
    from ray_vlm.data.stats_plot import draw_stats
    from ray_vlm.data.stats_text import describe_stats
    from ray_vlm.runs.store import write_picture
    from ray_vlm.train.driver import absolute_paths

    job = absolute_paths(load_job(args.job, args.overrides))
    stats = measure_rows(job)
    print(describe_stats(stats))
    picture = draw_stats(stats, f"{Path(args.job).name}: {stats.parts['train'][0]:,} training rows")
    print(f"\npicture: {write_picture(picture, args.output, job.run.output_dir, 'stats')}")


def _data_preview(args: argparse.Namespace) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.data.preview import choose_rows, describe_choice, describe_rows
    from ray_vlm.data.sheet import make_cells
    from ray_vlm.data.sheet_plot import draw_sheet
    from ray_vlm.data.splits import row_tags
    from ray_vlm.runs.store import write_picture
    from ray_vlm.train.driver import prepare

    prepared = prepare(load_job(args.job, args.overrides))
    train, spec = prepared.train, prepared.spec
    chosen = choose_rows([row_tags(prepared.job, record) for record in train.records], args.rows)
    print(describe_rows(train, spec, chosen))
    title = f"{Path(args.job).name}: {len(chosen.positions)} of {len(train):,} training rows, as the model sees them"
    picture = draw_sheet(make_cells(train, spec, chosen.positions), title, describe_choice(chosen, spec))
    print(f"\npicture: {write_picture(picture, args.output, prepared.job.run.output_dir, 'preview')}")


def _submit(args: argparse.Namespace) -> int:
    from ray_vlm.cluster.submit import (
        check_job_file,
        connect_jobs,
        entrypoint,
        follow_job,
        plan_runtime_env,
        submit,
    )
    from ray_vlm.config.load import load_job
    from ray_vlm.config.resume import check_output_dir
    from ray_vlm.errors import ConfigError

    job = load_job(args.job, args.overrides)
    if problems := check_output_dir(job.run.output_dir) + check_output_dir(args.output or "/", "--output"):
        raise ConfigError(problems)
    folder = Path(args.working_dir).resolve()
    words = [*args.overrides, *(args.flags or [])]
    for name in ("adapter", "output", "against"):
        words += [f"--{name}", value] if (value := getattr(args, name)) else []
    command = entrypoint(args.what, check_job_file(args.job, folder), words)
    env = plan_runtime_env(folder, Path(args.runtime_env) if args.runtime_env else None)
    client = connect_jobs(args.address)
    name = submit(client, command, env, args.submission_id)
    print(f"job {name}: {command}", flush=True)
    return 0 if args.no_wait else follow_job(client, name, _ask)


def _ask(question: str) -> bool:
    try:
        return sys.stdin.isatty() and input(question).strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


def _jobs(args: argparse.Namespace) -> int:
    from ray_vlm.cluster.submit import ask_cluster, connect_jobs, describe_jobs, follow_job

    client = connect_jobs(args.address)
    if args.action == "list":
        print(describe_jobs(ask_cluster(client.list_jobs)))
        return 0
    info = ask_cluster(lambda: client.get_job_info(args.id))
    if args.action == "show":
        print(describe_jobs([info]))
        print(f"exit code {info.driver_exit_code}" + (f"\n{info.message}" if info.message else ""))
    elif args.action == "stop":
        ask_cluster(lambda: client.stop_job(args.id))
        print(f"job {args.id} was asked to stop; `ray-vlm jobs logs {args.id} --follow` waits for its end")
    elif args.follow:
        return follow_job(client, args.id, _ask)
    else:
        print(ask_cluster(lambda: client.get_job_logs(args.id)), end="")
    return 0
