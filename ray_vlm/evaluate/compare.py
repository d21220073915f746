"""`compare.html`: several runs on one page: settings that differ, metrics, curves in shared charts, and the same sample
images with each run's answers. One self-contained file; all text from files is escaped.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ray_vlm.evaluate.report import EvalResult, draw_pictures, render
from ray_vlm.runs.compare import SETTINGS, Comparison, test_of
from ray_vlm.runs.monitor import whole_lines
from ray_vlm.runs.plot import MAIN, Chart, main_key, overlay
from ray_vlm.runs.read import Run, setting
from ray_vlm.runs.text import format_number
from ray_vlm.storage import Store

_MOST_VIEWS = 6  # runs whose answers are shown side by side for an image


def write_comparison(runs: Sequence[Run], comparison: Comparison) -> str:
    """Return the page's HTML. `comparison`: of the same runs, in the same order."""
    results = _same_rows(load_results(runs, comparison.titles))
    notes = [*comparison.notes]
    if len(results) > _MOST_VIEWS:
        notes.append(f"Images show the answers of the first {_MOST_VIEWS} runs.")
        results = results[:_MOST_VIEWS]
    return render(
        "compare.html.j2",
        title=f"{len(runs)} runs: {', '.join(comparison.titles[:4])}{', ...' if len(runs) > 4 else ''}",
        notes=notes,
        comparison=comparison,
        settings=SETTINGS,
        format_value=lambda value: value if isinstance(value, str) else format_number(value),
        charts=_charts(runs, comparison.titles),
        images=draw_pictures(results),
        columns=len(results),
    )


def load_results(runs: Sequence[Run], titles: Sequence[str]) -> list[EvalResult]:
    """Return the evaluation that represents each run, with its predictions; runs without one are left out."""
    results = []
    for run, title in zip(runs, titles, strict=True):
        name, metrics = test_of(run)
        data = Store(run.address).read(f"evaluate/{name}/predictions.jsonl") if name else None
        predictions = _read_predictions(data or b"")
        if predictions:
            results.append(EvalResult(title, metrics, predictions))
    return results


def _read_predictions(data: bytes) -> list[dict[str, Any]]:
    """Parse the complete lines of a `predictions.jsonl`; a line cut off by a crash is left out."""
    needed = {"id", "images", "sizes", "truth", "found", "score", "answer"}
    return [line for line in whole_lines(data) if isinstance(line, dict) and needed <= set(line)]


def _same_rows(results: Sequence[EvalResult]) -> list[EvalResult]:
    """Return the results of the first one's task, each with the rows that all of them have, in one order."""
    if not results:
        return []
    results = [result for result in results if result.metrics.get("task") == results[0].metrics.get("task")]
    by_id = [{p["id"]: p for p in result.predictions} for result in results]
    common = [name for name in by_id[0] if all(name in predictions for predictions in by_id)]
    return [
        replace(result, predictions=[predictions[name] for name in common])
        for result, predictions in zip(results, by_id, strict=True)
        if common
    ]


def _charts(runs: Sequence[Run], titles: Sequence[str]) -> list[Chart]:
    """Return the charts: training by the main number of each method, then validation by the metric that chose
    `best/`."""
    mains = dict.fromkeys(main_key(run.current) for run in runs if setting(run.job, "method.name"))
    metrics = dict.fromkeys(run.metric for run in runs)
    charts = [overlay(runs, titles, "train", key, f"{MAIN[key]}, training, smoothed") for key in mains]
    charts += [overlay(runs, titles, "eval", key, f"{key}, validation") for key in metrics]
    return [chart for chart in charts if chart is not None]
