"""The parser of `ray-vlm` and of each of its verbs: options in full, no empty values, errors that name a likely fix."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

RunVerb = Callable[[argparse.Namespace], int | None]  # runs a verb with its arguments; None is exit code 0


class VerbParser(argparse.ArgumentParser):
    """A parser that takes no abbreviated option and no empty text. Its sub-parsers are of the same class.

    After parsing, `args.parser` is the parser of the verb that was named, so that its usage can be shown.
    """

    def __init__(self, **options: Any) -> None:
        # argparse completes abbreviations by default: `--over` would delete a run as `--overwrite` does
        super().__init__(**{"allow_abbrev": False, **options})
        self.register("type", None, _read_text)  # the type of every argument that has none of its own
        self.set_defaults(parser=self)  # the parser of the innermost verb sets it last
        # without a default, which would replace what was given before the verb
        self.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="show details too")

    def add_subparsers(self, **options: Any) -> argparse._SubParsersAction:
        """As argparse does it; the words behind a verb are left to the parser of that verb."""
        verbs = super().add_subparsers(**options)
        verbs.type = str  # argparse applies the type to all those words, and empty ones would be blamed on VERB
        return verbs

    def refuse_unknown(self, words: Sequence[str]) -> NoReturn:
        """Print this parser's usage, the words that it does not know and the option that was probably meant; exit 2."""
        options = [option for action in self._actions for option in action.option_strings]
        likely: list[str] = []
        for name in (word.partition("=")[0] for word in words if word.startswith("--")):
            completed = [option for option in options if option.startswith(name)]
            likely += completed or difflib.get_close_matches(name, options, n=1)
        hint = f"; did you mean {' or '.join(dict.fromkeys(likely))}?" if likely else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{hint}")


def job_verb(verbs: argparse._SubParsersAction, name: str, text: str, run: RunVerb) -> argparse.ArgumentParser:
    """Add a verb that takes a job file and settings."""
    verb = verbs.add_parser(name, help=text)
    verb.add_argument("job", help="the job's YAML file")
    # without a default argparse would list it among the required arguments when the job is missing
    verb.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings that replace those of the file"
    )
    verb.set_defaults(verb=run)
    return verb


def _read_text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the value is empty, perhaps from a shell variable that is not set; give one")
    return text
