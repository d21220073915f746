"""What workers must know from the driver's environment, and nobody else may see: tokens, caches, offline switches.

The values travel with the task, in memory. They are never put into a runtime environment, which Ray writes to its logs
and shows to everybody on the cluster, nor into a file or a command line.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ray_vlm.config.paths import job_folder, use_job_folder

PATHS = ("HF_HOME", "GOOGLE_APPLICATION_CREDENTIALS")  # names of places that another machine may not have
FORWARDED = (
    *PATHS,
    *("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"),
    *("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_MODE"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_REGION"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
)


@dataclass(frozen=True)
class Environment:
    """Variables on their way to a worker; their values are not in the `repr`. `job_folder`: that of the job file, where
    functions that the job names may be."""

    values: Mapping[str, str] = field(default_factory=dict, repr=False)
    job_folder: str | None = None

    def apply(self) -> None:
        """Set them in this process, before the libraries that read them are imported. A path that this machine does not
        have is left out, so that the machine's own setting, or the default, counts."""
        os.environ.update({name: v for name, v in self.values.items() if name not in PATHS or os.path.exists(v)})
        if self.job_folder is not None and os.path.isdir(self.job_folder):  # another machine may not have it
            use_job_folder(self.job_folder)


def read_environment() -> Environment:
    """What of `FORWARDED` is set in this process, and where its job file lies."""
    return Environment({name: os.environ[name] for name in FORWARDED if name in os.environ}, job_folder())
