"""Files as popular tools write them: read as they are meant, whatever they look like."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as masks

from ray_vlm.config.data import Source
from ray_vlm.data.image_paths import resolve_image
from ray_vlm.data.images import decode
from ray_vlm.data.measure import measure_row, settle_boxes
from ray_vlm.data.records import BadRow, SftRecord
from ray_vlm.data.sources.columns import apply_class_names
from ray_vlm.data.sources.formats import read_rows
from ray_vlm.data.suspicions import find_suspicions, summarise, tell_unused
from ray_vlm.errors import DataError

DOG = [{"id": 1, "name": "dog"}]
ROBOFLOW = {"id": 0, "name": "fish", "supercategory": "none"}  # the project, before its classes


def _coco(folder: Path, annotations: list[Any], categories: list[Any] | None = None, image_id: Any = 1) -> Any:
    data = {
        "images": [{"id": image_id, "file_name": "a.jpg"}],
        "annotations": annotations,
        "categories": categories or DOG,
    }
    (folder / "rows.json").write_text(json.dumps(data))
    return read_rows(Source(path=str(folder / "rows.json")))


def _box(**options: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 10]} | options


@pytest.mark.parametrize(
    ("categories", "labels"),
    [
        ([ROBOFLOW, {"id": 1, "name": "fish", "supercategory": "fish"}], ["fish"]),
        ([ROBOFLOW, {"id": 1, "name": "eel", "supercategory": "fish"}], ["eel"]),
        ([{"id": 1, "name": "bus", "supercategory": "vehicle"}, {"id": 7, "name": "vehicle"}], ["bus"]),
        ([{"id": 1, "name": "a", "supercategory": "none"}, ROBOFLOW | {"id": 2}], ["a", "fish"]),
        ([{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}], ["cat", "dog"]),  # a class may have no box in one file
        ([{"id": 1, "name": "person", "supercategory": "person"}, {"id": 2, "name": "bus"}], ["person", "bus"]),
        ([{"id": 1, "name": "dog"}, {"id": 2, "name": "dog"}], ["dog"]),
    ],
)  # fmt: skip
def test_groups_that_no_box_uses_are_no_classes(tmp_path: Path, categories: list[dict], labels: list[str]) -> None:
    """Roboflow writes the project's name as a category 0, above all others."""
    (row,), names = _coco(tmp_path, [_box()], categories)
    assert names == labels
    assert row.truth["labels"] == (next(c["name"] for c in categories if c["id"] == 1),)


def test_a_category_that_is_used_is_a_class_whatever_it_is_called(tmp_path: Path) -> None:
    eel = {"id": 1, "name": "eel", "supercategory": "fish"}
    (row,), labels = _coco(tmp_path, [_box(category_id=0), _box()], [ROBOFLOW, eel])
    assert labels == ["fish", "eel"]
    assert row.truth["labels"] == ("fish", "eel")


def _mask() -> np.ndarray:
    mask = np.zeros((48, 64), np.uint8, order="F")
    mask[10:20, 5:30] = 1
    return mask


def _run_lengths() -> list[int]:
    flat = _mask().flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    return np.diff([0, *edges, len(flat)]).tolist()


@pytest.mark.parametrize(
    ("segmentation", "box"),
    [
        ([[1, 1, 10, 1, 10, 10]], (1, 1, 10, 10)),
        ([[1, 1, 10, 1, 10, 10], [20, 5, 30, 5, 30, 25.5]], (1, 1, 30, 25.5)),
        ({"size": [48, 64], "counts": _run_lengths()}, (5, 10, 30, 20)),
        ({"size": [48, 64], "counts": masks.encode(_mask())["counts"].decode()}, (5, 10, 30, 20)),
    ],
)
@pytest.mark.parametrize("bbox", [{}, {"bbox": []}, {"bbox": None}])
def test_a_mask_alone_gives_the_box_around_it(tmp_path: Path, segmentation: Any, box: tuple, bbox: dict) -> None:
    (row,), _ = _coco(tmp_path, [{"image_id": 1, "category_id": 1, "segmentation": segmentation} | bbox])
    assert row.truth["boxes"] == (tuple(map(float, box)),)


