"""A Ray that `ray start` has left on the machine, with a token: not joined unasked, and joined or refused as the job
says. Signals while Ray starts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ray_vlm.runs.monitor import read_metrics

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4
TOKEN_OF_ANOTHER = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """The environment of a machine on which `ray start --head` has left a cluster with a token. Short paths: Ray's
    sockets lie in them."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    (folder / "home").mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"RAY_TMPDIR": str(folder), "HOME": str(folder / "home"), "RAY_USAGE_STATS_ENABLED": "0"}
    own = env | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=3", "--port=0"]
    with open(folder / "log", "w") as log:
        words = [*command, "--include-dashboard=False", "--disable-usage-stats"]
        process = subprocess.Popen(words, env=own, stdout=log, stderr=log, start_new_session=True)
    address = folder / "ray" / "ray_current_cluster"
    until = time.monotonic() + 90
    while not address.exists() and time.monotonic() < until:
        time.sleep(0.5)
    time.sleep(3)
    yield env | {"OTHER": address.read_text().strip()}
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        each.kill()
    shutil.rmtree(folder, ignore_errors=True)


def _run(env: dict[str, str], path: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ray_vlm", "train", str(path), "cluster.num_workers=1", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


def test_a_run_beside_another_cluster_has_its_own_and_says_how_to_join(head: dict[str, str], job_file) -> None:
    done = _run(head, job_file(train={"max_steps": 1}))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"a Ray cluster runs on this machine already ({head['OTHER']})" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "auth", [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}]
)
@pytest.mark.parametrize("address", ["auto", "OTHER"])
def test_a_cluster_that_wants_another_token_is_told_with_the_fix(
    head: dict[str, str], job_file, auth: dict[str, str], address: str
) -> None:
    done = _run(head | auth, job_file(), f"cluster.address={head.get(address, address)}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert "cannot be joined" in done.stderr
    assert "Traceback" not in done.stderr


def test_with_its_token_it_is_joined(head: dict[str, str], job_file, tmp_path: Path) -> None:
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    done = _run(head | auth, job_file(train={"max_steps": 1}), "cluster.address=auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "runs" / "run" / "run.json").read_text())["cluster"]["CPU"] == 3


def test_an_address_where_nobody_is_is_told(job_file) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    done = _run(dict(os.environ), job_file(), f"cluster.address={address}")
    assert done.returncode == 1
    assert f"cluster.address='{address}' cannot be joined" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "after_s"), [(signal.SIGINT, 2.0), (signal.SIGTERM, 8.0), (signal.SIGINT, 16.0)])
def test_a_signal_while_ray_starts_leaves_at_once(job_file, tmp_path: Path, number: int, after_s: float) -> None:
    """While Ray, its workers and the base start: no step is trained for the sake of a checkpoint."""
    command = [
        sys.executable,
        "-m",
        "ray_vlm",
        "train",
        str(job_file()),
        "cluster.num_workers=1",
        "train.max_steps=5000",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "runs" / "run"
    until = time.monotonic() + 60
    while not (run / "run.json").exists() and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(after_s)
    if any(line["kind"] == "train" for line in read_metrics(run / "metrics.jsonl")):
        process.kill()
        pytest.skip("this machine was quicker")
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    sent = time.monotonic()
    assert process.wait(timeout=60) == 128 + number
    assert time.monotonic() - sent < 8
    assert "stopped before the first step; --resume goes on" in (process.stderr.read() if process.stderr else "")
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["status"] == manifest["attempts"][0]["status"] == "interrupted"
    assert not (run / ".ray").exists()
    _, alive = psutil.wait_procs(started, timeout=60)  # agents notice late that their raylet is gone
    assert alive == [], "Ray goes on without its driver"
