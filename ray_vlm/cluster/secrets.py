"""How a token gets from the machine that submits to the driver of the job, seen by nobody on the way.

A runtime environment is written to Ray's logs and shown in its dashboard, so it carries only the name of a package that
cannot be guessed. The package is a few bytes in the cluster's memory; the driver takes and deletes it as it starts.
"""

import json
import os
import secrets
from typing import Any

from ray_vlm.cluster.environment import Environment, read_environment
from ray_vlm.errors import RunError

SECRETS_VARIABLE = "RAY_VLM_SECRETS"


def send_secrets(client: Any) -> str | None:
    """Leave this process's tokens with the cluster; returns the package's name, or None where there are none.

    Uses the upload that Ray Jobs makes of a working directory (`dashboard_sdk.py`, `_upload_package`).
    """
    values = read_environment().values
    if not values:
        return None
    name = f"_ray_pkg_{secrets.token_hex(16)}.zip"
    client._package_exists(f"gcs://{name}")  # asking for it starts the ten minutes after which Ray deletes it
    answer = client._do_request("PUT", f"/api/packages/gcs/{name}", data=json.dumps(dict(values)).encode())
    if answer.status_code != 200:
        client._raise_error(answer)
    return f"gcs://{name}"


def take_secrets() -> Environment:
    """What `send_secrets` left for this job, removing it. Raises `RunError` when it is gone: Ray keeps what nobody has
    asked for ten minutes only."""
    name = os.environ.pop(SECRETS_VARIABLE, None)
    if name is None:
        return Environment()
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    cluster = GcsClient(address=os.environ["RAY_ADDRESS"])
    data = cluster.internal_kv_get(name.encode(), None)
    cluster.internal_kv_del(name.encode(), False, None)
    if not data:
        raise RunError("the tokens that were submitted with this job are gone: it waited too long. Submit it again.")
    return Environment(json.loads(data))
