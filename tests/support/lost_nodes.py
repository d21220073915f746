"""The behaviour of a run when nodes are lost: killed, cut off briefly or for good, drained with notice, or restarted.

The nodes are real Ray nodes, each with its own address and processes (`tests/support/hosts.py`): a head without CPUs on
which the command runs, and nodes for one worker each; the run allows one or two workers.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_vlm.config.load import load_job
from ray_vlm.runs.monitor import current_lines, read_metrics
from ray_vlm.runs.paths import RunPaths
from tests.support.hosts import Hosts, start_hosts
from tests.support.killing import write_job as write_small_job
from tests.support.killing import write_method_job

ROOT = Path(__file__).parents[2]
EVERY = 10  # steps between checkpoints
DETECTED_S = 4.5  # what the health checks below come to: three of half a second that wait for a second each
_HEALTH = {"initial_delay_ms": 0, "period_ms": 500, "timeout_ms": 1000, "failure_threshold": 3}
_START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
_START += ["--object-store-memory=200000000"]
HEAD = "10.79.0.10"


@dataclass
class Scene:
    """A cluster with a running job, and what was observed."""

    hosts: Hosts
    env: dict[str, str]
    paths: RunPaths
    process: subprocess.Popen

    def lines(self, kind: str = "train") -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`, including those of repeated steps."""
        return [line for line in read_metrics(self.paths.metrics) if line["kind"] == kind]

    def wait(self, holds: Callable[[], Any], limit_s: float = 150.0) -> float:
        """Wait until the condition holds and return the time. Raise if it does not come in time or the run ends
        before."""
        until = time.monotonic() + limit_s
        while not holds():
            assert self.process.poll() is None, f"the run ended: {self.output()}"
            assert time.monotonic() < until, f"nothing after {limit_s} s: {self.output()}"
            time.sleep(0.05)
        return time.time()

    def wait_step(self, step: int, attempt: int = 1, limit_s: float = 150.0) -> float:
        """Wait for a step of this attempt or a later one."""
        return self.wait(lambda: any(x["step"] >= step and x["attempt"] >= attempt for x in self.lines()), limit_s)

    def output(self) -> str:
        """Return the end of the command's output."""
        return (self.paths.root.parent / "out.txt").read_text()[-3000:]

    def finish(self, limit_s: float = 300.0) -> dict[str, Any]:
        """Wait for the end of the run and return `run.json`."""
        assert self.process.wait(timeout=limit_s) == 0, self.output()
        return json.loads(self.paths.run.read_text())


def write_job(folder: Path, steps: int) -> Path:
    """Write a small SFT job on drawn scenes, for one or two workers; an existing job stays."""
    if (folder / "job.yaml").exists():
        return folder / "job.yaml"
    job = yaml.safe_load(write_small_job(folder).read_text())
    job["train"] |= {"global_batch_size": 4, "micro_batch_size": 2, "max_steps": steps}
    job["checkpoint"] = {"every_steps": EVERY, "keep": 3}
    # one thread, and room for one worker on a node of three CPUs
    job["cluster"] = {"num_workers": [1, 2], "cpus_per_worker": 1.9, "max_failures": 5}
    job["run"] = {"name": "run", "output_dir": str(folder)}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder / "job.yaml"


@contextmanager
def start_scene(folder: Path, steps: int, nodes: int = 2) -> Iterator[Scene]:
    """Start a cluster with the run on its head, and wait until shortly after its first checkpoint."""
    job = write_job(folder, steps)
    env = cluster_env() | {f"RAY_health_check_{name}": str(value) for name, value in _HEALTH.items()}
    with start_hosts([head(), *(node(i + 1) for i in range(nodes))], env, folder) as hosts:
        env["RAY_ADDRESS"] = f"{HEAD}:6379"
        wait_nodes(hosts, env, nodes + 1, folder)
        command = [sys.executable, "-m", "ray_vlm", "train", str(job), "--resume"]
        scene = Scene(hosts, env, RunPaths(folder / "run"), _launch(hosts, env, command, folder))
        try:
            scene.wait_step(EVERY + 2)
            yield scene
        finally:
            scene.process.kill()
            scene.process.wait()


