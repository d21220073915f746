"""Check whether the cluster can run the job: pure arithmetic on needed and available resources, without Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ray_vlm.config.method import GrpoMethod, Method
from ray_vlm.config.schema import Cluster, JobConfig
from ray_vlm.errors import RunError

SMALL_PIXELS = 500_000  # of an image that is decoded in less time than it takes to move it
_TOLERANCE = 1e-6  # of sums of fractional CPUs
_MAX_LOADERS = 8  # processes that read images for one worker, unless data.num_loaders is set


@dataclass(frozen=True)
class ClusterDemand:
    """What a job demands of a cluster."""

    cluster: Cluster
    num_loaders: int | None = None  # processes that read images for one worker; None: as the free CPUs allow
    loaders: Literal["ray_data", "threads"] | None = None  # what reads images; None: threads for small ones that fit
    num_validators: int = 0  # processes for asynchronous validation, each as large as a worker
    quantised: bool = False  # the nodes need bitsandbytes
    num_samplers: int = 0  # processes that sample for GRPO, beside the workers: the fewest, and the most of them
    most_samplers: int = 0
    sampler: tuple[float, float] = (0.0, 0.0)  # CPUs and GPUs of each of them


@dataclass(frozen=True)
class Layout:
    """A job's layout on a cluster: the number of loaders of each worker, and the CPUs that each loader reserves.

    `beside_workers`: these CPUs are on the workers' own nodes, so that loaders may be threads of a worker.
    """

    num_loaders: int
    cpus_per_loader: float
    beside_workers: bool = False


@dataclass(frozen=True)
class SamplerRoom:
    """How many samplers the cluster's nodes have room for beside the workers, and for how many more there is a place
    that nothing uses now."""

    in_all: int
    free: int


def build_demand(job: JobConfig) -> ClusterDemand:
    """Gather what a job demands of a cluster."""
    data, validators, samplers = job.data, int(job.evaluate.asynchronous), (0, 0)
    if isinstance(job.method, GrpoMethod):
        samplers = job.method.least_samplers, job.method.most_samplers
    return ClusterDemand(
        *(job.cluster, data.num_loaders, data.loaders, validators, job.model.load_in_4bit, *samplers),
        sampler=sampler_resources(job.method, job.cluster),
    )


def sampler_resources(method: Method, cluster: Cluster) -> tuple[float, float]:
    """Return the CPUs and the GPUs of each sampler of a job with this method; of a job without samplers 0 and 0."""
    if not isinstance(method, GrpoMethod) or not method.samplers:
        return 0.0, 0.0
    gpus = method.gpus_per_sampler if method.gpus_per_sampler is not None else int(cluster.gpus_per_worker > 0)
    return method.cpus_per_sampler or cluster.cpus_per_worker, float(gpus)


def count_processes(demand: ClusterDemand, workers: int | None = None) -> int:
    """Count the processes that hold the model: the workers (by default the fewest that the job allows), and one more
    for asynchronous validation. 0 for a job that runs in this process alone."""
    fewest = demand.cluster.least_workers if demand.cluster.num_workers else 0
    return (workers or fewest) + demand.num_validators


def cpus_needed(demand: ClusterDemand) -> int:
    """Return the CPUs that a local cluster needs: for the processes with a model, and one for each loader."""
    workers = demand.cluster.most_workers if demand.cluster.num_workers else 0
    loaders = workers * (demand.num_loaders or 1)
    cpus = count_processes(demand, workers) * demand.cluster.cpus_per_worker + demand.num_samplers * demand.sampler[0]
    return int(-(-cpus // 1)) + loaders


def expected_resources(now: Mapping[str, float], demand: ClusterDemand, at_once: int = 1) -> dict[str, float]:
    """Return the resources that an autoscaling cluster is expected to reach: those it has `now`, and at least those
    that `at_once` runs of the job need."""
    processes = max(1, count_processes(demand))
    cpus = max(float(cpus_needed(demand)), demand.cluster.cpus_per_worker)
    gpus = processes * demand.cluster.gpus_per_worker + demand.num_samplers * demand.sampler[1]
    need = {"CPU": cpus, "GPU": gpus}
    return {**now, **{name: max(now.get(name, 0.0), at_once * each) for name, each in need.items()}}


def plan_layout(
    demand: ClusterDemand,
    resources: Mapping[str, float],
    nodes: Sequence[Mapping[str, float]] | None = None,
    at_once: int = 1,
) -> Layout:
    """Divide the CPUs that the workers and the samplers leave free among the loaders. `resources` is the total for this
    run, `nodes` each node's for all that run `at_once`.

    Ray Data needs CPUs of its own: if the workers took all of them, no image would ever arrive, and training would wait
    forever without an error. Raises `RunError` with everything that is missing.
    """
    count = count_samplers(demand, resources, nodes, at_once)
    layout, problems = _try_layout(demand, count, resources, nodes, at_once)
    if problems:
        raise RunError(problems)
    return layout


def count_samplers(
    demand: ClusterDemand,
    resources: Mapping[str, float],
    nodes: Sequence[Mapping[str, float]] | None = None,
    at_once: int = 1,
) -> int:
    """Count the samplers that the cluster has room for beside the workers, so that each loader has a CPU of its own:
    between the fewest and the most. With elastic workers, as many of these as then fit are counted, and at least the
    fewest. `resources` and `nodes` are those of `plan_layout`."""
    for count in range(demand.most_samplers, demand.num_samplers, -1):
        layout, problems = _try_layout(demand, count, resources, nodes, at_once)
        if not problems and layout.cpus_per_loader == 1.0 and _fit_on_nodes(demand, count, nodes, at_once):
            return count
    return demand.num_samplers


def _fit_on_nodes(
    demand: ClusterDemand, num_samplers: int, nodes: Sequence[Mapping[str, float]] | None, at_once: int
) -> bool:
    """Return whether each sampler and each of the fewest workers finds a node; True if the nodes are not known."""
    if not nodes:
        return True
    _, left = _without_samplers(demand, num_samplers, {}, nodes, at_once)
    per_worker = {"CPU": demand.cluster.cpus_per_worker, "GPU": demand.cluster.gpus_per_worker}
    overfull = any(amount < -_TOLERANCE for node in left for amount in node.values())
    return not overfull and sum(_fit(node, per_worker) for node in left) >= count_processes(demand) * at_once


def _try_layout(
    demand: ClusterDemand,
    num_samplers: int,
    resources: Mapping[str, float],
    nodes: Sequence[Mapping[str, float]] | None,
    at_once: int,
) -> tuple[Layout, list[str]]:
    """Return the layout with so many samplers, and what is missing for it."""
    cluster = demand.cluster
    per_worker = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    problems = _miss_for_samplers(demand, num_samplers, resources, nodes)
    if num_samplers and not problems:
        resources, nodes = _without_samplers(demand, num_samplers, resources, nodes, at_once)
    problems += _miss_for_workers(demand, num_samplers, resources, nodes)
    workers = max(cluster.least_workers, min(cluster.most_workers, _fit(resources, per_worker)))
    free = left = resources.get("CPU", 0) - cluster.cpus_per_worker * count_processes(demand, workers)
    if cluster.most_workers > cluster.least_workers and nodes:
        # if nodes are lost, workers may fill the one that remains
        taken_alone = [min(cluster.most_workers, _fit(node, per_worker)) * cluster.cpus_per_worker for node in nodes]
        left = min(free, max(node.get("CPU", 0) - taken for node, taken in zip(nodes, taken_alone, strict=True)))
    if not problems and left < 1 - _TOLERANCE:
        problems.append(
            f"cluster: the workers take all {resources.get('CPU', 0):g} CPUs, and Ray Data needs at least one to read "
            "images. Lower cluster.num_workers or cluster.cpus_per_worker, or add a CPU node."
        )
    cpus_for_loaders = max(free, 0.0) / workers + _TOLERANCE  # of each worker
    loaders = demand.num_loaders or max(1, min(_MAX_LOADERS, int(cpus_for_loaders)))
    cpus_per_loader = min(1.0, int(cpus_for_loaders / loaders * 100) / 100)
    # Workers that come and go leave no fixed share of a node's CPUs to each.
    with_loaders = {**per_worker, "CPU": cluster.cpus_per_worker + loaders * cpus_per_loader}
    fixed = cluster.least_workers == cluster.most_workers
    fit = sum(_fit(node, with_loaders) for node in nodes or ())
    beside_workers = fixed and fit >= count_processes(demand, workers) * at_once
    if not problems and demand.loaders == "threads" and not beside_workers:
        problems.append(
            f"data.loaders=threads: a worker and its loaders together need {with_loaders['CPU']:g} CPUs of one node, "
            f"and the number of workers must be fixed; the nodes have room for {fit} of {workers}. Leave data.loaders "
            "out, or lower data.num_loaders."
        )
    return Layout(loaders, cpus_per_loader, beside_workers), problems


def _miss_for_workers(
    demand: ClusterDemand,
    num_samplers: int,
    resources: Mapping[str, float],
    nodes: Sequence[Mapping[str, float]] | None,
) -> list[str]:
    """Return what is missing for the workers and the validation beside them, of what the samplers leave."""
    cluster, problems = demand.cluster, []
    per_worker = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    processes = count_processes(demand)
    validator = " and one for evaluate.asynchronous" if demand.num_validators else ""
    who = f"{cluster.least_workers} workers{validator}"
    for name, each in per_worker.items():
        need, have = each * processes, resources.get(name, 0)
        if need > have + _TOLERANCE:
            beside = f" beside {num_samplers} samplers" if num_samplers else ""
            problems.append(
                f"cluster: {who} of {each:g} {name} need {need:g}{beside}, but the cluster has "
                f"{have:g}. Lower cluster.num_workers or cluster.{name.lower()}s_per_worker, add nodes, or set "
                "cluster.startup_minutes if the cluster starts nodes by itself."
            )
        elif nodes and each > (most := max(node.get(name, 0) for node in nodes)):
            problems.append(
                f"cluster: a worker of {each:g} {name} fits on no node; the largest has {most:g}. Lower "
                f"cluster.{name.lower()}s_per_worker."
            )
    return problems


def _miss_for_samplers(
    demand: ClusterDemand,
    num_samplers: int,
    resources: Mapping[str, float],
    nodes: Sequence[Mapping[str, float]] | None,
) -> list[str]:
    """Return what is missing for the samplers alone: more of them than cards, or none fits on any node."""
    if not num_samplers:
        return []
    problems = []
    for name, each in zip(("CPU", "GPU"), demand.sampler, strict=True):
        key, need, have = f"method.{name.lower()}s_per_sampler", each * num_samplers, resources.get(name, 0)
        if need > have + _TOLERANCE:
            problems.append(
                f"method.samplers={num_samplers}: samplers of {each:g} {name} need {need:g}, but the cluster "
                f"has {have:g}, and the workers need some too. Lower method.samplers or {key}, or add nodes."
            )
        elif nodes and each > (most := max(node.get(name, 0) for node in nodes)):
            problems.append(
                f"method.samplers: a sampler of {each:g} {name} fits on no node; the largest has {most:g}. Lower {key}."
            )
    return problems


def _without_samplers(
    demand: ClusterDemand,
    num_samplers: int,
    resources: Mapping[str, float],
    nodes: Sequence[Mapping[str, float]] | None,
    at_once: int,
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return the resources in total and by node that the samplers of `at_once` runs leave. Each is taken to go to the
    node with the most of what it needs, as Ray spreads what it starts."""
    taken = dict(zip(("CPU", "GPU"), demand.sampler, strict=True))
    scarce = "GPU" if taken["GPU"] else "CPU"
    left = [dict(node) for node in nodes or ()]
    for _ in range(num_samplers * at_once if left else 0):
        node = max(left, key=lambda node: node.get(scarce, 0.0))
        node.update({name: node.get(name, 0.0) - amount for name, amount in taken.items() if amount})
    total = {name: amount - num_samplers * taken.get(name, 0.0) for name, amount in resources.items()}
    return total, left


def count_threads(demand: ClusterDemand, layout: Layout, image_pixels: float) -> int:
    """Return how many loaders of a worker are its threads: all of them, or none. `image_pixels`: mean of the images.

    Small images cost less to decode than to move from another process.
    """
    small = demand.loaders is None and image_pixels < SMALL_PIXELS
    return layout.num_loaders if layout.beside_workers and (small or demand.loaders == "threads") else 0


def count_fitting(resources: Mapping[str, float], sampler: tuple[float, float]) -> int:
    """Return how many samplers with these CPUs and GPUs fit into `resources`."""
    return _fit(resources, dict(zip(("CPU", "GPU"), sampler, strict=True)))


def _fit(resources: Mapping[str, float], per_worker: Mapping[str, float]) -> int:
    """Return how many workers fit into `resources`."""
    return min(int(resources.get(name, 0) / each + _TOLERANCE) for name, each in per_worker.items() if each)
