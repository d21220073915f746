"""The importance of each searched setting for the result: PED-ANOVA (arXiv:2304.10255), by Optuna.

Trials are compared at the last validation that all of them reached: a trial that was ended early would otherwise count
as a bad result of its settings.
"""

from collections.abc import Sequence

from ray_vlm.tune.plan import score_of_trial
from ray_vlm.tune.space import LISTS, Setting, Space
from ray_vlm.tune.trials import Trial

_FEWEST = 6  # trials; with fewer the shares would be noise


def measure_importance(space: Space, trials: Sequence[Trial]) -> tuple[dict[str, float], int | None]:
    """Return shares that sum to 1, the largest first, and the step at which trials were compared.

    Return ({}, None) with fewer than six trials at one step, or where all their scores are equal.
    """
    step = _common_step(trials)
    if step is None:
        return {}, None
    rows = []
    for trial in trials:
        score = score_of_trial({trial.metric: dict(trial.curve).get(step)}, trial.metric)
        drawn = {s.key: _code(s, trial.values.get(s.key)) for s in space.searched}
        if score is not None and None not in drawn.values():
            rows.append((drawn, score))
    varied = [s for s in space.searched if len({drawn[s.key] for drawn, _ in rows}) > 1]
    if len(rows) < _FEWEST or not varied or len({score for _, score in rows}) < 2:
        return {}, None
    return _ask_optuna(varied, rows), step


def _common_step(trials: Sequence[Trial]) -> int | None:
    reached = [{step for step, _ in trial.curve} for trial in trials if trial.curve]
    common = set.intersection(*reached) if reached else set()
    return max(common, default=None)


def _code(setting: Setting, value: object) -> float | int | None:
    """Encode a value as a number: itself, or its position in the list; None where it lies outside the space."""
    if setting.kind in LISTS:
        return setting.args.index(value) if value in setting.args else None
    inside = isinstance(value, int | float) and setting.args[0] <= value <= setting.args[1]
    return value if inside and isinstance(value, int | float) else None


def _ask_optuna(settings: Sequence[Setting], rows: Sequence[tuple[dict, float]]) -> dict[str, float]:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions: dict[str, BaseDistribution] = {
        s.key: CategoricalDistribution(list(range(len(s.args))))
        if s.kind in LISTS
        else FloatDistribution(float(s.args[0]), float(s.args[1]), log="log" in s.kind)
        for s in settings
    }
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    for drawn, score in rows:
        params = {s.key: drawn[s.key] for s in settings}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=score))
    importances = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
    )
    total = sum(importances.values()) or 1.0
    return dict(sorted(((key, share / total) for key, share in importances.items()), key=lambda item: -item[1]))
