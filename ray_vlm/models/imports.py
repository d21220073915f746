"""Import the large libraries at the start of a process, with garbage collection turned off.

Python searches all objects for cycles whenever enough new ones exist. torch, transformers and TRL create a million
objects that live as long as the process: searching them repeatedly took a tenth of a loader's start-up time.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from ray_vlm.machine import count_threads
from ray_vlm.models import library_logging


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


def import_training_libraries() -> None:
    """Import torch, transformers, PEFT and TRL."""
    with no_garbage_collection():
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
        import trl.trainer.base_trainer  # noqa: F401


def keep_imports() -> None:
    """Exclude all present objects from garbage collection for good, in a process with a single purpose."""
    gc.freeze()


def prepare_process(seed: int, cpus: float, in_ray: bool) -> None:
    """Import the libraries without their messages, and set threads and seeds. `cpus`: of this process."""
    library_logging.quiet_libraries()
    import_training_libraries()
    if in_ray:
        keep_imports()
    import torch
    import transformers

    torch.set_num_threads(count_threads(cpus))
    transformers.set_seed(seed)
