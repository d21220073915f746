"""Write classification and GUI steps: tables with a row for each image or step, and folders that are classes.

Each function returns the path of the rows.
"""

import csv
import json
from collections.abc import Iterable
from typing import TextIO

from ray_vlm.data.records import Record, SftRecord
from ray_vlm.data.sources.output import Output, as_json, class_name, group_of, label_of, plain_number, safe_name

_CORNERS = ("x1", "y1", "x2", "y2")
GUI_COLUMNS = ("id", "Task_id", "Image_id", "Instruction", "Output", "Grounding")


def _open_csv(file: TextIO, names: Iterable[str]) -> csv.DictWriter:
    writer = csv.DictWriter(file, list(names), restval="", extrasaction="ignore")
    writer.writeheader()
    return writer


def write_image_csv(records: Iterable[Record], out: Output) -> str:
    """Write `rows.csv` with a column for each attribute, and four for a box where rows have one."""
    names = ("id", "group", "image", *out.profile.attributes, *_CORNERS)
    with out.open("rows.csv") as file:
        writer = _open_csv(file, names)
        for record in records:
            assert isinstance(record, SftRecord)
            cells = {"id": record.id, "group": group_of(record), "image": out.images.add(record)}
            cells |= record.truth["attributes"]
            if (box := record.context.get("box")) is not None:
                cells |= {name: repr(plain_number(v)) for name, v in zip(_CORNERS, box, strict=True)}
            writer.writerow(cells)
    return "rows.csv"


def write_image_folder(records: Iterable[Record], out: Output) -> str:
    """Write torchvision's and the hub's folders of images (docs.pytorch.org/vision, `ImageFolder`): a folder for each
    class. Images are named by the ids of their rows."""
    for record in records:
        out.images.add(record, folder=f"{out.split}/{safe_name(label_of(record))}", name=class_name(record))
    return out.split


def write_gui_csv(records: Iterable[Record], out: Output) -> str:
    """Write `rows.csv` of steps: `Output` and `Grounding` are JSON, the latter empty where nothing is pointed at."""
    with out.open("rows.csv") as file:
        writer = _open_csv(file, GUI_COLUMNS)
        for record in records:
            assert isinstance(record, SftRecord)
            truth, context = record.truth, record.context
            regions = {"bbox": truth["box"], "point": truth["point"]}
            pointed = {name: list(map(plain_number, v)) for name, v in regions.items() if v is not None}
            own_id = record.id != f"{context['task']}/{context['step']}"
            writer.writerow(
                {
                    "id": record.id if own_id else "",
                    "Task_id": context["task"],
                    "Image_id": out.images.add(record),
                    "Instruction": context["instruction"],
                    "Output": json.dumps(truth["output"], ensure_ascii=False, separators=(",", ":"), allow_nan=False),
                    "Grounding": as_json(pointed) if pointed else "",
                }
            )
    return "rows.csv"
