"""`format: auto`: what files look like, and what is refused because it looks like nothing or like two things."""

import csv
import json
import logging
import random
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_vlm.config.data import Source
from ray_vlm.config.resume import check_resume, keep_formats
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.sources.detect import detect_format, settle_formats
from ray_vlm.data.sources.formats import read_rows
from ray_vlm.errors import ConfigError, DataError

Row = dict[str, Any]


def _turns(
    *texts: str, first: str = "role", second: str = "content", names: tuple[str, str] = ("user", "assistant")
) -> list:
    return [{first: names[i % 2], second: text} for i, text in enumerate(texts)]


def _llava(*texts: str) -> list:
    return _turns(*texts, first="from", second="value", names=("human", "gpt"))


def _parts(number: int) -> list[Row]:
    image = {"type": "image_url", "image_url": {"url": f"{number}.jpg"}, "text": None}
    return [image, {"type": "text", "text": "What is it?", "image_url": None}]


def _gui(i: int) -> Row:
    names = {"Task_id": "1", "Image_id": f"{i}.png", "Instruction": "Go."}
    return names | {"Output": '{"action": "tap"}', "Grounding": "[1, 2]" if i else ""}


# Rows by the format that they are of; each function gives the row of a number.
ROWS: dict[str, tuple[str, Callable[[int], Row]]] = {
    "llava": (
        "llava",
        lambda i: {"id": str(i), "image": f"{i}.jpg", "conversations": _llava("<image>What?", f"A dog {i}.")},
    ),
    "llava-text": ("llava", lambda i: {"conversations": _llava("Hi.", "Hello.", "And?", "Fine.")}),
    "llava-two-boxes": (
        "llava",
        lambda i: {"image": "a.jpg", "conversations": _llava("<image>Where?", "[1, 2, 3, 4]", "And?", "[5, 6, 7, 8]")},
    ),
    "messages": ("messages", lambda i: {"messages": _turns("<image>What?", "A dog."), "images": [f"{i}.jpg"]}),
    "messages-grounding": (
        "messages",
        lambda i: {
            "messages": _turns("<image>Where is <ref-object>?", "At <bbox>."),
            "images": ["a.jpg"],
            "objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]},
        },
    ),
    "openai": (
        "openai",
        lambda i: {
            "messages": [
                {"role": "user", "content": _parts(i)},
                {"role": "assistant", "content": [{"type": "text", "text": "A dog.", "image_url": None}]},
            ]
        },
    ),
    "query_response": ("query_response", lambda i: {"query": "What?", "response": "A dog.", "images": [f"{i}.jpg"]}),
    "query_response-history": (
        "query_response",
        lambda i: {"query": "What?", "response": "A dog.", "history": [["a", "b"]], "system": "s"},
    ),
    "alpaca": ("alpaca", lambda i: {"instruction": "What?", "input": "", "output": f"A dog {i}.", "images": ["a.jpg"]}),
    "alpaca-short": ("alpaca", lambda i: {"instruction": "Say it.", "output": "It."}),
    "preference-trl": (
        "preference",
        lambda i: {"prompt": "What?", "chosen": "A dog.", "rejected": "A cat.", "images": [f"{i}.jpg"]},
    ),
    "preference-turns": (
        "preference",
        lambda i: {"prompt": _turns("What?"), "chosen": _turns("", "A dog.")[1:], "rejected": _turns("", "No.")[1:]},
    ),
    "preference-factory": (
        "preference",
        lambda i: {
            "conversations": _llava("<image>What?"),
            "chosen": {"from": "gpt", "value": "A dog."},
            "rejected": {"from": "gpt", "value": "A cat."},
            "images": ["a.jpg"],
        },
    ),
    "preference-swift": (
        "preference",
        lambda i: {"messages": _turns("<image>What?", "A dog."), "rejected_response": "A cat.", "images": ["a.jpg"]},
    ),
    "prompt": ("prompt", lambda i: {"prompt": "How many?", "images": [f"{i}.jpg"], "answer": str(i)}),
    "prompt-easyr1": ("prompt", lambda i: {"problem": "<image>How many?", "images": ["a.jpg"], "answer": "seven"}),
    "prompt-solution": ("prompt", lambda i: {"problem": "How many?", "image": "a.jpg", "solution": "seven dogs"}),
    "prompt-turns": ("prompt", lambda i: {"prompt": _turns("How many?"), "image": "a.jpg", "ground_truth": "3"}),
    "rec": (
        "rec",
        lambda i: {"image": f"{i}.jpg", "problem": "Where?", "solution": [1.5, 2.0, 3.0, 4.0], "normal_caption": "dog"},
    ),
    "rec-text": ("rec", lambda i: {"image": "a.jpg", "problem": "Where?", "solution": "<answer>[1, 2, 3, 4]</answer>"}),
    "rec-conversations": (
        "rec",
        lambda i: {"image": "a.jpg", "conversations": _llava("<image>Where?", "[1, 2, 3, 4]"), "normal_caption": "dog"},
    ),
    "rec-unanswered": ("rec", lambda i: {"image": "a.jpg", "messages": _turns("Where?"), "solution": "[1, 2, 3, 4]"}),
    "gui_csv": ("gui_csv", _gui),
    "objects": ("objects", lambda i: {"images": [f"{i}.jpg"], "objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}}),
    "hf_objects": (
        "hf_objects",
        lambda i: {
            "image": f"{i}.jpg",
            "width": 9,
            "height": 9,
            "objects": {"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": [0]},
        },
    ),
    "hf_objects-structs": (
        "hf_objects",
        lambda i: {"image": f"{i}.jpg", "objects": [{"bbox": [1.0, 2.0, 3.0, 4.0], "category_id": 1, "id": i}]},
    ),
    "image_csv": ("image_csv", lambda i: {"image": f"{i}.jpg", "label": ["dog", "cat"][i % 2]}),
    "image_csv-number": ("image_csv", lambda i: {"id": i, "image": f"{i}.jpg", "label": i % 3}),
    "image_csv-boxes": (
        "image_csv",
        lambda i: {
            "image": f"{i}.jpg",
            "x1": 1,
            "y1": 2,
            "x2": 3,
            "y2": 4,
            "drain": "toe",
            "state": ["open", "shut"][i % 2],
        },
    ),
    "image_csv-metadata": ("image_csv", lambda i: {"file_name": f"{i}.jpg", "label": "dog"}),
    "label_studio": (
        "label_studio",
        lambda i: {
            "id": i,
            "data": {"image": f"/data/upload/{i}.jpg"},
            "annotations": [{"id": 1, "result": [{"type": "rectanglelabels", "value": {"x": 1.0}}]}],
        },
    ),
    "label_studio-min": (
        "label_studio",
        lambda i: {
            "image": f"/data/upload/{i}.jpg",
            "id": i,
            "label": [{"x": 1.0, "y": 2.0, "width": 3.0, "height": 4.0, "rectanglelabels": ["dog"]}],
            "annotator": 1,
            "annotation_id": i,
            "created_at": "2026-01-02T03:04:05Z",
            "lead_time": 3.2,
        },
    ),
}
CONTAINERS = ["rows.jsonl", "rows.json", "data.json", "rows.csv", "rows.tsv", "rows.parquet", "rows.arrow"]


def _write(path: Path, rows: list[Row]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows if path.name != "data.json" else {"version": 1, "data": rows}))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(
                {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in r.items()} for r in rows
            )
    else:
        import pyarrow
        from pyarrow import feather, parquet

        table = pyarrow.Table.from_pylist(rows)
        (parquet.write_table if path.suffix == ".parquet" else feather.write_feather)(table, str(path))
    return str(path)


def _detect(path: str | Path, **options: Any) -> str:
    return detect_format(Source(path=str(path), format="auto", **options)).format


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("kind", ROWS)
def test_rows_in_every_container(tmp_path: Path, kind: str, name: str) -> None:
    format, make = ROWS[kind]
    path = _write(tmp_path / name, [make(i) for i in range(6)])
    detected = detect_format(Source(path=path, format="auto"))
    assert detected.format == format, detected.reason
    assert len(detected.reason) > 10


def test_a_single_row_is_enough_where_columns_say_it(tmp_path: Path) -> None:
    for kind, (format, make) in ROWS.items():
        if kind != "image_csv-boxes":  # classes under names of one's own are known by being repeated
            assert _detect(_write(tmp_path / "rows.jsonl", [make(0)])) == format, kind


COCO = {
    "info": {"year": 2026},
    "images": [{"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in range(300)],
    "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 2, 3, 4]} for i in range(300)],
    "categories": [{"id": 1, "name": "dog"}],
}
LABELME = {
    "version": "5.4.1",
    "flags": {},
    "shapes": [{"label": "dog", "points": [[1, 2], [3, 4]], "shape_type": "rectangle"}],
    "imagePath": "a.jpg",
    "imageData": "AAAA",
    "imageHeight": 9,
    "imageWidth": 9,
}
VOC = (
    "<annotation><filename>a.jpg</filename><size><width>9</width><height>9</height></size><object><name>dog</name>"
    "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object></annotation>"
)
CVAT = (
    '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version><meta><task/></meta>'
    '<image id="0" name="a.jpg" width="9" height="9"><box label="dog" xtl="1" ytl="2" xbr="3" ybr="4"/>'
    "</image></annotations>"
)


def _files(root: Path, **contents: str) -> str:
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return str(root)


def _dump(value: Any) -> str:
    return json.dumps(value)


YOLO_FILES = {
    "images/train/a.jpg": "",
    "images/val/b.jpg": "",
    "labels/train/a.txt": "0 0.5 0.5 0.1 0.1\n",
    "labels/val/b.txt": "",
}
DATA_YAML = "path: .\ntrain: images/train\nval: images/val\nnames: {0: dog}\n"
FOLDERS: dict[str, tuple[str, dict[str, str]]] = {
    "yolo-both": ("yolo", YOLO_FILES | {"data.yaml": DATA_YAML}),
    "yolo-folders": ("yolo", YOLO_FILES),
    "yolo-roboflow": (
        "yolo",
        {
            "data.yaml": "train: ../train/images\nnc: 1\nnames: ['dog']\n",
            "train/images/a.jpg": "",
            "train/labels/a.txt": "0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2",
            "README.roboflow.txt": "x",
        },
    ),
    "yolo-yaml-alone": ("yolo", {"data.yaml": DATA_YAML, "images/train/a.jpg": ""}),
    "voc": ("voc", {"Annotations/a.xml": VOC, "JPEGImages/a.jpg": "", "ImageSets/Main/train.txt": "a"}),
    "voc-beside": ("voc", {"a.xml": VOC, "a.jpg": ""}),
    "labelme": ("labelme", {"a.json": _dump(LABELME), "a.jpg": "", "b.json": _dump(LABELME), "b.jpg": ""}),
    "labelme-deep": ("labelme", {"json/a.json": _dump(LABELME), "images/a.jpg": ""}),
    "image_folder": ("image_folder", {"dog/a.jpg": "", "cat/b.png": "", ".DS_Store": "", "cat/.DS_Store": ""}),
    "image_folder-split": ("image_folder", {"train/dog/a.jpg": "", "train/cat/b.png": "", "val/dog/c.jpg": ""}),
    "image_folder-names": ("image_folder", {"dog/a.jpg": "", "cat/b.jpg": "", "classes.json": '{"0": "dog"}'}),
    "cvat": ("cvat", {"annotations.xml": CVAT, "images/a.jpg": ""}),
    "image_folder-deep": ("image_folder", {"dog/2024/a.jpg": "", "cat/x/y/b.png": "", "README.md": "x"}),
}
FILES: dict[str, tuple[str, str, str]] = {
    "coco": ("coco", "instances.json", _dump(COCO)),
    "coco-indented": ("coco", "a.json", json.dumps(COCO, indent=1)),
    "coco-roboflow-order": ("coco", "_annotations.coco.json", _dump(dict(reversed(COCO.items())))),
    "coco-without-boxes": ("coco", "a.json", _dump(COCO | {"annotations": []})),
    "coco-masks": ("coco", "a.json", _dump(COCO | {"annotations": [{"image_id": 1, "segmentation": [[1, 2]]}]})),
    "coco-bom": ("coco", "a.json", "\ufeff" + _dump(COCO)),
    "labelme": ("labelme", "a.json", _dump(LABELME)),
    "voc": ("voc", "a.xml", VOC),
    "cvat": ("cvat", "annotations.xml", CVAT),
    "yolo": ("yolo", "data.yaml", DATA_YAML),
    "yolo-yml": ("yolo", "pets.yml", "train: a\nnames: [dog]\n"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(tmp_path: Path, kind: str) -> None:
    format, files = FOLDERS[kind]
    assert _detect(_files(tmp_path / "set", **files)) == format


@pytest.mark.parametrize("kind", FILES)
def test_files_of_annotations(tmp_path: Path, kind: str) -> None:
    format, name, text = FILES[kind]
    assert _detect(f"{_files(tmp_path, **{name: text})}/{name}") == format


@pytest.mark.parametrize(
    ("row", "columns", "format"),
    [
        ({"photo": "a.jpg", "kind": "dog"}, {"image": "photo", "label": "kind"}, "image_csv"),
        ({"photo": "a.jpg", "kind": "dog"}, {"image": "photo", "kind": "kind"}, "image_csv"),
        ({"photo": "a.jpg", "caption": "dog"}, {"image": "photo", "label": "caption"}, "image_csv"),
        (
            {"image": "a.jpg", "question": "What?", "answer": "A dog."},
            {"query": "question", "response": "answer"},
            "query_response",
        ),
        ({"image": "a.jpg", "question": "What?", "answer": "A dog."}, {"prompt": "question"}, "prompt"),
        ({"conversation": _llava("a", "b")}, {"conversations": "conversation"}, "llava"),
        ({"q": "What?", "good": "A.", "bad": "B."}, {"prompt": "q", "chosen": "good", "rejected": "bad"}, "preference"),
        ({"instruction": "a", "response": "b"}, {"output": "response"}, "alpaca"),
    ],
)
def test_columns_with_other_names(tmp_path: Path, row: Row, columns: dict[str, str], format: str) -> None:
    assert _detect(_write(tmp_path / "rows.jsonl", [row]), columns=columns) == format


UNCLEAR: list[tuple[str, list[Row], str]] = [
    (
        "llava or rec",
        [{"image": "a.jpg", "conversations": _llava("Where?", "[1, 2, 3, 4]")}],
        "llava, since .*; or rec, since",
    ),
    (
        "objects or messages",
        [{"images": ["a"], "messages": _turns("Where?", "There."), "objects": {"ref": ["a"], "bbox": [[1, 2, 3, 4]]}}],
        "(messages|objects), since .*; or (messages|objects), since",
    ),
    (
        "two kinds of chats",
        [{"messages": _turns("a", "b"), "conversations": _llava("a", "b")}],
        "(llava|messages), since",
    ),
    (
        "questions",
        [{"image": "a.jpg", "question": "What?", "answer": "A dog."}],
        "image_csv, which needs `question` renamed",
    ),
    ("captions", [{"image": "a.jpg", "text": "A dog."}] * 5, "image_csv, which needs `text` renamed"),
    ("sizes", [{"image": f"{i}.jpg", "width": 3} for i in range(9)], "image_csv, which needs a column with classes"),
    ("splits", [{"image": f"{i}.jpg", "split": "train"} for i in range(9)], "needs a column with classes"),
    ("paths", [{"image": f"{i}.jpg", "mask": "m/a.png"} for i in range(9)], "needs a column with classes"),
    ("each its own", [{"image": f"{i}.jpg", "note": f"note {i} x"} for i in range(9)], "needs a column with classes"),
    ("corners", [{"image": "a.jpg", "class": "dog", "xmin": 1, "xmax": 3}], "needs `xmin` renamed"),
    ("prompt and completion", [{"prompt": "a", "completion": "b"}], "prompt, which needs no `completion`"),
    (
        "misspelt pairs",
        [{"messages": _turns("a", "b"), "rejected_answer": "c"}],
        "messages, which needs no `rejected_answer`",
    ),
    ("swift pairs", [{"query": "a", "response": "b", "rejected_response": "c"}], "query_response, which needs no"),
    ("alpaca pairs", [{"instruction": "a", "chosen": "b", "rejected": "c"}], "preference, which needs `prompt`"),
    ("no prompt", [{"chosen": _turns("a", "b"), "rejected": _turns("a", "c")}], "preference, which needs `prompt`"),
    ("results", [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}], "no known format"),
    ("nothing", [{"a": 1}], "its rows are of no known format; they have a"),
    ("empty cells", [{"image": None, "label": ""}], "no known format; they have no filled cells"),
    ("unanswered", [{"messages": _turns("a")}], "messages, which needs an answer as the last turn"),
    ("answered prompt", [{"prompt": _turns("a", "b")}], "no known format"),
]


@pytest.mark.parametrize(("rows", "words"), [(rows, words) for _, rows, words in UNCLEAR], ids=[u[0] for u in UNCLEAR])
def test_unclear_rows(tmp_path: Path, rows: list[Row], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        _detect(_write(tmp_path / "rows.jsonl", rows))
    assert "Set `format` of the source" in str(caught.value)


BROKEN: list[tuple[str, dict[str, str], str, str]] = [
    ("empty", {"a.json": ""}, "a.json", "not readable as UTF-8 JSON"),
    ("empty-list", {"a.json": "[]"}, "a.json", "holds no rows"),
    ("empty-jsonl", {"a.jsonl": ""}, "a.jsonl", "holds no rows"),
    ("empty-csv", {"a.csv": ""}, "a.csv", "must be a header"),
    ("header", {"a.csv": "image,label\n"}, "a.csv", "holds no rows"),
    ("empty-xml", {"a.xml": ""}, "a.xml", "no XML"),
    ("xml-encoding", {"a.xml": '<?xml version="1.0" encoding="utf-99"?><annotation/>'}, "a.xml", "no XML"),
    ("other-xml", {"a.xml": "<html/>"}, "a.xml", "its root is `html`"),
    ("bare-xml", {"a.xml": "<annotation/>"}, "a.xml", "voc, but a.xml has neither an object nor a size"),
    ("entities", {"a.xml": '<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>'}, "a.xml", "no XML"),
    ("empty-yaml", {"a.yaml": ""}, "a.yaml", "neither `names` nor `train`"),
    ("other-yaml", {"a.yaml": "model: x\n"}, "a.yaml", "neither `names` nor `train`"),
    ("cut-yaml", {"a.yaml": "train: a\nval: b\n"}, "a.yaml", "yolo, but a.yaml has no `names`"),
    ("no-yaml", {"a.yaml": "a: [1\n"}, "a.yaml", "not readable as YAML"),
    ("text", {"a.txt": "0 0.5 0.5 0.1 0.1"}, "a.txt", "rows are not read from .txt"),
    ("zip", {"a.zip": "PK"}, "a.zip", "rows are not read from .zip"),
    ("words", {"a.jsonl": "hello\nworld\n"}, "a.jsonl", "none of its first 2 rows can be read: line 1 is not JSON"),
    ("word", {"a.json": '"hello"'}, "a.json", "expected a JSON list"),
    ("lines", {"a.json": '{"messages": []}\n{"messages": []}\n'}, "a.json", "Extra data"),
    ("no-parquet", {"a.parquet": "PAR1"}, "a.parquet", "not readable"),
    ("no-arrow", {"a.arrow": "x" * 50}, "a.arrow", "a.arrow"),
    (
        "captions",
        {"a.json": _dump(COCO | {"annotations": [{"image_id": 1, "caption": "a"}]})},
        "a.json",
        "no annotation of",
    ),
    ("missing", {}, "none.jsonl", "no such file"),
    ("missing-json", {}, "none.json", "no such file"),
    ("missing-xml", {}, "none.xml", "none.xml"),
    ("folder-empty", {"set/.keep": ""}, "set", "an empty folder"),
    ("folder-of-texts", {"set/a.md": "x"}, "set", "a folder that is of no known format.*begins with a.md"),
    ("folder-of-images", {"set/a.jpg": "", "set/b.jpg": ""}, "set", "a folder that is of no known format"),
    ("one-class", {"set/dog/a.jpg": ""}, "set", "image_folder, but the only folder of images is dog"),
    ("images-alone", {"set/images/a.jpg": "", "set/other/b.jpg": ""}, "set", "images is no name of a class"),
    ("masks", {"set/images/a.jpg": "", "set/labels/a.png": ""}, "set", "yolo, but `labels` has no .txt files"),
    ("labels-alone", {"set/labels/a.txt": "0 1 1 1 1", "set/a.jpg": ""}, "set", "yolo, but no folder `images`"),
    (
        "words-in-labels",
        {"set/images/a.jpg": "", "set/labels/a.txt": "dog"},
        "set",
        "yolo, but labels/a.txt has a line 'dog'",
    ),
    ("one-class", {"set/dog/a.jpg": "", "set/Thumbs.db": "x", "set/dog/desktop.ini": "x"}, "set", "the only folder"),
    ("texts-beside", {"set/dog/a.jpg": "", "set/cat/a.jpg": "", "set/cat/a.txt": "x"}, "set", "cat/a.txt is no image"),
    (
        "coco-inside",
        {"set/a.json": _dump(COCO), "set/a.jpg": ""},
        "set",
        "so its format is coco. Give that file as `path`",
    ),
    (
        "cvat-inside",
        {"set/task.xml": CVAT, "set/images/a.jpg": ""},
        "set",
        "so its format is cvat. Give that file",
    ),
    ("metadata", {"set/metadata.csv": "file_name,label\n", "set/a.jpg": ""}, "set", r"set/metadata\.csv as `path`"),
    (
        "table-and-classes",
        {"set/t.csv": "a,b\n", "set/dog/a.jpg": "", "set/cat/a.jpg": ""},
        "set",
        "and it has tables too",
    ),
    (
        "chats-and-folders",
        {"set/chat.json": _dump([ROWS["llava"][1](0)]), "set/coco/a.jpg": "", "set/gqa/a.jpg": ""},
        "set",
        "and it has tables too",
    ),
    ("voc-and-cvat", {"set/a.xml": VOC, "set/b.xml": CVAT}, "set", "voc, since .*; or cvat, since"),
    (
        "voc-and-yolo",
        {"set/a.xml": VOC, **{f"set/{k}": v for k, v in YOLO_FILES.items()}},
        "set",
        "yolo, since .*; or voc, since",
    ),
    ("voc-and-labelme", {"set/a.xml": VOC, "set/a.json": _dump(LABELME)}, "set", "voc, since .*; or labelme, since"),
]


@pytest.mark.parametrize(("files", "name", "words"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_broken_ones(tmp_path: Path, files: dict[str, str], name: str, words: str) -> None:
    _files(tmp_path, **files)
    with pytest.raises(DataError, match=re.compile(words, re.S)):
        _detect(tmp_path / name)


def _try(path: str | Path) -> tuple[str | None, str | None]:
    """Return the format, or the reason why there is none."""
    try:
        return _detect(path), None
    except DataError as error:
        return None, str(error)


def _mutations() -> list[tuple[str, str, str, Any]]:
    """(name, the format that is right or empty, kind, argument) of files that are made from good rows."""
    cases: list[tuple[str, str, str, Any]] = []
    for kind, (_, make) in ROWS.items():
        cases += [(f"{kind}-without-{key}", kind, "drop", key) for key in make(0)]
        cases += [(f"{kind}-renamed-{key}", kind, "rename", key) for key in make(0)]
        cases += [(f"{kind}-cut-{share}", kind, "cut", share) for share in (0.05, 0.5, 0.95)]
        cases.append((f"{kind}-emptied", kind, "empty", None))
    pick = random.Random(0)
    kinds = sorted(ROWS)
    cases += [(f"mixed-{i}", "", "mix", pick.sample(kinds, 2)) for i in range(60)]
    return cases


# Rows that are whole rows of another format, or of the same, without a key: no reader could tell.
LEGITIMATE = {
    ("preference-swift", "rejected_response"): "messages",  # not where it has a name like it
    ("messages-grounding", "messages"): "objects",
    ("rec-text", "solution"): "prompt",
}


@pytest.mark.parametrize(
    ("kind", "change", "argument"), [c[1:] for c in _mutations()], ids=[c[0] for c in _mutations()]
)
def test_changed_rows_are_right_or_refused(tmp_path: Path, kind: str, change: str, argument: Any) -> None:
    path = tmp_path / "rows.jsonl"
    right = {ROWS[kind][0]} if kind else set()
    rows = [ROWS[kind][1](i) for i in range(6)] if kind else []
    if change == "drop":
        rows = [{key: value for key, value in row.items() if key != argument} for row in rows]
        right |= {LEGITIMATE.get((kind, argument)) or ""}
    elif change == "rename":
        rows = [{f"{key}_x" if key == argument else key: value for key, value in row.items()} for row in rows]
        right |= {LEGITIMATE.get((kind, argument)) or ""}
    elif change == "empty":
        rows = [dict.fromkeys(row) for row in rows]
    elif change == "mix":
        first, second = argument
        rows = [ROWS[first if i % 2 else second][1](i) for i in range(8)]
        right = {ROWS[first][0]} if ROWS[first][0] == ROWS[second][0] else set()
        if {ROWS[first][0], ROWS[second][0]} == {"messages", "openai"}:
            right = {"openai"}
    _write(path, rows)
    if change == "cut":
        path.write_bytes(path.read_bytes()[: int(argument * path.stat().st_size)])
    detected, problem = _try(path)
    assert detected is None or detected in right
    words = r"which needs|, since|no known format|can be read|holds no rows|only \d+ look"
    assert problem is None or re.search(words, problem), problem


@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("kind", [*FILES, *(f"{kind}.parquet" for kind in ROWS)])
def test_files_that_were_cut_off(tmp_path: Path, kind: str, share: float) -> None:
    if kind in FILES:
        format, name, text = FILES[kind]
        path = tmp_path / name
        path.write_text(text)
    else:
        format, make = ROWS[kind.removesuffix(".parquet")]
        path = Path(_write(tmp_path / "rows.parquet", [make(i) for i in range(6)]))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with suppress(DataError):
        assert _detect(path) == format


@pytest.mark.parametrize("key", ["images", "annotations", "categories", "shapes", "imagePath"])
def test_annotations_without_a_key(tmp_path: Path, key: str) -> None:
    whole, format = (COCO, "coco") if key in COCO else (LABELME, "labelme")
    (tmp_path / "a.json").write_text(_dump({name: value for name, value in whole.items() if name != key}))
    if key == "categories":
        assert _detect(tmp_path / "a.json") == format  # its reader says what is missing
        return
    with pytest.raises(DataError, match=f"{format}, but a.json has no `{key}`"):
        _detect(tmp_path / "a.json")


def test_bad_rows_among_good_ones_do_not_count(tmp_path: Path) -> None:
    lines = [_dump(ROWS["llava"][1](i)) for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:2], "{broken", *lines[2:], '{"id": 3}']))
    assert _detect(tmp_path / "rows.jsonl") == "llava"
    (tmp_path / "rows.jsonl").write_text("\n".join([lines[0], '{"id": 3}', '{"id": 4}', '{"id": 5}']))
    with pytest.raises(DataError, match="of its first 4 rows only 1 look like llava"):
        _detect(tmp_path / "rows.jsonl")


def test_only_the_start_of_a_large_file_is_read(tmp_path: Path) -> None:
    row = ROWS["llava"][1](0)
    (tmp_path / "rows.json").write_text("[" + ",".join([_dump(row)] * 300) + ", broken")
    assert _detect(tmp_path / "rows.json") == "llava"


def test_a_list_of_files(tmp_path: Path) -> None:
    paths = [_write(tmp_path / f"{i}.jsonl", [ROWS["llava"][1](0)]) for i in range(3)]
    assert detect_format(Source(path=tuple(paths), format="auto")).format == "llava"
    paths.append(_write(tmp_path / "3.jsonl", [ROWS["alpaca"][1](0)]))
    with pytest.raises(DataError, match=r"0\.jsonl looks like llava, since .*3\.jsonl like alpaca, since"):
        detect_format(Source(path=tuple(paths), format="auto"))


def _job(**sections: Any) -> JobConfig:
    return JobConfig.model_validate({"model": {"name": "tiny"}} | sections)


def test_a_job_is_settled_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    coco, chat = tmp_path / "coco.json", _write(tmp_path / "chat.jsonl", [ROWS["llava"][1](0)])
    coco.write_text(_dump(COCO))
    auto = {"path": str(coco), "format": "auto"}
    job = _job(
        data={"train": auto, "mix": [auto], "eval": 0.1, "test": {"path": str(tmp_path / "t.json"), "format": "coco"}}
    )
    with caplog.at_level(logging.INFO):
        settled = settle_formats(job)
    assert [s.format for s in (settled.data.train, *settled.data.mix, settled.data.test)] == ["coco"] * 3  # type: ignore
    assert settled.data.eval == job.data.eval
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "data.train: format coco, since coco.json has `images` and `annotations`",
        "data.mix[0]: format coco, since coco.json has `images` and `annotations`",
    ]
    assert settle_formats(settled) is settled
    absent = [{"path": str(tmp_path / name), "format": "auto"} for name in ("a.csv", "b.csv")]
    unusable = _job(data={"train": absent[0], "eval": absent[1]})
    with pytest.raises(DataError, match=r"a\.csv: .*\n.*b\.csv: "):
        settle_formats(unusable)
    with pytest.raises(ConfigError, match=r"data\.train\.format: llava holds no rows for sft of detection"):
        settle_formats(_job(data={"train": {"path": chat, "format": "auto"}}))
    assert (
        settle_formats(_job(task="chat", data={"train": {"path": chat, "format": "auto"}})).data.train.format == "llava"
    )  # type: ignore


def test_the_file_is_made_before_it_is_looked_at(tmp_path: Path) -> None:
    path = str(tmp_path / "made.json")
    rows, labels = read_rows(Source(path=path, format="auto", create="tests.unit.data.test_detect:write_coco"))
    assert (len(rows), labels) == (300, ["dog"])


def write_coco(path: str) -> None:
    """What the test above names as `create`."""
    Path(path).write_text(_dump(COCO))


def test_a_resumed_job_keeps_its_formats(tmp_path: Path) -> None:
    gone = {"path": str(tmp_path / "gone.json"), "format": "auto"}
    job = _job(data={"train": gone, "mix": [gone], "test": {"path": str(tmp_path / "other.json"), "format": "auto"}})
    data = {"train": gone | {"format": "voc"}, "mix": [gone | {"format": "coco"}], "test": gone | {"format": "coco"}}
    kept = keep_formats({"data": data}, job).data
    assert (kept.train.format, kept.mix[0].format, kept.test.format) == ("voc", "coco", "auto")  # type: ignore
    listed = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    several = _job(data={"train": {"path": listed, "format": "auto"}})
    earlier = {"data": {"train": {"path": listed, "format": "voc"}}}
    assert keep_formats(earlier, several).data.train.format == "voc"  # type: ignore[union-attr]
    assert check_resume({"data": {"train": data["train"]}}, {"data": {"train": gone}}) == []
    assert check_resume({"data": {"train": data["train"]}}, {"data": {"train": gone | {"format": "coco"}}}) != []


def test_yaml_of_a_job_may_say_auto(tmp_path: Path) -> None:
    from ray_vlm.config.load import load_job

    (tmp_path / "rows.csv").write_text("image,label\na.jpg,dog\n")
    text = {
        "model": {"name": "tiny"},
        "task": "classification",
        "data": {"train": {"path": "rows.csv", "format": "auto"}},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(text))
    assert settle_formats(load_job(tmp_path / "job.yaml")).data.train.format == "image_csv"  # type: ignore[union-attr]


def test_a_chosen_format_that_is_wrong_names_the_likely_one(tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.parquet", [ROWS["query_response"][1](0)])
    with pytest.raises(DataError, match=r"no column conversations; .*It looks like format=query_response: rows have"):
        read_rows(Source(path=path, format="llava"))


@pytest.mark.parametrize("kind", [*FOLDERS, *FILES])
def test_an_object_store(kind: str) -> None:
    import fsspec

    format, files = FOLDERS[kind] if kind in FOLDERS else (FILES[kind][0], {FILES[kind][1]: FILES[kind][2]})
    system = fsspec.filesystem("memory")
    try:
        for name, text in files.items():
            system.pipe(f"/detect/{name}", text.encode())
        path = "memory://detect" if kind in FOLDERS else f"memory://detect/{FILES[kind][1]}"
        assert _detect(path) == format
    finally:
        system.rm("/detect", recursive=True)


def test_a_folder_with_more_files_than_are_looked_at(tmp_path: Path) -> None:
    _files(tmp_path, **{f"{i}.jpg": "" for i in range(400)}, **{f"{i}.xml": VOC for i in range(400)})
    assert _detect(tmp_path) == "voc"


def test_an_evaluation_is_planned_with_the_real_format(tmp_path: Path) -> None:
    from ray_vlm.evaluate.run import plan_targets

    (tmp_path / "coco.json").write_text(_dump(COCO))
    job = _job(data={"test": {"path": str(tmp_path / "coco.json"), "format": "auto"}})
    (target,) = plan_targets(job, [], base=True, unquantised=False)
    assert target.job.data.test.format == "coco"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz", "coco.json.gz"])
def test_compressed_files(tmp_path: Path, name: str) -> None:
    import gzip

    path = tmp_path / name
    plain = tmp_path / name.removesuffix(".gz")
    if name.startswith("coco"):
        plain.write_text(_dump(COCO))
    else:
        _write(plain, [ROWS["alpaca"][1](i) for i in range(4)])
    path.write_bytes(gzip.compress(plain.read_bytes()))
    assert _detect(path) == ("coco" if name.startswith("coco") else "alpaca")
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(DataError):
        _detect(path)


def test_folders_and_patterns_of_rows(tmp_path: Path) -> None:
    for name in ("hub/data/train-00000-of-00002.parquet", "hub/data/train-00001-of-00002.parquet", "flat/a.jsonl"):
        _write(tmp_path / name, [ROWS["hf_objects"][1](i) for i in range(4)])
    _files(tmp_path / "flat", **{"images/a.jpg": "", "README.md": "x"})
    assert _detect(tmp_path / "hub") == "hf_objects"
    assert _detect(tmp_path / "flat") == "hf_objects"
    assert _detect(f"{tmp_path}/hub/data/*.parquet") == "hf_objects"
    _write(tmp_path / "chats/data.json", [ROWS["llava"][1](0)])
    _files(tmp_path / "chats", **{"images/a.jpg": ""})
    assert _detect(tmp_path / "chats") == "llava"


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"image": Value("string"), "label": ClassLabel(names=["dog", "cat"])})
    rows = Dataset.from_dict({"image": ["a.jpg", "b.jpg"], "label": [0, 1]}, features=features)
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "both"))
    assert _detect(tmp_path / "one") == "image_csv"
    assert _detect(tmp_path / "both") == "image_csv"
    assert _detect(tmp_path / "both", split="test") == "image_csv"


