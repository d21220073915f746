"""`report.html` of a sweep: trials, the importance of their settings, curves, cost, and the best trial's answers.

One self-contained file from the files in the sweep's folder; all text from files is escaped.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_vlm.evaluate.compare import load_results
from ray_vlm.evaluate.report import choose_images, draw_picture, render
from ray_vlm.runs.compute import COST_TITLES, measure_compute, sum_compute
from ray_vlm.runs.plot import overlay
from ray_vlm.runs.read import Run, is_number
from ray_vlm.runs.text import format_duration, format_number, format_setting
from ray_vlm.tune.space import LISTS, Setting, Space
from ray_vlm.tune.trials import Trial, pareto, rank, score_of_trial

WIDTH, HEIGHT = 760, 240  # pixels of the drawing of parallel coordinates
_FEWEST = 6  # trials; with fewer the shares of importance would be noise


def write_report(
    title: str, space: Space, metrics: Sequence[str], trials: Sequence[Trial], runs: Sequence[Run], notes: Sequence[str]
) -> str:
    """Return the page's HTML. `runs`: of the trials, in their order; `metrics`: the ranking one, then the others."""
    order = rank(trials)
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
        coordinates=lay_out(space, trials, metrics[0]),
        importance=importance,
        importance_step=step,
        curve=_chart([runs[i] for i in order], [names[i] for i in order], metrics[0]),
        cost=describe_cost(trials, runs),
        images=[p for r in results[:1] for i in choose_images(r.predictions) if (p := draw_picture(i, results))],
        columns=1,
    )


def _chart(runs: Sequence[Run], titles: Sequence[str], metric: str) -> dict[str, Any] | None:
    """Return the chart of validations, the best trial first and in the page's colour of the best, number 1."""
    chart = overlay(runs, titles, "eval", metric, f"{metric}, validation")
    if chart is None:
        return None
    numbers = [1, 0, *range(2, len(chart["curves"]))]
    curves = [{**curve, "number": number} for curve, number in zip(chart["curves"], numbers, strict=False)]
    return {**chart, "curves": curves}


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
    shown = ("gpu_hours", "cpu_hours", "unfinished_hours", "energy_kwh", "co2_kg")
    titles = COST_TITLES | {"unfinished_hours": "of them in trials without an end"}
    rows += [(titles[key], format_number(compute[key])) for key in shown if compute.get(key)]
    return [*rows, ("steps trained", f"{sum(trial.step for trial in trials):,}")]


@dataclass(frozen=True)
class _Axis:
    """One axis of parallel coordinates. `marks`: (pixels from the top, text); `y_of`: gives a value's pixels."""

    title: str
    marks: list[tuple[float, str]]
    y_of: Callable[[Any], float]


def lay_out(space: Space, trials: Sequence[Trial], metric: str) -> dict[str, Any] | None:
    """Lay out parallel coordinates: an axis with its marks for each searched setting and one for the metric, and a line
    from left to right for each trial, the best one last so that it is drawn on top. Return None with fewer than two
    trials that have a number."""
    order = rank(trials)
    if len(order) < 2:
        return None
    shown = [trials[i] for i in reversed(order)]
    axes = [_axis(s, [t.values.get(s.key) for t in shown]) for s in space.searched]
    axes.append(_number_axis(metric, [t.metrics[metric] for t in shown], log=False))
    gap = WIDTH / max(1, len(axes) - 1)
    xs = [round(i * gap, 1) for i in range(len(axes))]
    lines = []
    for position, trial in enumerate(shown):
        values = [*(trial.values.get(s.key) for s in space.searched), trial.metrics[metric]]
        points = [(x, axis.y_of(value)) for x, axis, value in zip(xs, axes, values, strict=True)]
        share, best = position / (len(shown) - 1), position == len(shown) - 1
        lines.append({"name": trial.name, "points": points, "share": round(share, 3), "best": best})
    drawn = [{"title": axis.title, "x": x, "marks": axis.marks} for x, axis in zip(xs, axes, strict=True)]
    return {"width": WIDTH, "height": HEIGHT, "axes": drawn, "lines": lines}


def _axis(setting: Setting, values: Sequence[Any]) -> _Axis:
    if setting.kind not in LISTS and all(is_number(value) for value in values):
        return _number_axis(setting.key, [*setting.args[:2], *values], "log" in setting.kind)
    names = list(dict.fromkeys(json.dumps(v, sort_keys=True) for v in [*setting.args, *values]))
    if all(is_number(json.loads(name)) for name in names):
        names.sort(key=lambda name: float(json.loads(name)))
    heights = {name: _down((i + 0.5) / len(names)) for i, name in enumerate(names)}
    marks = [(y, format_setting(json.loads(name))) for name, y in heights.items()]
    return _Axis(setting.key, marks, lambda value: heights[json.dumps(value, sort_keys=True)])


def _number_axis(title: str, values: Sequence[float], log: bool) -> _Axis:
    scale: Callable[[float], float] = math.log if log and min(values) > 0 else float
    low, high = scale(min(values)), scale(max(values))

    def y_of(value: float) -> float:
        return _down((scale(value) - low) / ((high - low) or 1.0))

    marks = [(y_of(value), format_setting(float(value))) for value in dict.fromkeys((min(values), max(values)))]
    return _Axis(title, marks, y_of)


def _down(share: float) -> float:
    """Return the pixels from the top of a share of the height: 0.0 is the bottom, where y is largest in an SVG."""
    return round((1 - share) * HEIGHT, 1)


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
