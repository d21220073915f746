"""Import the large libraries of a process that begins, without looking for garbage meanwhile.

Python looks for cycles among all objects each time enough new ones are there. torch, transformers and TRL make a
million objects that stay as long as the process: to look through them again and again took a tenth of a loader's start.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """While the body runs, cycles are not looked for."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def import_training_libraries() -> None:
    """torch, transformers, PEFT and TRL."""
    with no_garbage_collection():
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
        import trl.trainer.base_trainer  # noqa: F401


def keep_imports() -> None:
    """Take what is there out of the collector's sight for good, in a process that serves one purpose to its end."""
    gc.freeze()
