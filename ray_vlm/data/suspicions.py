"""Find what looks wrong about readable rows: numbers in another unit, sizes that contradict the file, crowds, and
labels that spell one class in two ways.

What would teach the model something wrong is a reason against the row or the file, with the setting that allows it;
what may be intended is a note.
"""

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.data.records import BadRow, Record, SftRecord
from ray_vlm.data.sources.fields import column_setting

_SAME_PX = 2  # tools round sizes
_MANY = 5  # crowds of a class without an object; a small sample of COCO may have one or two
_FEW = 20  # fewer boxes show nothing about their unit
_SHOWN = 3
_LARGE_PX = 1100


def unit_problem(record: Record) -> str | None:
    """Return why the boxes or points of a row in pixels seem to be shares of the image, or None.

    They do if all lie in the image's first pixel.
    """
    regions = regions_of(record)
    if not regions or max(max(region) for region in regions) > 1.0 or min(min(region) for region in regions) < 0.0:
        return None
    if all(len(region) == 2 and float(v).is_integer() for region in regions for v in region):
        return None  # a point in the corner
    shown = [round(v, 4) for v in regions[0]]
    return f"{shown} lies within one pixel, so its numbers seem to be shares of the image; set box_units=relative_1"


def regions_of(record: Record) -> list[Sequence[float]]:
    """Return all boxes and points of a row, as its source has them."""
    if not isinstance(record, SftRecord):
        return []
    regions: list[Sequence[float]] = [*record.truth.get("boxes", ()), *record.context.get("boxes", ())]
    single = (record.truth.get("box"), record.truth.get("point"), record.context.get("box"))
    return [*regions, *(region for region in single if region is not None)]


def sizes_differ(listed: tuple[int, int], size: tuple[int, int]) -> bool:
    """Return whether the (width, height) that a file lists differs from the image's."""
    return any(abs(a - b) > _SAME_PX for a, b in zip(listed, size, strict=True))


def describe_sizes(listed: tuple[int, int], size: tuple[int, int]) -> str:
    """Return the reason against a row whose file lists another size than its image has."""
    turned = not sizes_differ((listed[1], listed[0]), size)
    why = "width and height are exchanged, as where a camera was held upright" if turned else "as of another resolution"
    return (
        f"the file lists {listed[0]}x{listed[1]} px, and the upright image has {size[0]}x{size[1]}: {why}. Set "
        "box_frame=listed if the boxes belong to the listed size, or box_frame=image if they fit the image"
    )


def crowd_problem(crowds: Counter[str], objects: Counter[str]) -> str | None:
    """Return why so many crowds cannot be intended, or None: most annotations are crowds, or all of a class.

    `crowds`, `objects`: how many there are by class.
    """
    mostly_crowds = crowds.total() > objects.total()
    most = [
        name
        for name, n in crowds.items()
        if n > objects[name] and (mostly_crowds or (n >= _MANY and not objects[name]))
    ]
    if not most:
        return None
    shown = ", ".join(f"{name} ({crowds[name]} of {crowds[name] + objects[name]})" for name in sorted(most)[:_SHOWN])
    return (
        f"most annotations of {shown}{' and others' if len(most) > _SHOWN else ''} are crowds (iscrowd: 1), as CVAT "
        "writes every mask; they would be left out, and the model would learn that nothing is there. Set "
        "crowds=objects to count them as objects, or crowds=skip to leave them out"
    )


@dataclass
class ShardSummary:
    """What is known of some consecutive rows of a source as a whole.

    `labels`: class names in order of appearance. `crowds`: crowd annotations left out, `crowd_images`: images that have
    them, `crowd_id`: id of the first. `records`, `with_images`: usable rows, and those with an image. `regions`,
    `large_regions`, `farthest`: boxes and points in pixels of usable rows, those in images of more than 1,100 pixels on
    both sides, and the largest coordinate. `cut`, `dropped`: boxes that `data.on_bad_box` has changed. `faults`: images
    of rows that cannot be used, with the file's size and time, or None where there is no file. `files`: of a source of
    several files, as `records.name_file` takes them.
    """

    labels: list[str] = field(default_factory=list)
    crowds: int = 0
    crowd_images: int = 0
    crowd_id: str = ""
    records: int = 0
    with_images: int = 0
    regions: int = 0
    large_regions: int = 0
    farthest: float = 0.0
    cut: int = 0
    dropped: int = 0
    faults: dict[str, list[int] | None] = field(default_factory=dict)
    files: list[tuple[str, int, int]] = field(default_factory=list)


