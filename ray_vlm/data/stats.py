"""Measure the training rows for `ray-vlm data stats`, and what other limits on pixels and tokens would change.

`measure_rows` computes plain numbers from the index, without decoding an image; `stats_text.py` describes them and
`stats_plot.py` draws them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.balance import plan_balance
from ray_vlm.data.images import ImageSpec
from ray_vlm.data.index import Index
from ray_vlm.data.records import Record, SftRecord
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.splits import load_parts, row_tags
from ray_vlm.tasks.classification import centre_of, region_of

SMALL_PX, MEDIUM_PX = 32, 96  # COCO's limits of small, medium and large boxes: sides of squares
THIN_PX = 4.0  # the model hardly sees a box thinner than this after resizing
_BUDGETS = (256, 512, 768, 1024, 1280)  # visual tokens of one image
_QUANTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Stats:
    """The numbers. Sides and sizes are (width, height) in pixels.

    `parts`: usable rows and bad ones of train, eval and test. `classes`: tag, rows, share (of rows), objects, times
    (shown in an epoch) and weight, most rows first. `region_counts`: class -> region -> boxes and points. `images` and
    `resized_images`: `int64 [images, 2]`, the latter without padding. `boxes`, `resized_boxes`: `float64 [boxes, 2]`.
    `without_object`: detection images that have no box; None for other tasks. `tokens`: image, prompt, answer and all
    -> `int64 [rows]`. `limits`: what each `max_pixels` does. `cuts`: what `max_tokens` at each quantile drops.
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
    factor: int
    min_pixels: int
    max_pixels: int
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
    regions = [region for record in train.records for region in regions_of(record)]
    boxes = [(region, size) for _, region, size in regions if len(region) == 4]
    sides = np.array([[b[2] - b[0], b[3] - b[1]] for b, _ in boxes], np.float64).reshape(-1, 2)
    box_images = np.array([size for _, size in boxes], np.int64).reshape(-1, 2)
    images = np.array([size for record in train.records for size in record.sizes], np.int64).reshape(-1, 2)
    tokens = {"image": train.image_tokens, "prompt": train.prompt_tokens, "answer": train.answer_tokens}
    region_counts: dict[str, Counter[str]] = defaultdict(Counter)
    for tag, region, size in regions:
        region_counts[tag][region_of(*centre_of(region, size), job.task.regions)] += 1
    return Stats(
        parts={name: (len(getattr(parts, name)), len(getattr(parts, name).bad)) for name in wanted},
        notes=parts.notes,
        classes=_classes(job, train),
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
        factor=spec.factor,
        min_pixels=spec.min_pixels,
        max_pixels=spec.max_pixels,
        max_tokens=job.data.max_tokens,
    )


def regions_of(record: Record) -> Iterator[tuple[str, Sequence[float], tuple[int, int]]]:
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


def _count_without_object(index: Index) -> int:
    return sum(not record.truth["boxes"] for record in index.records)


def _classes(job: JobConfig, index: Index) -> tuple[dict[str, Any], ...]:
    tags = [row_tags(job, record) for record in index.records]
    sources = [s for s in (job.data.train, *job.data.mix) if s is not None]
    weights = np.array([sources[record.source].weight for record in index.records])
    objects = Counter(tag for row_classes in tags for tag in row_classes)
    return tuple(
        {
            "tag": entry["tag"],
            "rows": entry["rows"],
            "share": entry["share"],
            "objects": objects[entry["tag"]],
            "times": entry["times_shown"],
            "weight": entry["weight"],
        }
        for entry in plan_balance(tags, weights, job.data, job.task.name != "detection").table
    )


def _resized(sizes: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Return (width, height) of each image as the model sees it, without padding, `int64 [images, 2]`."""
    return _by_size(sizes, lambda size: spec.place(size).content, 2)


def _image_tokens(sizes: np.ndarray, spec: ImageSpec, builder: SampleBuilder) -> np.ndarray:
    return _by_size(sizes, lambda size: (builder.num_image_tokens(size, spec),), 1)[:, 0]


def _by_size(sizes: np.ndarray, measure: Any, columns: int) -> np.ndarray:
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
    sizes = np.array([size for record in index.records for size in record.sizes], np.int64).reshape(-1, 2)
    row_of = np.repeat(np.arange(len(index)), [len(record.sizes) for record in index.records])
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
    same = (np.abs(change) < stats.factor).all(axis=1)
    smaller = stats.resized_images.prod(axis=1) < stats.images.prod(axis=1)
    return {
        "shrunk": int((~same & smaller).sum()),
        "enlarged": int((~same & ~smaller).sum()),
        "kept": int(same.sum()),
        "unchanged": int((change == 0).all(axis=1).sum()),
    }
