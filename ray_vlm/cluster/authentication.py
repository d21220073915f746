"""Check the token of a Ray cluster before joining it.

Ray itself tries for twenty seconds with a wrong token and then reports only that it could not connect.
"""

import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_ANSWER_S = 3.0
_METHOD = "/ray.rpc.NodeInfoGcsService/CheckAlive"  # answered by every living Ray cluster
FIX = (
    "Set RAY_AUTH_MODE=token and the cluster's own token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token "
    "(`ray get-auth-token` on its head shows it)."
)


def find_token(environ: Mapping[str, str] = os.environ, home: Path | None = None) -> str | None:
    """Return the token that Ray would find on this machine, or None."""
    if token := environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(path) if path else (home or Path.home()) / ".ray" / "auth_token"
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def sends_token(by_auto: bool, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether Ray would send a token: with RAY_AUTH_MODE=token, or by default to a cluster that `auto` named."""
    mode = environ.get("RAY_AUTH_MODE", "").lower()
    return mode == "token" or (by_auto and not mode)


def check_token(address: str, by_auto: bool = False) -> str | None:
    """Return why the cluster at `address` (host:port) would refuse this process's token; None if it would not, or does
    not answer the check. `by_auto`: Ray found the address itself."""
    import grpc  # comes with Ray

    if not re.fullmatch(r"[^/]+:\d+", address):
        return None
    token = find_token()
    sent = token if sends_token(by_auto) else None
    with grpc.insecure_channel(address) as channel:
        try:
            ask = channel.unary_unary(_METHOD)
            ask(b"", timeout=_ANSWER_S, metadata=[("authorization", f"Bearer {sent}")] if sent else [])
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                return None
            if sent:
                return "its token differs from the one that is set here"
            return "it needs a token" + (
                ", and RAY_AUTH_MODE does not let Ray send the one that is set here" if token else ""
            )
    return None


@contextmanager
def token_here(address: str) -> Iterator[None]:
    """Let Ray send this user's token to this user's cluster on this machine, if it needs one, as to a cluster that it
    finds by `auto`. A mode that the user has set stays, and other machines and other users get nothing."""
    if "RAY_AUTH_MODE" in os.environ or find_token() is None or not _is_own(address) or not check_token(address):
        yield
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    _refresh_mode()
    try:
        yield
    finally:
        os.environ.pop("RAY_AUTH_MODE", None)
        _refresh_mode()


def _refresh_mode() -> None:
    """Let Ray read its mode again, if it has been imported: it keeps what it has read once. In a connected process the
    mode stays, because threads of Ray read it at any time."""
    if "ray" in sys.modules and not sys.modules["ray"].is_initialized():
        raylet: Any = importlib.import_module("ray._raylet")  # compiled, without types
        raylet.Config.initialize("")


def _is_own(address: str) -> bool:
    """Whether a process of this user accepts connections at an address (host:port) of this machine."""
    import psutil

    host, _, port = address.rpartition(":")
    own = {each.address for addresses in psutil.net_if_addrs().values() for each in addresses}
    if host not in own:
        return False
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and str(connection.laddr.port) == port and connection.pid:
                return psutil.Process(connection.pid).uids().real == os.getuid()
    return False
