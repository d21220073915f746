"""The lines that the package logs for the user."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ray_vlm.logs import attached


@contextmanager
def kept_lines(level: int = logging.INFO) -> Iterator[list[str]]:
    """Collect what is logged while the body runs."""
    lines: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    with attached(handler):
        yield lines
