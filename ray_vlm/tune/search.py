"""Hand a sweep to Ray Tune: what draws values, what ends trials early, how many run at once.

Values of a random search and of grids are drawn here, by number, so a sweep that goes on draws the same ones again. TPE
is told the trials that there were, in their order, and goes on from them.
"""

import itertools
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.tune.plan import SweepPlan
from ray_vlm.tune.space import LISTS, Setting, Space
from ray_vlm.tune.trial import WORST, Sweep, name_trial, run_trial

_NEVER = 10**9  # steps; a trial ends by its own plan


def draw_trials(space: Space, num_trials: int, seed: int, default_first: bool) -> tuple[dict[str, Any], ...]:
    """Values of every trial of a random search, by number: grids in turn, the rest at random.

    The same for the same arguments, whatever `num_trials` is. The first is the job's own, an empty mapping, where
    `default_first`.
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


def _draw(setting: Setting, random: Any) -> Any:
    if setting.kind in LISTS:
        return setting.args[int(random.integers(len(setting.args)))]
    value = _domain(setting).sample(random_state=random)
    return value.item() if hasattr(value, "item") else value


def _domain(setting: Setting) -> Any:
    """Ray Tune's distribution; of a list the positions, since TPE takes no mappings."""
    from ray import tune

    return (
        tune.choice(range(len(setting.args))) if setting.kind in LISTS else getattr(tune, setting.kind)(*setting.args)
    )


def decode(space: Space, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Values for what TPE drew: a list's value for its position."""
    return {s.key: s.args[drawn[s.key]] if s.kind in LISTS else drawn[s.key] for s in space.searched}


def encode(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of `decode`."""
    return {s.key: s.args.index(values[s.key]) if s.kind in LISTS else values[s.key] for s in space.searched}


def build_scheduler(job: JobConfig, first_validation: int) -> Any:
    """What ends trials early, by the score at equal steps. `first_validation`: the step of a trial's first one."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

    grace = job.tune.grace_steps or first_validation
    if job.tune.scheduler == "none":
        return FIFOScheduler()
    if job.tune.scheduler == "median":
        return MedianStoppingRule(
            time_attr="step",
            grace_period=grace,
            min_samples_required=3,
            min_time_slice=math.inf,  # type: ignore[arg-type]  # else it pauses trials
        )
    return ASHAScheduler(time_attr="step", max_t=_NEVER, grace_period=grace, reduction_factor=job.tune.reduction_factor)


def run_tune(
    sweep: Sweep,
    plan: SweepPlan,
    job: JobConfig,
    first: int,
    known: Mapping[int, Mapping[str, Any]],
    say: Callable[[str], None],
) -> tuple[list[int], dict[int, str]]:
    """Run every trial to its end; returns the numbers of those that came to one, and what went wrong with others.

    `first`: the step of a trial's first validation. `known`: values of the trials that an earlier call began, by
    their numbers.
    """
    from ray import tune

    # A trial's workers reserve their own, and its loaders what is left: a trial that only waits must take no share of a
    # CPU from them. Tune wants something reserved, so it is a byte.
    each = {"CPU": plan.cpus, "GPU": plan.gpus} if plan.in_process else {"memory": 1.0}
    trainable = tune.with_resources(tune.with_parameters(run_trial, sweep=sweep), each)
    search: dict[str, Any] = {"num_samples": plan.num_trials}
    space: dict[str, Any] = {}
    ended: list[int] = []
    if sweep.draws:
        space, search = {"number": tune.grid_search(list(range(plan.num_trials)))}, {"num_samples": 1}
    else:
        search["search_alg"] = _tpe(sweep.space, job.seed, known)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # that reporter prints a table and two paths, whatever `verbose` is
    with tempfile.TemporaryDirectory(prefix="ray_vlm-tune-") as folder:  # Tune's own state; it is never read back
        results = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="score",
                mode="max",
                scheduler=build_scheduler(job, first),
                max_concurrent_trials=plan.at_once,
                reuse_actors=plan.in_process and job.tune.resident,
                **search,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=job.tune.max_retries),
                callbacks=[_teller(sweep.metric, say, ended)],
            ),
        ).fit()
    wrong = {
        r.config["number"]: str(r.error).strip().splitlines()[-1][:500]
        for r in (results[i] for i in range(len(results)))
        if r.error and r.config
    }
    return ended, wrong


def _tpe(space: Space, seed: int, known: Mapping[int, Mapping[str, Any]]) -> Any:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it announces its study
    first = sorted(known)
    numbers = itertools.chain(first, itertools.count(max(first, default=-1) + 1))

    class Numbered(OptunaSearch):
        """Optuna's TPE, with the trial's number beside its values."""

        def suggest(self, trial_id: str) -> dict | None:
            drawn = super().suggest(trial_id)
            return decode(space, drawn) | {"number": next(numbers)} if isinstance(drawn, dict) else drawn

    domains = {s.key: _domain(s) for s in space.searched}
    points = [encode(space, known[number]) for number in first]
    return Numbered(domains, metric="score", mode="max", seed=seed, points_to_evaluate=points or None)


def _teller(metric: str, say: Callable[[str], None], ended: list[int]) -> Any:
    """One line for every validation of every trial, and for every failure; the numbers of those that came to an end
    are put into `ended`."""
    from ray import tune

    class Teller(tune.Callback):
        def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
            value = result.get(metric, result["score"])
            told = "no number" if result["score"] == WORST else f"{value:.4f}"
            say(f"trial {name_trial(result['config']['number'])}  step {result['step']:>5}  {metric} {told}")

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            ended.append(trial.config["number"])

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            say(f"trial {name_trial(trial.config['number'])}  failed")

    return Teller()
