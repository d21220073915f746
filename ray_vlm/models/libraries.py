"""The large libraries: they are imported with garbage collection turned off, and kept from mixing their messages with
the run's own lines.

Python searches all objects for cycles whenever enough new ones exist. torch, transformers and TRL create a million
objects that live as long as the process: searching them repeatedly took a tenth of a loader's start-up time.
"""

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ray_vlm.machine import count_threads

# Environment variables that libraries read when they load; a value that the user has set stays.
_SETTINGS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # the run's own lines show the progress of a download
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}

# A logger's filters do not apply to those below it, so each that speaks is named.
_LOUD = (
    *("deepspeed", "DeepSpeed", "deepspeed.accelerator.real_accelerator", "accel_logger"),
    *("bitsandbytes", "bitsandbytes.cextension", "bitsandbytes.backends.cpu.ops"),
)


class _ErrorsOnly(logging.Filter):
    """Let errors pass. A filter and not a level: libraries set their loggers' levels when they load, which is later."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR


def quiet_libraries() -> None:
    """Turn off telemetry, progress bars and start-up messages. Call it before the libraries load; it loads none."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in _LOUD:
        logger = logging.getLogger(name)
        if not any(isinstance(known, _ErrorsOnly) for known in logger.filters):
            logger.addFilter(_ErrorsOnly())
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(transformers|trl|peft|accelerate|torch|ray)\b")
    if "transformers" in sys.modules:  # it read the environment when it was loaded
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Turn garbage collection off while the body runs."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def keep_imports() -> None:
    """Exclude all present objects from garbage collection for good, in a process with a single purpose."""
    gc.freeze()


def prepare_process(seed: int, cpus: float, in_ray: bool) -> None:
    """Import the training libraries without their messages, and set threads and seeds. `cpus`: of this process."""
    quiet_libraries()
    with no_garbage_collection():
        import peft  # noqa: F401
        import torch
        import transformers
        import trl.trainer.base_trainer  # noqa: F401
    if in_ray:
        keep_imports()
    torch.set_num_threads(count_threads(cpus))
    transformers.set_seed(seed)
