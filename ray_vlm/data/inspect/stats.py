"""Measure the training rows for `ray-vlm data stats`, and what other limits on pixels and tokens would change.

`measure_rows` computes plain numbers from the index, without decoding an image; `describe_stats` writes them as text,
one paragraph for each question, and `draw_stats` draws them as one picture: classes, tokens, image sizes, box sizes.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_vlm.config.data import Data
from ray_vlm.config.schema import JobConfig
from ray_vlm.config.task import Task
from ray_vlm.data.balance import plan_balance
from ray_vlm.data.images import ImageSpec
from ray_vlm.data.index import Index
from ray_vlm.data.inspect.check import plain, shorten
from ray_vlm.data.parts import load_parts
from ray_vlm.data.records import Record, SftRecord
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.runs.plot import BLUE, GREY, INK, ORANGE, make_panels, picture_style, save
from ray_vlm.runs.text import format_table
from ray_vlm.tasks.classification import centre_of, region_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL_PX, MEDIUM_PX = 32, 96  # COCO's limits of small, medium and large boxes: sides of squares
THIN_PX = 4.0  # the model hardly sees a box thinner than this after resizing
_BUDGETS = (256, 512, 768, 1024, 1280)  # visual tokens of one image
_LISTED_CLASSES, _DRAWN_CLASSES = 60, 20
_QUANTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Stats:
    """The numbers. Sides and sizes are (width, height) in pixels.

    `parts`: usable rows and bad ones of train, eval and test. `classes`: the table of `Balance`, with the number of
    objects, most rows first. `region_counts`: class -> region -> boxes and points. `images` and `resized_images`:
    `int64 [images, 2]`, the latter without padding. `boxes`, `resized_boxes`: `float64 [boxes, 2]`. `without_object`:
    detection images that have no box; None for other tasks and for pairs. `tokens`: image, prompt, answer and all ->
    `int64 [rows]`. `limits`: what each `max_pixels` does. `cuts`: what `max_tokens` at each quantile drops.
    """

    parts: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...]
    classes: tuple[dict[str, Any], ...]
    regions: tuple[str, ...]
    region_counts: Mapping[str, Counter[str]]
    images: np.ndarray
    resized_images: np.ndarray
    boxes: np.ndarray
    resized_boxes: np.ndarray
    without_object: int | None
    tokens: Mapping[str, np.ndarray]
    limits: tuple[dict[str, Any], ...]
    cuts: tuple[dict[str, Any], ...]
    image_spec: ImageSpec
    max_tokens: int | None


def measure_rows(job: JobConfig) -> Stats:
    """Read the job's parts and measure the training rows. Raise `DataError` if no row is usable.

    Bad rows are left out and counted under any `data.on_bad_row`. Rows above `data.max_tokens` are included, so that
    the limit can be judged.
    """
    wanted = [name for name in ("train", "eval", "test") if getattr(job.data, name) is not None or name == "train"]
    unlimited = job.data.model_copy(update={"on_bad_row": "quarantine", "max_tokens": None})
    parts = load_parts(job.model_copy(update={"data": unlimited}), wanted)
    train = parts.train
    assert train is not None
    builder = load_sample_builder(parts.spec)
    spec = builder.image_spec
    regions = [region for record in train.with_regions() for region in labelled_regions(record)]
    boxes = [(region, size) for _, region, size in regions if len(region) == 4]
    sides = np.array([[b[2] - b[0], b[3] - b[1]] for b, _ in boxes], np.float64).reshape(-1, 2)
    box_images = np.array([size for _, size in boxes], np.int64).reshape(-1, 2)
    images, _ = train.image_sizes()
    tokens = {"image": train.image_tokens, "prompt": train.prompt_tokens, "answer": train.answer_tokens}
    region_counts: dict[str, Counter[str]] = defaultdict(Counter)
    for tag, region, size in regions:
        region_counts[tag][region_of(*centre_of(region, size), job.task.regions)] += 1
    return Stats(
        parts={name: (len(getattr(parts, name)), len(getattr(parts, name).bad)) for name in wanted},
        notes=parts.notes,
        classes=_classes(job.data, job.task, train),
        regions=tuple(dict.fromkeys(name for row in job.task.regions for name in row)),
        region_counts=region_counts,
        images=images,
        resized_images=_resized(images, spec),
        boxes=sides,
        resized_boxes=sides * _resized(box_images, spec) / np.maximum(box_images, 1),
        without_object=_count_without_object(train) if job.task.name == "detection" else None,
        tokens={**tokens, "all": train.tokens},
        limits=_limits(train, sides, box_images, builder, job.data.max_tokens),
        cuts=tuple(_cut(train.tokens, quantile) for quantile in _QUANTILES),
        image_spec=spec,
        max_tokens=job.data.max_tokens,
    )


def labelled_regions(record: Record) -> Iterator[tuple[str, Sequence[float], tuple[int, int]]]:
    """Yield each box (four numbers) and point (two) of a record in original pixels, with its class and image size."""
    if not isinstance(record, SftRecord):
        return  # regions of pairs and prompts are only in their texts
    truth, context = record.truth, record.context
    for box, label in zip(truth.get("boxes", ()), truth.get("labels", ()), strict=True):
        yield label, box, record.sizes[0]
    if "attributes" in truth and context.get("box") is not None:
        yield next(iter(f"{k}={v}" for k, v in truth["attributes"].items())), context["box"], record.sizes[0]
    for key in ("box", "point"):
        if truth.get(key) is not None:
            yield f"action={truth['output']['action']}", truth[key], record.sizes[0]
    numbers = context.get("image_of") or (0,) * len(context.get("boxes", ()))
    for box, image in zip(context.get("boxes", ()), numbers, strict=True):
        yield "in the text", box, record.sizes[image]


def _count_without_object(index: Index) -> int | None:
    """Return how many rows of detection have no box; None if they are pairs or prompts, whose boxes are only in their
    texts."""
    kinds, kind_of = index.kinds
    if not isinstance(index.records[0], SftRecord):
        return None
    return int(np.isin(kind_of, [number for number, kind in enumerate(kinds) if not kind]).sum())


def _classes(data: Data, task: Task, index: Index) -> tuple[dict[str, Any], ...]:
    kinds, kind_of = index.kinds
    sources = [s for s in (data.train, *data.mix) if s is not None]
    weights = np.array([source.weight for source in sources])[index.sources]
    objects = Counter[str]()
    for kind, count in zip(kinds, np.bincount(kind_of, minlength=len(kinds)).tolist(), strict=True):
        for tag in kind:
            objects[tag] += count
    return tuple(
        {**entry, "objects": objects[entry["tag"]]}
        for entry in plan_balance(kinds, kind_of, weights, data, task.name != "detection").table
    )


def _resized(sizes: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Return (width, height) of each image as the model sees it, without padding, `int64 [images, 2]`."""
    return _by_size(sizes, lambda size: spec.place(size).content, 2)


