"""Keep libraries from calling home and from talking over the run's own lines; errors still come through."""

import logging
import os
import sys
import warnings

# What libraries are told as they load; a value that the user has set stays.
_SETTINGS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # our own lines say how far a download is
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}

_LOUD = ("deepspeed", "DeepSpeed", "bitsandbytes", "deepspeed.accelerator.real_accelerator", "accel_logger")


class _ErrorsOnly(logging.Filter):
    """A filter rather than a level: libraries set their loggers' levels as they load, after us."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR


def quiet_libraries() -> None:
    """Telemetry, progress bars and start-up chatter off. Call before the libraries load; itself it loads none."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in _LOUD:
        logger = logging.getLogger(name)
        if not any(isinstance(known, _ErrorsOnly) for known in logger.filters):
            logger.addFilter(_ErrorsOnly())
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(transformers|trl|peft|accelerate|torch|ray)\b")
    if "transformers" in sys.modules:  # it has read its settings already
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