@pytest.mark.parametrize(
    "segmentation",
    [
        "x", [[1, 1, 10]], [[1, 2]], [3], [["a", 1, 2, 3]], {}, {"size": [0, 0], "counts": "x"}, {"counts": "abc"},
        {"size": [48, 64]}, {"size": [48, 64], "counts": [1, -1]}, {"size": "ab", "counts": [1]},
        {"size": [48, 64], "counts": [5]}, {"size": [48, 64], "counts": "\u00e9"}, {"size": [2**40, 1], "counts": "1"},
    ],
)  # fmt: skip
def test_a_mask_that_cannot_be_read_is_a_bad_row(tmp_path: Path, segmentation: Any) -> None:
    (row,), _ = _coco(tmp_path, [{"image_id": 1, "category_id": 1, "segmentation": segmentation}])
    assert isinstance(row, BadRow)
    assert "bbox" in row.reason


def test_ids_that_passed_through_a_table_are_whole_numbers(tmp_path: Path) -> None:
    (row,), _ = _coco(tmp_path, [_box(image_id=1.0, category_id=1.0)])
    assert (row.id, row.truth["labels"]) == ("1", ("dog",))
    (row,), _ = _coco(tmp_path, [_box()], [{"id": 1.0, "name": "dog"}], image_id=1.0)
    assert (row.id, row.truth["labels"]) == ("1", ("dog",))
    assert len(row.truth["boxes"]) == 1


def test_annotations_of_other_images_harm_no_row(tmp_path: Path) -> None:
    (row, stray), _ = _coco(tmp_path, [_box(), _box(image_id=99), _box(image_id=1.5), 5])
    assert row.truth["boxes"] == ((1.0, 2.0, 11.0, 12.0),)
    reason = "annotation 1 has image_id 99, which no image has, and so have 2 others; remove it or add the image"
    assert stray == BadRow(1, "", reason)


@pytest.mark.parametrize("crowd", [1, "1", True, 1.0, "1.0", "true"])
def test_a_crowd_is_no_object_however_it_is_written(tmp_path: Path, crowd: Any) -> None:
    (row,), _ = _coco(tmp_path, [_box(iscrowd=crowd), _box(iscrowd=0, bbox=[3, 3, 3, 3])])
    assert row.truth["boxes"] == ((3.0, 3.0, 6.0, 6.0),)


@pytest.mark.parametrize("name", ["images\\a b.jpg", "images/a%20b.jpg", "images\\a%20b.jpg", ".\\images\\a b.jpg"])
def test_names_as_windows_and_the_web_write_them(tmp_path: Path, name: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a b.jpg").write_bytes(b"")
    assert resolve_image(str(tmp_path), name) == str(tmp_path / "images" / "a b.jpg")


def test_a_name_that_is_there_as_it_stands_is_that_file(tmp_path: Path) -> None:
    for name in ("a%20b.jpg", "a b.jpg", "c\\d.jpg"):
        (tmp_path / name).write_bytes(b"")
    assert resolve_image(str(tmp_path), "a%20b.jpg").endswith("a%20b.jpg")
    assert resolve_image(str(tmp_path), "c\\d.jpg").endswith("c\\d.jpg")


@pytest.mark.parametrize(
    "name", ["..\\secret.jpg", "..%2fsecret.jpg", "%2e%2e/secret.jpg", "a%00.jpg", "\\..\\secret.jpg"]
)
def test_another_spelling_does_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"")
    (tmp_path / "in").mkdir()
    with suppress(ValueError):  # refused, or the name of a file inside that is not there
        assert resolve_image(str(tmp_path / "in"), name).startswith(str(tmp_path / "in") + "/")


