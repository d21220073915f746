"""Join the Ray cluster that the job names, or start one in this machine for as long as the run lasts."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray_vlm.cluster.nodes import ask_nodes, compare_nodes, describe_node, expected, wait_longer
from ray_vlm.cluster.preflight import Layout, cpus_needed, plan_layout
from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import RunError

# What Ray is told before it starts; a value that the user has set stays.
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing calls home
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for the next poll, 2 s apart by default
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # 5 s of a notice of 15 or 30 would be gone
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_enable_metrics_collection": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_worker_niceness": "0",  # at Ray's 15 whatever else runs here holds up all threads of a step
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(
            f"cluster.address={address!r} cannot be joined ({str(error).splitlines()[0]}). Start it, or leave the "
            "address out to use a cluster of this machine's own."
        ) from None


@contextmanager
def start_ray(job: JobConfig) -> Iterator[None]:
    """The Ray cluster that the job names, or one of our own. Leaves Ray as it was found.

    A cluster of our own gets as many logical CPUs as the job needs, even where that is more than the machine has.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    print(describe_start(job), flush=True)  # to import Ray and to start it takes longer than a person waits in silence
    import ray

    mine = not ray.is_initialized()
    if mine:
        address = job.cluster.address or os.environ.get("RAY_ADDRESS")
        if address:
            _join(address)
        else:
            cpus = max(os.cpu_count() or 1, cpus_needed(job))
            ray.init(num_cpus=cpus, include_dashboard=True, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        if mine:
            ray.shutdown()


@contextmanager
def connect(job: JobConfig, at_once: int = 1) -> Iterator[Layout]:
    """A Ray cluster that can run the job, and how the job lies on it. Leaves Ray as it was found.

    `at_once`: how many runs like it share the cluster. Raises `RunError` when a cluster that was joined is too small.
    """
    with start_ray(job):
        resources, nodes = find_resources(job, at_once)
        yield plan_layout(job, {name: amount / at_once for name, amount in resources.items()}, nodes)


def find_resources(job: JobConfig, at_once: int = 1) -> tuple[dict[str, float], list[Mapping[str, float]]]:
    """What the cluster has, or is waited for to start for `at_once` runs of the job, all together; and by node, where
    no others are waited for. Raises `RunError` where nodes do not fit the job: other packages, no driver."""
    import ray

    living, problems = ask_nodes() if len(ray.nodes()) > 1 else ([], [])
    problems += compare_nodes(living, describe_node(), job.model.load_in_4bit, job.cluster.gpus_per_worker > 0)
    if problems:
        raise RunError(problems)
    if minutes := job.cluster.startup_minutes:
        wait_longer(minutes)
        return expected(ray.cluster_resources(), job, at_once), []
    if job.cluster.most_workers > job.cluster.least_workers:  # Ray asks first for room that a lost node had
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    return ray.cluster_resources(), [node["Resources"] for node in ray.nodes() if node["Alive"]]


def describe_start(job: JobConfig) -> str:
    """What `start_ray` is about to do."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return "using the Ray cluster that this process has joined"
    address = job.cluster.address or os.environ.get("RAY_ADDRESS")
    return f"joining the Ray cluster at {address}" if address else "starting Ray on this machine"
