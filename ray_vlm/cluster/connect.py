"""Join the Ray cluster that the job names, or start a local one for the duration of the run."""

import logging
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray_vlm.cluster import authentication
from ray_vlm.cluster.nodes import ask_nodes, compare_nodes, describe_node
from ray_vlm.cluster.preflight import (
    ClusterDemand,
    Layout,
    SamplerRoom,
    count_fitting,
    count_samplers,
    cpus_needed,
    expected_resources,
    plan_layout,
)
from ray_vlm.errors import RunError
from ray_vlm.machine import cannot_hold_ray, count_cpus, count_gpus, describe_room, ray_folder, read_disk

logger = logging.getLogger(__name__)
# Environment variables that are set before Ray starts; a value that the user has set stays.
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing calls home
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for the next poll, by default 2 s apart
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # the default of 5 s would use up much of a notice of 15 or 30 s
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_enable_metrics_collection": "0",
    # Ray prints what its nodes report whatever `log_to_driver` is. These two tell a person nothing.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started on node|There are infinite retries remaining",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_worker_niceness": "0",  # at Ray's default of 15 other processes delay every step
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# The same for a local cluster: its only machine is never preempted, so no process needs to watch for that.
OWN_SETTINGS = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
_OWN = "local"  # the address with which Ray starts a new local cluster
_ANSWER_S = 0.3  # time for a cluster on this machine to answer
_JOIN_S = 5.0  # the same for a cluster that is to be joined


def explain_refusal(address: str, setting: str, text: str) -> str:
    """Build the message for a cluster that cannot be joined, from Ray's `text`. `setting` is where `address` is set."""
    reason = " ".join(text.split())
    if re.search("authenticat|unauthori[sz]ed|token", text, re.IGNORECASE):
        reason, fix = reason.split(". ")[0], authentication.FIX
    elif "ersion mismatch" in text:
        fix = (
            "Install here the versions of Ray and Python that the cluster has, or start the cluster with the ones here."
        )
    else:
        fix = "Start it, or leave the address out to start a local cluster."
    return f"{setting}={address!r} cannot be joined ({reason[:300] or 'no reason was given'}). {fix}"


def _join(address: str, setting: str) -> None:
    import ray
    from ray.exceptions import RayError

    by_auto = address == "auto"
    if re.fullmatch(r"[^/]+:\d+", address) and not answers(address, _JOIN_S):  # Ray itself tries for minutes
        raise RunError(explain_refusal(address, setting, "nothing answers there"))
    if refused := authentication.check_token((find_other_cluster() or "") if by_auto else address, by_auto):
        raise RunError(explain_refusal(address, setting, refused))
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise RunError(explain_refusal(address, setting, str(error))) from None


def answers(address: str, timeout_s: float) -> bool:
    """Whether anything accepts connections at `address` (host:port)."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout_s):
            return True
    except (OSError, ValueError, OverflowError):
        return False


def find_other_cluster() -> str | None:
    """Return the address of a running cluster that `ray start` started on this machine, or None.

    The file with the address remains when a cluster dies, so the address must answer too.
    """
    try:
        address = (ray_folder() / "ray_current_cluster").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return address if answers(address, _ANSWER_S) else None


def _start_own(cpus: int) -> None:
    """Start a local cluster, also beside another one, which Ray would otherwise join by default."""
    import ray

    disk = read_disk(ray_folder())
    note = describe_room(disk)
    if note and cannot_hold_ray(disk):
        raise RunError(note)
    if note:
        logger.warning(note)
    if (other := find_other_cluster()) is not None:
        logger.warning(
            f"a Ray cluster runs on this machine already ({other}); this starts one of its own beside it. "
            "cluster.address=auto, or RAY_ADDRESS=auto, joins that one"
        )
    ray.init(address=_OWN, num_cpus=cpus, include_dashboard=True, log_to_driver=False, logging_level=logging.ERROR)


@contextmanager
def start_ray(demand: ClusterDemand) -> Iterator[None]:
    """Join the Ray cluster that the job names, or start a local one, and shut down Ray at the end if this started it.

    A local cluster gets as many logical CPUs as the job needs, even if the machine has fewer.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    logger.info(describe_start(demand.cluster.address))
    import ray  # after the line above, since importing and starting Ray takes many seconds

    starts_ray, added = not ray.is_initialized(), set[str]()
    try:
        if starts_ray:
            setting = "cluster.address" if demand.cluster.address else "RAY_ADDRESS"
            address = demand.cluster.address or os.environ.get("RAY_ADDRESS") or _OWN
            if address == _OWN:
                added = OWN_SETTINGS.keys() - os.environ.keys()
                os.environ.update({name: OWN_SETTINGS[name] for name in added})
                _start_own(max(count_cpus(), cpus_needed(demand)))
            else:
                _join(address, setting)
            if demand.cluster.gpus_per_worker == 0:
                tell_idle_gpus(count_gpus() if address == _OWN else int(ray.cluster_resources().get("GPU", 0)))
        yield
    finally:
        if starts_ray:
            ray.shutdown()
        for name in added:  # a cluster that is joined later may lose machines
            os.environ.pop(name, None)


