"""Charts of runs: curves with their points and smoothing, drawn with matplotlib as files or for a page.

The colours, settings and fonts of all pictures of the package are here too.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ray_vlm.errors import ConfigError
from ray_vlm.runs.read import Run, is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, INK, _GRID = "#9aa3ad", "#22303c", "#e6e9ed"
# The colours of Okabe and Ito, which people with colour blindness tell apart, without their yellow.
COLOURS = BLUE, ORANGE, *_ = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", INK
_OF_PAGE = {INK: "var(--ink)", GREY: "var(--soft)", _GRID: "var(--line)"}  # colours that follow a page's dark mode
_STYLE: dict[str, Any] = {
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
    "grid.color": _GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "text.parse_math": False,  # a class may be called `$5`
    "svg.hashsalt": "ray_vlm",
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.12,
}
Points = list[tuple[float, float]]
Line = Mapping[str, Any]  # of `metrics.jsonl`

# The main number of a run: the first of these keys that its training lines have, and its title.
MAIN = {"reward": "Reward", "preference_accuracy": "Pairs preferred as they should be", "loss": "Loss"}
_MOST = 400  # points drawn of a line; more are not visible
_WEIGHT = 0.9  # of the previous values in a smoothed line
_BLOCKS = "▁▂▃▄▅▆▇█"
DASHES = ["-", "--", ":", "-."]  # once the colours are used up
_NAMED = 16  # runs that a legend can hold
_PANEL = (6.5, 3.6)  # inches
_EVEN = ("learning_rate", "epoch")  # numbers without noise, which are not smoothed


@dataclass(frozen=True)
class Chart:
    """A chart of a page: its title, the drawing, and (colour, CSS border style, name) of each line."""

    title: str
    svg: str
    lines: tuple[tuple[str, str, str], ...] = ()


def points_of(lines: Sequence[Line], kind: str, key: str) -> Points:
    """Return (step, value) of every line of that kind with a finite number under `key`."""
    values: list[tuple[int, Any]] = [(line["step"], line.get(key)) for line in lines if line["kind"] == kind]
    return [(step, value) for step, value in values if is_number(value)]


def main_key(lines: Sequence[Line]) -> str:
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


def learning_curve(lines: Sequence[Line], name: str = "") -> Chart | None:
    """Return the chart of a run's main number in training and validation; None with fewer than two training lines."""
    key = main_key(lines)
    if len(points_of(lines, "train", key)) < 2:
        return None
    title = f"{MAIN[key]}, {name}" if name else MAIN[key]
    return draw_chart(title, key, ["training, each step and smoothed; dots: validation"], [lines])


def overlay(runs: Sequence[Run], titles: Sequence[str], kind: str, key: str, title: str) -> Chart | None:
    """Return one chart of a number in several runs, one colour each; None if no run has it.

    Training lines are smoothed; validations are joined and marked.
    """
    lines = [[line for line in run.current if line["kind"] == kind] for run in runs]
    return draw_chart(title, key, titles, lines) if any(points_of(some, kind, key) for some in lines) else None


def draw_chart(title: str, key: str, names: Sequence[str], runs: Sequence[Sequence[Line]]) -> Chart:
    """Draw a number in the lines of runs for a page. A run without it keeps its colour, and is not named."""
    with picture_style():
        figure, panels = make_panels(1, 1, (9, 2.9))
        _draw(panels[0], key, runs)
        svg = draw_for_page(figure)
    shown = [(i, name) for i, name in enumerate(names) if any(is_number(line.get(key)) for line in runs[i])]
    return Chart(title, svg, tuple((_page_colour(i), "dashed" if i >= len(COLOURS) else "solid", n) for i, n in shown))


def _page_colour(i: int) -> str:
    colour = COLOURS[i % len(COLOURS)]
    return _OF_PAGE.get(colour, colour)


def draw_for_page(figure: "Figure") -> str:
    """Return the figure as an SVG element, whose text and axes follow the page's colours and font."""
    svg = save(figure, "svg", transparent=True).decode()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    return re.sub("|".join(_OF_PAGE), lambda match: _OF_PAGE[match[0]], svg)


def font_families() -> list[str]:
    """Return font families: matplotlib's own, then one with Chinese, Japanese and Korean if it is installed."""
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    wanted = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC")
    return ["DejaVu Sans", *[name for name in (*wanted, "Microsoft YaHei", "Arial Unicode MS") if name in known][:1]]


@contextmanager
def picture_style() -> Iterator[None]:
    """Draw and save figures in the package's style. This needs no display."""
    import matplotlib

    style: Any = _STYLE | {"font.family": font_families()}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def make_panels(count: int, columns: int, inches: tuple[float, float], **options: Any) -> "tuple[Figure, list[Axes]]":
    """Return a figure of panels of this size, and the panels. `options`: of `Figure.subplots`."""
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(inches[0] * columns, inches[1] * rows + 0.5), dpi=110, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]


def save(figure: "Figure", form: str, transparent: bool = False) -> bytes:
    """Return the figure as PNG, or as an SVG that is the same for the same figure."""
    out = io.BytesIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type")) if form == "svg" else None
    figure.savefig(out, format=form, metadata=metadata, transparent=transparent)
    return out.getvalue()


def plot_runs(runs: Sequence[Run], titles: Sequence[str], keys: Sequence[str] = (), form: str = "png") -> bytes:
    """Return the picture: a panel for each key, a colour for each run; training smoothed, validations as dots.

    Without `keys`: the runs' main number and metric, learning rate and gradient norm. Raises `ConfigError` for a key
    that no run has, with the available ones.
    """
    keys = check_keys(runs, keys) if keys else default_keys(runs)
    with picture_style():
        figure, panels = make_panels(len(keys), min(2, len(keys)), _PANEL)
        for key, panel in zip(keys, panels, strict=True):
            _draw(panel, key, [run.current for run in runs])
            panel.set_title(key)
        _name_runs(figure, titles)
        return save(figure, form)


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


def _draw(panel: "Axes", key: str, runs: Sequence[Sequence[Line]]) -> None:
    """Draw one panel. Noisy numbers are smoothed; for a single run the raw values are drawn behind the line."""
    for i, lines in reversed(list(enumerate(runs))):  # the first run on top
        look = _look(i)
        train, held_out = points_of(lines, "train", key), points_of(lines, "eval", key)
        line = train if key in _EVEN else smooth(train)
        if len(runs) == 1 and line != train:
            panel.plot(*_columns(thin(train)), color=look["color"], alpha=0.25, linewidth=0.8)
        panel.plot(*_columns(thin(line)), linewidth=1.7, **look)
        joined = {} if train else {"linestyle": look["linestyle"]}
        dots = {"color": look["color"], "marker": "o", "markersize": 4, "linestyle": "none"}
        panel.plot(*_columns(held_out), **(dots | joined))
    _set_axes(panel)
    panel.set_xlabel("optimizer step")


def _set_axes(panel: "Axes") -> None:
    """Put ticks at whole steps only, and let no axis of numbers that are never negative begin below 0."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    values = [value for line in panel.lines for value in cast("Sequence[float]", line.get_ydata())]
    if len(set(values)) < 2 and 0 <= min(values, default=0) <= 1:  # matplotlib would draw 0 from -0.055 to 0.055
        panel.set_ylim(0, 1)
    elif min(values) >= 0 and panel.get_ylim()[0] < 0:
        panel.set_ylim(bottom=0)


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
