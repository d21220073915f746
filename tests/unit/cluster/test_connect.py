"""Which cluster a run gets, and the notes before it starts. Ray itself is not started."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_vlm.cluster import connect
from ray_vlm.cluster.connect import SETTINGS, explain_refusal, find_other_cluster, start_ray
from ray_vlm.cluster.preflight import ClusterDemand
from ray_vlm.config.cluster import Cluster
from ray_vlm.errors import RunError
from ray_vlm.machine import GIB, Disk


def _demand(**cluster: Any) -> ClusterDemand:
    return ClusterDemand(Cluster(**cluster))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What `ray.init` was called with, on a machine of 4 CPUs without cards, with room, where no other cluster runs."""
    called: dict[str, Any] = {}
    for name in SETTINGS:
        monkeypatch.setenv(name, SETTINGS[name])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **kwargs: called.update(kwargs))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 4.0})
    monkeypatch.setattr(connect.authentication, "check_token", lambda *args: None)
    monkeypatch.setattr(connect, "count_cpus", lambda: 4)
    monkeypatch.setattr(connect, "count_gpus", lambda: 0)
    monkeypatch.setattr(connect, "read_disk", lambda folder: Disk(str(folder), 100 * GIB, 50 * GIB))
    return called


@pytest.fixture
def other_cluster(tmp_path: Path) -> Iterator[str]:
    """The address of something that answers, where `ray start` would have left it."""
    (tmp_path / "ray").mkdir()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
        yield address


def _notes(capsys: pytest.CaptureFixture) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]


@pytest.mark.parametrize(("workers", "cpus"), [(1, 4), (6, 12)])
def test_a_cluster_of_our_own_has_the_cpus_that_we_may_use_or_need(
    started: dict[str, Any], workers: int, cpus: int, capsys: pytest.CaptureFixture
) -> None:
    with start_ray(_demand(num_workers=workers)):
        pass
    assert (started["address"], started["num_cpus"]) == ("local", cpus)
    assert _notes(capsys) == []


def test_beside_another_cluster_we_start_our_own_and_say_how_to_join(
    started: dict[str, Any], other_cluster: str, capsys: pytest.CaptureFixture
) -> None:
    assert find_other_cluster() == other_cluster
    with start_ray(_demand()):
        pass
    assert started["address"] == "local"
    (line,) = _notes(capsys)
    assert f"a Ray cluster runs on this machine already ({other_cluster})" in line
    assert "cluster.address=auto" in line


@pytest.mark.parametrize("text", ["127.0.0.1:1", "garbage", "", "127.0.0.1:999999999999"])
def test_an_address_that_a_dead_cluster_left_counts_for_nothing(
    started: dict[str, Any], tmp_path: Path, text: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(text)
    with start_ray(_demand()):
        pass
    assert started["address"] == "local"
    assert _notes(capsys) == []


def test_a_cluster_that_was_named_is_joined_as_it_is(
    started: dict[str, Any], other_cluster: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(connect, "answers", lambda address, timeout_s: True)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    monkeypatch.delenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", raising=False)
    with start_ray(_demand(gpus_per_worker=1)):
        assert started["address"] == "10.0.0.9:6379"
    with start_ray(_demand(address="auto", gpus_per_worker=1)):
        assert started["address"] == "auto"
        assert "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER" not in os.environ
    assert "num_cpus" not in started
    assert _notes(capsys) == []
    with start_ray(_demand(address="local")):
        assert (started["address"], started["num_cpus"]) == ("local", 4)
        assert os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0", "no machine is taken away from this one"
    assert "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER" not in os.environ
    assert capsys.readouterr().out.startswith("starting Ray on this machine\n")


def test_idle_gpus_are_reported_in_one_line(
    started: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with start_ray(_demand(address="auto")):
        pass
    monkeypatch.setattr(connect, "count_gpus", lambda: 1)
    with start_ray(_demand()):
        pass
    with start_ray(_demand(gpus_per_worker=1)):
        pass
    joined, own = _notes(capsys)
    assert joined.startswith("note: 4 GPUs lie idle, and the job runs on CPUs; cluster.gpus_per_worker=1")
    assert own.startswith("note: a GPU lies idle")


def test_a_full_temporary_folder_is_reported_before_ray_starts(
    started: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(connect, "read_disk", lambda folder: Disk("/tmp/ray", 100 * GIB, 2 * GIB))
    with start_ray(_demand()):
        pass
    assert "note: /tmp/ray, Ray's temporary folder, is 98% full" in capsys.readouterr().out
    started.clear()
    monkeypatch.setattr(connect, "read_disk", lambda folder: Disk("/tmp/ray", 100 * GIB, 2**20))
    with pytest.raises(RunError, match="RAY_TMPDIR"), start_ray(_demand()):
        pass
    assert started == {}


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("Token authentication is enabled but no authentication token was found", "RAY_AUTH_TOKEN"),
        ("RPC Error message: Invalid authentication token; RPC Error details: UNAUTHENTICATED", "RAY_AUTH_TOKEN"),
        (
            "Version mismatch: The cluster was started with:\n    Ray: 2.9\n    Python: 3.11",
            "Install here the versions of Ray and Python",
        ),
        ("ray client connection timeout", "Start it, or leave the address out"),
    ],
)
def test_a_refusal_is_reported_with_the_fix(text: str, fix: str) -> None:
    message = explain_refusal("10.0.0.9:6379", "RAY_ADDRESS", text)
    assert message.startswith("RAY_ADDRESS='10.0.0.9:6379' cannot be joined (")
    assert " ".join(text.split()) in message
    assert fix in message


def test_an_address_where_nothing_answers_is_reported_at_once(started: dict[str, Any]) -> None:
    message = r"cluster\.address=.127\.0\.0\.1:1. cannot be joined \(nothing answers there\)"
    with pytest.raises(RunError, match=message), start_ray(_demand(address="127.0.0.1:1")):
        pass
    assert started == {}


def test_every_refusal_that_ray_raises_is_a_run_error(started: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import AuthenticationError

    def refuse(**kwargs: Any) -> None:
        raise AuthenticationError("no token was found")

    monkeypatch.setattr(ray, "init", refuse)
    message = r"cluster\.address='auto' cannot be joined .*RAY_AUTH_MODE=token"
    with pytest.raises(RunError, match=message), start_ray(_demand(address="auto")):
        pass


def test_a_report_waits_for_no_slow_poll() -> None:
    """At Ray's own two seconds each report would hold the workers as long (`tests/cluster/test_recovery.py`)."""
    assert float(SETTINGS["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]) <= 0.2