def tell_idle_gpus(count: int) -> None:
    """Log a warning that a run on CPUs leaves `count` GPUs idle, unless there are none."""
    if count:
        cards = "a GPU lies" if count == 1 else f"{count} GPUs lie"
        logger.warning(f"{cards} idle, and the job runs on CPUs; cluster.gpus_per_worker=1 gives each worker a GPU")


@contextmanager
def connect(demand: ClusterDemand, at_once: int = 1) -> Iterator[Layout]:
    """Start or join a Ray cluster and yield the layout on it of a job with this demand.

    `at_once`: how many such runs share the cluster. Raises `RunError` if a joined cluster is too small.
    """
    with start_ray(demand):
        resources, nodes = find_resources(demand, at_once)
        yield plan_layout(demand, {name: amount / at_once for name, amount in resources.items()}, nodes, at_once)


def find_resources(demand: ClusterDemand, at_once: int = 1) -> tuple[dict[str, float], list[Mapping[str, float]]]:
    """Return the resources of the cluster in total and by node.

    With `cluster.startup_minutes` the total includes the nodes that are expected to start for `at_once` runs, and the
    list of nodes is empty. Raises `RunError` if a node does not fit the job: other packages, no driver.
    """
    import ray

    cluster = demand.cluster
    living, problems = ask_nodes() if len(ray.nodes()) > 1 else ([], [])
    problems += compare_nodes(living, describe_node(), demand.quantised, cluster.gpus_per_worker > 0)
    if problems:
        raise RunError(problems)
    if cluster.startup_minutes:  # by default Ray Train gives up after one minute
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(60 * cluster.startup_minutes)
        return expected_resources(ray.cluster_resources(), demand, at_once), []
    if cluster.most_workers > cluster.least_workers:  # Ray first waits for the resources of a lost node
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    return read_resources()


def read_resources() -> tuple[dict[str, float], list[Mapping[str, float]]]:
    """Return what the cluster has now, in total and by node."""
    import ray

    return ray.cluster_resources(), [node["Resources"] for node in ray.nodes() if node["Alive"]]


def sampler_room(demand: ClusterDemand, at_once: int) -> SamplerRoom:
    """Return the room for samplers on the cluster as it is now."""
    import ray

    resources, nodes = read_resources()
    in_all = count_samplers(demand, {name: amount / at_once for name, amount in resources.items()}, nodes, at_once)
    return SamplerRoom(in_all, count_fitting(ray.available_resources(), demand.sampler))


def describe_start(address: str | None) -> str:
    """Describe what `start_ray` is about to do. `address`: the cluster to join, if the job names one."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return "using the Ray cluster that this process has joined"
    address = address or os.environ.get("RAY_ADDRESS")
    own = address in (None, "", _OWN)
    return "starting Ray on this machine" if own else f"joining the Ray cluster at {address}"
