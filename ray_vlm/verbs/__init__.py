"""The verbs of `ray-vlm`: their arguments, and the functions that run them."""

import argparse


def job_verb(verbs: argparse._SubParsersAction, name: str, text: str, run: object) -> argparse.ArgumentParser:
    """Add a verb that takes a job file and settings; `run` is called with the parsed arguments."""
    verb = verbs.add_parser(name, help=text)
    verb.add_argument("job", help="the job's YAML file")
    # without a default argparse would list it among the required arguments when the job is missing
    verb.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings that replace those of the file"
    )
    verb.set_defaults(verb=run)
    return verb
