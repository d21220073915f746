"""The style of the package's pictures: matplotlib settings, colours, and fonts for any label."""

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


def font_families() -> list[str]:
    """Return font families: matplotlib's own, then one with Chinese, Japanese and Korean if it is installed."""
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    wanted = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC")
    return ["DejaVu Sans", *[name for name in (*wanted, "Microsoft YaHei", "Arial Unicode MS") if name in known][:1]]
