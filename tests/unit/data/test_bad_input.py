"""A corpus of broken inputs: every one is named with row, id, reason and what to do, and costs no other row."""

import io
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import Model
from ray_vlm.config.task import ClassificationTask, DetectionTask
from ray_vlm.data.parts import build_index
from ray_vlm.data.preprocessing import read_preprocessing
from ray_vlm.data.records import BadRow
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.sources.formats import FORMATS, open_rows, read_rows
from ray_vlm.data.sources.tables import MAX_LINE_BYTES
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import DataError, ModelError

USER, ANSWER = {"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A dog."}
HUMAN, GPT = {"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dog."}
GOOD: dict[str, dict[str, Any]] = {
    "llava": {"image": "a.jpg", "conversations": [HUMAN, GPT]},
    "messages": {"images": ["a.jpg"], "messages": [USER, ANSWER]},
    "objects": {"images": ["a.jpg"], "objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}},
    "hf_objects": {"image": "a.jpg", "objects": {"category": ["dog"], "bbox": [[1, 2, 3, 4]]}},
    "image_csv": {"image": "a.jpg", "label": "dog"},
    "gui_csv": {
        "Task_id": "1",
        "Image_id": "a.jpg",
        "Instruction": "Go.",
        "Output": '{"action": "tap"}',
        "Grounding": "[1, 2]",
    },
    "preference": {"image": "a.jpg", "prompt": "What?", "chosen": "A dog.", "rejected": "A cat."},
    "prompt": {"images": ["a.jpg"], "prompt": "What?", "solution": "dog"},
    "openai": {"images": ["a.jpg"], "messages": [USER, ANSWER]},
    "query_response": {"images": ["a.jpg"], "query": "What?", "response": "A dog.", "history": [["Hi.", "Hello."]]},
    "alpaca": {"images": ["a.jpg"], "instruction": "Name it.", "input": "One word.", "output": "Dog."},
    "rec": {"image": "a.jpg", "conversations": [HUMAN, GPT], "normal_caption": "the dog"},
}
NAN, INF = float("nan"), float("inf")


def _turn(text: Any, role: Any = "human") -> dict[str, Any]:
    return {"from": role, "value": text}


def _objects(**change: Any) -> dict[str, Any]:
    return {"objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]} | change}


# format, what differs from a good row (None: the key is not there), words of the reason
ROWS: list[tuple[str, dict[str, Any], str]] = [
    (
        "llava",
        {"conversations": None},
        r"no conversations; the row has .*Fill it, or name its column, .*data\.train\.columns=\{conversations: NAME\}",
    ),
    ("llava", {"conversations": []}, "no conversations"),
    (
        "llava",
        {"conversations": "hello"},
        r"'hello' is not a list of turns; write one, .*data\.train\.columns=\{conversations: NAME\}",
    ),
    ("llava", {"conversations": [3, GPT]}, r"conversations\[0\] is 3; a turn is an object"),
    ("llava", {"conversations": [_turn("x", "tool"), GPT]}, "the role 'tool'; use system, user"),
    ("llava", {"conversations": [_turn("x", ["human"]), GPT]}, "the role .*; use system, user"),
    ("llava", {"conversations": [HUMAN, HUMAN, GPT]}, "turn 1 is of the user, where the assistant's was expected"),
    ("llava", {"conversations": [GPT]}, "turn 0 is of the assistant, where the user's was expected"),
    ("llava", {"conversations": [HUMAN]}, "the last turn is not of the assistant; turns are"),
    ("llava", {"conversations": [_turn("x", "system")]}, "the last turn is not of the assistant"),
    ("llava", {"conversations": [HUMAN, _turn(" ", "gpt")]}, "nothing to learn; fill or remove"),
    ("llava", {"conversations": [HUMAN, _turn(None, "gpt")]}, r"conversations\[1\] holds None in place of a text"),
    ("llava", {"conversations": [HUMAN, _turn("<image>", "gpt")]}, "images belong to the user's turns"),
    (
        "llava",
        {"conversations": '[{"from": "human", "value": "\\ud800"}]'},
        "conversations holds half a surrogate pair",
    ),
    ("gui_csv", {"Output": '{"action": "tap", "text": "\\udc00"}'}, "Output holds half a surrogate pair"),
    ("gui_csv", {"Output": '{"action": "tap", "text": "\\u0000"}'}, "Output holds NUL characters"),
    ("llava", {"image": ["a.jpg", "b.jpg"]}, "1 <image> tags for 2 images; write one tag for each"),
    ("llava", {"image": None}, "1 <image> tags for 0 images"),
    ("llava", {"image": 3}, "image 3 is neither a path nor bytes; give a path"),
    ("llava", {"image": {"path": None}}, "neither a path nor bytes"),
    ("llava", {"image": "https://x.org/a.jpg"}, "URLs are not read; download it and give a path under image_root"),
    ("llava", {"image": "HTTP://x.org/a.jpg"}, "URLs are not read"),
    ("llava", {"image": "data:text/plain;base64,AAAA"}, "of type 'text/plain', which is no image; write the image to"),
    ("llava", {"image": "data:image/png;base64,AA=A"}, "data: URI that is not base64"),
    ("llava", {"image": "../a.jpg"}, "outside image_root .*; move it there, or set image_root"),
    ("llava", {"image": "/etc/passwd"}, "outside image_root"),
    ("llava", {"image": "s3://bucket/a.jpg"}, "outside image_root"),
    ("llava", {"image": "x" * 300 + ".jpg"}, "not a path .*304 bytes long"),
    ("llava", {"image": "x/" * 3000}, "not a path .*6000 bytes long"),
    ("llava", {"image": ["  "]}, "not a path .*it is empty"),
    ("messages", {"messages": [USER | {"content": [{"type": "video"}]}, ANSWER]}, r"messages\[0\] holds .*; use"),
    ("messages", {"messages": [USER | {"content": [{"type": "text", "text": 3}]}, ANSWER]}, "; use .*text"),
    ("messages", {"messages": [USER, ANSWER], **_objects()}, "0 <ref-object> for 1 entries of objects.ref; mend one"),
    ("messages", {"messages": [USER, ANSWER], **_objects(ref=[])}, "0 <bbox> for 1 entries of objects.bbox"),
    ("messages", _objects(image_id=[1]), "image_id 1 is none of 1 images; count them from 0"),
    ("messages", _objects(image_id=[0, 0]), "image_id .* is not a list of one image for each"),
    ("objects", {"objects": None}, "no objects; the row has"),
    ("objects", {"objects": [1]}, 'is not {"ref": .*write two lists'),
    ("objects", {"objects": "{"}, "objects holds '{', which is not JSON"),
    ("objects", _objects(ref="dog"), 'is not {"ref"'),
    ("objects", _objects(bbox=[[1, 2]]), "not four finite numbers"),
    ("objects", _objects(bbox=[[1, 2, 3]]), r"objects.bbox\[0\] \[1, 2, 3\] is not four finite numbers .*mend it"),
    ("objects", _objects(bbox=[[1, 2, NAN, 3]]), "not four finite numbers"),
    ("objects", _objects(bbox=[[1, 2, 3, INF]]), "not four finite numbers"),
    ("objects", _objects(bbox=[[1, 2, 3, 1e9]]), "not four finite numbers"),
    ("objects", _objects(bbox=[[1, 2, 3, True]]), "not four finite numbers"),
    ("objects", _objects(bbox=[[1, 2, 3, "4"]]), "not four finite numbers"),
    ("objects", _objects(bbox=[[1, 2, 3, 10**400]]), "not four finite numbers"),
    ("objects", _objects(ref=["dog", "cat"]), "2 ref for 1 bbox; give each box its name"),
    ("objects", _objects(ref=[""]), r"objects.ref\[0\] is empty; fill it"),
    ("objects", _objects(ref=["a\x1bb"]), r"'a\\x1bb' holds the control character \\x1b; remove it"),
    ("objects", _objects(bbox_type="norm1000"), "'norm1000' is neither real .*mend it"),
    ("objects", _objects(bbox_type=["real"]), "is neither real"),
    ("objects", {"images": ["a.jpg", "a.jpg"]}, "the row has 2 images; a detection row has one"),
    ("image_csv", {"label": None}, "attribute label is empty; fill it"),
    ("image_csv", {"label": NAN}, "attribute label is empty"),
    ("image_csv", {"label": {"a": 1}}, "attribute label is {'a': 1}; fill it with text"),
    ("image_csv", {"label": "a\rb"}, r"control character \\r; remove it"),
    ("image_csv", {"label": "a\x85b"}, r"control character \\x85"),
    ("image_csv", {"image": ""}, "no image or file_name; the row has"),
    ("image_csv", {"bbox": "[1, 2, 3]"}, r"bbox \[1, 2, 3\] is not four finite numbers"),
    ("image_csv", {"bbox": "[1, 2, 3, NaN]"}, "which is not JSON .*write it as JSON"),
    ("image_csv", {"bbox": "1 2 3 4"}, "not four finite numbers"),
    ("image_csv", {"x1": 1, "y1": 2, "x2": 3}, "x1, y1, x2, y2 .* is not four finite numbers"),
    (
        "gui_csv",
        {"Task_id": None},
        r"Task_id is empty; fill it, or name its column, as in data\.train\.columns=\{Task_id: ",
    ),
    ("gui_csv", {"Task_id": ["1"]}, "Task_id .* is not a plain text or number"),
    ("gui_csv", {"Image_id": ""}, "Image_id is empty; fill it, or name its column"),
    ("gui_csv", {"Instruction": ""}, "Instruction is empty; fill it"),
    ("gui_csv", {"Output": "tap"}, "Output holds 'tap', which is not JSON .*write it as JSON"),
    ("gui_csv", {"Output": "{'action': 'tap'}"}, "which is not JSON"),
    ("gui_csv", {"Output": "[1]"}, r"Output holds \[1\], which is not a JSON object; write"),
    ("gui_csv", {"Output": "", "Instruction": None}, "Output and Instruction is empty; fill it"),
    ("gui_csv", {"Image_id": ["a.jpg", "b.jpg"]}, "names 2 images; a step has one screen"),
    ("gui_csv", {"Instruction": ["Go"]}, "Instruction .* is not a text; say in words what the task is"),
    ("gui_csv", {"Output": '{"text": "x"}'}, "no text under `action`; name what is done"),
    ("gui_csv", {"Output": '{"action": ""}'}, "no text under `action`"),
    ("gui_csv", {"Output": {"action": "tap", "wait": NAN}}, "cannot be written as JSON"),
    ("gui_csv", {"Grounding": "over there"}, "Grounding holds 'over there', which is not JSON"),
    ("gui_csv", {"Grounding": '{"rect": [1, 2, 3, 4]}'}, "use one of bbox, .*nothing is pointed at"),
    ("gui_csv", {"Grounding": '{"bbox": [1, 2, 3]}'}, "Grounding bbox .* is not four finite numbers"),
    ("gui_csv", {"Grounding": '{"point": [1, "2"]}'}, "Grounding point .* is not two finite numbers"),
    ("gui_csv", {"Grounding": "[1, 2, 3]"}, "not four finite numbers"),
    ("gui_csv", {"Grounding": "3"}, "Grounding holds 3; use one of"),
    ("gui_csv", {"Grounding": '{"x": 3}'}, "Grounding .* is not two finite numbers"),
    ("gui_csv", {"Grounding": '{"x1": 1, "y1": 2, "x2": 3}'}, "Grounding .* is not four finite numbers"),
    ("gui_csv", {"Grounding": '{"x": 3, "y": 4, "width": 5, "height": null}'}, "not four finite numbers"),
    ("gui_csv", {"Grounding": '{"point": {"x": 3, "y": "4"}}'}, "Grounding point .* is not two finite numbers"),
    ("gui_csv", {"Output": '{"action": {"target": "Save"}}'}, "no text under `action`"),
    (
        "gui_csv",
        {"Output": '{"action": {"type": "tap", "text": "a"}, "text": "b"}'},
        "says 'text' twice, beside `action`",
    ),
    ("preference", {"rejected": "A dog. "}, "are the same, so there is nothing to prefer; mend or remove"),
    ("preference", {"rejected": None}, "no rejected or rejected_response; the row has"),
    ("preference", {"rejected": [USER]}, "rejected must be a text or one turn of the assistant"),
    ("preference", {"chosen": [ANSWER | {"content": " "}]}, "the chosen answer is empty, so there is nothing to learn"),
    ("preference", {"chosen": "<image>"}, "the chosen answer holds an <image> tag"),
    ("preference", {"prompt": [USER, ANSWER]}, "the last turn is not of the user"),
    ("prompt", {"prompt": 3}, "prompt 3 is not a list of turns"),
    ("prompt", {"prompt": "<image><image>"}, "2 <image> tags for 1 images"),
]


@pytest.mark.parametrize(("format", "change", "words"), ROWS, ids=[f"{r[0]}-{i}" for i, r in enumerate(ROWS)])
def test_a_bad_row_is_named_and_its_neighbours_live(
    tmp_path: Path, format: str, change: dict[str, Any], words: str
) -> None:
    odd = {k: v for k, v in (GOOD[format] | change | {"id": "odd"}).items() if v is not None}
    rows = [GOOD[format] | {"id": "first"}, odd, GOOD[format] | {"id": "last"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _check(_read(tmp_path / "rows.jsonl", format), 1, "odd", words, 3)


def _read(path: Path, format: str, **options: Any) -> list[Any]:
    return read_rows(Source(path=str(path), format=format, **options))[0]


def _check(records: list[Any], row: int, name: str, words: str, num_rows: int) -> None:
    """One row is bad, for that reason; it and the good ones are all rows."""
    assert [r.row for r in records] == list(range(num_rows))
    assert [isinstance(r, BadRow) for r in records] == [i == row for i in range(num_rows)]
    assert records[row].id == name
    assert re.search(words, records[row].reason), records[row].reason
    assert len(records[row].reason) < 700
    records[row].reason.encode()


LINES: list[tuple[bytes, str]] = [
    (b'{"image": "a.jpg", ', "line 3 is not JSON .*; mend it, one object a line"),
    (b"[1, 2]", r"line 3 is a list; a row is a JSON object \{...\}"),
    (b"null", "line 3 is null"),
    (b"12", "line 3 is a number"),
    (b'{"image": "a.jpg", "label": "\xff"}', "line 3 is not UTF-8 .*byte 29.*; save the file as UTF-8"),
    (b'{"image": "a.jpg", "label": "\0"}', "line 3 holds NUL characters"),
    (b'{"image": "a.jpg", "label": "\\u0000"}', "line 3 holds NUL characters in a text; remove them"),
    (b'{"image": "a.jpg", "label": ["\\ud800"]}', "line 3 holds half a surrogate pair"),
    (b"[" * 100_000, "line 3 is not JSON"),
    (b'{"image": ' + b"9" * 5000 + b"}", "line 3 is not JSON"),
    (b'{"image": "' + b"x" * MAX_LINE_BYTES + b'"}', "line 3 is .* bytes long, above 16777216; keep images in files"),
    (b'{"id": 1.5, "image": "a.jpg", "label": "x"}', "id 1.5 is neither a text nor a whole number; mend it"),
    (b'{"id": true, "image": "a.jpg", "label": "x"}', "id True is neither"),
    (b'{"id": "a\\u0007", "image": "a.jpg", "label": "x"}', r"id 'a\\x07' holds the control character \\x07"),
]


@pytest.mark.parametrize(("line", "words"), LINES, ids=range(len(LINES)))
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: bytes, words: str) -> None:
    good = b'{"image": "a.jpg", "label": "dog"}\r\n'
    (tmp_path / "rows.jsonl").write_bytes(good + b"\r\n" + line + b"\n" + good)
    _check(_read(tmp_path / "rows.jsonl", "image_csv"), 1, "", words, 3)


CSV_LINES: list[tuple[bytes, str]] = [
    (b"a.jpg", "line 4 has 1 cells for 2 columns; put quotes around"),
    (b"a.jpg,dog,cat", "line 4 has 3 cells for 2 columns"),
    (b"a.jpg,\xff", "line 4 is not UTF-8; save the file as UTF-8"),
    (b"a.jpg,a\0b", "line 4 holds NUL characters"),
    (b'a.jpg,"dog"x', "line 4 is not CSV .*; write a quote inside quotes twice"),
    (b'a.jpg,"dog', "line 4 is not CSV"),
    (b"a.jpg," + b"x" * MAX_LINE_BYTES, "line 4 is .* bytes long, above 16777216"),
]


@pytest.mark.parametrize(("line", "words"), CSV_LINES, ids=range(len(CSV_LINES)))
def test_a_bad_line_of_csv_is_named_by_its_number(tmp_path: Path, line: bytes, words: str) -> None:
    (tmp_path / "rows.csv").write_bytes(b'image,label\n"a.jpg","two\nlines"\n' + line + b'\na.jpg,"dog"\n')
    _check(_read(tmp_path / "rows.csv", "image_csv"), 1, "", words, 3)


def test_a_bad_entry_of_a_list_is_named_by_its_place(tmp_path: Path) -> None:
    good = {"image": "a.jpg", "label": "dog"}
    (tmp_path / "rows.json").write_text(json.dumps([good, 3, good]))
    _check(_read(tmp_path / "rows.json", "image_csv"), 1, "", "entry 1 is a number; a row is a JSON object", 3)
    (tmp_path / "rows.json").write_text(json.dumps([good, good | {"label": "\0"}, good]))
    _check(_read(tmp_path / "rows.json", "image_csv"), 1, "", "entry 1 holds NUL characters", 3)


def test_a_bad_text_of_parquet_is_named_by_its_row(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    raw = pyarrow.array([b"dog", b"\xff\xfe", b"cat"], pyarrow.binary()).view(pyarrow.utf8())
    parquet.write_table(pyarrow.table({"image": ["a.jpg"] * 3, "label": raw}), tmp_path / "rows.parquet")
    _check(_read(tmp_path / "rows.parquet", "image_csv"), 1, "", "row 1 holds a text that is not UTF-8", 3)


@pytest.mark.parametrize("format", GOOD)
def test_rows_that_share_an_id_are_kept_apart(tmp_path: Path, format: str) -> None:
    rows = [GOOD[format] | {"id": name} for name in ("x", 7, "7", "y")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    records = _read(tmp_path / "rows.json", format)
    if format == "gui_csv":  # a step's id is its own
        assert [isinstance(r, BadRow) for r in records] == [False, True, True, False]
        assert records[1] == BadRow(1, "7", "id 7 is used by 2 rows; make it unique")
    else:
        assert [r.id for r in records] == ["x", "7", "7#2", "y"]


def test_a_row_without_its_group_is_bad(tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "label": "dog", "site": site} for site in ("n", "", "s")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    records = _read(tmp_path / "rows.json", "image_csv", columns={"group": "site"})
    _check(records, 1, "", "group is empty; fill it", 3)


COCO: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"id": None}, {}, "", "needs an `id`"),
    ({"file_name": 3}, {}, "", "and a `file_name`"),
    ({"id": "a\x07"}, {}, "", "control character"),
    ({"id": "\ud800"}, {}, "", "control character"),
    ({"file_name": "a\0.jpg"}, {}, "1", "is not a path .*NUL"),
    ({"file_name": "../a.jpg"}, {}, "1", "outside image_root"),
    ({"file_name": "http://x/a.jpg"}, {}, "1", "URLs are not read"),
    ({}, {"bbox": [1, 2, NAN, 3]}, "1", "not four finite numbers .x, y, width, height"),
    ({}, {"bbox": {"x": 1}}, "1", "not four finite numbers"),
    ({}, {"category_id": 9}, "1", "category_id 9 is not in `categories`"),
]


@pytest.mark.parametrize(("image", "annotation", "name", "words"), COCO, ids=range(len(COCO)))
def test_a_bad_image_of_coco(
    tmp_path: Path, image: dict[str, Any], annotation: dict[str, Any], name: str, words: str
) -> None:
    images = [{"id": i, "file_name": "a.jpg"} | (image if i == 1 else {}) for i in range(3)]
    boxes = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]} | annotation] if annotation else []
    data = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "dog"}]}
    (tmp_path / "rows.json").write_text(json.dumps(data))
    _check(_read(tmp_path / "rows.json", "coco"), 1, name, words, 3)


