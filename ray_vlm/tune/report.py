"""`report.html` of a sweep: trials, the importance of their settings, curves, cost, and the best trial's answers.

One self-contained file from the files in the sweep's folder; all text from files is escaped.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_vlm.data.inspect.check import shorten
from ray_vlm.evaluate.compare import load_results
from ray_vlm.evaluate.report import draw_pictures, render
from ray_vlm.runs.compute import describe_hours, measure_compute, sum_compute
from ray_vlm.runs.plot import BLUE, GREY, draw_for_page, make_panels, overlay, picture_style
from ray_vlm.runs.read import Run, is_number
from ray_vlm.runs.text import format_duration, format_number, format_setting
from ray_vlm.tune.space import LISTS, Setting, Space, holds
from ray_vlm.tune.trials import Trial, pareto, rank_trials, score_of_trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 4  # panels in a line of the chart of settings
_MOST_LETTERS = 24  # of the values of a list that have room below a panel
_FEWEST = 6  # trials; with fewer the shares of importance would be noise


def write_report(
    title: str, space: Space, metrics: Sequence[str], trials: Sequence[Trial], runs: Sequence[Run], notes: Sequence[str]
) -> str:
    """Return the page's HTML. `runs`: of the trials, in their order; `metrics`: the ranking one, then the others."""
    order = rank_trials(trials)
    rest = [i for i in range(len(trials)) if i not in order]
    front = set(pareto([trial.metrics for trial in trials], metrics)) if len(metrics) > 1 else set()
    keys = [s.key for s in space.searched]
    importance, step = measure_importance(space, trials)
    names = [f"trial {trial.name}" for trial in trials]
    results = load_results([runs[order[0]]], [names[order[0]]]) if order else []
    return render(
        "sweep.html.j2",
        folder=Path(__file__).parent,
        title=title,
        notes=notes,
        metrics=metrics,
        keys=keys,
        rows=[_row(trials[i], keys, metrics, i in order[:1], i in front) for i in [*order, *rest]],
        front=bool(front),
        settings_chart=draw_settings(space, [trials[i] for i in order], metrics[0]),
        importance=importance,
        importance_step=step,
        curve=overlay(
            [runs[i] for i in order], [names[i] for i in order], "eval", metrics[0], f"{metrics[0]}, validation"
        ),
        cost=describe_cost(trials, runs),
        images=draw_pictures(results),
        columns=1,
    )


def _row(trial: Trial, keys: Sequence[str], metrics: Sequence[str], best: bool, front: bool) -> dict[str, Any]:
    status = trial.status if trial.status == "finished" else f"{trial.status} at step {trial.step}"
    return {
        "name": trial.name,
        "values": [format_setting(trial.values.get(key)) for key in keys],
        "numbers": [format_number(trial.metrics.get(name)) for name in metrics],
        "step": trial.best_step if trial.best_step is not None else "-",
        "status": status,
        "time": format_duration(trial.wall_s),
        "best": best,
        "front": front,
    }


def describe_cost(trials: Sequence[Trial], runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return the sweep's cost as rows of a table."""
    if not runs:
        return []
    compute = sum_compute(runs, [measure_compute(run) for run in runs])
    statuses = [trial.status for trial in trials]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    rows = [("trials", counts), ("time of all trials", format_duration(compute["wall_s"]))]
    rows += describe_hours(compute)
    return [*rows, ("steps trained", f"{sum(trial.step for trial in trials):,}")]


def draw_settings(space: Space, ranked: Sequence[Trial], metric: str) -> str:
    """Draw the metric over each searched setting as an SVG element, a point for each trial; empty with fewer than two
    trials. `ranked`: trials that have the metric, the best first."""
    settings, scores = space.searched, [trial.metrics[metric] for trial in ranked]
    if len(ranked) < 2 or not settings:
        return ""
    columns = min(_COLUMNS, len(settings))
    with picture_style():
        figure, panels = make_panels(len(settings), columns, (9 / columns, 2.7), sharey=True)
        for panel, setting in zip(panels, settings, strict=True):
            values = place_values(panel, setting, [trial.values.get(setting.key) for trial in ranked])
            panel.scatter(values, scores, s=34, color=GREY, alpha=0.7, linewidths=0)
            panel.scatter(values[:1], scores[:1], s=64, color=BLUE)  # its colour among the curves
            panel.set_xlabel(setting.key)
            panel.tick_params(axis="x", which="both", labelsize=8)
        for panel in panels[::columns]:
            panel.set_ylabel(metric)
        return draw_for_page(figure)


def place_values(panel: "Axes", setting: Setting, values: Sequence[Any]) -> list[float]:
    """Return where values lie on the axis of a setting: numbers on its scale, those of a list in equal distances."""
    from matplotlib.ticker import LogFormatter

    if setting.kind not in LISTS and all(is_number(value) for value in values):
        if "log" in setting.kind and min(values) > 0:
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter(LogFormatter())  # the scale's own writes TeX, which is not parsed
            panel.xaxis.set_minor_formatter(LogFormatter())
        return list(values)
    known = {format_setting(value): value for value in (*setting.args, *values)}
    names = sorted(known, key=known.__getitem__) if all(map(is_number, known.values())) else list(known)
    turned: dict[str, Any] = {"rotation": 15, "ha": "right"} if sum(map(len, names)) > _MOST_LETTERS else {}
    panel.set_xticks(range(len(names)), [shorten(name, 24) for name in names], **turned)
    panel.set_xlim(-0.5, len(names) - 0.5)
    return [names.index(format_setting(value)) for value in values]


def measure_importance(space: Space, trials: Sequence[Trial]) -> tuple[dict[str, float], int | None]:
    """Measure how much each searched setting matters for the result, by Optuna's PED-ANOVA (arXiv:2304.10255). Return
    shares that sum to 1, the largest first, and the step at which trials were compared.

    That is the last validation that all of them reached: a trial that was ended early would otherwise count as a bad
    result of its settings. Return ({}, None) with fewer than six trials at one step, or where all scores are equal.
    """
    reached = [{step for step, _ in trial.curve} for trial in trials if trial.curve]
    step = max(set.intersection(*reached), default=None) if reached else None
    if step is None:
        return {}, None
    numbers = {trial.name: {trial.metric: dict(trial.curve).get(step)} for trial in trials}
    rows = [
        (trial.values, score)
        for trial in trials
        if (score := score_of_trial(numbers[trial.name], trial.metric)) is not None
        and all(holds(s, trial.values.get(s.key)) for s in space.searched)
    ]
    varied = [s for s in space.searched if len({format_setting(values[s.key]) for values, _ in rows}) > 1]
    if len(rows) < _FEWEST or not varied or len({score for _, score in rows}) < 2:
        return {}, None
    return _ask_optuna(varied, rows), step


def _ask_optuna(settings: Sequence[Setting], rows: Sequence[tuple[dict[str, Any], float]]) -> dict[str, float]:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions: dict[str, BaseDistribution] = {
        s.key: CategoricalDistribution(list(range(len(s.args))))
        if s.kind in LISTS
        else FloatDistribution(float(s.args[0]), float(s.args[1]), log="log" in s.kind)
        for s in settings
    }
    study = optuna.create_study(direction="maximize")
    for values, score in rows:
        params = {s.key: s.args.index(values[s.key]) if s.kind in LISTS else values[s.key] for s in settings}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=score))
    return optuna.importance.get_param_importances(study)
