"""`ray-vlm tune`: search for better settings, and export the best trial."""

import argparse

from ray_vlm.cli.parser import job_verb


def add_tune_verb(verbs: argparse._SubParsersAction) -> None:
    """Add `ray-vlm tune JOB --space SPACE`."""
    tune = job_verb(verbs, "tune", "run trials of a job over a space of settings, and export the best", _tune)
    tune.add_argument("--space", required=True, metavar="FILE", help="the search space, a YAML file of tune_spaces/")
    either = tune.add_mutually_exclusive_group()
    either.add_argument("--overwrite", action="store_true", help="delete the sweep of that name first")
    either.add_argument("--resume", action="store_true", help="continue the sweep of that name, or start it")


def _tune(args: argparse.Namespace) -> None:
    from ray_vlm.tune.sweep import tune

    tune(args.job, args.overrides, args.space, args.resume, args.overwrite)
