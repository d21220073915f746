"""The large libraries: they are imported with garbage collection turned off and without what no run uses, and kept from
mixing their messages with the run's own lines.

Python searches all objects for cycles whenever enough new ones exist. torch, transformers and TRL create a million
objects that live as long as the process: searching them repeatedly took a tenth of a loader's start-up time.

They also import whatever optional library is installed, in case it is used. In Python `sys.modules[name] = None` makes
a library look as if it were not installed, which all of them handle (`hidden`).
"""

import gc
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

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

# What the libraries import while they load, and this package never uses through them: TRL's tracker and Accelerate's
# dialogue for SageMaker. And what `torch.compile` needs, which PEFT brings in with bitsandbytes: that compiles the
# kernels of devices that have none of their own, if it can; those for CPUs and NVIDIA GPUs are not compiled. TRL
# imports vLLM, if it is installed, which needs them.
_UNUSED = ("wandb", "boto3")
_COMPILER = ("torch._dynamo.repro.after_dynamo", "torch._inductor.compile_fx")


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
    # It names other versions than those that were tried; `engines/vllm_start.py` has a warning of its own.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions", category=UserWarning)
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


@contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Let modules look as if they were not installed while the body runs, except those that are imported already."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


@contextmanager
def training_imports() -> Iterator[None]:
    """Import training libraries in the body: without garbage collection, and without what no run uses."""
    with no_garbage_collection(), hidden(*_UNUSED):
        yield


@contextmanager
def frozen() -> Iterator[None]:
    """Exclude all present objects from garbage collection while the body runs, unless some are excluded already.

    Python collects garbage as soon as that is allowed again after the imports, Accelerate does before the first step:
    half a second each if the libraries' objects are searched too. So enter it before collection is allowed again.
    """
    freezes = gc.get_freeze_count() == 0
    if freezes:
        gc.freeze()
    try:
        yield
    finally:
        if freezes:
            gc.unfreeze()


def keep_imports() -> None:
    """Exclude all present objects from garbage collection for good, in a process with a single purpose."""
    gc.freeze()


def prepare_process(seed: int, cpus: float, in_ray: bool) -> None:
    """Import the training libraries without their messages, and set threads and seeds. `cpus`: of this process."""
    quiet_libraries()
    with training_imports():
        import_transformers()
        with hidden(*_COMPILER):
            import peft  # noqa: F401
        import torch
        import transformers

        _import_trl()
        if in_ray:
            keep_imports()
    torch.set_num_threads(count_threads(cpus))
    transformers.set_seed(seed)


def import_transformers() -> None:
    """Import transformers and the base of its models, with one list of models, and without SciPy.

    transformers imports SciPy for the losses of its object detectors only.
    """
    list_models_once()
    from transformers.utils import import_utils

    is_available = import_utils.is_scipy_available  # caches its answer
    is_available.cache_clear()
    with hidden("scipy"):
        import transformers.loss.loss_utils
    is_available.cache_clear()
    if is_available():
        for name, module in list(sys.modules.items()):
            if name.startswith("transformers.loss.") and not hasattr(module, "linear_sum_assignment"):
                module.linear_sum_assignment = _assign  # type: ignore[attr-defined]
    import transformers.modeling_utils  # noqa: F401


def _assign(*args: Any, **options: Any) -> Any:
    """Call SciPy's `linear_sum_assignment`, for whoever trains a detector of transformers later in this process."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(*args, **options)


def list_models_once() -> None:
    """Import `transformers.models` with the list of models that `transformers` has made.

    Each of the two makes it from the text of some 1,600 files. The one of `transformers` has also the
    modules beside `models`.
    """
    import transformers
    from transformers.utils import import_utils

    models, make = Path(transformers.__file__).parent / "models", import_utils.define_import_structure

    def define_import_structure(module_path: str, prefix: str | None = None) -> dict[frozenset, dict[str, set[str]]]:
        if Path(module_path) != models / "__init__.py" or prefix is not None:
            return make(module_path, prefix)
        known = make(models, prefix="models")  # as `transformers` has called it, so it is cached
        return {
            backends: {name.removeprefix("models."): own for name, own in modules.items() if name.startswith("models.")}
            for backends, modules in known.items()
        }

    import_utils.define_import_structure = define_import_structure  # type: ignore[assignment]
    try:
        importlib.import_module("transformers.models")
    finally:
        import_utils.define_import_structure = make


class _Distributions(dict[str, list[str]]):
    """The distributions of each importable package, as of `packages_distributions`, looked up when they are needed.

    TRL builds the complete table when it is imported, from the list of files of every installed distribution, and asks
    it for two packages, whose distributions have the names of the packages.
    """

    def __missing__(self, name: str) -> list[str]:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            return dict(metadata.packages_distributions())[name]
        return [name]


def _import_trl() -> None:
    """Import TRL's trainers, with its table of distributions looked up when it is needed."""
    complete = metadata.packages_distributions
    metadata.packages_distributions = _Distributions
    try:
        importlib.import_module("trl.import_utils")
    finally:
        metadata.packages_distributions = complete
    import trl.trainer.base_trainer  # noqa: F401