def cluster_env() -> dict[str, str]:
    """Return the environment of a cluster on hosts, and of the commands on it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0"}
    env["RAY_worker_niceness"] = "0"
    env |= {"GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(ROOT)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return env


def head(cpus: int = 0) -> list[str]:
    """Return the command of the first host."""
    own = [f"--num-cpus={cpus}", f"--node-ip-address={HEAD}", f"--dashboard-host={HEAD}"]
    return [*_START, "--head", "--port=6379", *own]


def node(number: int, cpus: int = 3) -> list[str]:
    """Return the command of another host: by default room for one worker, and one CPU that reads images."""
    return [*_START, f"--address={HEAD}:6379", f"--num-cpus={cpus}", f"--node-ip-address=10.79.0.{10 + number}"]


def wait_nodes(hosts: Hosts, env: dict[str, str], count: int, logs: Path) -> None:
    """Wait until the head reports so many living nodes. `logs`: the folder with the output of the hosts."""
    until = time.monotonic() + 120
    while count_nodes(hosts, env) < count:
        assert time.monotonic() < until, "\n".join(log.read_text()[-800:] for log in logs.glob("rvh*.log"))
        time.sleep(1)


def _launch(hosts: Hosts, env: dict[str, str], command: list[str], folder: Path) -> subprocess.Popen:
    with open(folder / "out.txt", "ab") as out:
        return subprocess.Popen(hosts[0].words(command), env=env, cwd=ROOT, stdout=out, stderr=out)


def _ask(hosts: Hosts, env: dict[str, str], code: str) -> str:
    code = f"import ray; ray.init(address='{HEAD}:6379', logging_level='ERROR', log_to_driver=False); {code}"
    words = hosts[0].words([sys.executable, "-c", code])
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=60).stdout.strip()


def count_nodes(hosts: Hosts, env: dict[str, str]) -> int:
    """Return the number of living nodes that the head reports."""
    output = _ask(hosts, env, "print(sum(n['Alive'] for n in ray.nodes()))")
    return int(output.split()[-1]) if output else 0


def compare(scene: Scene, folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compare the finished run with the same job undisturbed in one process; return the largest relative difference of
    a step's loss, whether every step and image came exactly once, and lost steps, workers and status of each
    attempt."""
    from ray_vlm.train.driver import train

    job = load_job(folder / "job.yaml", ["cluster.num_workers=0", "run.name=alone", *overrides])
    alone = current_lines(read_metrics(train(job, "").metrics))
    alone = [line for line in alone if line["kind"] == "train"]
    want = {line["step"]: line["loss"] for line in alone}
    lines = [x for x in current_lines(read_metrics(scene.paths.metrics)) if x["kind"] == "train"]
    got = [(line["step"], line["loss"]) for line in lines]
    run = json.loads(scene.paths.run.read_text())
    return {
        "apart": max(abs(loss - want[step]) / abs(want[step]) for step, loss in got),
        "steps_once": [step for step, _ in got] == sorted(want),
        "images": sum(line["images"] for line in lines) == sum(line["images"] for line in alone),
        "lost_steps": [a.get("lost_steps", 0) for a in run["attempts"]],
        "workers": [a["workers"] for a in run["attempts"] if "workers" in a],
        "status": [a["status"] for a in run["attempts"]],
    }


def kill_and_add(folder: Path, steps: int = 300) -> dict[str, Any]:
    """Start two nodes and kill one; the run continues with one worker, and with two once another node joins."""
    with start_scene(folder, steps) as scene:
        scene.hosts.kill(2)
        killed = time.time()
        on = scene.wait_step(EVERY + 1, attempt=2)
        scene.wait_step(2 * EVERY + 2, attempt=2)
        scene.hosts.start(node(3))
        scene.wait(lambda: any(line["num_workers"] == 2 and line["attempt"] > 2 for line in scene.lines("start")))
        scene.finish()
        return {"went_on_s": on - killed - DETECTED_S} | compare(scene, folder)


def cut_for_good(folder: Path, steps: int = 60) -> dict[str, Any]:
    """Disconnect a node that may hold rank 0 while its processes keep running; reconnect it after the run has
    continued."""
    with start_scene(folder, steps) as scene:
        scene.hosts.cut(1)
        cut = time.time()
        on = scene.wait_step(EVERY + 1, attempt=2)
        scene.hosts.heal(1)
        scene.finish()
        return {"went_on_s": on - cut - DETECTED_S} | compare(scene, folder)


def cut_briefly(folder: Path, steps: int = 60) -> dict[str, Any]:
    """Disconnect a node for a second, less than the health checks allow."""
    with start_scene(folder, steps) as scene:
        scene.hosts.cut(2)
        time.sleep(1.0)
        scene.hosts.heal(2)
        scene.finish()
        return compare(scene, folder)


