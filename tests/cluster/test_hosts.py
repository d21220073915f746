"""Two hosts with addresses of their own: a submitted job has one worker on each, and a sweep its trials on both."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts import Host, start_hosts, why_not

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
TOKEN = "fedcba9876543210" * 4
PYTHON = sys.executable
SMALL = ["train.max_steps=3", "checkpoint.every_steps=2", "evaluate.every_steps=3", "evaluate.num_samples=4"]


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Host], dict[str, str]]]:
    """A head that offers no CPU, and two hosts with three each, started as `cluster.yaml` starts its nodes."""
    if reason := why_not():
        pytest.skip(f"several hosts on one machine: {reason}")
    folder = tmp_path_factory.mktemp("hosts")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    env |= {"GLOO_SOCKET_IFNAME": "eth0", "RAY_enable_metrics_collection": "0"}
    env["PATH"] = f"{Path(PYTHON).parent}:{env['PATH']}"
    start = [PYTHON, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    start += ["--object-store-memory=200000000"]
    head = [
        *start,
        "--head",
        "--port=6379",
        "--num-cpus=0",
        "--node-ip-address=10.79.0.10",
        "--dashboard-host=127.0.0.1",
    ]
    nodes = [[*start, "--address=10.79.0.10:6379", "--num-cpus=3", f"--node-ip-address=10.79.0.{i}"] for i in (11, 12)]
    with start_hosts([head, *nodes], env, folder) as hosts:
        until = time.monotonic() + 120
        while _living(hosts[0], env) < 3:
            assert time.monotonic() < until, "\n".join(log.read_text()[-800:] for log in folder.glob("*.log"))
            time.sleep(1)
        yield hosts, env


def _living(head: Host, env: dict[str, str]) -> int:
    code = "import ray; ray.init(address='10.79.0.10:6379', logging_level='ERROR', log_to_driver=False); "
    code += "print(sum(n['Alive'] for n in ray.nodes()))"
    completed = subprocess.run(head.words([PYTHON, "-c", code]), env=env, capture_output=True, text=True)
    return int(completed.stdout.split()[-1]) if completed.returncode == 0 and completed.stdout.strip() else 0


def _on_head(hosts: list[Host], env: dict[str, str], *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(hosts[0].words(words), env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_a_submitted_job_has_one_worker_on_each_host(two_hosts, tmp_path: Path) -> None:
    hosts, env = two_hosts
    words = ["jobs/demo_sft.yaml", *SMALL, f"run.output_dir={tmp_path}", "cluster.num_workers=2"]
    words += [f"data.{part}.path={tmp_path}/site/{part}.json" for part in ("train", "eval", "test")]
    words += ["cluster.cpus_per_worker=2", "model.load_in_4bit=true", "--address", "http://127.0.0.1:8265"]
    done = _on_head(hosts, env, PYTHON, "-m", "ray_vlm", "submit", "train", *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = json.loads((tmp_path / "demo_sft" / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["result"]["steps"] == 3
    nodes = "import ray; ray.init(address='10.79.0.10:6379', logging_level='ERROR'); from ray.util.state import "
    nodes += "list_actors; print([a.node_id for a in list_actors(filters=[('class_name', '=', 'RayTrainWorker')])])"
    completed = _on_head(hosts, env, PYTHON, "-c", nodes)
    assert len(set(json.loads(completed.stdout.splitlines()[-1].replace("'", '"')))) == 2, (
        completed.stdout + completed.stderr
    )


def test_a_stranger_is_refused(two_hosts) -> None:
    hosts, env = two_hosts
    code = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8265/api/jobs/').status)"
    refused = _on_head(hosts, env, PYTHON, "-c", code)
    assert refused.returncode != 0
    assert "401" in refused.stderr or "403" in refused.stderr
    outside = subprocess.run(
        hosts[1].words([PYTHON, "-c", code.replace("127.0.0.1", hosts[0].address)]),
        env=env,
        capture_output=True,
        text=True,
    )
    assert "refused" in outside.stderr.lower(), "the dashboard listens on the head alone"


def test_a_folder_that_only_one_host_sees_is_refused_before_any_trial(two_hosts, tmp_path: Path) -> None:
    hosts, env = two_hosts
    space = tmp_path / "space.yaml"
    space.write_text("lora.rank: {choice: [4, 8]}\n")
    words = ["tune", "jobs/demo_sft.yaml", "--space", str(space), *SMALL, "run.output_dir=/tmp/ray/out"]
    done = _on_head(hosts, env | {"RAY_ADDRESS": "10.79.0.10:6379"}, PYTHON, "-m", "ray_vlm", *words)
    assert done.returncode != 0
    assert "is not seen by 10.79.0.11, 10.79.0.12" in done.stderr
