"""`ray-vlm submit` and `ray-vlm jobs`: run a verb on a cluster through Ray Jobs, and look after it."""

import argparse
import sys
from pathlib import Path


def add_cluster_verbs(verbs: argparse._SubParsersAction) -> None:
    """`ray-vlm submit` and `ray-vlm jobs`."""
    where = {"help": "the cluster's job server, http://HOST:8265 (default: RAY_API_SERVER_ADDRESS, or this machine)"}
    submit = verbs.add_parser("submit", help="run a verb as a Ray job on a cluster, and follow it")
    submit.add_argument("what", choices=["train", "tune", "evaluate"], metavar="VERB", help="train, tune or evaluate")
    submit.add_argument("job", help="the job's YAML file, inside the working directory")
    submit.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    submit.add_argument("--address", **where)
    submit.add_argument("--no-wait", action="store_true", help="do not follow the log")
    submit.add_argument("--working-dir", default=".", help="the folder that travels (default: this one)")
    submit.add_argument("--runtime-env", help="default: jobs/runtime_env.yaml")
    submit.add_argument("--submission-id", help="the job's name on the cluster")
    for flag in ("--resume", "--overwrite"):
        submit.add_argument(flag, action="append_const", dest="flags", const=flag, help="handed on to train and tune")
    submit.add_argument("--space", help="handed on to tune: a file inside the working directory")
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
    from ray_vlm.runs.track import adopt_wandb_login

    job = load_job(args.job, args.overrides)
    if problems := check_output_dir(job.run.output_dir) + check_output_dir(args.output or "/", "--output"):
        raise ConfigError(problems)
    if job.track.wandb:
        adopt_wandb_login()  # travels with the other tokens
    folder = Path(args.working_dir).resolve()
    words = [*args.overrides, *(args.flags or [])]
    if args.what == "tune" and not args.space:
        raise ConfigError("submit tune: --space is missing. Give a file of tune_spaces/.")
    if args.space:
        words += ["--space", check_job_file(args.space, folder)]
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
