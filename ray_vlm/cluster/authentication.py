"""Whether a Ray cluster wants a token, and another one than it would be sent. Asked before Ray joins it: Ray tries for
twenty seconds with a wrong token and then says only that it could not connect."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

_ANSWER_S = 3.0
_METHOD = "/ray.rpc.NodeInfoGcsService/CheckAlive"  # what every Ray answers that is alive
FIX = (
    "Set RAY_AUTH_MODE=token and the cluster's own token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token "
    "(`ray get-auth-token` on its head shows it)."
)


def find_token(environ: Mapping[str, str] = os.environ, home: Path | None = None) -> str | None:
    """The token that Ray would find on this machine, or None."""
    if token := environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(path) if path else (home or Path.home()) / ".ray" / "auth_token"
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def sends_token(found_by_ray: bool, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether Ray would send a token: where it is told to, or has found the cluster by itself (`auto`)."""
    mode = environ.get("RAY_AUTH_MODE", "").lower()
    return mode == "token" or (found_by_ray and not mode)


def check_token(address: str, found_by_ray: bool = False) -> str | None:
    """Why the cluster at `address`, a host and a port, would refuse this process for its token; None where it would not
    or cannot be asked in that way."""
    import grpc  # comes with Ray

    if not re.fullmatch(r"[^/]+:\d+", address):
        return None
    token = find_token()
    sent = token if sends_token(found_by_ray) else None
    with grpc.insecure_channel(address) as channel:
        try:
            ask = channel.unary_unary(_METHOD)
            ask(b"", timeout=_ANSWER_S, metadata=[("authorization", f"Bearer {sent}")] if sent else [])
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                return None
            if sent:
                return "it has another token than the one that is set here"
            return "it wants a token" + (
                ", and RAY_AUTH_MODE does not let Ray send the one that is here" if token else ""
            )
    return None