def _image_tokens(sizes: np.ndarray, spec: ImageSpec, builder: SampleBuilder) -> np.ndarray:
    return _by_size(sizes, lambda size: (builder.num_image_tokens(size, spec),), 1)[:, 0]


def _by_size(sizes: np.ndarray, measure: Callable[[tuple[int, int]], Sequence[int]], columns: int) -> np.ndarray:
    """Return `measure` of each size, computed once for equal sizes."""
    unique, inverse = np.unique(sizes, axis=0, return_inverse=True)
    values = np.array([measure((int(w), int(h))) for w, h in unique], np.int64).reshape(-1, columns)
    return values[inverse.reshape(-1)]


def _limits(
    index: Index, sides: np.ndarray, box_images: np.ndarray, builder: SampleBuilder, max_tokens: int | None
) -> tuple[dict[str, Any], ...]:
    """Return tokens and thin boxes for each `max_pixels`; texts are counted as they are now."""
    spec = builder.image_spec
    budgets = () if spec.stock else _BUDGETS  # with tiles, tokens do not follow from pixels
    sizes, row_of = index.image_sizes()
    out = []
    for limit in sorted({*(budget * spec.factor**2 for budget in budgets), spec.max_pixels}):
        other = replace(spec, max_pixels=limit, min_pixels=min(spec.min_pixels, limit))
        image = np.bincount(row_of, _image_tokens(sizes, other, builder), len(index))
        tokens = image + index.prompt_tokens + index.answer_tokens
        thin = (sides * _resized(box_images, other) / np.maximum(box_images, 1)).min(axis=1, initial=np.inf) < THIN_PX
        out.append(
            {
                "max_pixels": limit,
                "own": limit == spec.max_pixels,
                "image_tokens": float(image.mean()),
                "tokens": float(tokens.mean()),
                "above": None if max_tokens is None else int((tokens > max_tokens).sum()),
                "thin": float(thin.mean()) if len(thin) else None,
            }
        )
    return tuple(out)


def _cut(tokens: np.ndarray, quantile: int) -> dict[str, Any]:
    limit = int(np.percentile(tokens, quantile, method="inverted_cdf"))
    return {"quantile": quantile, "max_tokens": limit, "dropped": int((tokens > limit).sum())}


def box_classes(sides: np.ndarray) -> tuple[int, int, int]:
    """Return how many boxes are small, medium and large; `sides` is `float64 [boxes, 2]` in pixels."""
    areas = sides.prod(axis=1)
    small, large = int((areas < SMALL_PX**2).sum()), int((areas >= MEDIUM_PX**2).sum())
    return small, len(areas) - small - large, large


