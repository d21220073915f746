"""Write detection in the formats of annotation tools: one function each, which returns the path of the rows.

Records have sizes, and boxes in pixels of the upright image; every number keeps all its digits. Rows are written one
after another, so a data set may be larger than memory.
"""

import shutil
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import escape, quoteattr

from ray_vlm.data.records import Box, Record, SftRecord
from ray_vlm.data.sources.output import (
    Output,
    as_json,
    as_xml,
    group_of,
    id_and_group,
    is_larger,
    lone_group,
    own_name,
    plain_number,
    stem_of,
    yolo_name,
)


def _objects(record: Record) -> list[tuple[Box, str]]:
    assert isinstance(record, SftRecord)
    return list(zip(record.truth["boxes"], record.truth["labels"], strict=True))


def _rectangle(box: Box) -> list[float | int]:
    """Return [x, y, width, height]."""
    x1, y1, x2, y2 = box
    return [plain_number(v) for v in (x1, y1, x2 - x1, y2 - y1)]


def write_coco(records: Iterable[Record], out: Output) -> str:
    """Write COCO detection JSON (cocodataset.org/#format-data): `annotations.json` and `images/`.

    Ids of images are numbers if all of them are, as pycocotools expects; else all are texts. If a row belongs to a
    group, every image has a `group`.
    """
    codes = {label: code for code, label in enumerate(out.profile.labels, 1)}
    spare = out.folder / ".annotations"
    with out.open("annotations.json") as file, open(spare, "w+", encoding="utf-8", newline="") as annotations:
        file.write('{"images": [')
        count = 0
        for number, record in enumerate(records):
            width, height = record.sizes[0]
            image_id = int(record.id) if out.profile.numeric_ids else record.id
            entry = {"id": image_id, "file_name": out.images.add(record), "width": width, "height": height}
            if out.profile.grouped:
                entry["group"] = group_of(record) or lone_group(record)
            file.write(f"{',' if number else ''}\n{as_json(entry)}")
            for box, label in _objects(record):
                x, y, w, h = _rectangle(box)
                about: dict[str, Any] = {
                    "id": count + 1,
                    "image_id": image_id,
                    "category_id": codes[label],
                    "bbox": [x, y, w, h],
                }
                about |= {"area": plain_number(w * h), "iscrowd": 0}
                annotations.write(f"{',' if count else ''}\n{as_json(about)}")
                count += 1
        file.write('\n],\n"annotations": [')
        annotations.seek(0)
        shutil.copyfileobj(annotations, file)
        categories = [{"id": code, "name": label} for label, code in codes.items()]
        file.write(f'\n],\n"categories": {as_json(categories)}\n}}\n')
    spare.unlink()
    return "annotations.json"


def write_yolo(records: Iterable[Record], out: Output) -> str:
    """Write YOLO's text files (docs.ultralytics.com/datasets/detect): `class x y width height`, the centre and the
    size as shares of the image, in `labels/`, the images beside them in `images/`, and `data.yaml`."""
    import yaml

    split = out.split
    codes = {label: code for code, label in enumerate(out.profile.labels)}
    # Without `path`, trainers take the folder of this file; a relative one they look for elsewhere.
    about = {split: f"images/{split}", "nc": len(codes), "names": {code: label for label, code in codes.items()}}
    with out.open("data.yaml") as file:
        yaml.safe_dump(about, file, sort_keys=False, allow_unicode=True, width=2**20)
    for record in records:
        name = out.images.add(record, folder=f"images/{split}", name=yolo_name(record))
        width, height = record.sizes[0]
        with out.open(f"labels/{split}/{stem_of(name, f'images/{split}')}.txt") as file:
            for box, label in _objects(record):
                x1, y1, x2, y2 = _inside(box, width, height) if is_larger(box, (width, height)) else box
                numbers = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
                file.write(f"{codes[label]} {' '.join(map(_decimal, numbers))}\n")
    return "data.yaml"


def _inside(box: Box, width: int, height: int) -> Box:
    x1, y1, x2, y2 = box
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))


def _decimal(value: float) -> str:
    """Return a number with all its digits and without an exponent."""
    text = repr(float(value))
    return f"{value:.24f}".rstrip("0") if "e" in text else text


def write_voc(records: Iterable[Record], out: Output) -> str:
    """Write Pascal VOC (host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc_07-Jun-2012.pdf): `Annotations/*.xml`,
    `JPEGImages/` and `ImageSets/Main/<split>.txt`. Corners count from 0, as LabelImg writes them."""
    with out.open(f"ImageSets/Main/{out.split}.txt") as listing:
        for record in records:
            name = out.images.add(record, folder="JPEGImages", name=own_name(record))
            stem = stem_of(name, "JPEGImages")
            listing.write(f"{stem}\n")
            with out.open(f"Annotations/{stem}.xml") as file:
                file.write("".join(_voc_lines(record, name.removeprefix("JPEGImages/"))))
    return ""


def _voc_lines(record: Record, file_name: str) -> Iterator[str]:
    width, height = record.sizes[0]
    yield f"<annotation>\n\t<folder>JPEGImages</folder>\n\t<filename>{escape(file_name)}</filename>\n"
    yield f"\t<size>\n\t\t<width>{width}</width>\n\t\t<height>{height}</height>\n\t\t<depth>3</depth>\n\t</size>\n"
    yield "\t<segmented>0</segmented>\n"
    for box, label in _objects(record):
        x1, y1, x2, y2 = map(plain_number, box)
        yield f"\t<object>\n\t\t<name>{escape(as_xml(label))}</name>\n\t\t<pose>Unspecified</pose>\n"
        yield "\t\t<truncated>0</truncated>\n\t\t<difficult>0</difficult>\n\t\t<bndbox>\n"
        yield f"\t\t\t<xmin>{x1}</xmin>\n\t\t\t<ymin>{y1}</ymin>\n\t\t\t<xmax>{x2}</xmax>\n\t\t\t<ymax>{y2}</ymax>\n"
        yield "\t\t</bndbox>\n\t</object>\n"
    yield "</annotation>\n"


