"""Describe the numbers of `stats.py` as text for a terminal, one paragraph for each question."""

from collections.abc import Sequence

import numpy as np

from ray_vlm.data.stats import THIN_PX, Stats, box_classes, size_changes
from ray_vlm.data.survey import plain

_SHOWN_CLASSES = 60


def describe_stats(stats: Stats) -> str:
    """Return the numbers as text, one paragraph for each question."""
    rows = len(stats.tokens["all"])
    parts = ", ".join(
        f"{name} {good}" + (f" ({bad} bad left out)" if bad else "") for name, (good, bad) in stats.parts.items()
    )
    blocks = [
        [f"rows: {parts}", *(f"note: {plain(note)}" for note in stats.notes)],
        _class_lines(stats),
        _region_lines(stats),
        _box_lines(stats, rows),
        _image_lines(stats),
        _token_lines(stats),
        _limit_lines(stats, rows),
        _cut_lines(stats, rows),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def _class_lines(stats: Stats) -> list[str]:
    if not stats.classes:
        return []
    names = shorten([entry["tag"] for entry in stats.classes])
    width = max(5, *map(len, names))
    lines = [f"{'class':<{width}} {'rows':>8} {'of rows':>8} {'objects':>8} {'shown':>7} {'weight':>7}"]
    lines += [
        f"{name:<{width}} {e['rows']:>8} {e['share']:>8.1%} {e['objects']:>8} {e['times']:>6.2f}x {e['weight']:>7.2f}"
        for name, e in zip(names, stats.classes, strict=True)
    ]
    if len(names) > _SHOWN_CLASSES:
        half = _SHOWN_CLASSES // 2
        lines = [*lines[: half + 1], f"... {len(names) - _SHOWN_CLASSES} more ...", *lines[-half:]]
    return lines


def _region_lines(stats: Stats) -> list[str]:
    """Return a table of classes by regions; the words of a region's name stand below one another."""
    if not stats.region_counts:
        return []
    ranked = sorted(stats.region_counts.items(), key=lambda item: -item[1].total())[:_SHOWN_CLASSES]
    names = shorten([tag for tag, _ in ranked])
    width = max(5, *map(len, names))
    heads = [plain(region).split() for region in stats.regions]
    height = max(map(len, heads))
    wide = [max(5, *map(len, head)) for head in heads]
    lines = ["share of each class's centres by region"]
    for line in range(height):
        words = [head[line - height + len(head)] if line >= height - len(head) else "" for head in heads]
        cells = " ".join(f"{word:>{w}}" for word, w in zip(words, wide, strict=True))
        lines.append(f"{'class' if line == height - 1 else '':<{width}}  {cells}")
    for name, (_, counts) in zip(names, ranked, strict=True):
        shares = [counts[region] / counts.total() for region in stats.regions]
        cells = " ".join(f"{f'{v:.0%}' if v else '.':>{w}}" for v, w in zip(shares, wide, strict=True))
        lines.append(f"{name:<{width}}  {cells}")
    return lines


def _box_lines(stats: Stats, rows: int) -> list[str]:
    count = len(stats.boxes)
    without = stats.without_object
    empty = [] if without is None else [f"  {without} images ({without / rows:.1%}) have no object"]
    if not count:
        return empty and [f"{count} boxes", *empty]
    thin = int((stats.resized_boxes.min(axis=1) < THIN_PX).sum())
    lines = [f"{f'{count} boxes':<18} {'small':>14} {'medium':>14} {'large':>14}   (areas below 32², below 96², above)"]
    for name, sides in (("original pixels", stats.boxes), ("resized pixels", stats.resized_boxes)):
        cells = " ".join(f"{f'{n} ({n / count:.1%})':>14}" for n in box_classes(sides))
        lines.append(f"  {name:<16} {cells}")
    lines.append(f"  {thin} ({thin / count:.1%}) are thinner than {THIN_PX:.0f} pixels after resizing")
    return [*lines, *empty]


def _image_lines(stats: Stats) -> list[str]:
    if not len(stats.images):
        return []
    columns = {"width": stats.images[:, 0], "height": stats.images[:, 1]}
    columns["width / height"] = stats.images[:, 0] / stats.images[:, 1]
    lines = [f"{f'{len(stats.images)} images':<18} {'min':>8} {'median':>8} {'max':>8}"]
    for name, values in columns.items():
        form = ".2f" if "/" in name else ".0f"
        cells = " ".join(f"{v:>8{form}}" for v in (values.min(), np.median(values), values.max()))
        lines.append(f"  {name:<16} {cells}")
    n = size_changes(stats)
    return [
        *lines,
        f"  resizing (to {stats.min_pixels:,} .. {stats.max_pixels:,} pixels): {n['shrunk']} shrunk, "
        f"{n['enlarged']} enlarged, {n['kept']} keep their size, {n['unchanged']} of these to the pixel "
        f"(the others' sides are rounded to {stats.factor} pixels)",
    ]


def _token_lines(stats: Stats) -> list[str]:
    lines = [f"{'tokens a row':<18} {'min':>8} {'median':>8} {'p95':>8} {'max':>8} {'mean':>8}"]
    for name, values in stats.tokens.items():
        statistics = (values.min(), np.median(values), np.percentile(values, 95), values.max(), values.mean())
        lines.append(f"  {name:<16} " + " ".join(f"{v:>8.0f}" for v in statistics))
    return lines


def _limit_lines(stats: Stats, rows: int) -> list[str]:
    above = "" if stats.max_tokens is None else f" {f'rows above max_tokens={stats.max_tokens}':>28}"
    lines = [
        "other limits on image sizes",
        f"  {'data.max_pixels':>15} {'visual tokens':>13} {'image tokens a row':>19} {'tokens a row':>13}"
        f"{above} {f'boxes < {THIN_PX:.0f} px':>12}",
    ]
    for e in stats.limits:
        many = e["above"]
        dropped = "" if many is None else f" {f'{many} ({many / rows:.1%})':>28}"
        thin = "-" if e["thin"] is None else f"{e['thin']:.1%}"
        lines.append(
            f"  {e['max_pixels']:>15,} {e['max_pixels'] / stats.factor**2:>13,.0f} {e['image_tokens']:>19,.0f} "
            f"{e['tokens']:>13,.0f}{dropped} {thin:>12}" + ("  <- this job" if e["own"] else "")
        )
    return lines


def _cut_lines(stats: Stats, rows: int) -> list[str]:
    lines = ["limits on tokens", f"  {'quantile':>15} {'data.max_tokens':>15} {'rows dropped':>16}"]
    for e in stats.cuts:
        dropped = f"{e['dropped']} ({e['dropped'] / rows:.1%})"
        lines.append(f"  {'p' + str(e['quantile']):>15} {e['max_tokens']:>15,} {dropped:>16}")
    return lines


def shorten(names: Sequence[str], longest: int = 32) -> list[str]:
    """Return class names that are printable and at most `longest` characters."""
    return [name if len(name) <= longest else f"{name[: longest - 1]}…" for name in map(plain, names)]
