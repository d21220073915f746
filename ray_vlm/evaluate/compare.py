"""`compare.html`: several runs on one page: settings that differ, metrics, curves laid over one another, and the same
sample images with each run's answers. One self-contained file; everything that came from files is escaped.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ray_vlm.evaluate.pictures import EvalResult, choose_images, draw_picture
from ray_vlm.evaluate.report import render
from ray_vlm.runs.compare import SETTINGS, Comparison, test_of
from ray_vlm.runs.curves import MAIN, main_key, overlay
from ray_vlm.runs.monitor import whole_lines
from ray_vlm.runs.read import Run, setting
from ray_vlm.runs.store import Store
from ray_vlm.runs.text import format_number

_MOST_VIEWS = 6  # runs whose answers stand beside each other on an image


def write_comparison(runs: Sequence[Run], comparison: Comparison) -> str:
    """The page's HTML. `comparison`: of the same runs, in the same order."""
    stages = _same_rows(load_stages(runs, comparison.titles))
    notes = [*comparison.notes]
    if len(stages) > _MOST_VIEWS:
        notes.append(f"Images show the answers of the first {_MOST_VIEWS} runs.")
        stages = stages[:_MOST_VIEWS]
    chosen = choose_images(stages[0].predictions) if stages else []
    images = [picture for i in chosen if (picture := draw_picture(i, stages)) is not None]
    return render(
        "compare.html.j2",
        title=f"{len(runs)} runs: {', '.join(comparison.titles[:4])}{', ...' if len(runs) > 4 else ''}",
        notes=notes,
        comparison=comparison,
        settings=SETTINGS,
        tell=lambda value: value if isinstance(value, str) else format_number(value),
        charts=_charts(runs, comparison.titles),
        images=images,
        columns=len(stages),
    )


def load_stages(runs: Sequence[Run], titles: Sequence[str]) -> list[EvalResult]:
    """The evaluation that stands for each run, with its predictions; those that have none are left out."""
    stages = []
    for run, title in zip(runs, titles, strict=True):
        name, metrics = test_of(run)
        data = Store(run.address).read(f"evaluate/{name}/predictions.jsonl") if name else None
        predictions = _read_predictions(data or b"")
        if predictions:
            stages.append(EvalResult(title, metrics, predictions))
    return stages


def _read_predictions(data: bytes) -> list[dict[str, Any]]:
    """Whole lines of a `predictions.jsonl`; a line cut off by a crash is left out."""
    needed = {"id", "images", "sizes", "truth", "found", "score", "answer"}
    return [line for line in whole_lines(data) if isinstance(line, dict) and needed <= set(line)]


def _same_rows(stages: Sequence[EvalResult]) -> list[EvalResult]:
    """The stages with the rows that all have, in one order; of those of another task than the first, none."""
    if not stages:
        return []
    stages = [stage for stage in stages if stage.metrics.get("task") == stages[0].metrics.get("task")]
    rows = [{p["id"]: p for p in stage.predictions} for stage in stages]
    common = [name for name in rows[0] if all(name in of_stage for of_stage in rows)]
    return [
        replace(stage, predictions=[of_stage[name] for name in common])
        for stage, of_stage in zip(stages, rows, strict=True)
        if common
    ]


def _charts(runs: Sequence[Run], titles: Sequence[str]) -> list[dict[str, Any]]:
    """Training by what each run is about, then validation by what chose its best."""
    mains = dict.fromkeys(main_key(run.current) for run in runs if setting(run.job, "method.name"))
    metrics = dict.fromkeys(run.metric for run in runs)
    charts = [overlay(runs, titles, "train", key, f"{MAIN[key]}, training, smoothed") for key in mains]
    charts += [overlay(runs, titles, "eval", key, f"{key}, validation") for key in metrics]
    return [chart for chart in charts if chart is not None]