WHOLE: list[tuple[str, bytes | None, str, str]] = [
    ("rows.jsonl", None, "llava", "no such file. Give `path`"),
    ("rows.xlsx", b"x", "llava", "rows are not read from .xlsx. Give a .json"),
    ("rows", b"x", "llava", "a name without a suffix"),
    ("rows.jsonl", b"", "llava", "holds no rows"),
    ("rows.jsonl", b"\n \n", "llava", "holds no rows"),
    ("rows.json", b"[]", "llava", "holds no rows"),
    ("rows.json", b'{"rows": []}', "llava", "expected a JSON list of objects, or an object with that list"),
    ("rows.json", b"\xff\xfe[\0]\0", "llava", "not readable as UTF-8 JSON .*save it as UTF-8"),
    ("rows.json", b"[" * 100_000, "llava", "not readable as UTF-8 JSON"),
    ("rows.jsonl", "{}".encode("utf-16"), "llava", "not UTF-8 but UTF-16. Save it as UTF-8"),
    ("rows.csv", b"", "image_csv", "must be a header"),
    ("rows.csv", b"\xef\xbb\xbf\r\n", "image_csv", "must be a header"),
    ("rows.csv", b",,\na,b,c\n", "image_csv", "must be a header"),
    ("rows.csv", b"image,label\n", "image_csv", "holds no rows"),
    ("rows.csv", b"image,label,label\na.jpg,b,c\n", "image_csv", "'label'. twice or empty. Give each column one name"),
    ("rows.csv", b"image,,label\na.jpg,b,c\n", "image_csv", "a column twice or empty"),
    ("rows.csv", b'image,"label\na.jpg,b\n', "image_csv", "not a CSV header"),
    ("rows.csv", b"image,l\xff\na.jpg,b\n", "image_csv", "as UTF-8 text"),
    (
        "rows.csv",
        b"photo,label\na.jpg,b\n",
        "image_csv",
        r"no column image or file_name; it has photo, label. .*data\.train\.columns={image: NAME}",
    ),
    ("rows.csv", b"image;label\na.jpg;b\n", "image_csv", "no column image or file_name; it has image;label"),
    ("rows.csv", b"image,id\na.jpg,1\n", "image_csv", "no column with an attribute"),
    ("rows.csv", b"Task_id,Image_id,Instruction,Output\n1,a,b,c\n", "gui_csv", "no column Grounding"),
    ("rows.parquet", b"PAR1 but not for long", "llava", "not readable .*Give `path` a file"),
    ("rows.json", b'{"images": [], "annotations": []}', "coco", "`categories` must list"),
    (
        "rows.json",
        b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a\\u0007"}]}',
        "coco",
        "control character",
    ),
]