def write_labelme(records: Iterable[Record], out: Output) -> str:
    """Write labelme's JSON (github.com/wkentaro/labelme): a file beside each image, with rectangles of two points."""
    for record in records:
        name = out.images.add(record, folder="images", name=own_name(record))
        width, height = record.sizes[0]
        shapes: list[dict[str, Any]] = [
            {
                "label": label,
                "points": [[float(x1), float(y1)], [float(x2), float(y2)]],
                "group_id": None,
                "description": "",
                "shape_type": "rectangle",
                "flags": {},
                "mask": None,
            }
            for (x1, y1, x2, y2), label in _objects(record)
        ]
        about: dict[str, Any] = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": name.rpartition("/")[2],
        }
        about |= {"imageData": None, "imageHeight": height, "imageWidth": width}
        with out.open(f"images/{stem_of(name, 'images')}.json") as file:
            file.write(as_json(about))
    return "images"


def write_cvat(records: Iterable[Record], out: Output) -> str:
    """Write CVAT for images 1.1 (docs.cvat.ai/docs/manual/advanced/xml_format): `annotations.xml` and `images/`."""
    with out.open("annotations.xml") as file:
        file.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n')
        file.write("  <meta>\n    <task>\n      <labels>\n")
        for label in out.profile.labels:
            file.write(
                f"        <label><name>{escape(as_xml(label))}</name><type>rectangle</type><attributes/></label>\n"
            )
        file.write("      </labels>\n    </task>\n  </meta>\n")
        for number, record in enumerate(records):
            name = out.images.add(record, name=own_name(record)).removeprefix("images/")
            width, height = record.sizes[0]
            file.write(f'  <image id="{number}" name={quoteattr(name)} width="{width}" height="{height}">\n')
            for box, label in _objects(record):
                corners = (
                    f'{side}="{plain_number(v)}"' for side, v in zip(("xtl", "ytl", "xbr", "ybr"), box, strict=True)
                )
                file.write(
                    f'    <box label={quoteattr(as_xml(label))} source="manual" occluded="0" {" ".join(corners)} '
                )
                file.write('z_order="0"></box>\n')
            file.write("  </image>\n")
        file.write("</annotations>\n")
    return "annotations.xml"


def write_label_studio(records: Iterable[Record], out: Output) -> str:
    """Write Label Studio's JSON export (labelstud.io/guide/export): `tasks.json` with boxes in percent, and `images/`.

    Images have the address of local storage, whose root is to be the folder of the data set.
    """
    with out.open("tasks.json") as file:
        file.write("[")
        for number, record in enumerate(records):
            name = out.images.add(record, name=own_name(record))
            width, height = record.sizes[0]
            result = [
                {
                    "id": f"{number + 1}-{position + 1}",
                    "type": "rectanglelabels",
                    "from_name": "label",
                    "to_name": "image",
                    "original_width": width,
                    "original_height": height,
                    "image_rotation": 0,
                    "value": {
                        "x": x1 / width * 100,
                        "y": y1 / height * 100,
                        "width": (x2 - x1) / width * 100,
                        "height": (y2 - y1) / height * 100,
                        "rotation": 0,
                        "rectanglelabels": [label],
                    },
                }
                for position, ((x1, y1, x2, y2), label) in enumerate(_objects(record))
            ]
            data = {"image": f"/data/local-files/?d={quote(name)}"}
            data |= {"group": group} if (group := group_of(record)) else {}
            task = {"id": number + 1, "data": data, "annotations": [{"id": number + 1, "result": result}]}
            file.write(f"{',' if number else ''}\n{as_json(task)}")
        file.write("\n]\n")
    return "tasks.json"


def write_hf_objects(records: Iterable[Record], out: Output) -> str:
    """Write rows as the hub's data sets of objects have them (huggingface.co/docs/datasets/image_dataset, "Object
    detection"): `metadata.jsonl` with `objects`, whose `bbox` is [x, y, width, height], beside the images.

    `datasets` loads the folder as an `imagefolder`.
    """
    with out.open("metadata.jsonl") as file:
        for record in records:
            objects = _objects(record)
            width, height = record.sizes[0]
            cells: dict[str, Any] = {"file_name": out.images.add(record), "width": width, "height": height}
            cells |= id_and_group(record)
            boxes = [list(map(float, _rectangle(box))) for box, _ in objects]  # of one type, for columns of Arrow
            cells["objects"] = {"bbox": boxes, "category": [label for _, label in objects]}
            file.write(f"{as_json(cells)}\n")
    return "metadata.jsonl"


def write_objects(records: Iterable[Record], out: Output) -> str:
    """Write ms-swift's grounding rows (swift.readthedocs.io, "Custom Dataset"): `rows.jsonl` with `objects`, whose
    `bbox` is [x1, y1, x2, y2] in pixels."""
    with out.open("rows.jsonl") as file:
        for record in records:
            labels = [label for _, label in _objects(record)]
            boxes = [list(map(float, box)) for box, _ in _objects(record)]
            objects = {"ref": labels, "bbox": boxes, "bbox_type": "real"}
            cells = {**id_and_group(record), "images": [out.images.add(record)], "objects": objects}
            file.write(f"{as_json(cells)}\n")
    return "rows.jsonl"