@pytest.mark.parametrize("kind", ["yolo", "cvat"])
def test_a_file_with_splits_inside(tmp_path: Path, kind: str) -> None:
    """`split` is for the reader, and no reason to refuse a file."""
    if kind == "yolo":
        path = tmp_path / "data.yaml"
        path.write_text("train: images/train\nval: images/val\nnames: [dog]\n")
    else:
        path = tmp_path / "annotations.xml"
        path.write_text("<annotations><meta/><image subset='val' name='a.png'/></annotations>")
    assert detect_format(Source(path=str(path), split="val", format="auto")).format == kind


def test_darknet(tmp_path: Path) -> None:
    """Text files beside the images, and `obj.data` or a list of names: darknet, CVAT's YOLO 1.1 and Roboflow's."""
    for folder, name in (("a", "obj.data"), ("b", "_darknet.labels"), ("c", "classes.txt")):
        (tmp_path / folder / "obj").mkdir(parents=True)
        (tmp_path / folder / name).write_text("dog")
        (tmp_path / folder / "obj/1.jpg").touch()
        (tmp_path / folder / "obj/1.txt").write_text("0 0.5 0.5 0.2 0.2")
        assert _detect(tmp_path / folder) == "yolo"
    assert _detect(tmp_path / "a/obj.data") == "yolo"
    (tmp_path / "c/obj/1.txt").write_text("a photo of a dog")
    with pytest.raises(DataError, match="its format is not clear"):
        _detect(tmp_path / "c")


def test_all_columns_that_become_attributes_are_named(tmp_path: Path) -> None:
    rows = [{"image": f"{i}.jpg", "label": "ab"[i % 2], "split": "train", "bbox": "[1, 2, 3, 4]"} for i in range(4)]
    path = _write(tmp_path / "rows.jsonl", rows)
    assert detect_format(Source(path=path, format="auto")).reason.endswith("names the right ones: `split`")
    reason = detect_format(Source(path=path, format="auto", columns={"label": "label"})).reason
    assert reason == "rows have an image and `label`"
