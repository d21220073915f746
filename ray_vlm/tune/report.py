"""`report.html` of a sweep: trials, the importance of their settings, curves, cost, and the best trial's answers.

One self-contained file from the files in the sweep's folder; all text from files is escaped.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_vlm.evaluate.compare import load_results
from ray_vlm.evaluate.report import EvalResult, choose_images, draw_picture, render
from ray_vlm.runs.compute import measure_compute, sum_compute
from ray_vlm.runs.plot import overlay
from ray_vlm.runs.read import Run
from ray_vlm.runs.text import format_duration, format_number, format_setting
from ray_vlm.tune.coordinates import lay_out
from ray_vlm.tune.importance import measure_importance
from ray_vlm.tune.plan import pareto
from ray_vlm.tune.space import Space
from ray_vlm.tune.trials import Trial, rank


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
        images=_samples(results),
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
    titles = {
        "gpu_hours": "GPU-hours",
        "cpu_hours": "CPU-hours",
        "unfinished_hours": "of them in trials without an end",
    }
    titles |= {"energy_kwh": "energy (kWh, estimate)", "co2_kg": "CO2 (kg, estimate)"}
    rows += [(name, format_number(compute[key])) for key, name in titles.items() if compute.get(key)]
    return [*rows, ("steps trained", f"{sum(trial.step for trial in trials):,}")]


def _samples(results: Sequence[EvalResult]) -> list[dict[str, Any]]:
    if not results:
        return []
    return [p for i in choose_images(results[0].predictions) if (p := draw_picture(i, results)) is not None]
