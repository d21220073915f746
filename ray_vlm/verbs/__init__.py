"""The words of the verbs that come in families, and what each does: data, cluster, runs."""

import argparse


def job_verb(verbs: argparse._SubParsersAction, name: str, text: str, run: object) -> argparse.ArgumentParser:
    """A verb that takes a job file and settings; `run` is called with the parsed words."""
    verb = verbs.add_parser(name, help=text)
    verb.add_argument("job", help="the job's YAML file")
    # with a default of its own argparse does not call it required where the job is missing
    verb.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings that replace those of the file"
    )
    verb.set_defaults(verb=run)
    return verb