@pytest.mark.parametrize(("name", "content", "format", "words"), WHOLE, ids=range(len(WHOLE)))
def test_an_unusable_file_is_refused_whole(
    tmp_path: Path, name: str, content: bytes | None, format: str, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        _read(tmp_path / name, format)
    assert str(tmp_path / name) in str(error.value)


def test_nesting_of_any_depth_is_reported(tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "label": "dog"}]
    lines = [json.dumps(rows[0])] + ['{"image": "a.jpg", "label": ' + "[" * d + "]" * d + "}" for d in range(1, 1000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    records = _read(tmp_path / "rows.jsonl", "image_csv")
    assert [isinstance(r, BadRow) for r in records] == [False] + [True] * 999


def test_columns_of_one_name_in_parquet_are_refused(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["image", "image"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"is there twice .image, image.. Give each one name"):
        _read(tmp_path / "rows.parquet", "llava")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_a_folder_is_no_file_with_rows(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"rows{suffix}").mkdir()
    with pytest.raises(DataError, match=r"no file with rows is in this folder; it holds nothing"):
        _read(tmp_path / f"rows{suffix}", "llava")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("https://x.org/rows.jsonl", "https:// addresses are not read; download the file and give its path"),
        ("ftp://x.org/rows.jsonl", "are not read; download"),
        ("nowhere://x/rows.jsonl", "no file system for nowhere://"),
        ("rows\0.jsonl", "not readable"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_addresses_that_nothing_opens_are_refused(address: str, words: str, suffix: str) -> None:
    with pytest.raises(DataError, match=words):
        read_rows(Source(path=address.replace("jsonl", suffix), format="llava"))


def test_image_root_must_be_a_path(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([GOOD["llava"]]))
    with pytest.raises(DataError, match=r"image_root .* cannot be used"):
        _read(tmp_path / "rows.json", "llava", image_root="a\0b")


ODD: list[Any] = [None, True, 0, -1, 1.5, NAN, "", " ", "x", "\n", "[", "{}", "[1]", [], [[]], {}, [None], {"bbox": 3}]
ODD += [{"path": 3}, ["a.jpg", 3], {"ref": [None], "bbox": [None]}, [{"role": None}], [{"from": "gpt", "value": []}]]
ODD += [[{"role": "user", "content": [None]}], '{"action": 3}', '{"point": {}}', "<image>" * 3, {"ref": 1, "bbox": []}]


def test_every_format_of_rows_has_a_good_row() -> None:
    assert {name for name, format in FORMATS.items() if format.open is open_rows} == set(GOOD)


@pytest.mark.parametrize("format", sorted(GOOD))
def test_nonsense_in_any_cell_never_raises(tmp_path: Path, format: str) -> None:
    pick = random.Random(0)
    rows = []
    for i in range(600):
        row = GOOD[format] | {"id": str(i)}
        for name in pick.sample([*row, "image", "images", "objects", "bbox", "group"], 1 + i % 2):
            row[name] = pick.choice(ODD)
        rows.append(row)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = _read(tmp_path / "rows.jsonl", format)
    assert [r.row for r in records] == list(range(600))
    assert 0 < sum(isinstance(r, BadRow) for r in records) < 600
    assert all(r.reason for r in records if isinstance(r, BadRow))


def _image(kind: str, size: tuple[int, int] = (100, 80)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


PICTURES: list[tuple[str, bytes | None, str | None]] = [
    ("half.jpg", _image("JPEG")[:1500], "truncated"),
    ("without_end.jpg", _image("JPEG")[:-2], "truncated"),
    ("half.png", _image("PNG")[:1500], "truncated|cannot be read"),
    ("empty.jpg", b"", r"empty \(0 bytes\).*fetch the file again"),
    ("page.jpg", b"<html>not an image</html>", "an HTML page, as a failed download leaves it"),
    ("thin.png", _image("PNG", (1, 5000)), "one side is over 200 times the other"),
    ("missing.jpg", None, "missing; mend the path or image_root"),
    ("gif_named.jpg", _image("GIF"), None),
]


def test_bad_pictures_are_found_by_the_index(tmp_path: Path, tiny_models: dict[str, str]) -> None:
    for name, content, _ in PICTURES:
        if content is not None:
            (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.jpg").mkdir()
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (1200, 1000)).save(tmp_path / "large.png")
    pictures = [
        *PICTURES,
        ("folder.jpg", None, "not a file; mend the path"),
        ("bomb.png", None, "400000000 pixels, above data.max_image_pixels=1000000; make it smaller|decompression bomb"),
        ("large.png", None, "1200000 pixels, above data.max_image_pixels"),
    ]
    (tmp_path / "rows.csv").write_text("image,label\n" + "".join(f"{name},dog\n" for name, _, _ in pictures))
    task = ClassificationTask()
    spec = SampleSpec(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), task, ("label=dog",))
    source = Source(path=str(tmp_path / "rows.csv"), format="image_csv")
    index = build_index(source, Data(on_bad_row="quarantine", max_image_pixels=1_000_000), SampleBuilder(spec))
    reasons = {bad.row: bad.reason for bad in index.bad}
    for row, (name, _, words) in enumerate(pictures):
        if words is None:
            assert row not in reasons
        else:
            assert re.search(words, reasons[row]), (name, reasons[row])
            assert name in reasons[row] or row == 5
    assert len(index) + len(index.bad) == len(pictures)


MADE: list[tuple[str, Any, str]] = [
    ("labels", [["dog"]], r"labels.0: Input should be a valid string"),
    ("labels", "dog", "labels: "),
    ("hints", None, "hints: "),
    ("task", 3, "task: "),
    ("task", {"name": "detection", "codec": "x"}, "task.codec: "),
    ("task", {"name": "chat"}, "trained for chat, and the job's task is detection"),
    ("images", [], "images: "),
    ("images", {"min_pixels": "4096", "max_pixels": 4096}, "images.min_pixels: "),
    ("images", {"min_pixels": 0, "max_pixels": 4096}, "images.min_pixels: "),
    ("images", {"min_pixels": 1, "max_pixels": 4096, "pad": [0, 0, 256]}, "images.pad.2: "),
]


@pytest.mark.parametrize(("key", "value", "words"), MADE, ids=range(len(MADE)))
def test_what_a_damaged_preprocessing_file_says_is_refused(tmp_path: Path, key: str, value: Any, words: str) -> None:
    spec = SampleSpec(Model(name="x"), DetectionTask(), ("dog",))
    images = {"min_pixels": 4096, "max_pixels": 8192, "pad": None, "center": False, "stock": False}
    made = {"task": {"name": "detection"}, "labels": ["dog"], "hints": "", "split": "", "images": images}
    (tmp_path / "preprocessing.json").write_text(json.dumps(made | {"later": "unknown"}))
    assert read_preprocessing(str(tmp_path), spec) == replace(spec, min_pixels=4096, max_pixels=8192)
    (tmp_path / "preprocessing.json").write_text(json.dumps(made | {key: value}))
    with pytest.raises(ModelError, match=words):
        read_preprocessing(str(tmp_path), spec)


@pytest.mark.parametrize("content", [b"", b"null", b"[" * 100_000, b"\xff", None])
def test_a_preprocessing_file_that_is_none_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "preprocessing.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ModelError, match=r"preprocessing\.json: not readable .*Use an adapter folder"):
        read_preprocessing(str(tmp_path), SampleSpec(Model(name="x"), DetectionTask(), ()))


def test_hints_that_are_no_plain_text_are_refused(tiny_models: dict[str, str]) -> None:
    spec = SampleSpec(Model(name=tiny_models["qwen3_vl"]), ClassificationTask(), ("label=dog",), hints="\ud800")
    with pytest.raises(DataError, match=r"hint or class name .* cannot be used"):
        SampleBuilder(spec)
