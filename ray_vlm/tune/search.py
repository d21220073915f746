"""Run a sweep with Ray Tune: the concurrency, the search that draws values, and the scheduler that ends trials early.

Values of a random search and of grids are drawn here by trial number, so a resumed sweep draws the same ones again. TPE
gets the earlier trials in their order and continues from them.
"""

import itertools
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_vlm.cluster.preflight import build_demand, count_processes
from ray_vlm.config.schema import JobConfig, Tune
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.tune.space import LISTS, Setting, Space
from ray_vlm.tune.trial import WORST, Sweep, name_trial, run_trial

if TYPE_CHECKING:
    import numpy as np
    from ray.tune import Callback
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search.optuna import OptunaSearch
    from ray.tune.search.sample import Domain

logger = logging.getLogger(__name__)
_NEVER = 10**9  # steps; a trial ends by its own plan


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

    A trial needs its workers, its samplers, the validation process if there is one, and a CPU for reading images; a
    trial in Tune's own process needs only that process.
    """
    cluster = job.cluster
    alone = cluster.num_workers == 0 or job.tune.resident
    demand = build_demand(job)
    processes = 1 if alone else count_processes(demand)
    cpus = processes * cluster.cpus_per_worker + demand.num_samplers * demand.sampler[0] + (0 if alone else 1)
    gpus = processes * cluster.gpus_per_worker + demand.num_samplers * demand.sampler[1]
    needs = {name: need for name, need in (("CPU", cpus), ("GPU", gpus)) if need}
    fits = {name: resources.get(name, 0) / need for name, need in needs.items()}
    problems = [
        f"tune: a trial needs {need:g} {name}, but the cluster has {resources.get(name, 0):g}. Lower "
        f"cluster.num_workers or cluster.{name.lower()}s_per_worker, add nodes, or set cluster.startup_minutes if the "
        "cluster starts nodes by itself."
        for name, need in needs.items()
        if fits[name] < 1
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


def draw_trials(space: Space, num_trials: int, seed: int, default_first: bool) -> tuple[dict[str, Any], ...]:
    """Draw the values of every trial of a random search, by number: grids in turn, the rest at random.

    A trial's values do not depend on `num_trials`. With `default_first`, trial 0 is an empty mapping: the job itself.
    """
    import numpy as np

    grids = [s for s in space.searched if s.kind == "grid"]
    combinations = list(itertools.product(*(s.args for s in grids)))
    draws: list[dict[str, Any]] = [{}] if default_first else []
    for number in range(num_trials - len(draws)):
        random = np.random.default_rng([seed, number])
        drawn = {s.key: _draw(s, random) for s in space.searched if s.kind != "grid"}
        fixed = dict(zip((s.key for s in grids), combinations[number % len(combinations)], strict=True))
        draws.append({s.key: (drawn | fixed)[s.key] for s in space.searched})
    return tuple(draws)


def _draw(setting: Setting, random: "np.random.Generator") -> Any:
    if setting.kind in LISTS:
        return setting.args[int(random.integers(len(setting.args)))]
    value = _domain(setting).sample(random_state=random)
    return value.item() if hasattr(value, "item") else value


def _domain(setting: Setting) -> "Domain":
    """Return Ray Tune's distribution; of a list that of its positions, because TPE takes no mappings."""
    from ray import tune

    if setting.kind in LISTS:
        return tune.choice(range(len(setting.args)))
    return getattr(tune, setting.kind)(*setting.args)


