"""`ray-vlm submit` and `ray-vlm jobs`: run a verb on a cluster through Ray Jobs, and manage the jobs."""

import argparse
from collections.abc import Callable

from ray_vlm.cli.submit import SERVER_HELP, add_submit_verb, ask


def add_cluster_verbs(
    verbs: argparse._SubParsersAction, add_computing_verbs: Callable[[argparse._SubParsersAction], None]
) -> None:
    """Add `ray-vlm submit VERB`, for the verbs that `add_computing_verbs` adds, and `ray-vlm jobs`."""
    add_submit_verb(verbs, add_computing_verbs)
    jobs = verbs.add_parser("jobs", help="the jobs of a cluster").add_subparsers(metavar="ACTION", required=True)
    for name, text in (("list", "all jobs"), ("show", "one job"), ("logs", "its log"), ("stop", "end it")):
        action = jobs.add_parser(name, help=text)
        action.add_argument("--address", help=SERVER_HELP)
        action.set_defaults(verb=_jobs, action=name)
        if name != "list":
            action.add_argument("id", help="the job's name on the cluster")
        if name == "logs":
            action.add_argument("--follow", action="store_true", help="until the job ends; exit with its code")


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
        return follow_job(client, args.id, ask)
    else:
        print(ask_cluster(lambda: client.get_job_logs(args.id)), end="")
    return 0
