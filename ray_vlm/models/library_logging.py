"""Turn off libraries' telemetry, and the messages that would mix with the run's own lines. Errors are still shown."""

import logging
import os
import sys
import warnings

# Environment variables that libraries read when they load; a value that the user has set stays.
_SETTINGS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # the run's own lines show the progress of a download
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}

_LOUD = ("deepspeed", "DeepSpeed", "bitsandbytes", "deepspeed.accelerator.real_accelerator", "accel_logger")


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
