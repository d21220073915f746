"""Checking a cluster's token, against a server that answers as Ray's does."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from ray_vlm.cluster.authentication import check_token, find_token, sends_token, token_here

TOKEN = "the cluster's"


class _Gcs(grpc.GenericRpcHandler):
    """Answers only requests with the token."""

    def service(self, details: Any) -> Any:
        def answer(request: bytes, context: Any) -> bytes:
            if ("authorization", f"Bearer {TOKEN}") not in context.invocation_metadata():
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1), handlers=[_Gcs()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)


@pytest.mark.parametrize(
    ("mode", "token", "by_auto", "reason"),
    [
        (None, None, False, "it needs a token"),
        (None, None, True, "it needs a token"),
        ("token", None, False, "it needs a token"),
        ("token", "another", False, "its token differs"),
        (None, TOKEN, False, "RAY_AUTH_MODE does not let Ray send"),
        ("disabled", TOKEN, True, "RAY_AUTH_MODE does not let Ray send"),
        ("token", TOKEN, False, None),
        (None, TOKEN, True, None),
    ],
)
def test_a_cluster_with_a_token(
    cluster: str,
    mode: str | None,
    token: str | None,
    by_auto: bool,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("RAY_AUTH_MODE", mode), ("RAY_AUTH_TOKEN", token)):
        if value:
            monkeypatch.setenv(name, value)
    refusal = check_token(cluster, by_auto)
    assert (refusal is None) == (reason is None)
    assert reason is None or reason in str(refusal)


@pytest.mark.parametrize(
    ("mode", "token", "here", "chosen"),
    [
        (None, TOKEN, True, "token"),
        (None, TOKEN, False, None),  # another machine gets nothing
        (None, None, True, None),
        ("disabled", TOKEN, True, "disabled"),
    ],
)
def test_a_cluster_on_this_machine_gets_the_user_s_token(
    cluster: str,
    mode: str | None,
    token: str | None,
    here: bool,
    chosen: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("RAY_AUTH_MODE", mode), ("RAY_AUTH_TOKEN", token)):
        if value:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "psutil.net_if_addrs", lambda: {"lo": [SimpleNamespace(address="127.0.0.1" if here else "::1")]}
    )
    with token_here(cluster):
        assert os.environ.get("RAY_AUTH_MODE") == chosen
        if "ray" in sys.modules and not sys.modules["ray"].is_initialized():
            from ray._raylet import AuthenticationMode, get_authentication_mode

            assert (get_authentication_mode() == AuthenticationMode.TOKEN) == (chosen == "token")
    assert os.environ.get("RAY_AUTH_MODE") == mode


def test_the_mode_of_a_connected_process_stays(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of Ray read it at any time, and end the process where they then find no token."""
    from ray._raylet import get_authentication_mode

    before = get_authentication_mode()
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    with token_here(cluster):
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert get_authentication_mode() == before


def test_a_listener_of_another_user_gets_nothing(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with token_here(cluster):
        assert "RAY_AUTH_MODE" not in os.environ


def test_a_cluster_without_tokens_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with token_here("127.0.0.1:1"):
        assert "RAY_AUTH_MODE" not in os.environ


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:10001", "auto", ""])
def test_what_does_not_answer_is_left_to_ray(address: str) -> None:
    assert check_token(address) is None


def test_tokens_are_read_from_where_ray_reads_them(tmp_path: Path) -> None:
    assert find_token({}, tmp_path) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of home\n")
    (tmp_path / "other").write_text("of path")
    assert find_token({}, tmp_path) == "of home"
    assert find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}, tmp_path) == "of path"
    assert find_token({"RAY_AUTH_TOKEN": "of value", "RAY_AUTH_TOKEN_PATH": "x"}, tmp_path) == "of value"
    assert sends_token(False, {"RAY_AUTH_MODE": "token"})
    assert not sends_token(True, {"RAY_AUTH_MODE": "disabled"})
