"""Keep libraries from calling home and from talking over the run's own lines; errors still come through."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Telemetry, progress bars and start-up chatter off. Call before the libraries load."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("deepspeed", "DeepSpeed", "bitsandbytes", "deepspeed.accelerator.real_accelerator", "accel_logger"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(transformers|trl|peft|accelerate|torch|ray)\b")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
