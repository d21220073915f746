"""The log files of a run, `logs/<name>.log`: lines of the driver or of a rank, also details, with time and level."""

import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from logging.handlers import RotatingFileHandler

from ray_vlm import __version__
from ray_vlm.logs import attached
from ray_vlm.runs.paths import RunPaths

logger = logging.getLogger(__name__)
_MAX_BYTES = 10 * 2**20  # a file of this size becomes `<name>.log.1`, in place of the one before


class _LogFile(RotatingFileHandler):
    """A log file. After the first line that cannot be written, a note says so and the run goes on without it."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Take no more lines."""
        self.setLevel(logging.CRITICAL + 1)
        logger.warning(f"{self.baseFilename} cannot be written ({sys.exception()}); the run goes on without this file")


def _log_failure(_: object, error: BaseException | None, __: object) -> None:
    """Log the traceback of the error that ends a context; a signal is none."""
    if isinstance(error, Exception):
        logger.debug("ended by an exception", exc_info=error)


@contextmanager
def log_to_file(paths: RunPaths, name: str) -> Iterator[None]:
    """While the body runs, append the package's lines to the run's `logs/<name>.log`.

    In an object store the file arrives at the end of the body.
    """
    path = paths.logs / f"{name}.log"
    with suppress(OSError):  # if there is no folder, the first line fails
        path.parent.mkdir(parents=True, exist_ok=True)
        paths.refresh(path)
    handler = _LogFile(path, maxBytes=_MAX_BYTES, backupCount=1, encoding="utf-8", delay=True, errors="replace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    try:
        with attached(handler), ExitStack() as ending:
            logger.debug(f"ray_vlm {__version__}, process {os.getpid()} on {platform.node()}")
            ending.push(_log_failure)
            yield
    finally:
        with suppress(OSError):
            paths.publish(path)