def decode(space: Space, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Turn TPE's draw into values: the position in a list becomes the list's value."""
    return {s.key: s.args[drawn[s.key]] if s.kind in LISTS else drawn[s.key] for s in space.searched}


def encode(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Invert `decode`."""
    return {s.key: s.args.index(values[s.key]) if s.kind in LISTS else values[s.key] for s in space.searched}


def build_scheduler(options: Tune, first_validation: int) -> "TrialScheduler":
    """Build the scheduler that ends trials early by their score at equal steps. `first_validation`: the first
    step at which a trial has one."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

    grace = options.grace_steps or first_validation
    if options.scheduler == "none":
        return FIFOScheduler()
    if options.scheduler == "median":
        return MedianStoppingRule(
            time_attr="step",
            grace_period=grace,
            min_samples_required=3,
            min_time_slice=math.inf,  # type: ignore[arg-type]  # a finite value would let it pause trials
        )
    return ASHAScheduler(time_attr="step", max_t=_NEVER, grace_period=grace, reduction_factor=options.reduction_factor)


def run_tune(
    sweep: Sweep,
    plan: SweepPlan,
    options: Tune,
    first: int,
    known: Mapping[int, Mapping[str, Any]],
) -> tuple[list[int], dict[int, str]]:
    """Run every trial; return the numbers of those that completed, and the errors of the others by number.

    `first`: the step of a trial's first validation. `known`: values of the trials that an earlier call started, by
    number.
    """
    from ray import tune

    # A trial's workers reserve their own CPUs, and its loaders the rest: the trial's process only waits and must not
    # reserve a share of a CPU itself. Tune requires some reservation, so it is one byte of memory.
    each = {"CPU": plan.cpus, "GPU": plan.gpus} if plan.in_process else {"memory": 1.0}
    trainable = tune.with_resources(tune.with_parameters(run_trial, sweep=sweep), each)
    search: dict[str, Any] = {"num_samples": plan.num_trials}
    space: dict[str, Any] = {}
    ended: list[int] = []
    if sweep.draws:
        space, search = {"number": tune.grid_search(list(range(plan.num_trials)))}, {"num_samples": 1}
    else:
        search["search_alg"] = _tpe(sweep.space, sweep.job["seed"], known)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # that reporter prints a table and two paths, whatever `verbose` is
    with tempfile.TemporaryDirectory(prefix="ray_vlm-tune-") as folder:  # Tune's own state, never read again
        results = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="score",
                mode="max",
                scheduler=build_scheduler(options, first),
                max_concurrent_trials=plan.at_once,
                reuse_actors=plan.in_process and options.resident,
                **search,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=options.max_retries),
                callbacks=[_reporter(sweep.metric, ended)],
            ),
        ).fit()
    wrong = {
        r.config["number"]: str(r.error).strip().splitlines()[-1][:500]
        for r in (results[i] for i in range(len(results)))
        if r.error and r.config
    }
    return ended, wrong


def _tpe(space: Space, seed: int, known: Mapping[int, Mapping[str, Any]]) -> "OptunaSearch":
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would print a line for each study and trial
    first = sorted(known)
    numbers = itertools.chain(first, itertools.count(max(first, default=-1) + 1))

    class Numbered(OptunaSearch):
        """Optuna's TPE, with the trial's number beside its values."""

        def suggest(self, trial_id: str) -> dict | None:
            drawn = super().suggest(trial_id)
            return decode(space, drawn) | {"number": next(numbers)} if isinstance(drawn, dict) else drawn

    domains: dict[str, Any] = {s.key: _domain(s) for s in space.searched}  # it turns them into Optuna's
    points = [encode(space, known[number]) for number in first]
    return Numbered(domains, metric="score", mode="max", seed=seed, points_to_evaluate=points or None)


def _reporter(metric: str, ended: list[int]) -> "Callback":
    """Return a Tune callback that logs a line for every validation and failure, and appends the numbers of completed
    trials to `ended`."""
    from ray import tune

    class Reporter(tune.Callback):
        def on_trial_result(
            self, iteration: int, trials: "list[Trial]", trial: "Trial", result: dict, **info: object
        ) -> None:
            value = result.get(metric, result["score"])
            text = "no number" if result["score"] == WORST else f"{value:.4f}"
            logger.info(f"trial {name_trial(result['config']['number'])}  step {result['step']:>5}  {metric} {text}")

        def on_trial_complete(self, iteration: int, trials: "list[Trial]", trial: "Trial", **info: object) -> None:
            ended.append(trial.config["number"])

        def on_trial_error(self, iteration: int, trials: "list[Trial]", trial: "Trial", **info: object) -> None:
            logger.info(f"trial {name_trial(trial.config['number'])}  failed")

    return Reporter()
