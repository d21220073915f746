"""Find what looks wrong about readable rows: numbers in another unit, sizes that contradict the file, crowds, and
labels that spell one class in two ways.

What would teach the model something wrong is a reason against the row or the file, with the setting that allows it;
what may be intended is a note.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.data.records import BadRow, Record, SftRecord
from ray_vlm.data.sources.fields import column_setting

_SAME_PX = 2  # tools round sizes
_MANY = 5  # crowds of a class without an object; a small sample of COCO may have one or two
_FEW = 20  # fewer boxes show nothing about their unit
_SHOWN = 3


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


def find_suspicions(
    source: Source,
    rows: Sequence[Record | BadRow],
    records: Sequence[Record],
    labels: Iterable[str],
    on_bad_box: str = "raise",
) -> list[str]:
    """Return notes on a whole source.

    `rows`: as they were read. `records`: those that can be used, with the sizes of their images. `on_bad_box`: the
    job's setting.
    """
    notes = [*_tell_spellings(labels), *_tell_crowds(rows), *_tell_unit(source, records), *_tell_bare(records)]
    return [*(f"{source.path}: {note}" for note in notes), *tell_mended(rows, records, source, on_bad_box)]


def tell_mended(
    rows: Sequence[Record | BadRow], records: Sequence[Record], source: Source, on_bad_box: str
) -> list[str]:
    """Return a note on the boxes that `data.on_bad_box` has clipped or dropped. `rows`: as they were read."""
    if on_bad_box == "raise":
        return []
    before = {row.row: row for row in rows if isinstance(row, SftRecord)}
    pairs = [
        (before[r.row].truth.get("boxes", ()), r.truth.get("boxes", ())) for r in records if isinstance(r, SftRecord)
    ]
    dropped = sum(len(old) - len(new) for old, new in pairs)
    same_unit = source.box_units == "pixels" and source.box_frame != "listed"
    cut = sum(len(set(new) - set(old)) for old, new in pairs) if same_unit else 0
    parts = [f"{count} boxes {what}" for count, what in ((cut, "cut to their image"), (dropped, "left out")) if count]
    return [f"{source.path}: {' and '.join(parts)} (data.on_bad_box={on_bad_box})"] if parts else []


def tell_unused(labels: Iterable[str], rows: Iterable[Record | BadRow]) -> list[str]:
    """Return a note on declared class names that no row has. The question names them all the same."""
    used = {label for row in rows if isinstance(row, SftRecord) for label in row.truth.get("labels", ())}
    unused = [label for label in dict.fromkeys(labels) if "=" not in label and label not in used]
    if not unused or not used:
        return []
    more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
    return [
        f"no row has a box of {', '.join(map(repr, unused[:_SHOWN]))}{more}, but the question asks for it; task.labels "
        "sets the classes of the question"
    ]


def _tell_spellings(labels: Iterable[str]) -> Iterable[str]:
    alike: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        alike[" ".join(label.replace("_", " ").casefold().split())].append(label)
    for names in alike.values():
        if len(names) > 1:
            yield f"classes {', '.join(map(repr, names))} differ only in case, spaces or underscores; are they one?"


def _tell_crowds(rows: Sequence[Record | BadRow]) -> Iterable[str]:
    with_crowds = [row for row in rows if isinstance(row, SftRecord) and row.context.get("crowds")]
    if count := sum(record.context["crowds"] for record in with_crowds):
        yield (
            f"{count} crowd annotations (iscrowd: 1) of {len(with_crowds)} images are left out, for example of id "
            f"{with_crowds[0].id}; crowds=objects counts them as objects"
        )


def _tell_unit(source: Source, records: Sequence[Record]) -> Iterable[str]:
    if source.box_units != "pixels":
        return
    regions = [(region, record.sizes[0]) for record in records if record.sizes for region in regions_of(record)]
    large = sum(min(size) > 1100 for _, size in regions)
    if len(regions) < _FEW or large < len(regions) / 2:
        return
    if max(max(region) for region, _ in regions) <= 1000:
        yield (
            "no box reaches beyond 1000, though most images have more pixels on both sides; if the numbers are "
            "thousandths of the image, set box_units=relative_1000"
        )


def _tell_bare(records: Sequence[Record]) -> Iterable[str]:
    if records and not any(record.images for record in records):
        yield f"no row has an image; a column with images is named as in {column_setting('image')}"


def strip_marks(context: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's context without the keys that only these checks need."""
    return {key: value for key, value in context.items() if key not in ("listed", "frame", "crowds")}
