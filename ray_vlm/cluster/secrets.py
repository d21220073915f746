"""Send tokens from the machine that submits a job to the job's driver without exposing them.

A runtime environment is written to Ray's logs and shown in its dashboard, so it carries only the unguessable name of a
package. The package is a few bytes in the cluster's memory, which the driver reads and deletes when it starts.
"""

import json
import os
import secrets
from typing import Any

from ray_vlm.cluster.environment import Environment, read_environment
from ray_vlm.errors import RunError

SECRETS_VARIABLE = "RAY_VLM_SECRETS"


def send_secrets(client: Any) -> str | None:
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