def size_changes(stats: Stats) -> dict[str, int]:
    """Return how many images are shrunk, enlarged, or keep their size except for rounding to whole patches."""
    change = stats.resized_images - stats.images
    same = (np.abs(change) < stats.image_spec.factor).all(axis=1)
    smaller = stats.resized_images.prod(axis=1) < stats.images.prod(axis=1)
    return {
        "shrunk": int((~same & smaller).sum()),
        "enlarged": int((~same & ~smaller).sum()),
        "kept": int(same.sum()),
        "unchanged": int((change == 0).all(axis=1).sum()),
    }


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
    rows = []
    for e in stats.classes:
        shown, weight = f"{e['times_shown']:.2f}x", f"{e['weight']:.2f}"
        rows.append([shorten(e["tag"]), str(e["rows"]), f"{e['share']:.1%}", str(e["objects"]), shown, weight])
    if len(rows) > _LISTED_CLASSES:
        half = _LISTED_CLASSES // 2
        rows = [*rows[:half], [f"... {len(rows) - _LISTED_CLASSES} more ...", *[""] * 5], *rows[-half:]]
    return [format_table([["class", "rows", "of rows", "objects", "shown", "weight"], *rows])]


def _region_lines(stats: Stats) -> list[str]:
    """Return a table of classes by regions; the words of a region's name stand below one another."""
    if not stats.region_counts:
        return []
    ranked = sorted(stats.region_counts.items(), key=lambda item: -item[1].total())[:_LISTED_CLASSES]
    heads = list(zip_longest(["class"], *(region.split()[::-1] for region in stats.regions), fillvalue=""))[::-1]
    rows = []
    for tag, counts in ranked:
        shares = [counts[region] / counts.total() for region in stats.regions]
        rows.append([shorten(tag), *(f"{share:.0%}" if share else "." for share in shares)])
    return ["share of each class's centres by region", format_table([*heads, *rows], heads=len(heads))]


def _box_lines(stats: Stats, rows: int) -> list[str]:
    count = len(stats.boxes)
    without = stats.without_object
    empty = [] if without is None else [f"  {without} images ({without / rows:.1%}) have no object"]
    if not count:
        return empty and [f"{count} boxes", *empty]
    thin = int((stats.resized_boxes.min(axis=1) < THIN_PX).sum())
    table = [[f"{count} boxes", "small (< 32²)", "medium (< 96²)", "large"]]
    for name, sides in (("original pixels", stats.boxes), ("resized pixels", stats.resized_boxes)):
        table.append([f"  {name}", *(f"{n} ({n / count:.1%})" for n in box_classes(sides))])
    narrow = f"  {thin} ({thin / count:.1%}) are thinner than {THIN_PX:.0f} pixels after resizing"
    return [format_table(table), narrow, *empty]


def _image_lines(stats: Stats) -> list[str]:
    if not len(stats.images):
        return []
    columns = {"width": stats.images[:, 0], "height": stats.images[:, 1]}
    columns["width / height"] = stats.images[:, 0] / stats.images[:, 1]
    rows = [[f"{len(stats.images)} images", "min", "median", "max"]]
    for name, values in columns.items():
        form = ".2f" if "/" in name else ".0f"
        rows.append([f"  {name}", *(format(v, form) for v in (values.min(), np.median(values), values.max()))])
    n, spec = size_changes(stats), stats.image_spec
    return [
        format_table(rows),
        f"  resizing (to {spec.min_pixels:,} .. {spec.max_pixels:,} pixels): {n['shrunk']} shrunk, "
        f"{n['enlarged']} enlarged, {n['kept']} keep their size, {n['unchanged']} of these to the pixel "
        f"(the others' sides are rounded to {spec.factor} pixels)",
    ]


def _token_lines(stats: Stats) -> list[str]:
    rows = [["tokens a row", "min", "median", "p95", "max", "mean"]]
    for name, values in stats.tokens.items():
        statistics = (values.min(), np.median(values), np.percentile(values, 95), values.max(), values.mean())
        rows.append([f"  {name}", *(f"{v:.0f}" for v in statistics)])
    return [format_table(rows)]


def _limit_lines(stats: Stats, rows: int) -> list[str]:
    above = [] if stats.max_tokens is None else [f"rows above max_tokens={stats.max_tokens}"]
    head = ["  data.max_pixels", "visual tokens", "image tokens a row", "tokens a row", *above]
    table = [[*head, f"boxes < {THIN_PX:.0f} px", ""]]
    for e in stats.limits:
        many, visual_tokens = e["above"], e["max_pixels"] / stats.image_spec.factor**2
        numbers = [f"{n:,.0f}" for n in (e["max_pixels"], visual_tokens, e["image_tokens"], e["tokens"])]
        dropped = [] if many is None else [f"{many} ({many / rows:.1%})"]
        thin = "-" if e["thin"] is None else f"{e['thin']:.1%}"
        table.append([*numbers, *dropped, thin, "<- this job" if e["own"] else ""])
    return ["other limits on image sizes", format_table(table, left=())]


