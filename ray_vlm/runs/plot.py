"""Curves of one or several runs on one picture, as PNG or SVG."""

import io
import warnings
from collections.abc import Sequence
from typing import Any

from ray_vlm.errors import ConfigError
from ray_vlm.runs.curves import Points, main_key, points_of, smooth, thin
from ray_vlm.runs.drawing import INK, STYLE, font_families
from ray_vlm.runs.read import Run

COLOURS = ["#2563eb", "#e08a00", "#0a9a6b", "#c2568f", "#d5480b", "#38a3d9", "#7c3aed", "#6b7684"]
DASHES = ["-", "--", ":", "-."]  # once the colours are used up
_NAMED = 16  # runs that a legend can hold
_PANEL = (6.5, 3.6)  # inches
_EVEN = ("learning_rate", "epoch")  # numbers without noise, which are not smoothed


def plot_runs(runs: Sequence[Run], titles: Sequence[str], keys: Sequence[str] = (), form: str = "png") -> bytes:
    """Return the picture: a panel for each key, a colour for each run; training smoothed, validations as dots.

    Without `keys`: the runs' main number and metric, learning rate and gradient norm. Raises `ConfigError` for a key
    that no run has, with the available ones.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = check_keys(runs, keys) if keys else default_keys(runs)
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    style: Any = {**STYLE, "font.family": font_families(), "svg.hashsalt": "ray_vlm"}
    out = io.BytesIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows + 0.5), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for key, panel in zip(panels, axes, strict=False):
            _draw(panel, key, runs)
        for panel in axes[len(panels) :]:
            panel.set_visible(False)
        _name_runs(figure, titles)
        figure.savefig(out, format=form, metadata={"Date": None} if form == "svg" else None)
    return out.getvalue()


def _name_runs(figure: Any, titles: Sequence[str]) -> None:
    """Add the title of one run, a legend of several, or their number if a legend would hide the curves."""
    from matplotlib.lines import Line2D

    if len(titles) == 1:
        figure.suptitle(titles[0], x=0.012, ha="left", fontsize=14, color=INK)
    elif len(titles) <= _NAMED:
        handles = [Line2D([], [], linewidth=2, **_look(i)) for i in range(len(titles))]
        names = [f" {title}" for title in titles]  # matplotlib omits labels that begin with an underscore
        figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(titles)), fontsize=9)
    else:
        figure.suptitle(f"{len(titles)} runs", x=0.012, ha="left", fontsize=14, color=INK)


def _look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}


def numbers_of(runs: Sequence[Run]) -> list[str]:
    """Return every key of the training and validation lines, in order of appearance."""
    seen = {k: None for run in runs for line in run.current if line["kind"] in ("train", "eval") for k in line}
    return [key for key in seen if key not in ("kind", "attempt", "step", "time")]


def check_keys(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """Return the keys as a list. Raises `ConfigError` for those that no run has."""
    there = numbers_of(runs)
    if unknown := [key for key in keys if key not in there]:
        raise ConfigError([f"--metric {key}: no run has it. There are: {', '.join(there)}." for key in unknown])
    return list(keys)


def default_keys(runs: Sequence[Run]) -> list[str]:
    """Return the keys that are drawn by default."""
    there = set(numbers_of(runs))
    wanted = [
        *(main_key(run.current) for run in runs),
        "loss",
        *(run.metric for run in runs),
        "learning_rate",
        "grad_norm",
    ]
    return [key for key in dict.fromkeys(wanted) if key in there] or ["loss"]


def _draw(panel: Any, key: str, runs: Sequence[Run]) -> None:
    """Draw one panel. Noisy numbers are smoothed; for a single run the raw values are drawn behind the line."""
    for i, run in enumerate(runs):
        look = _look(i)
        train, held_out = points_of(run.current, "train", key), points_of(run.current, "eval", key)
        line = train if key in _EVEN else smooth(train)
        if len(runs) == 1 and line != train:
            panel.plot(*_columns(thin(train)), color=look["color"], alpha=0.25, linewidth=0.8)
        panel.plot(*_columns(thin(line)), linewidth=1.7, **look)
        joined = {} if train else {"linestyle": look["linestyle"]}
        dots = {"color": look["color"], "marker": "o", "markersize": 4, "linestyle": "none"}
        panel.plot(*_columns(held_out), **(dots | joined))
    _set_axes(panel)
    panel.set_title(key)
    panel.set_xlabel("optimizer step")


def _set_axes(panel: Any) -> None:
    """Put ticks at whole steps only, and let no axis of numbers that are never negative begin below 0."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    values = [value for line in panel.lines for value in line.get_ydata()]
    if not any(values):  # all 0, or no line: matplotlib would draw from -0.055 to 0.055
        panel.set_ylim(0, 1)
    elif min(values) >= 0 and panel.get_ylim()[0] < 0:
        panel.set_ylim(bottom=0)


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
