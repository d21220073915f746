"""Will the cluster run the job? Pure arithmetic on what was asked and what there is; nothing here touches Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import RunError

_MOST_LOADERS = 8  # processes that read images for one worker, unless the job says more


@dataclass(frozen=True)
class Layout:
    """How a job lies on a cluster: loaders of each worker, and the CPUs that each loader reserves."""

    num_loaders: int
    cpus_per_loader: float


def count_processes(job: JobConfig, workers: int | None = None) -> int:
    """Processes that hold the model: the workers, by default the fewest that the job trains with, and one more where
    validation has its own. 0 for a job of this process alone."""
    fewest = job.cluster.least_workers if job.cluster.num_workers else 0
    return (workers or fewest) + job.evaluate.asynchronous


def cpus_needed(job: JobConfig) -> int:
    """CPUs of a cluster of our own: those of the processes with a model, and one loader for each worker beyond them."""
    workers = job.cluster.most_workers if job.cluster.num_workers else 0
    loaders = workers * (job.data.num_loaders or 1)
    return int(-(-count_processes(job, workers) * job.cluster.cpus_per_worker // 1)) + loaders


def plan_layout(
    job: JobConfig, resources: Mapping[str, float], nodes: Sequence[Mapping[str, float]] | None = None
) -> Layout:
    """Share out what the workers leave of `resources`, all nodes together. Raises `RunError` with all that is missing.

    Ray Data needs CPUs of its own: with none left beyond the workers no image would ever arrive, and training would
    wait for ever without an error.
    """
    cluster, problems = job.cluster, []
    each_of = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    processes = count_processes(job)
    beside = " and one for evaluate.asynchronous" if job.evaluate.asynchronous else ""
    who = f"{cluster.least_workers} workers{beside}"
    for name, each in each_of.items():
        need, have = each * processes, resources.get(name, 0)
        if need > have:
            problems.append(
                f"cluster: {who} of {each:g} {name} need {need:g}, but the cluster has "
                f"{have:g}. Lower cluster.num_workers or cluster.{name.lower()}s_per_worker, add nodes, or set "
                "cluster.startup_minutes if the cluster starts nodes by itself."
            )
        elif nodes and each > (most := max(node.get(name, 0) for node in nodes)):
            problems.append(
                f"cluster: a worker of {each:g} {name} fits on no node; the largest has {most:g}. Lower "
                f"cluster.{name.lower()}s_per_worker."
            )
    workers = max(cluster.least_workers, min(cluster.most_workers, _fit(resources, each_of)))
    free = left = resources.get("CPU", 0) - cluster.cpus_per_worker * count_processes(job, workers)
    if cluster.most_workers > cluster.least_workers and nodes:  # nodes may go, and workers fill the one that stays
        alone = [min(cluster.most_workers, _fit(node, each_of)) * cluster.cpus_per_worker for node in nodes]
        left = min(free, max(node.get("CPU", 0) - taken for node, taken in zip(nodes, alone, strict=True)))
    if not problems and left < 1:
        problems.append(
            f"cluster: the workers take all {resources.get('CPU', 0):g} CPUs, and Ray Data needs at least one to read "
            "images. Lower cluster.num_workers or cluster.cpus_per_worker, or add a CPU node."
        )
    if problems:
        raise RunError(problems)
    for_each = free / workers
    loaders = job.data.num_loaders or max(1, min(_MOST_LOADERS, int(for_each)))
    return Layout(loaders, min(1.0, int(for_each / loaders * 100) / 100))


def _fit(resources: Mapping[str, float], each_of: Mapping[str, float]) -> int:
    """How many workers fit."""
    return min(int(resources.get(name, 0) // each) for name, each in each_of.items() if each)


def describe_idle_gpus(count: int) -> str:
    """What a run on CPUs says where there are cards."""
    cards = "a GPU lies" if count == 1 else f"{count} GPUs lie"
    return f"{cards} idle, and the job runs on CPUs; cluster.gpus_per_worker=1 gives each worker a GPU"
