"""What the nodes of a joined cluster are and have, against what the driver's machine has: told in one message.

`ask_nodes` looks, in a task on every node; `compare_nodes` and `expected` decide and touch nothing.
"""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from ray_vlm import __version__
from ray_vlm.cluster.preflight import count_processes, cpus_needed
from ray_vlm.config.schema import JobConfig

# Packages whose versions decide numbers or file formats; another one on a node is an error that would come late.
SAME = ("ray-vlm", "ray", "torch", "torchvision", "transformers", "trl", "peft", "accelerate", "datasets")
QUANTISED = ("bitsandbytes",)
_OLDEST_DRIVER = {"13": 580, "12": 525}  # of NVIDIA's, by the major version of torch's CUDA (its release notes)


@dataclass(frozen=True)
class Node:
    """One node. `versions`: of packages, absent ones left out; `driver`: NVIDIA's, or None; `cuda`: that of torch."""

    name: str
    python: str
    versions: Mapping[str, str] = field(default_factory=dict)
    driver: str | None = None
    cuda: str | None = None
    gpus: float = 0


def describe_node(name: str = "", gpus: float = 0) -> Node:
    """This machine."""
    versions = {"ray-vlm": __version__}  # it may have travelled with a job, and then no package is installed
    for package in (*SAME[1:], *QUANTISED):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    python = ".".join(platform.python_version_tuple()[:2])
    return Node(name or platform.node(), python, versions, _driver(), _cuda(versions.get("torch", "")), gpus)


def _driver() -> str | None:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
    except OSError:
        return None
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), None)


def _cuda(version: str) -> str | None:
    """The CUDA that a torch wheel is built for, by its version: `2.15.0+cu132` or, of the index's own, its packages."""
    _, mark, tag = version.partition("+cu")
    if mark:
        return tag[:-1]
    try:
        return metadata.version("nvidia-cuda-runtime").split(".")[0]
    except metadata.PackageNotFoundError:
        return None


def compare_nodes(nodes: Sequence[Node], here: Node, quantised: bool, gpus: bool) -> list[str]:
    """Everything in which a node does not fit, one sentence each. `quantised`: the job needs bitsandbytes; `gpus`: it
    asks for cards, so nodes that have some need a driver."""
    problems = []
    for node in nodes:
        if node.python != here.python:
            problems.append(f"{node.name}: Python {node.python}, and {here.python} here. Use one image for all nodes.")
        for package in (*SAME, *(QUANTISED if quantised else ())):
            there, mine = node.versions.get(package), here.versions.get(package)
            if there is None:
                problems.append(
                    f"{node.name}: {package} is not installed. Install it with the cluster's set-up commands."
                )
            elif mine is not None and there != mine:
                problems.append(f"{node.name}: {package} {there}, and {mine} here. Install the same on all nodes.")
        problems += _check_driver(node) if gpus and node.gpus else []
    return problems


def _check_driver(node: Node) -> list[str]:
    oldest = _OLDEST_DRIVER.get((node.cuda or "").split(".")[0])
    if node.driver is None:
        return [f"{node.name}: offers {node.gpus:g} GPU, but has no NVIDIA driver. Install one on the machine."]
    if oldest and int(node.driver.split(".")[0]) < oldest:
        return [
            f"{node.name}: NVIDIA driver {node.driver}, and torch for CUDA {node.cuda} needs {oldest} or newer. Update "
            "the driver, or install a torch for an older CUDA."
        ]
    return []


def ask_nodes(timeout_s: float = 60.0) -> tuple[list[Node], list[str]]:
    """Every living node of the cluster, looked at from within, and why others could not be; one that does not answer in
    time is left out."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask: Any = ray.remote(num_cpus=0)(describe_node)
    asked = {}
    for node in (node for node in ray.nodes() if node["Alive"]):
        where = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        name, gpus = node["NodeManagerAddress"], node["Resources"].get("GPU", 0)
        asked[ask.options(scheduling_strategy=where, max_retries=0).remote(name, gpus)] = name
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    found, problems = [], []
    for reference in done:
        try:
            found.append(ray.get(reference))
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            problems.append(
                f"{asked[reference]}: cannot be asked ({reason[:200]}). Install this package on every node."
            )
    return found, problems


def living_nodes() -> set[str]:
    """Addresses of the cluster's living nodes; none where the cluster itself does not answer."""
    import ray

    try:
        return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    except (ConnectionError, RuntimeError):
        return set()


def expected(now: Mapping[str, float], job: JobConfig, at_once: int = 1) -> dict[str, float]:
    """What a cluster that starts machines on demand is taken to come to: what it has `now`, and no less than
    `at_once` runs of the job need."""
    processes = max(1, count_processes(job))
    cpus = max(float(cpus_needed(job)), job.cluster.cpus_per_worker)
    need = {"CPU": cpus, "GPU": processes * job.cluster.gpus_per_worker}
    return {**now, **{name: max(now.get(name, 0.0), at_once * each) for name, each in need.items()}}


def wait_longer(minutes: float) -> None:
    """Give machines that are still to be started the time that it takes: Ray Train gives up after a minute."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(60 * minutes)
