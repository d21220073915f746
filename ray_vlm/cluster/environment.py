"""The environment variables that other processes of a job get: tokens, caches, offline switches.

Workers get them from the driver with their task, in memory. They are never put into a runtime environment, which Ray
writes to its logs and shows to every user of the cluster, nor into a file or a command line. The driver of a submitted
job gets them from the machine that submits it: the runtime environment carries only the unguessable name of a package,
a few bytes in the cluster's memory, which the driver reads and deletes when it starts.
"""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray_vlm.config.paths import job_folder, use_job_folder
from ray_vlm.errors import RunError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

SECRETS_VARIABLE = "RAY_VLM_SECRETS"

PATHS = ("HF_HOME", "GOOGLE_APPLICATION_CREDENTIALS")  # values are paths, which another machine may not have
FORWARDED = (
    *PATHS,
    *("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"),
    *("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_MODE"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_REGION"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "OPENAI_API_KEY"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
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


def send_secrets(client: "JobSubmissionClient") -> str | None:
    """Upload this process's tokens to the cluster and return the package's URI, or None without tokens.

    Uses the upload that Ray Jobs makes of a working directory (`dashboard_sdk.py`, `_upload_package`).
    """
    values = read_environment().values
    if not values:
        return None
    name = f"_ray_pkg_{secrets.token_hex(16)}.zip"
    client._package_exists(f"gcs://{name}")  # this request starts the ten minutes after which Ray deletes it
    answer = client._do_request("PUT", f"/api/packages/gcs/{name}", data=json.dumps(dict(values)).encode())
    if answer.status_code != 200:
        client._raise_error(answer)
    return f"gcs://{name}"


def take_secrets() -> Environment:
    """Read and delete what `send_secrets` uploaded for this job. Raises `RunError` if it is gone: Ray keeps an unused
    package for ten minutes only."""
    name = os.environ.pop(SECRETS_VARIABLE, None)
    if name is None:
        return Environment()
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    cluster = GcsClient(address=os.environ["RAY_ADDRESS"])
    data = cluster.internal_kv_get(name.encode(), None)
    cluster.internal_kv_del(name.encode(), False, None)
    if not data:
        raise RunError(
            "the tokens that were submitted with this job have expired: it waited for more than ten minutes. Submit it "
            "again."
        )
    return Environment(json.loads(data))