def _give_notice(scene: Scene, host: int, notice_s: int) -> None:
    """Tell Ray that a node will be taken away in `notice_s` seconds."""
    code = f"print([n['NodeID'] for n in ray.nodes() if n['NodeManagerAddress'] == '10.79.0.{10 + host}'][0])"
    drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", f"{HEAD}:6379"]
    drain += ["--node-id", _ask(scene.hosts, scene.env, code).split()[-1], "--reason-message", "spot"]
    drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", str(notice_s)]
    done = subprocess.run(scene.hosts[0].words(drain), env=scene.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def take_away(folder: Path, steps: int = 40, notice_s: int = 15) -> dict[str, Any]:
    """Drain a node with a notice and kill it when the notice is over."""
    with start_scene(folder, steps) as scene:
        _give_notice(scene, 2, notice_s)
        notice_at, step = time.time(), max(line["step"] for line in scene.lines())
        time.sleep(notice_s)
        scene.hosts.kill(2)
        saved = [x for x in scene.lines("checkpoint") if x["step"] >= step and x["time"] < notice_at + notice_s]
        reached = max(x["step"] for x in scene.lines() if x["attempt"] == 1)
        scene.finish()
        assert saved, f"no checkpoint within the notice: {scene.output()}"
        times = {"saved_s": saved[0]["time"] - notice_at, "steps_old": reached - max(x["step"] for x in saved)}
        return times | compare(scene, folder)


def write_sampled_job(folder: Path, steps: int, samplers: int | list[int] = 2) -> Path:
    """Write a small GRPO job with samplers. A node of three CPUs has room for the worker or for one sampler."""
    job = yaml.safe_load(write_job(folder, steps).read_text())
    write_method_job(folder, folder / "job.yaml", "grpo")
    sampled = yaml.safe_load((folder / "grpo.yaml").read_text())
    sampled["train"] |= {"max_steps": steps, "global_batch_size": 16}
    sampled["cluster"] = job["cluster"] | {"num_workers": 1}
    sampled["method"] |= {
        "samplers": samplers,
        "cpus_per_sampler": 2,
        "rewards": {"tests.integration.test_alignment:even_tokens": 1.0},
    }
    sampled["run"] = job["run"]
    (folder / "job.yaml").write_text(yaml.safe_dump(sampled))
    return folder / "job.yaml"


# Of a job that samples in the worker what its samplers sample.
_IN_WORKER = ("method.samplers=0", "method.cpus_per_sampler=null", "method.sampling_batch=1")


def _host_of(scene: Scene, sampler: int) -> int:
    """Return the host of a sampler."""
    (log,) = scene.paths.logs.glob(f"sampler-{sampler}*")
    match = re.search(r"process \d+ on rvh(\d)", log.read_text())
    assert match is not None
    return int(match[1])


def cut_sampler(folder: Path, steps: int = 40) -> dict[str, Any]:
    """Disconnect the node of a sampler for good; the other sampler answers all that is asked from then on. Return what
    `compare` does, against samples of the worker itself, and the samplers that the worker missed."""
    write_sampled_job(folder, steps)
    with start_scene(folder, steps, nodes=3) as scene:
        scene.hosts.cut(_host_of(scene, 0))
        at = max(line["step"] for line in scene.lines())
        scene.finish()
        gone = [line for line in scene.output().splitlines() if "sampler 0 is gone" in line]
        return {"cut_at": at, "gone": gone} | compare(scene, folder, _IN_WORKER)


def take_sampler_away(folder: Path, steps: int = 60, notice_s: int = 15) -> dict[str, Any]:
    """Drain the node of one of two samplers with a notice, and kill it when the notice is over."""
    write_sampled_job(folder, steps)
    with start_scene(folder, steps, nodes=3) as scene:
        host = _host_of(scene, 0)
        _give_notice(scene, host, notice_s)
        time.sleep(notice_s)
        scene.hosts.kill(host)
        scene.finish()
        return compare(scene, folder, _IN_WORKER)


def change_samplers(folder: Path, steps: int = 200) -> dict[str, Any]:
    """Add a node to a run with one sampler of at most two, and kill it after the second sampler has joined. Return what
    `compare` does, and the numbers of samplers in order."""
    write_sampled_job(folder, steps, [1, 2])
    with start_scene(folder, steps) as scene:
        scene.hosts.start(node(3))
        scene.wait(lambda: scene.lines()[-1]["samplers"] == 2)
        scene.hosts.kill(3)
        scene.wait(lambda: scene.lines()[-1]["samplers"] == 1)
        scene.finish()
        counts = [int(line["samplers"]) for line in scene.lines()]
        changes = [counts[0], *(b for a, b in itertools.pairwise(counts) if a != b)]
        return {"samplers": changes} | compare(scene, folder, _IN_WORKER)


def restart_head(folder: Path, steps: int = 40) -> dict[str, Any]:
    """Kill the head and the command on it; start the cluster anew, and continue with the same command."""
    with start_scene(folder, steps, nodes=1) as scene:
        scene.hosts.kill(0)
        scene.process.wait()
    with start_scene(folder, steps, nodes=1) as again:
        again.finish()
        return compare(again, folder)


SCENES = (kill_and_add, cut_for_good, cut_briefly, take_away, restart_head)
