"""`ray-vlm submit VERB ...` and `ray-vlm jobs`: run a verb on a cluster through Ray Jobs, and manage the jobs."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from ray_vlm.cluster.package import Archive
    from ray_vlm.config.schema import JobConfig

_SERVER_HELP = "the cluster's job server, http://HOST:8265 (default: RAY_API_SERVER_ADDRESS, or this machine)"


def add_jobs_verbs(verbs: argparse._SubParsersAction) -> None:
    """Add `ray-vlm jobs list|show|logs|stop`."""
    jobs = verbs.add_parser("jobs", help="the jobs of a cluster").add_subparsers(metavar="ACTION", required=True)
    for name, text in (("list", "all jobs"), ("show", "one job"), ("logs", "its log"), ("stop", "end it")):
        action = jobs.add_parser(name, help=text)
        action.add_argument("--address", help=_SERVER_HELP)
        action.set_defaults(verb=_jobs, action=name)
        if name != "list":
            action.add_argument("id", help="the job's name on the cluster")
        if name == "logs":
            action.add_argument("--follow", action="store_true", help="until the job ends; exit with its code")


def add_submit_verb(
    verbs: argparse._SubParsersAction, add_computing_verbs: Callable[[argparse._SubParsersAction], None]
) -> None:
    """Add `ray-vlm submit VERB` for every verb that `add_computing_verbs` adds, with that verb's own arguments."""
    submit = verbs.add_parser("submit", help="run a verb as a Ray job on a cluster, and follow it")
    own = {action.dest for action in _add_options(submit)}
    computing = submit.add_subparsers(metavar="VERB", required=True)
    add_computing_verbs(computing)
    for name, parser in computing.choices.items():
        words = tuple(action for action in parser._actions if not isinstance(action, argparse._HelpAction))
        assert not own & {action.dest for action in words}, f"{name} has an option of submit's name"
        _add_options(parser, left_to_submit=True)
        parser.set_defaults(verb=_submit, submitted_verb=name, submitted_actions=words)


def _add_options(parser: argparse.ArgumentParser, left_to_submit: bool = False) -> list[argparse.Action]:
    """Add submit's own options, which may stand before or after the verb.

    `left_to_submit`: for the parser of the verb, without defaults, which would replace values given before the verb.
    """
    default: Any = argparse.SUPPRESS if left_to_submit else None
    folder = default if left_to_submit else "."
    group = parser.add_argument_group("where and how it runs")
    return [
        group.add_argument("--address", default=default, help=_SERVER_HELP),
        group.add_argument(
            "--no-wait", action="store_true", default=default or False, help="do not follow the log, return at once"
        ),
        group.add_argument(
            "--working-dir", default=folder, metavar="FOLDER", help="the folder that is sent (default: this one)"
        ),
        group.add_argument("--runtime-env", default=default, metavar="FILE", help="default: jobs/runtime_env.yaml"),
        group.add_argument("--submission-id", default=default, metavar="NAME", help="the job's name on the cluster"),
        group.add_argument(
            "--driver-cpus", type=float, default=default, metavar="N", help="run the verb on a node with this many CPUs"
        ),
        group.add_argument(
            "--driver-gpus",
            type=float,
            default=default,
            metavar="N",
            help="the same for GPUs, for verbs that compute in one process (default: on the head)",
        ),
    ]


def command_words(actions: tuple[argparse.Action, ...], values: dict[str, Any]) -> list[str]:
    """Write the command line that gives a verb these values: positional words, then options without default value."""
    words: list[str] = []
    options: list[str] = []
    for action in actions:
        value = values.get(action.dest)
        if not action.option_strings:
            words += [str(word) for word in (value if isinstance(value, list) else [value])]
        elif value in (None, action.default):
            continue
        elif action.nargs == 0:
            options += action.option_strings[-1:] if value == action.const else []
        else:
            options += [f"{action.option_strings[-1]}={one}" for one in (value if isinstance(value, list) else [value])]
    return [*words, *options]


def _submit(args: argparse.Namespace) -> int:
    from ray_vlm.cluster.package import check_size, describe_archive, plan_package, plan_working_folder
    from ray_vlm.cluster.submit import connect_jobs, entrypoint, load_runtime_env, submit
    from ray_vlm.config.load import load_job
    from ray_vlm.runs.trackers import adopt_wandb_login

    job = load_job(args.job, args.overrides) if hasattr(args, "overrides") else None
    if job is not None and job.track.wandb:
        adopt_wandb_login()  # sent with the other tokens
    folder = _working_folder(args.working_dir)
    env, env_file = load_runtime_env(folder, args.runtime_env)
    archive, package = plan_working_folder(folder, env.get("excludes", []), env_file), plan_package()
    values, lines = _check_paths(args, job, archive)
    check_size(archive)
    command = entrypoint(args.submitted_verb, command_words(args.submitted_actions, values))
    client = connect_jobs(args.address)
    print("\n".join([describe_archive(archive), describe_archive(package), *lines]), flush=True)
    name = submit(client, command, env, (archive, package), args.submission_id, args.driver_cpus, args.driver_gpus)
    print(f"job {name}: {command}", flush=True)
    return 0 if args.no_wait else _follow(client, name)


def _working_folder(path: str) -> Path:
    from ray_vlm.errors import ConfigError

    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(f"--working-dir {path}: no such folder.")
    return folder


def _check_paths(
    args: argparse.Namespace, job: "JobConfig | None", archive: "Archive"
) -> tuple[dict[str, Any], list[str]]:
    """Return the verb's arguments as the cluster gets them, and lines on what it reads and writes outside the folder.

    Raises `ConfigError` with every problem.
    """
    from ray_vlm.cluster.package import check_job, check_results, check_words
    from ray_vlm.errors import ConfigError

    words = {action.dest: getattr(args, action.dest, None) for action in args.submitted_actions}
    values, report = check_words(words, archive)
    if job is not None:
        report += check_job(job, values["job"], archive)
    report += check_results(args.submitted_verb, words, job.run.output_dir if job is not None else None)
    if report.problems:
        raise ConfigError(report.problems)
    lines = [f"note: {note}" for note in report.notes]
    lines += [f"all nodes must see {path}" for path in dict.fromkeys(report.expected)]
    return values, [*lines, *(f"results go to {path}, as the nodes see it" for path in report.written)]


def _jobs(args: argparse.Namespace) -> int:
    from ray_vlm.cluster.submit import ask_cluster, connect_jobs, describe_jobs

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
        return _follow(client, args.id)
    else:
        print(ask_cluster(lambda: client.get_job_logs(args.id)), end="")
    return 0


def _follow(client: "JobSubmissionClient", job: str) -> int:
    """Print the job's log until the job ends; return its exit code. Ctrl-C asks whether to stop the job too."""
    from ray_vlm.cluster.submit import PATIENCE_S, STOPPED, ask_cluster, exit_code, new_text

    lines = new_text(client, job)
    while True:
        try:
            for text in lines:
                print(text, end="", flush=True)
            return exit_code(ask_cluster(lambda: client.get_job_info(job), PATIENCE_S))
        except KeyboardInterrupt:
            if not _ask(f"\nstop job {job} too? It writes a checkpoint first. [y/N] "):
                print(f"job {job} goes on; `ray-vlm jobs logs {job} --follow` and `ray-vlm jobs stop {job}` reach it")
                return STOPPED
            ask_cluster(lambda: client.stop_job(job))
            lines = new_text(client, job, lines_shown=True)


def _ask(question: str) -> bool:
    """Whether a user at the terminal answers yes."""
    try:
        return sys.stdin.isatty() and input(question).strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False