def test_several_questions_about_one_image_may_share_its_id(tmp_path: Path) -> None:
    """As in LLaVA's own mixtures; they stay on one side of every split."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    rows = [{"id": name, "image": "a.jpg", "conversations": turns} for name in ("7", "7", "7#2", "8", 7)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    records, _ = read_rows(Source(path=str(tmp_path / "rows.json"), format="llava"))
    assert [(row.id, row.group) for row in records] == [("7", "7"), ("7#3", "7"), ("7#2", ""), ("8", ""), ("7#4", "7")]


def _rows(folder: Path, rows: list[dict], format: str, **options: Any) -> list[Any]:
    (folder / "rows.json").write_text(json.dumps(rows))
    return read_rows(Source(path=str(folder / "rows.json"), format=format, **options))[0]


TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "x"}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"video": "a.mp4"}, "the row has video, which is not read"),
        ({"audios": ["a.wav"], "image": "a.jpg"}, "the row has audios"),
        ({"conversations": [{"from": "human", "value": "<video>\nWhat?"}, TURNS[1]]}, "a text holds <video>"),
        (
            {"image_path": "a.jpg"},
            r"its column image_path names one \('a.jpg'\).* data\.train\.columns=\{image: image_path\}",
        ),
        ({"photos": ["d/A.PNG"]}, "its column photos names one"),
        ({"conversations": [*TURNS[:1], TURNS[1] | {"loss": False}, *TURNS]}, r"conversations\[1\] is marked as not"),
        ({"conversations": [*TURNS[:1], TURNS[1] | {"weight": 0}, *TURNS]}, "marked as not to be learned"),
    ],
)
def test_what_would_not_be_seen_or_heard_makes_a_row_bad(tmp_path: Path, row: dict, reason: str) -> None:
    (record,) = _rows(tmp_path, [{"id": "8", "conversations": TURNS} | row], "llava")
    assert isinstance(record, BadRow)
    assert re.search(reason, record.reason)


@pytest.mark.parametrize(
    "row",
    [
        {}, {"video": None, "audios": []}, {"id": "a.jpg"}, {"source": "see the photo a.jpg"},
        {"conversations": [TURNS[0] | {"loss": False}, TURNS[1] | {"loss": True, "weight": 1.0}]}, {"video": False},
        {"videos": [None]}, {"audio": {"bytes": None, "path": None}}, {"note": "what format has photo.jpg"},
        {"conversations": [TURNS[0], TURNS[1] | {"value": "<video src=x>, <video>"}]}, {"answer": "a.png"},
    ],
)  # fmt: skip
def test_text_without_media_stays_a_row(tmp_path: Path, row: dict) -> None:
    (record,) = _rows(tmp_path, [{"id": "8", "conversations": TURNS} | row], "llava")
    assert isinstance(record, SftRecord), record.reason
    assert record.images == ()


def test_a_mapped_column_has_the_image(tmp_path: Path) -> None:
    row = {"id": "9", "photo": "a.jpg", "conversations": TURNS}
    (record,) = _rows(tmp_path, [row], "llava", columns={"image": "photo"})
    assert record.images == (str(tmp_path / "a.jpg"),)


FEATURES = {
    "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    "objects": {"category": {"feature": {"names": ["cup", "bowl"], "_type": "ClassLabel"}, "_type": "List"}},
    "old": [{"names": ["a", "b"], "_type": "ClassLabel"}],
    "struct": {"feature": {"kind": {"names": ["n", "y"], "_type": "ClassLabel"}}, "_type": "Sequence"},
    "count": {"dtype": "int64", "_type": "Value"},
}


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("label", 1, "dog"), ("label", -1, None), ("label", 7, None), ("label", None, None), ("count", 1, 1),
        ("objects", {"category": [1, 0]}, {"category": ["bowl", "cup"]}), ("old", [1, 0], ["b", "a"]),
        ("struct", {"kind": [1]}, {"kind": ["y"]}), ("struct", [{"kind": 1}], [{"kind": "y"}]), ("other", 1, 1),
    ],
)  # fmt: skip
def test_classes_of_datasets_are_their_names(name: str, value: Any, named: Any) -> None:
    assert apply_class_names({name: value}, FEATURES) == {name: named}


def test_parquet_of_datasets_has_class_names(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    about = json.dumps({"info": {"features": {"label": FEATURES["label"]}}})
    table = pyarrow.table({"image": ["a.jpg", "b.jpg"], "label": [0, 1]})
    parquet.write_table(table.replace_schema_metadata({"huggingface": about}), tmp_path / "rows.parquet")
    rows, labels = read_rows(Source(path=str(tmp_path / "rows.parquet"), format="image_csv"))
    assert labels == ["label=cat", "label=dog"]
    assert [row.truth["attributes"] for row in rows] == [{"label": "cat"}, {"label": "dog"}]


def _image(path: Path, size: tuple[int, int], orientation: int = 1) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(path, exif=exif)


def _sized(folder: Path, listed: tuple[Any, Any], bbox: list[float], **options: Any) -> Any:
    """The only row of a file that lists this size of `a.jpg`, measured."""
    data = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": listed[0], "height": listed[1]}],
        "annotations": [_box(bbox=bbox)],
        "categories": DOG,
    }
    (folder / "rows.json").write_text(json.dumps(data))
    rows, _ = read_rows(Source(path=str(folder / "rows.json"), **options))
    return measure_row(rows[0], 50_000_000)


def test_sizes_that_contradict_the_image_are_bad_until_the_job_says_what_boxes_mean(tmp_path: Path) -> None:
    _image(tmp_path / "a.jpg", (64, 48))
    small = _sized(tmp_path, (640, 480), [10, 20, 20, 20])
    assert "lists 640x480 px, and the upright image has 64x48: as of another resolution" in small.reason
    assert _sized(tmp_path, (640, 480), [10, 20, 20, 20], box_frame="listed").truth["boxes"] == ((1.0, 2.0, 3.0, 4.0),)
    assert _sized(tmp_path, (640, 480), [10, 20, 20, 20], box_frame="image").truth["boxes"] == ((10, 20, 30, 40),)
    assert "another shape" in _sized(tmp_path, (640, 300), [10, 20, 20, 20], box_frame="listed").reason
    for listed in ((64, 48), (65, 47), (None, None), ("64", "48"), (0, 48)):
        record = _sized(tmp_path, listed, [10, 20, 20, 20])
        assert record.truth["boxes"] == ((10, 20, 30, 40),)
        assert record.context == {}


# A box of 20 by 10 at the top left of what the camera stored, as it lies in the upright image.
@pytest.mark.parametrize(
    ("orientation", "box"),
    [
        *((2, (43, 2, 63, 12)), (3, (43, 36, 63, 46)), (4, (1, 36, 21, 46))),
        *((5, (2, 1, 12, 21)), (6, (36, 1, 46, 21)), (7, (36, 43, 46, 63)), (8, (2, 43, 12, 63))),
    ],
)
def test_boxes_of_a_photo_that_a_tool_did_not_turn(tmp_path: Path, orientation: int, box: tuple) -> None:
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[2:12, 1:21] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")  # a PNG by its content
    if orientation >= 5:
        assert "width and height are exchanged" in _sized(tmp_path, (64, 48), [1, 2, 20, 10]).reason
        turned = _sized(tmp_path, (48, 64), [1, 2, 20, 10], box_frame="listed")
        assert turned.truth["boxes"] == ((1, 2, 21, 12),), "the file lists this one as it is seen"
    record = _sized(tmp_path, (64, 48), [1, 2, 20, 10], box_frame="listed")
    assert record.truth["boxes"] == (box,)
    x1, y1, x2, y2 = box
    twice = _sized(tmp_path, (128, 96), [2, 4, 40, 20], box_frame="listed")
    assert twice.truth["boxes"] == (box,)
    upright = decode(record.images[0])
    assert (upright[y1:y2, x1:x2] == 255).all()
    assert upright.sum() == stored.sum()


@pytest.mark.parametrize("bbox", [[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], [0.0, 0.5, 1.0, 0.5]])
def test_boxes_that_are_shares_are_not_taken_for_pixels(tmp_path: Path, bbox: list[float]) -> None:
    _image(tmp_path / "a.jpg", (1000, 800))
    record = _sized(tmp_path, (1000, 800), bbox)
    assert "seem to be shares of the image; set box_units=relative_1" in record.reason
    assert isinstance(_sized(tmp_path, (1000, 800), bbox, box_units="relative_1"), SftRecord)
    assert isinstance(_sized(tmp_path, (1000, 800), [0.1, 0.2, 30, 40]), SftRecord)


@pytest.mark.parametrize(
    ("point", "good"), [((0.5, 0.3), False), ((0.0, 1.0), True), ((1.0, 1.0), True), ((1.5, 0.3), True)]
)
def test_a_point_that_is_a_share_is_not_taken_for_a_pixel(point: tuple[float, float], good: bool) -> None:
    record = SftRecord("1", 0, ("a.jpg",), ((1000, 800),), {"output": {}, "box": None, "point": point})
    assert isinstance(settle_boxes(record), SftRecord) is good


@pytest.mark.parametrize(
    ("crowds", "objects", "bad"), [(1, 0, True), (3, 1, True), (1, 1, False), (1, 5, False), (0, 2, False)]
)  # of the only class
def test_a_class_of_crowds_stops_until_the_job_says_what_they_are(
    tmp_path: Path, crowds: int, objects: int, bad: bool
) -> None:
    """CVAT writes every mask as a crowd."""
    boxes = [_box(iscrowd=1)] * crowds + [_box()] * objects
    if bad:
        with pytest.raises(DataError, match=rf"most annotations of dog \({crowds} of {crowds + objects}\) are crowds"):
            _coco(tmp_path, boxes)
    else:
        (row,), _ = _coco(tmp_path, boxes)
        assert len(row.truth["boxes"]) == objects
    for setting, expected in (("objects", crowds + objects), ("skip", objects)):
        (row,), _ = read_rows(Source(path=str(tmp_path / "rows.json"), crowds=setting))
        assert len(row.truth["boxes"]) == expected


def test_what_is_odd_about_a_source_is_reported_with_counts(tmp_path: Path) -> None:
    source = Source(path="rows.json")
    large = [SftRecord(str(i), i, ("a",), ((4000, 3000),), {"boxes": ((1, 2, 900, 990),)}) for i in range(30)]
    crowd = SftRecord("7", 0, ("a",), (), {"boxes": ()}, {"crowds": 3})
    labels = ["Stop_Sign", "stop sign", "dog"]
    notes = find_suspicions(source, summarise(source, [(crowd, crowd), *zip(large, large, strict=True)]), labels)
    assert [note.partition(": ")[2][:30] for note in notes] == [
        "classes 'Stop_Sign', 'stop sig", "3 crowd annotations (iscrowd: ", "no box reaches beyond 1000, th",
    ]  # fmt: skip
    text = [SftRecord("1", 0, (), (), {"answer": "x"})]
    assert "no row has an image" in find_suspicions(source, summarise(source, zip(text, text, strict=True)), [])[0]


def test_classes_without_a_box_are_reported() -> None:
    (note,) = tell_unused(["dog", *"abcd"], {"dog"})
    assert note.startswith(
        "no row has a box of 'a', 'b', 'c' and 1 more, but the question asks for it; task.labels sets"
    )
    assert tell_unused(["dog"], {"dog"}) == tell_unused(["state=wet"], {"dog"}) == tell_unused(["dog"], set()) == []


def test_labelmes_names_for_no_class_are_none(tmp_path: Path) -> None:
    names = ["_background_", "dog", "__ignore__", "cat"]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    assert _coco(tmp_path, [_box()], categories)[1] == ["dog", "cat"]
    assert _coco(tmp_path, [_box(), _box(category_id=0)], categories)[1] == ["_background_", "dog", "cat"]


def test_clean_rows_raise_no_suspicion() -> None:
    """A hundred sources of boxes anywhere in images of any size."""
    rng = np.random.default_rng(0)
    for number in range(100):
        rows = []
        for i in range(int(rng.integers(1, 60))):
            width, height = (int(v) for v in rng.integers(40, 4000, 2))
            low = rng.uniform(0, 0.8, 2)
            high = low + rng.uniform(0.1, 0.2, 2)
            box = (low[0] * width, low[1] * height, high[0] * width, high[1] * height)
            rows.append(SftRecord(str(i), i, ("a",), ((width, height),), {"boxes": (box,), "labels": ("dog",)}))
        summary = summarise(Source(path="rows.json"), zip(rows, rows, strict=True))
        assert find_suspicions(Source(path="rows.json"), summary, ["dog", "cat", f"class {number}"]) == []
        assert all(isinstance(settle_boxes(row), SftRecord) for row in rows)


def test_a_link_that_leads_out_is_followed_where_the_job_says_so(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "store" / "s.jpg").write_bytes(b"")
    (tmp_path / "in" / "s.jpg").symlink_to(tmp_path / "store" / "s.jpg")
    with pytest.raises(ValueError, match=r"it is a link to .*store/s.jpg; .* set follow_links=true"):
        resolve_image(str(tmp_path / "in"), "s.jpg")
    assert resolve_image(str(tmp_path / "in"), "s.jpg", follow_links=True) == str(tmp_path / "in" / "s.jpg")
    for name in ("../store/s.jpg", "a/../../store/s.jpg", str(tmp_path / "store" / "s.jpg")):
        with pytest.raises(ValueError, match="lies outside"):
            resolve_image(str(tmp_path / "in"), name, follow_links=True)


BOXES = ((5.0, 5.0, 20.0, 20.0), (5.0, 5.0, 5.0, 15.0), (40.0, 10.0, 67.0, 20.0), (90.0, 90.0, 99.0, 99.0))


@pytest.mark.parametrize(
    ("setting", "num_boxes", "note"),
    [
        ("raise", 4, ""),
        ("clip", 2, "1 boxes cut to their image and 2 boxes left out (data.on_bad_box=clip)"),
        ("drop", 1, "3 boxes left out (data.on_bad_box=drop)"),
    ],
)
def test_one_bad_box_need_not_cost_the_others(setting: str, num_boxes: int, note: str) -> None:
    row = SftRecord("1", 0, ("a",), ((64, 48),), {"boxes": BOXES, "labels": tuple("abcd")})
    record = settle_boxes(row, setting)
    assert len(record.truth["boxes"]) == len(record.truth["labels"]) == num_boxes
    if setting == "clip":
        assert record.truth["boxes"] == (BOXES[0], (40.0, 10.0, 64.0, 20.0))
        assert record.truth["labels"] == ("a", "c")
    source = Source(path="rows.json")
    notes = find_suspicions(source, summarise(source, [(row, record)]), "abcd", setting)
    assert notes == ([f"rows.json: {note}"] if note else [])


@pytest.mark.parametrize(
    ("data", "tool"),
    [
        ([{"id": 1, "annotations": [], "data": {"image": "a.jpg"}}], "Label Studio: set format=label_studio"),
        ({"version": "5", "shapes": [], "imagePath": "a.jpg"}, "labelme.*format=labelme"),
        ({"_via_img_metadata": {}}, "VIA: export COCO"),
        ({"name": "x", "samples": []}, "FiftyOne: export COCO"),
        ([{"image": "a.jpg", "objects": {"bbox": []}}], "format=hf_objects"),
        ([{"conversations": []}], "format=llava"),
    ],
)
def test_a_file_of_another_tool_is_named_with_what_to_export(tmp_path: Path, data: Any, tool: str) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=rf"not COCO; .*looks like a file of .*{tool}"):
        read_rows(Source(path=str(tmp_path / "rows.json"), format="coco"))
    if "export" in tool:
        with pytest.raises(DataError, match=rf"looks like a file of {tool.partition(':')[0]}, which is not read"):
            read_rows(Source(path=str(tmp_path / "rows.json")))


@pytest.mark.parametrize(("name", "advice"), [("data.yaml", "format=yolo"), ("a.xml", "format=voc")])
def test_a_suffix_of_another_tool_is_reported_with_the_way_out(tmp_path: Path, name: str, advice: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=rf"rows are not read from .*{advice}"):
        read_rows(Source(path=str(tmp_path / name), format="llava"))


def test_a_class_of_crowds_among_others_stops_where_it_is_no_chance(tmp_path: Path) -> None:
    categories = [*DOG, {"id": 2, "name": "person"}]
    dogs, crowd = [_box()] * 20, _box(category_id=2, iscrowd=1)
    (row,), _ = _coco(tmp_path, [*dogs, crowd], categories)
    assert len(row.truth["boxes"]) == 20
    with pytest.raises(DataError, match=r"most annotations of person \(5 of 5\) are crowds"):
        _coco(tmp_path, [*dogs, *[crowd] * 5], categories)


def test_an_image_that_cannot_be_read_again_leaves_no_unturned_boxes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _image(tmp_path / "a.jpg", (64, 48), 6)

    def refuse(image: str) -> int:
        raise OSError("the store is away")

    monkeypatch.setattr("ray_vlm.data.measure.read_orientation", refuse)
    record = _sized(tmp_path, (64, 48), [1, 2, 20, 10], box_frame="listed")
    assert record == BadRow(0, "1", "image cannot be read (the store is away); fetch the file again, or remove the row")


def test_an_image_that_is_gone_keeps_its_place_in_a_run_that_goes_on(tmp_path: Path) -> None:
    _image(tmp_path / "a.jpg", (64, 48), 6)
    record = _sized(tmp_path, (64, 48), [1, 2, 20, 10], box_frame="listed")
    (tmp_path / "a.jpg").unlink()
    rows, _ = read_rows(Source(path=str(tmp_path / "rows.json"), box_frame="listed"))
    assert isinstance(measure_row(rows[0], 50_000_000), BadRow)
    again = measure_row(rows[0], 50_000_000, known={record.images[0]: (48, 64)})
    assert (again.id, again.sizes) == ("1", ((48, 64),))


def test_what_other_programs_call_objects_and_prompts_is_reported_with_what_to_write(tmp_path: Path) -> None:
    question = [{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": "[1, 2, 3, 4]"}]
    rows: dict[str, dict[str, Any]] = {
        "objects": {"image": "a.jpg", "objects": {"bbox": [[1, 2, 10, 10]], "category": [0]}},
        "prompt": {"image": "a.jpg", "prompt": question},
    }
    reasons = {}
    for format, row in rows.items():
        (tmp_path / "rows.json").write_text(json.dumps([row]))
        (bad,), _ = read_rows(Source(path=str(tmp_path / "rows.json"), format=format))
        reasons[format] = bad.reason
    assert reasons["objects"].endswith("(where there are categories, bbox is mostly x, y, width, height)")
    assert reasons["prompt"].endswith("take the answer out, and keep it in a column of its own for rewards")
