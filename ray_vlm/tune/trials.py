"""Read the trials of a sweep from their run folders (values, status, best validation, cost), and rank them."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ray_vlm.errors import RunError
from ray_vlm.runs.monitor import rank_validation
from ray_vlm.runs.read import Run, is_number, read_run
from ray_vlm.storage import Store, join
from ray_vlm.tune.space import Space, value_of

TRIALS = "trials"  # folder of a sweep that holds its runs


def trial_address(address: str, name: str) -> str:
    """Return the address of a trial's run folder."""
    return join(address, f"{TRIALS}/{name}")


@dataclass(frozen=True)
class Trial:
    """One trial. `values`: of every key of the space; `metrics`: of its best validation, by its `metric`; `curve`: step
    and number of each validation; `wall_s`: seconds of all its attempts."""

    name: str
    values: dict[str, Any]
    status: str
    step: int
    num_steps: int | None
    metric: str
    metrics: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    curve: tuple[tuple[int, float], ...] = ()
    wall_s: float = 0.0


def read_trials(address: str, space: Space) -> list[Trial]:
    """Read the trials in a sweep's folder, in the order of their names; a folder without a run is left out."""
    trials = []
    for name in sorted(Store(join(address, TRIALS)).names()):
        with suppress(RunError):
            trials.append(read_trial(read_run(trial_address(address, name)), space))
    return trials


def read_trial(run: Run, space: Space) -> Trial:
    """Build the `Trial` of a run."""
    best = run.best or {}
    return Trial(
        name=run.name,
        values={s.key: value_of(run.job, s.key) for s in space.settings},
        status=run.status,
        step=run.step,
        num_steps=run.num_steps,
        metric=run.metric,
        metrics={k: v for k, v in best.items() if is_number(v) and k not in ("time", "attempt", "step", "epoch")},
        best_step=best.get("step"),
        curve=tuple((e["step"], e[run.metric]) for e in run.of_kind("eval") if is_number(e.get(run.metric))),
        wall_s=run.wall_s,
    )


def score_of_trial(values: Mapping[str, Any], metric: str) -> float | None:
    """Return the score that ranks a trial, higher is better; None where its metric is missing or not finite."""
    rank = rank_validation(values, metric)
    return rank[0] if rank else None


def rank_trials(trials: Sequence[Trial]) -> list[int]:
    """Return positions of the trials with a finite metric, the best first; of equal ones the earlier first."""
    numbers = {i: score_of_trial(trial.metrics, trials[0].metric) for i, trial in enumerate(trials)}
    scores = {i: score for i, score in numbers.items() if score is not None}
    return sorted(scores, key=lambda i: -scores[i])


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
