"""Charts of runs: curves with their points and smoothing, laid out for an SVG or drawn with matplotlib as PNG or SVG.

The colours, settings and fonts of all pictures of the package are here too.
"""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ray_vlm.errors import ConfigError
from ray_vlm.runs.read import Run, is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, INK = "#3b6fb6", "#e08a2e", "#9aa3ad", "#22303c"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titlepad": 12.0,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "text.parse_math": False,  # a class may be called `$5`
}
Points = list[tuple[float, float]]

# The main number of a run: the first of these keys that its training lines have, and its title.
MAIN = {"reward": "Reward", "preference_accuracy": "Pairs preferred as they should be", "loss": "Loss"}
FROM_ZERO = ("loss", "preference_accuracy")  # axes that include 0; a reward has no natural zero
_MOST = 400  # points drawn of a line; more are not visible
_WEIGHT = 0.9  # of the previous values in a smoothed line
_BLOCKS = "▁▂▃▄▅▆▇█"
COLOURS = ["#2563eb", "#e08a00", "#0a9a6b", "#c2568f", "#d5480b", "#38a3d9", "#7c3aed", "#6b7684"]
DASHES = ["-", "--", ":", "-."]  # once the colours are used up
_NAMED = 16  # runs that a legend can hold
_PANEL = (6.5, 3.6)  # inches
_EVEN = ("learning_rate", "epoch")  # numbers without noise, which are not smoothed


@dataclass(frozen=True)
class Curve:
    """One curve of a chart: its title, the line, separate dots, and a faint line behind it."""

    title: str
    line: Points
    dots: Points = ()  # type: ignore[assignment]
    faint: Points = ()  # type: ignore[assignment]


def points_of(lines: Sequence[dict[str, Any]], kind: str, key: str) -> Points:
    """Return (step, value) of every line of that kind with a finite number under `key`."""
    values: list[tuple[int, Any]] = [(line["step"], line.get(key)) for line in lines if line["kind"] == kind]
    return [(step, value) for step, value in values if is_number(value)]


def main_key(lines: Sequence[dict[str, Any]]) -> str:
    """Return the first key of `MAIN` that the training lines have, or `loss`."""
    train = [line for line in lines if line["kind"] == "train"]
    return next((key for key in MAIN if any(key in line for line in train)), "loss")


def smooth(points: Points) -> Points:
    """Return the exponential mean of the values, corrected for the bias of its start.

    The n-th mean is that of n values with weights `_WEIGHT ** (n - i)`, as TensorBoard divides by `1 - _WEIGHT ** n`.
    """
    means, mean, total_weight = [], 0.0, 0.0
    for step, value in points:
        total_weight = _WEIGHT * total_weight + 1
        mean += (value - mean) / total_weight  # this form keeps a constant line constant, to the bit
        means.append((step, mean))
    return means


def thin(points: Points, most: int = _MOST) -> Points:
    """Return at most `most` of the points, evenly spaced, including the first and the last."""
    if len(points) <= most:
        return list(points)
    last = len(points) - 1
    return [points[round(i * last / (most - 1))] for i in range(most)]


def spark(points: Points, width: int = 40) -> str:
    """Return the smoothed line as a sparkline of at most `width` characters; empty without points."""
    values = [value for _, value in thin(smooth(points), width)]
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(_BLOCKS) - 1) / ((high - low) or 1.0)
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values)


def learning_curve(lines: Sequence[dict[str, Any]], name: str = "") -> dict[str, Any] | None:
    """Return the chart of a run's main number in training and validation; None with fewer than two training lines."""
    key = main_key(lines)
    train = points_of(lines, "train", key)
    if len(train) < 2:
        return None
    curve = Curve("training, each step and smoothed", smooth(train), points_of(lines, "eval", key), train)
    return layout(f"{MAIN[key]}, {name}" if name else MAIN[key], [curve], key in FROM_ZERO)


def overlay(runs: Sequence[Run], titles: Sequence[str], kind: str, key: str, title: str) -> dict[str, Any] | None:
    """Return one chart of a number in several runs, one colour each; None if no run has it.

    Training lines are smoothed; validations are joined and marked.
    """
    curves = []
    for run, name in zip(runs, titles, strict=True):
        points = points_of(run.current, kind, key)
        curves.append(Curve(name, smooth(points)) if kind == "train" else Curve(name, points, points))
    return layout(title, curves, key in FROM_ZERO) if any(curve.line for curve in curves) else None


def layout(title: str, curves: Sequence[Curve], from_zero: bool, width: int = 760, height: int = 220) -> dict[str, Any]:
    """Return the input of the page's `chart` macro: points in pixels of `width` x `height`, and labels of both axes.

    y grows downwards in an SVG, so the largest value is at 0. If all values are equal, the axis is a range around them:
    0 to 1 for shares, so a line of zeros is at the bottom.
    """
    everything = [point for curve in curves for point in (*curve.line, *curve.dots, *curve.faint)]
    values = [value for _, value in everything] + ([0.0] if from_zero else [])
    top, bottom = max(values), min(values)
    if everything and top == bottom:
        top, bottom = (1.0, 0.0) if 0 <= top <= 1 else (top + 0.5, top - 0.5)
    scale, last = (top - bottom) or 1.0, max((step for step, _ in everything), default=1) or 1

    def to_pixels(points: Points) -> Points:
        return [(round(s / last * width, 1), round((top - v) / scale * height, 1)) for s, v in thin(points)]

    return {
        "title": title,
        "width": width,
        "height": height,
        "marks": [top, (top + bottom) / 2, bottom],
        "last": last,
        "curves": [
            {
                "number": i,
                "title": c.title,
                "line": to_pixels(c.line),
                "dots": to_pixels(c.dots),
                "faint": to_pixels(c.faint),
            }
            for i, c in enumerate(curves)
        ],
    }


def font_families() -> list[str]:
    """Return font families: matplotlib's own, then one with Chinese, Japanese and Korean if it is installed."""
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    wanted = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC")
    return ["DejaVu Sans", *[name for name in (*wanted, "Microsoft YaHei", "Arial Unicode MS") if name in known][:1]]


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


def _name_runs(figure: "Figure", titles: Sequence[str]) -> None:
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
        known = f"Lines of training and validation have: {', '.join(there)}."
        raise ConfigError([f"--metric {key}: no run has it. {known}" for key in unknown])
    return list(keys)


def default_keys(runs: Sequence[Run]) -> list[str]:
    """Return the keys that are drawn by default."""
    there = set(numbers_of(runs))
    main, metrics = [main_key(run.current) for run in runs], [run.metric for run in runs]
    wanted = [*main, "loss", *metrics, "learning_rate", "grad_norm"]
    return [key for key in dict.fromkeys(wanted) if key in there] or ["loss"]


def _draw(panel: "Axes", key: str, runs: Sequence[Run]) -> None:
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


def _set_axes(panel: "Axes") -> None:
    """Put ticks at whole steps only, and let no axis of numbers that are never negative begin below 0."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    values = [value for line in panel.lines for value in cast("Sequence[float]", line.get_ydata())]
    if not any(values):  # all 0, or no line: matplotlib would draw from -0.055 to 0.055
        panel.set_ylim(0, 1)
    elif min(values) >= 0 and panel.get_ylim()[0] < 0:
        panel.set_ylim(bottom=0)


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
