"""Check the nodes of a joined cluster: their packages and drivers, and whether they all see the folder of the runs.

`ask_nodes` describes every node in a task on it; `compare_nodes` is a pure function of that. All differences are
reported at once.
"""

import platform
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray_vlm import __version__
from ray_vlm.errors import RunError
from ray_vlm.machine import installed_version
from ray_vlm.storage import Store, is_remote

if TYPE_CHECKING:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

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
    versions |= {name: version for name in (*SAME[1:], *QUANTISED) if (version := installed_version(name))}
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
    return tag[:-1] if mark else (installed_version("nvidia-cuda-runtime") or "").split(".")[0] or None


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

    describe: Any = ray.remote(num_cpus=0)(describe_node)
    names = {}  # of the nodes, by the reference of their task
    for node in (node for node in ray.nodes() if node["Alive"]):
        name, gpus = node["NodeManagerAddress"], node["Resources"].get("GPU", 0)
        task = describe.options(scheduling_strategy=_only_on(node["NodeID"]), max_retries=0)
        names[task.remote(name, gpus)] = name
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


def check_shared(address: str) -> None:
    """Raise `RunError` with the nodes of the joined cluster that do not see the folder of the runs: on a local disk the
    files of other nodes would be missing. Every node sees an object store."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if is_remote(address) or len(nodes) < 2:
        return
    store, name = Store(address), f".seen-{uuid.uuid4().hex[:8]}"
    store.write(name, b"")
    try:
        sees: Any = ray.remote(num_cpus=0)(_sees)
        answers = [sees.options(scheduling_strategy=_only_on(node["NodeID"])).remote(address, name) for node in nodes]
        blind = [node["NodeManagerAddress"] for node, seen in zip(nodes, ray.get(answers), strict=True) if not seen]
    finally:
        store.remove(name)
    if blind:
        raise RunError(
            f"run.output_dir: {address} is not seen by {', '.join(sorted(blind))}. Give a folder on a file system that "
            "all nodes share, or s3://..."
        )


def _only_on(node_id: str) -> "NodeAffinitySchedulingStrategy":
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)


def _sees(address: str, name: str) -> bool:
    return Store(address).read(name) is not None
