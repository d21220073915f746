"""Draw the numbers of `stats.py` as one picture: classes, tokens, image sizes, box sizes, each panel if it has data."""

import io
import warnings
from typing import Any

import numpy as np

from ray_vlm.data.stats import MEDIUM_PX, SMALL_PX, THIN_PX, Stats, size_changes
from ray_vlm.data.stats_text import shorten
from ray_vlm.runs.plot import BLUE, GREY, INK, ORANGE, STYLE, font_families

_SHOWN_CLASSES = 20


def draw_stats(stats: Stats, title: str) -> bytes:
    """Return the picture as PNG, 13 inches wide at 110 dots an inch. Needs no display."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = [_tokens]
    if stats.classes:
        panels.insert(0, _classes)
    if len(stats.images):
        panels.append(_images)
    if len(stats.boxes):
        panels.append(_boxes)
    columns = 2 if len(panels) in (2, 4) else len(panels)
    lines = -(-len(panels) // columns)
    style: Any = {**STYLE, "font.family": font_families()}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        space = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15, wspace=0.06, hspace=0.08)
        figure = Figure(figsize=(13, 4.4 * lines + 0.6), dpi=110, layout=space)
        FigureCanvasAgg(figure)
        figure.suptitle(shorten([title], 110)[0], x=0.012, ha="left", fontsize=14, color=INK)
        for panel, axes in zip(panels, np.atleast_1d(figure.subplots(lines, columns)).flat, strict=True):
            panel(axes, stats)
        out = io.BytesIO()
        figure.savefig(out, format="png")
    return out.getvalue()


def _classes(axes: Any, stats: Stats) -> None:
    shown = stats.classes
    if len(shown) > _SHOWN_CLASSES:  # the rarest matter most
        shown = (*shown[: _SHOWN_CLASSES // 2], *shown[-_SHOWN_CLASSES // 2 :])
    hidden = len(stats.classes) - len(shown)
    names = shorten([entry["tag"] for entry in shown], 28)
    rows = [entry["rows"] for entry in shown]
    bars = axes.barh(range(len(shown)), rows, color=BLUE, height=0.7)
    rarest = min(rows)
    for bar, entry in zip(bars, shown, strict=True):
        bar.set_color(ORANGE if entry["rows"] == rarest and rarest < max(rows) else BLUE)
        text = f" {entry['rows']:,} ({entry['share']:.1%})"
        axes.text(bar.get_width(), bar.get_y() + bar.get_height() / 2, text, va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(shown)), names)
    axes.set_xlim(0, max(rows) * 1.25)
    axes.set_ylim(max(len(shown), 5) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("training rows that have it")
    note = "rows, and their share of all; the rarest in orange"
    axes.text(0, 1.03, note, transform=axes.transAxes, fontsize=9, color=INK)
    axes.set_title(f"Classes ({hidden} in between not shown)" if hidden else "Classes", pad=26)


def _tokens(axes: Any, stats: Stats) -> None:
    values = stats.tokens["all"]
    low, high = int(values.min()), int(values.max())
    axes.hist(values, bins=np.linspace(low - 0.5, high + 0.5, min(40, high - low + 1) + 1), color=BLUE)
    lines = [("median", float(np.median(values)), INK, "-"), ("p95", float(np.percentile(values, 95)), INK, "--")]
    if stats.max_tokens is not None:
        lines.append(("data.max_tokens", float(stats.max_tokens), ORANGE, "-"))
    for name, at, color, style in lines:
        axes.axvline(at, color=color, linestyle=style, linewidth=1.4, label=f"{name} {at:,.0f}")
    axes.set_xlabel("tokens of a row, images counted")
    axes.set_ylabel("rows")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.12)
    _legend_above(axes, len(lines))
    axes.set_title("Row lengths", pad=26)


def _images(axes: Any, stats: Stats) -> None:
    sizes, counts = np.unique(stats.images, axis=0, return_counts=True)
    area = 30 + 220 * counts / counts.max() if len(sizes) <= 200 else np.full(len(sizes), 14.0)
    axes.scatter(sizes[:, 0], sizes[:, 1], s=area, color=BLUE, alpha=0.55, linewidths=0)
    wide, tall = 1.15 * sizes[:, 0].max(), 1.15 * sizes[:, 1].max()
    across = np.linspace(1, wide, 400)
    for limit, name, style in ((stats.min_pixels, "min_pixels", ":"), (stats.max_pixels, "max_pixels", "--")):
        if (limit / across < tall).any():
            axes.plot(across, limit / across, color=ORANGE, linestyle=style, label=f"{name} {limit:,}")
    axes.set_xlim(0, wide)
    axes.set_ylim(0, tall)
    axes.set_xlabel("width in pixels")
    axes.set_ylabel("height in pixels")
    _legend_above(axes, 2)
    n = size_changes(stats)
    summary = ", ".join(f"{n[name]:,} {name}" for name in ("shrunk", "enlarged", "kept") if n[name])
    axes.set_title(f"Images: {summary} in size", pad=26)


def _boxes(axes: Any, stats: Stats) -> None:
    original, resized = (np.sqrt(sides.prod(axis=1)) for sides in (stats.boxes, stats.resized_boxes))
    both = np.maximum(np.concatenate([original, resized]), 1.0)
    far_apart = both.max() > 8 * both.min()
    bins = (np.geomspace if far_apart else np.linspace)(both.min() * 0.95, both.max() * 1.05, 32)
    axes.hist(np.maximum(resized, 1), bins=bins, color=BLUE, alpha=0.85, label="as the model sees them")
    axes.hist(np.maximum(original, 1), bins=bins, histtype="step", color=ORANGE, linewidth=1.6, label="in the files")
    for side, name in ((SMALL_PX, "small | medium"), (MEDIUM_PX, "medium | large")):
        if bins[0] < side < bins[-1]:
            axes.axvline(side, color=GREY, linestyle="--", linewidth=1.2)
            transform = axes.get_xaxis_transform()
            axes.text(side, 0.985, f" {name}", transform=transform, fontsize=8.5, color=INK, va="top", ha="left")
    if far_apart:
        axes.set_xscale("log")
        ticks = [v for v in (1, 2, 4, 8, 16, 32, 64, 96, 192, 384, 768, 1536, 3072) if bins[0] <= v <= bins[-1]]
        axes.set_xticks(ticks, [str(v) for v in ticks])
        axes.minorticks_off()
    axes.margins(y=0.15)
    axes.set_xlabel("side of a square of the box's area, in pixels")
    axes.set_ylabel("boxes")
    axes.yaxis.get_major_locator().set_params(integer=True)
    _legend_above(axes, 2)
    thin = (stats.resized_boxes.min(axis=1) < THIN_PX).mean()
    axes.set_title(f"Boxes: {thin:.1%} thinner than {THIN_PX:.0f} px", pad=26)


def _legend_above(axes: Any, columns: int) -> None:
    """Draw the legend between the title and the panel, where it covers nothing."""
    if axes.get_legend_handles_labels()[0]:
        options = {"loc": "lower left", "bbox_to_anchor": (-0.01, 0.985), "ncols": columns, "columnspacing": 1.2}
        axes.legend(**options, borderaxespad=0.2, handlelength=1.6, fontsize=9)