def _cut_lines(stats: Stats, rows: int) -> list[str]:
    table = [["  quantile", "data.max_tokens", "rows dropped"]]
    for e in stats.cuts:
        table.append([f"p{e['quantile']}", f"{e['max_tokens']:,}", f"{e['dropped']} ({e['dropped'] / rows:.1%})"])
    return ["limits on tokens", format_table(table, left=())]


def draw_stats(stats: Stats, title: str) -> bytes:
    """Return the picture as PNG, 13 inches wide at 110 dots an inch. Needs no display."""
    panels = [_draw_tokens]
    if stats.classes:
        panels.insert(0, _draw_classes)
    if len(stats.images):
        panels.append(_draw_images)
    if len(stats.boxes):
        panels.append(_draw_boxes)
    columns = 2 if len(panels) in (2, 4) else len(panels)
    with picture_style():
        figure, axes = make_panels(len(panels), columns, (13 / columns, 4.4))
        figure.suptitle(shorten(title, 110), x=0.012, ha="left", fontsize=14, color=INK)
        for panel, each in zip(panels, axes, strict=True):
            panel(each, stats)
        return save(figure, "png")


def _draw_classes(axes: "Axes", stats: Stats) -> None:
    shown = stats.classes
    if len(shown) > _DRAWN_CLASSES:  # the rarest matter most
        shown = (*shown[: _DRAWN_CLASSES // 2], *shown[-_DRAWN_CLASSES // 2 :])
    hidden = len(stats.classes) - len(shown)
    names = [shorten(entry["tag"], 28) for entry in shown]
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


def _draw_tokens(axes: "Axes", stats: Stats) -> None:
    values = stats.tokens["all"]
    low, high = int(values.min()), int(values.max())
    axes.hist(values, bins=np.linspace(low - 0.5, high + 0.5, min(40, high - low + 1) + 1).tolist(), color=BLUE)
    lines = [("median", float(np.median(values)), INK, "-"), ("p95", float(np.percentile(values, 95)), INK, "--")]
    if stats.max_tokens is not None:
        lines.append(("data.max_tokens", float(stats.max_tokens), ORANGE, "-"))
    for name, at, color, style in lines:
        axes.axvline(at, color=color, linestyle=style, linewidth=1.4, label=f"{name} {at:,.0f}")
    axes.set_xlabel("tokens of a row, images counted")
    axes.set_ylabel("rows")
    axes.locator_params(axis="y", integer=True)
    axes.margins(y=0.12)
    _legend_above(axes, len(lines))
    axes.set_title("Row lengths", pad=26)


def _draw_images(axes: "Axes", stats: Stats) -> None:
    sizes, counts = np.unique(stats.images, axis=0, return_counts=True)
    area = 30 + 220 * counts / counts.max() if len(sizes) <= 200 else np.full(len(sizes), 14.0)
    axes.scatter(sizes[:, 0], sizes[:, 1], s=area, color=BLUE, alpha=0.55, linewidths=0)
    wide, tall = 1.15 * sizes[:, 0].max(), 1.15 * sizes[:, 1].max()
    across = np.linspace(1, wide, 400)
    spec = stats.image_spec
    for limit, name, style in ((spec.min_pixels, "min_pixels", ":"), (spec.max_pixels, "max_pixels", "--")):
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


def _draw_boxes(axes: "Axes", stats: Stats) -> None:
    original, resized = (np.sqrt(sides.prod(axis=1)) for sides in (stats.boxes, stats.resized_boxes))
    both = np.maximum(np.concatenate([original, resized]), 1.0)
    far_apart = both.max() > 8 * both.min()
    bins = (np.geomspace if far_apart else np.linspace)(both.min() * 0.95, both.max() * 1.05, 32).tolist()
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
    axes.locator_params(axis="y", integer=True)
    _legend_above(axes, 2)
    thin = (stats.resized_boxes.min(axis=1) < THIN_PX).mean()
    axes.set_title(f"Boxes: {thin:.1%} thinner than {THIN_PX:.0f} px", pad=26)


def _legend_above(axes: "Axes", columns: int) -> None:
    """Draw the legend between the title and the panel, where it covers nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.01, 0.985),
            ncols=columns,
            columnspacing=1.2,
            borderaxespad=0.2,
            handlelength=1.6,
            fontsize=9,
        )
