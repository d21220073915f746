"""The lines that this package prints, through `logging`.

Every module logs by `logging.getLogger(__name__)`: INFO is a line for the user, WARNING a note, and DEBUG a detail that
`-v` shows. Importing the package gives its logger `ray_vlm` the handler `TERMINAL`, unless it has one already. The log
files of a run are in `runs/log_file.py`, and the lines that go into a run's `metrics.jsonl` in `train/run_log.py`.
"""

import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PACKAGE = logging.getLogger("ray_vlm")
PROGRESS = logging.getLogger("ray_vlm.progress")  # how far long work is
_BESIDE_OUTPUT = (PROGRESS.name, "ray_vlm.cluster.submit")  # stdout has the output of the verb, or of the submitted job


class TerminalHandler(logging.Handler):
    """Prints lines to stdout; progress, errors and details to stderr, so that a pipe gets the output of a verb only.

    `in_run`: whether a run is going on. Its progress belongs to its output, and a closed pipe must not end it.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.in_run = False

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record. Raise `BrokenPipeError` if the reader has left, which ends any verb but a run."""
        prefix = {logging.DEBUG: f"{record.name}: ", logging.WARNING: "note: "}.get(record.levelno, "")
        beside = record.name in _BESIDE_OUTPUT and not self.in_run
        is_line = record.levelno in (logging.INFO, logging.WARNING) and not beside
        try:
            # Looked up now, because notebooks and tests replace the streams.
            print(prefix + self.format(record), file=sys.stdout if is_line else sys.stderr, flush=True)
        except OSError:
            if not self.in_run and record.name != PROGRESS.name:
                raise


TERMINAL = TerminalHandler()


def show_lines() -> None:
    """Print the package's lines, unless its logger has been configured before."""
    if not PACKAGE.handlers:
        PACKAGE.addHandler(TERMINAL)
        PACKAGE.propagate = False
    if PACKAGE.level == logging.NOTSET:
        PACKAGE.setLevel(logging.DEBUG)  # the handlers choose


@contextmanager
def attached(handler: logging.Handler) -> Iterator[None]:
    """While the body runs, send the package's records to `handler` too."""
    PACKAGE.addHandler(handler)
    try:
        yield
    finally:
        PACKAGE.removeHandler(handler)
        with suppress(OSError):  # of a file that could not be written
            handler.close()


@contextmanager
def run_output() -> Iterator[None]:
    """While the body runs a job, print as `TerminalHandler.in_run` describes."""
    before, TERMINAL.in_run = TERMINAL.in_run, True
    try:
        yield
    finally:
        TERMINAL.in_run = before


def terminal_columns() -> int:
    """Return the columns of the terminal; no limit where output is piped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
