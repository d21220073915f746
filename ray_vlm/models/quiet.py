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


def quiet_libraries() -> None:
    """Telemetry, progress bars and start-up chatter off. Call before the libraries load; itself it loads none."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("deepspeed", "DeepSpeed", "bitsandbytes", "deepspeed.accelerator.real_accelerator", "accel_logger"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(transformers|trl|peft|accelerate|torch|ray)\b")
    if "transformers" in sys.modules:  # it has read its settings already
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
