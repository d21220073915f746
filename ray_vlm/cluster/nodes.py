"""Compare the nodes of a joined cluster with the driver's machine; all differences are reported at once.

`ask_nodes` describes every node in a task on it; `compare_nodes` and `expected` are pure functions of that.
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

# Packages whose versions decide numbers or file formats; a different one on a node would fail late.
SAME = ("ray-vlm", "ray", "torch", "torchvision", "transformers", "trl", "peft", "accelerate", "datasets")
QUANTISED = ("bitsandbytes",)
_OLDEST_DRIVER = {"13": 580, "12": 525}  # NVIDIA driver by the major version of torch's CUDA (CUDA release notes)


@dataclass(frozen=True)
class Node:
    """One node. `versions`: of the installed packages; `driver`: the NVIDIA driver, or None; `cuda`: torch's CUDA."""

    name: str
    python: str
    versions: Mapping[str, str] = field(default_factory=dict)
    driver: str | None = None
    cuda: str | None = None
    gpus: float = 0


def describe_node(name: str = "", gpus: float = 0) -> Node:
    """Describe this machine."""
    versions = {"ray-vlm": __version__}  # sent along with a job it is not installed, and has no metadata
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
    """Return the CUDA version of a torch wheel: from `2.15.0+cu132`, or for wheels from PyPI from the CUDA package."""
    _, mark, tag = version.partition("+cu")
    if mark:
        return tag[:-1]
    try:
        return metadata.version("nvidia-cuda-runtime").split(".")[0]
    except metadata.PackageNotFoundError:
        return None


def compare_nodes(nodes: Sequence[Node], here: Node, quantised: bool, gpus: bool) -> list[str]:
    """Return one message for each way in which a node does not fit. `quantised`: the job needs bitsandbytes; `gpus`:
    it uses GPUs, so nodes that have some need a driver."""
    problems = []
    for node in nodes:
        if node.python != here.python:
            problems.append(f"{node.name}: Python {node.python}, and {here.python} here. Use one image for all nodes.")
        for package in (*SAME, *(QUANTISED if quantised else ())):
            version, local = node.versions.get(package), here.versions.get(package)
            if version is None:
                problems.append(
                    f"{node.name}: {package} is not installed. Install it with the cluster's set-up commands."
                )
            elif local is not None and version != local:
                problems.append(f"{node.name}: {package} {version}, and {local} here. Install the same on all nodes.")
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
    """Describe every living node of the cluster in a task on it. Returns the nodes and a message for each that failed;
    a node that does not answer within `timeout_s` is left out."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    describe: Any = ray.remote(num_cpus=0)(describe_node)
    names = {}  # of the nodes, by the reference of their task
    for node in (node for node in ray.nodes() if node["Alive"]):
        where = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        name, gpus = node["NodeManagerAddress"], node["Resources"].get("GPU", 0)
        names[describe.options(scheduling_strategy=where, max_retries=0).remote(name, gpus)] = name
    done, _ = ray.wait(list(names), num_returns=len(names), timeout=timeout_s)
    nodes, problems = [], []
    for reference in done:
        try:
            nodes.append(ray.get(reference))
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            problems.append(
                f"{names[reference]}: cannot be inspected ({reason[:200]}). Install this package on every node."
            )
    return nodes, problems


def living_nodes() -> set[str]:
    """Return the addresses of the cluster's living nodes; an empty set if the cluster itself does not answer."""
    import ray

    try:
        return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    except (ConnectionError, RuntimeError):
        return set()


def expected(now: Mapping[str, float], job: JobConfig, at_once: int = 1) -> dict[str, float]:
    """Return the resources that an autoscaling cluster is expected to reach: those it has `now`, and at least those
    that `at_once` runs of the job need."""
    processes = max(1, count_processes(job))
    cpus = max(float(cpus_needed(job)), job.cluster.cpus_per_worker)
    need = {"CPU": cpus, "GPU": processes * job.cluster.gpus_per_worker}
    return {**now, **{name: max(now.get(name, 0.0), at_once * each) for name, each in need.items()}}


def wait_longer(minutes: float) -> None:
    """Wait `minutes` for nodes that are still to be started; by default Ray Train gives up after one minute."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(60 * minutes)
