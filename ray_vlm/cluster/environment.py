"""The environment variables that workers get from the driver: tokens, caches, offline switches.

The values are sent with the task, in memory. They are never put into a runtime environment, which Ray writes to its
logs and shows to every user of the cluster, nor into a file or a command line.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ray_vlm.config.paths import job_folder, use_job_folder

PATHS = ("HF_HOME", "GOOGLE_APPLICATION_CREDENTIALS")  # values are paths, which another machine may not have
FORWARDED = (
    *PATHS,
    *("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"),
    *("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_MODE"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_REGION"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
)


@dataclass(frozen=True)
class Environment:
    """Variables for a worker; their values are not in the `repr`. `job_folder`: the folder of the job file, which may
    hold functions that the job names."""

    values: Mapping[str, str] = field(default_factory=dict, repr=False)
    job_folder: str | None = None

    def apply(self) -> None:
        """Set them in this process; call it before importing the libraries that read them. A path that this machine
        does not have is left out, so that the machine's own setting or the default applies."""
        os.environ.update({name: v for name, v in self.values.items() if name not in PATHS or os.path.exists(v)})
        if self.job_folder is not None and os.path.isdir(self.job_folder):  # another machine may not have it
            use_job_folder(self.job_folder)


def read_environment() -> Environment:
    """Return the variables of `FORWARDED` that are set in this process, and the folder of its job file."""
    return Environment({name: os.environ[name] for name in FORWARDED if name in os.environ}, job_folder())
