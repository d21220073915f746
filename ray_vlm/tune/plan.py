"""Plan a sweep on a cluster (how many trials run at once), and rank its trials. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_vlm.cluster.preflight import build_demand, count_processes
from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.runs.monitor import LOWER_IS_BETTER
from ray_vlm.runs.schema import is_number
from ray_vlm.tune.space import Space


@dataclass(frozen=True)
class SweepPlan:
    """`num_trials` in all, `at_once` of them at a time, and the CPUs and GPUs of one. `in_process`: a trial trains in
    the process that Tune starts for it, without workers of its own."""

    num_trials: int
    at_once: int
    cpus: float
    gpus: float
    in_process: bool = False


def plan_sweep(
    job: JobConfig, space: Space, resources: Mapping[str, float], nodes: Sequence[Mapping[str, float]] = ()
) -> SweepPlan:
    """Divide the cluster's `resources` among trials. Raise `RunError` where not even one trial fits on the cluster, or
    one of its processes on any of the `nodes`, and `ConfigError` for a grid that the search cannot go through.

    A trial needs its workers, the validation process if there is one, and a CPU for reading images; a trial in Tune's
    own process needs only that process.
    """
    cluster = job.cluster
    alone = cluster.num_workers == 0 or job.tune.resident
    processes = 1 if alone else count_processes(build_demand(job))
    cpus = processes * cluster.cpus_per_worker + (0 if alone else 1)
    gpus = processes * cluster.gpus_per_worker
    fits = {name: resources.get(name, 0) / need for name, need in (("CPU", cpus), ("GPU", gpus)) if need}
    problems = [
        f"tune: a trial needs {need:g} {name}, but the cluster has {resources.get(name, 0):g}. Lower "
        f"cluster.num_workers or cluster.{name.lower()}s_per_worker, add nodes, or set cluster.startup_minutes if the "
        "cluster starts nodes by itself."
        for name, need in (("CPU", cpus), ("GPU", gpus))
        if need and fits[name] < 1
    ]
    for name, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)):
        if not problems and nodes and each > (most := max(node.get(name, 0) for node in nodes)):
            problems.append(
                f"tune: a process of {each:g} {name} fits on no node; the largest has {most:g}. Lower "
                f"cluster.{name.lower()}s_per_worker."
            )
    if problems:
        raise RunError(problems)
    grid = space.grid_size
    if grid > 1 and job.tune.search == "optuna":
        raise ConfigError(f"{space.path}: optuna does not go through grids. Use choice, or tune.search=random.")
    first = int(job.tune.default_first)
    if grid > job.tune.num_trials - first:
        raise ConfigError(
            f"{space.path}: its grids have {grid} combinations, and tune.num_trials is {job.tune.num_trials}"
            f"{', the first of them the job itself' if first else ''}. Raise it, or use choice."
        )
    room = math.floor(min(fits.values()) + 1e-9)
    num_trials = (job.tune.num_trials - first) // grid * grid + first  # every combination as often as any other
    return SweepPlan(num_trials, min(room, num_trials, job.tune.max_concurrent or room), cpus, gpus, alone)


def score_of_trial(values: Mapping[str, Any], metric: str) -> float | None:
    """Return the score that ranks a trial, higher is better; None where its metric is missing or not finite."""
    value = values.get(metric)
    if value is None or not is_number(value):
        return None
    return -value if metric in LOWER_IS_BETTER else value


def rank_trials(trials: Sequence[Mapping[str, Any]], metric: str) -> list[int]:
    """Return positions of the trials with a score, the best first; of equal ones the earlier first."""
    scores = {i: score for i, trial in enumerate(trials) if (score := score_of_trial(trial, metric)) is not None}
    return sorted(scores, key=lambda i: (-scores[i], i))


def pareto(trials: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[int]:
    """Return positions of the Pareto front: trials for which no other one is as good in every metric and better in
    one."""
    scores = {i: [score_of_trial(trial, name) for name in metrics] for i, trial in enumerate(trials)}
    complete = {i: [s for s in row if s is not None] for i, row in scores.items() if None not in row}
    return [
        i
        for i, row in complete.items()
        if not any(all(b >= a for a, b in zip(row, other, strict=True)) and other != row for other in complete.values())
    ]