def summarise(
    source: Source, rows: Iterable[tuple[Record | BadRow, Record | BadRow]], labels: Iterable[str] = ()
) -> ShardSummary:
    """Summarise rows, each as it was read and as it was checked. `labels`: the class names of the rows."""
    summary = ShardSummary(list(labels))
    for read, checked in rows:
        if isinstance(read, SftRecord) and (crowds := read.context.get("crowds")):
            summary.crowd_id = summary.crowd_id or read.id
            summary.crowd_images, summary.crowds = summary.crowd_images + 1, summary.crowds + crowds
        if isinstance(checked, BadRow):
            continue
        summary.records += 1
        summary.with_images += bool(checked.images)
        if isinstance(read, SftRecord) and isinstance(checked, SftRecord):
            old, new = _boxes_in_pixels(read, checked.sizes), checked.truth.get("boxes", ())
            summary.dropped += len(old) - len(new)
            summary.cut += len(set(new) - set(old)) if source.box_frame != "listed" and new != old else 0
        if checked.sizes and (regions := regions_of(checked)):
            summary.regions += len(regions)
            summary.large_regions += len(regions) if min(checked.sizes[0]) > _LARGE_PX else 0
            summary.farthest = max(summary.farthest, *(max(region) for region in regions))
    return summary


def _boxes_in_pixels(record: SftRecord, sizes: Sequence[tuple[int, int]]) -> Sequence[Sequence[float]]:
    """Return the boxes of a row as it was read, with shares of the image as pixels. `sizes`: of its images."""
    boxes, units = record.truth.get("boxes", ()), record.context.get("box_units")
    if units is None or not sizes:
        return boxes
    per_unit = 1.0 if units == "relative_1" else 1000.0
    return tuple(tuple(v / per_unit * sizes[0][axis % 2] for axis, v in enumerate(box)) for box in boxes)


def add_up(summaries: Iterable[ShardSummary]) -> ShardSummary:
    """Add up the summaries of consecutive rows, in their order."""
    total, labels = ShardSummary(), dict[str, None]()
    for summary in summaries:
        labels.update(dict.fromkeys(summary.labels))
        total.crowd_id = total.crowd_id or summary.crowd_id
        total.farthest = max(total.farthest, summary.farthest)
        total.faults |= summary.faults
        for name in ("crowds", "crowd_images", "records", "with_images", "regions", "large_regions", "cut", "dropped"):
            setattr(total, name, getattr(total, name) + getattr(summary, name))
    total.labels = list(labels)
    return total


def find_suspicions(
    source: Source, summary: ShardSummary, labels: Iterable[str], on_bad_box: str = "raise"
) -> list[str]:
    """Return notes on a whole source. `labels`: its class names; `on_bad_box`: the job's setting."""
    notes = [*_tell_spellings(labels), *_tell_crowds(summary), *_tell_unit(source, summary), *_tell_bare(summary)]
    return [f"{source.name}: {note}" for note in [*notes, *_tell_mended(summary, on_bad_box)]]


def tell_unused(labels: Iterable[str], used: Container[str]) -> list[str]:
    """Return a note on declared class names that no row has, among those `used`. The question names them all the
    same."""
    unused = [label for label in dict.fromkeys(labels) if "=" not in label and label not in used]
    if not unused or not used:
        return []
    more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
    return [
        f"no row has a box of {', '.join(map(repr, unused[:_SHOWN]))}{more}, but the question asks for it; task.labels "
        "sets the classes of the question"
    ]


def _tell_mended(summary: ShardSummary, on_bad_box: str) -> Iterable[str]:
    """Tell of the boxes that `data.on_bad_box` has clipped or dropped."""
    if on_bad_box == "raise":
        return
    counts = ((summary.cut, "cut to their image"), (summary.dropped, "left out"))
    if parts := [f"{count} boxes {what}" for count, what in counts if count]:
        yield f"{' and '.join(parts)} (data.on_bad_box={on_bad_box})"


def _tell_spellings(labels: Iterable[str]) -> Iterable[str]:
    alike: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        alike[" ".join(label.replace("_", " ").casefold().split())].append(label)
    for names in alike.values():
        if len(names) > 1:
            yield f"classes {', '.join(map(repr, names))} differ only in case, spaces or underscores; are they one?"


def _tell_crowds(summary: ShardSummary) -> Iterable[str]:
    if summary.crowds:
        yield (
            f"{summary.crowds} crowd annotations (iscrowd: 1) of {summary.crowd_images} images are left out, for "
            f"example of id {summary.crowd_id}; crowds=objects counts them as objects"
        )


def _tell_unit(source: Source, summary: ShardSummary) -> Iterable[str]:
    if source.box_units != "pixels" or summary.regions < _FEW or summary.large_regions < summary.regions / 2:
        return
    if summary.farthest <= 1000:
        yield (
            "no box reaches beyond 1000, though most images have more pixels on both sides; if the numbers are "
            "thousandths of the image, set box_units=relative_1000"
        )


def _tell_bare(summary: ShardSummary) -> Iterable[str]:
    if summary.records and not summary.with_images:
        yield f"no row has an image; a column with images is named as in {column_setting('image')}"


def strip_marks(context: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's context without the keys that only these checks need."""
    return {key: value for key, value in context.items() if key not in ("listed", "frame", "crowds")}
