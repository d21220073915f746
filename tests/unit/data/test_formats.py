"""Every format and every container gives the same records, whatever tool wrote the file."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.check_method import FORMAT_TASKS
from ray_vlm.config.data import Source
from ray_vlm.data.image_paths import resolve_image
from ray_vlm.data.records import BadRow, PreferenceRecord, PromptRecord, SftRecord
from ray_vlm.data.sources.formats import FORMATS, read_rows
from ray_vlm.data.sources.tables import read_table
from ray_vlm.errors import DataError
from ray_vlm.storage import open_file, read_bytes, split_address
from ray_vlm.tasks import TASKS

GUI = ["Task_id", "Image_id", "Instruction", "Output", "Grounding"]


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows in the container that the suffix names; a CSV as Excel writes it, with a BOM and CRLF."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        path.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def _read(path: str, format: str, **options: Any) -> tuple[list[Any], list[str]]:
    return read_rows(Source(path=path, format=format, **options))


def _one(tmp_path: Path, format: str, row: dict[str, Any], name: str = "rows.jsonl", **options: Any) -> Any:
    records, _ = _read(_write(tmp_path / name, [row]), format, **options)
    return records[0]


def test_coco(tmp_path: Path) -> None:
    data = {
        "images": [{"id": 7, "file_name": "a.jpg", "site": "north"}, {"id": 8, "file_name": "b.jpg", "site": 3}],
        "annotations": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 2, "name": "dog"}, {"id": 1, "name": "cat"}],
    }
    (tmp_path / "rows.json").write_text(json.dumps(data))
    rows, labels = _read(str(tmp_path / "rows.json"), "coco", columns={"group": "site"}, box_units="relative_1000")
    assert labels == ["dog", "cat"]
    truth = {"boxes": ((1.0, 2.0, 4.0, 6.0),), "labels": ("dog",)}
    image = str((tmp_path / "a.jpg").resolve())
    assert rows[0] == SftRecord("7", 0, (image,), (), truth, {"box_units": "relative_1000"}, "north")
    assert (rows[1].truth, rows[1].context, rows[1].group) == ({"boxes": (), "labels": ()}, {}, "3")


@pytest.mark.parametrize("columns", [{"id": "name"}, {"group": "place"}])
def test_columns_that_coco_cannot_rename_are_refused(tmp_path: Path, columns: dict[str, str]) -> None:
    data = {"images": [{"id": 7}], "annotations": [], "categories": [{"id": 2, "name": "dog"}]}
    (tmp_path / "rows.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match="columns"):
        _read(str(tmp_path / "rows.json"), "coco", columns=columns)


LLAVA = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]


def test_llava(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "Be brief."}, *LLAVA, {"from": "human", "value": "Sure?"}]
    turns.append({"from": "gpt", "value": "Yes."})
    record = _one(tmp_path, "llava", {"id": 5, "image": "a.jpg", "conversations": turns})
    assert (record.id, record.images) == ("5", (str((tmp_path / "a.jpg").resolve()),))
    assert record.truth == {"answer": "Yes."}
    assert record.context == {
        "turns": (
            ("system", "Be brief."),
            ("user", "<image>\nWhat?"),
            ("assistant", "A dog."),
            ("user", "Sure?"),
        )
    }


def test_llava_with_several_images_keeps_its_tags(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "The first."}]
    for name in ("image", "images"):
        record = _one(tmp_path, "llava", {name: ["a.jpg", "b.jpg"], "conversations": turns})
        assert len(record.images) == 2
        assert record.context["turns"] == (("user", "<image> or <image>?"),)
        assert record.id == "0"


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.tsv", "rows.parquet"])
def test_containers_give_the_same_conversation(tmp_path: Path, name: str) -> None:
    turns: Any = json.dumps(LLAVA) if name.endswith("sv") else LLAVA
    record = _one(tmp_path, "llava", {"id": "x", "image": "a.jpg", "conversations": turns}, name)
    expected = SftRecord("x", 0, (str((tmp_path / "a.jpg").resolve()),), (), {"answer": "A dog."})
    assert record == SftRecord(**{**vars(expected), "context": {"turns": (("user", "<image>\nWhat?"),)}})


def test_rows_under_data_in_json(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({"data": [{"image": "a.jpg", "conversations": LLAVA}]}))
    assert len(_read(str(tmp_path / "rows.json"), "llava")[0]) == 1


def test_messages_with_lists_of_parts(tmp_path: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A dog."}]
    record = _one(tmp_path, "messages", {"messages": messages, "images": ["a.jpg"]})
    assert (record.truth, record.context) == ({"answer": "A dog."}, {"turns": (("user", "<image>What?"),)})


def test_messages_with_images_inside_their_parts(tmp_path: Path) -> None:
    parts = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A dog."}]
    record = _one(tmp_path, "messages", {"messages": messages})
    assert record.images == (str((tmp_path / "a.jpg").resolve()),)


@pytest.mark.parametrize(
    ("kind", "declared", "units"),
    [
        (None, "pixels", None),
        (None, "relative_1000", "relative_1000"),
        ("real", "relative_1000", None),
        ("norm1", "pixels", "relative_1"),
    ],
)
def test_messages_with_objects(tmp_path: Path, kind: str | None, declared: str, units: str | None) -> None:
    messages = [
        {"role": "user", "content": "<image><image>Where is <ref-object>?"},
        {"role": "assistant", "content": "At <bbox>, or at <bbox>."},
    ]
    objects = {"ref": ["dog"], "bbox": [[1, 2, 3, 4], [5, 6]], "image_id": [0, 1], "bbox_type": kind}
    row = {"messages": messages, "images": ["a.jpg", "b.jpg"], "objects": objects}
    context = _one(tmp_path, "messages", row, box_units=declared).context
    assert context["refs"] == ("dog",)
    assert context["boxes"] == ((1.0, 2.0, 3.0, 4.0), (5.0, 6.0))
    assert context["image_of"] == (0, 1)
    assert context.get("box_units") == units


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv"])
def test_objects(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, Any]] = [
        {"images": ["a.jpg"], "objects": {"ref": ["dog", "cat"], "bbox": [[1, 2, 3, 4], [5, 6, 7, 8]]}},
        {"images": ["a.jpg"], "objects": {"ref": [], "bbox": []}},
    ]
    if name == "rows.csv":
        rows = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
    records, labels = _read(_write(tmp_path / name, rows), "objects")
    assert records[0].truth == {"boxes": ((1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0)), "labels": ("dog", "cat")}
    assert (records[1].truth, records[1].context) == ({"boxes": (), "labels": ()}, {})
    assert labels == ["cat", "dog"]


def test_image_csv(tmp_path: Path) -> None:
    row = {"image": "a.jpg", "x1": "1", "y1": "2.5", "x2": "3", "y2": "4", "object": " drain", "condition": "open"}
    empty = row | {"x1": "", "y1": "", "x2": "", "y2": "", "condition": "blocked, half"}
    records, labels = _read(_write(tmp_path / "rows.csv", [row, empty]), "image_csv", box_units="relative_1000")
    assert records[0].truth == {"attributes": {"object": "drain", "condition": "open"}}
    assert records[0].context == {"box": (1.0, 2.5, 3.0, 4.0), "box_units": "relative_1000"}
    assert records[1].context == {}
    assert labels == ["object=drain", "condition=blocked, half", "condition=open"]


def test_image_csv_with_other_names(tmp_path: Path) -> None:
    row = {"Photo": "a.jpg", "Class": 3, "Site": "north", "Notes": "none", "bbox": "[1, 2, 3, 4]"}
    columns = {"image": "Photo", "object": "Class", "group": "Site"}
    record = _one(tmp_path, "image_csv", row, "rows.parquet", columns=columns)
    assert record.truth == {"attributes": {"object": "3"}}
    assert (record.context, record.group) == ({"box": (1.0, 2.0, 3.0, 4.0)}, "north")
    del columns["object"]
    record = _one(tmp_path, "image_csv", row, "rows.parquet", columns=columns)
    assert record.truth == {"attributes": {"Class": "3", "Notes": "none"}}


def test_parquet_with_images_inside(tmp_path: Path) -> None:
    struct = {"image": {"bytes": b"\xff\xd8abc", "path": "../elsewhere.jpg"}, "label": "dog"}
    assert _one(tmp_path, "image_csv", struct, "rows.parquet").images == (b"\xff\xd8abc",)
    assert _one(tmp_path, "image_csv", {"image": b"\x89PNG", "label": "dog"}, "rows.parquet").images == (b"\x89PNG",)
    path = {"image": {"bytes": None, "path": "a.jpg"}, "label": "dog"}
    assert _one(tmp_path, "image_csv", path, "rows.parquet").images == (str((tmp_path / "a.jpg").resolve()),)
    several = {"images": [{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}], "messages": []}
    several["messages"] = [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "Two."}]
    assert _one(tmp_path, "messages", several, "rows.parquet").images == (b"1", b"2")


def _steps() -> list[dict[str, str]]:
    rows = []
    for task, step in ((1, 0), (1, 1), (2, 0), (10, 0), (1, 2)):
        output = json.dumps({"action_type": "tap", "text": f"ü {step}"})
        grounding = ("", "{}", '{"bbox_2d": [1, 2, 3, 4]}', "[5, 6]", '{"coordinate": [7, 8]}')[len(rows)]
        rows.append(dict(zip(GUI, (str(task), f"{task}_{step}.png", f"Goal {task}", output, grounding), strict=True)))
    return rows


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_gui_csv(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, Any]] = _steps()
    if name == "rows.jsonl":
        rows = [row | {k: json.loads(row[k] or "null") for k in ("Output", "Grounding")} for row in rows]
    records, labels = _read(_write(tmp_path / name, rows), "gui_csv")
    assert [r.id for r in records] == ["1/0", "1/1", "2/0", "10/0", "1/2"]
    assert [r.group for r in records] == ["1", "1", "2", "10", "1"]
    assert [r.truth["box"] for r in records] == [None, None, (1.0, 2.0, 3.0, 4.0), None, None]
    assert [r.truth["point"] for r in records] == [None, None, None, (5.0, 6.0), (7.0, 8.0)]
    assert records[4].context == {
        "instruction": "Goal 1",
        "task": "1",
        "step": 2,
        "history": ('{"action":"tap","text":"ü 0"}', '{"action":"tap","text":"ü 1"}'),
    }
    assert list(records[4].truth["output"].items()) == [("action", "tap"), ("text", "ü 2")]
    assert records[0].images == (str((tmp_path / "1_0.png").resolve()),)
    assert labels == []


def test_a_missing_prompt_names_the_setting_to_write(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image>Why?"}]
    bad = _one(tmp_path, "prompt", {"image": "a.jpg", "conversations": turns})
    assert bad.reason == (
        "no prompt or problem; the row has image, conversations. Fill it, or name its column, as in "
        "data.train.columns={prompt: conversations}"
    )
    record = _one(tmp_path, "prompt", {"image": "a.jpg", "conversations": turns}, columns={"prompt": "conversations"})
    assert record.prompt == (("user", "<image>Why?"),)
    two = _one(tmp_path, "prompt", {"image": "a.jpg", "conversations": turns, "level": 2})
    assert two.reason.endswith("data.train.columns={prompt: NAME}")


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"task_start": "2"}, [2, 3]),
        ({"task_end": "2"}, [0, 1, 2, 4]),
        ({"task_start": "2", "task_end": "10"}, [2, 3]),
        ({"max_tasks": 1}, [0, 1, 4]),
        ({"task_start": "2", "max_tasks": 1}, [2]),
        ({"max_tasks": 2, "max_rows": 2}, [0, 1]),
    ],
)
def test_gui_tasks_are_kept_by_id(tmp_path: Path, options: dict[str, Any], rows: list[int]) -> None:
    records, _ = _read(_write(tmp_path / "rows.csv", _steps()), "gui_csv", **options)
    assert [r.row for r in records] == rows


@pytest.mark.parametrize(
    ("output", "written"),
    [
        ({"action": {"type": "tap", "text": "hi"}, "reason": "x"}, '{"action":"tap","text":"hi","reason":"x"}'),
        ({"reason": "x", "action": {"name": "tap"}}, '{"action":"tap","reason":"x"}'),
        ({"type": {"action": "tap", "type": "button"}}, '{"action":"tap","type":"button"}'),
        ({"action": {"action_type": "tap", "name": "Save"}}, '{"action":"tap","name":"Save"}'),
        ({"action": "tap", "type": "button"}, '{"action":"tap","type":"button"}'),
    ],
)
def test_a_nested_action_is_a_step_like_a_flat_one(tmp_path: Path, output: dict[str, Any], written: str) -> None:
    rows = [row | {"Output": json.dumps(output), "Task_id": "1"} for row in _steps()[:2]]
    records, _ = _read(_write(tmp_path / "rows.csv", rows), "gui_csv")
    assert records[0].truth["output"] == json.loads(written)
    assert next(iter(records[0].truth["output"])) == "action"
    assert records[1].context["history"] == (written,)


@pytest.mark.parametrize(
    ("grounding", "box", "point"),
    [
        ({"x": 5, "y": 6.5}, None, (5.0, 6.5)),
        ({"x1": 1, "y1": 2, "x2": 3, "y2": 4}, (1.0, 2.0, 3.0, 4.0), None),
        ({"x": 1, "y": 2, "width": 10, "height": 20}, (1.0, 2.0, 11.0, 22.0), None),
        ({"point": {"x": 5, "y": 6}}, None, (5.0, 6.0)),
        ({"point": [5, 6], "x": 8, "y": 9}, None, (5.0, 6.0)),
        ({"bbox": {"x1": 1, "y1": 2, "x2": 3, "y2": 4}, "width": 1920}, (1.0, 2.0, 3.0, 4.0), None),
        ({"bbox": None, "x": 5, "y": 6}, None, (5.0, 6.0)),
        ({"x": None, "y": None}, None, None),
        ({"point": {"x": None, "y": None}}, None, None),
        ({"bbox": None}, None, None),
    ],
)
def test_groundings_by_name_and_nested(tmp_path: Path, grounding: dict[str, Any], box: Any, point: Any) -> None:
    row = _steps()[0] | {"Grounding": json.dumps(grounding)}
    (record,), _ = _read(_write(tmp_path / "rows.csv", [row]), "gui_csv")
    assert (record.truth["box"], record.truth["point"]) == (box, point)


def test_gui_tasks_with_names_are_kept_by_their_place(tmp_path: Path) -> None:
    rows = [row | {"Task_id": f"t{name}"} for row, name in zip(_steps(), "zabcz", strict=True)]
    path = _write(tmp_path / "rows.csv", rows)
    assert [r.row for r in _read(path, "gui_csv", task_start="ta", task_end="tb")[0]] == [1, 2]
    with pytest.raises(DataError, match="task_start='t9' is no Task_id"):
        _read(path, "gui_csv", task_start="t9")
    with pytest.raises(DataError, match="no task lies from"):
        _read(path, "gui_csv", task_start="tb", task_end="ta")


def test_a_bad_step_leaves_no_gap_in_the_memory(tmp_path: Path) -> None:
    rows = _steps()
    rows[0]["Grounding"] = "[1, 2, 3]"
    records, _ = _read(_write(tmp_path / "rows.csv", rows), "gui_csv")
    assert isinstance(records[0], BadRow)
    assert [len(r.context["history"]) for r in records[1:]] == [1, 0, 0, 2]
    rows[0]["Output"] = "{"
    records, _ = _read(_write(tmp_path / "rows.csv", rows), "gui_csv")
    assert [(len(r.context["history"]), r.context["step"]) for r in records[1:]] == [(0, 1), (0, 0), (0, 0), (1, 2)]


PREFERENCES: dict[str, dict[str, Any]] = {
    "TRL texts": {"prompt": "What?", "chosen": "A dog.", "rejected": "A cat."},
    "TRL turns": {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]}],
        "chosen": [{"role": "assistant", "content": "A dog."}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
    },
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}],
        "chosen": {"from": "gpt", "value": "A dog."},
        "rejected": {"from": "gpt", "value": "A cat."},
    },
    "ms-swift": {
        "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A dog."}],
        "rejected_response": "A cat.",
    },
}


@pytest.mark.parametrize("shape", PREFERENCES)
@pytest.mark.parametrize("image", [{"images": ["a.jpg"]}, {"image": "a.jpg"}])
def test_preference(tmp_path: Path, shape: str, image: dict[str, Any]) -> None:
    record = _one(tmp_path, "preference", PREFERENCES[shape] | image)
    expected = ((("user", "<image>\nWhat?"),), "A dog.", "A cat.")
    assert isinstance(record, PreferenceRecord)
    assert (record.prompt, record.chosen, record.rejected) == expected
    assert len(record.images) == 1


@pytest.mark.parametrize("name", ["prompt", "problem"])
def test_prompt(tmp_path: Path, name: str) -> None:
    row = {name: "How many?", "images": ["a.jpg"], "solution": [1, 2], "level": 3}
    record = _one(tmp_path, "prompt", row)
    assert isinstance(record, PromptRecord)
    assert record.prompt == (("user", "<image>\nHow many?"),)
    assert record.columns == {"solution": [1, 2], "level": 3}
    renamed = _one(tmp_path, "prompt", row, columns={"answer": "solution", "group": "level"})
    assert (renamed.columns, renamed.group) == ({"answer": [1, 2]}, "3")


def test_columns_that_no_row_has_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", [{"image": "a.jpg", "conversations": LLAVA}])
    with pytest.raises(DataError, match=r"no column 'photo', named by columns\.image; it has image, conversations"):
        _read(path, "llava", columns={"image": "photo"})


def test_a_mapped_column_wins_over_one_of_that_kind(tmp_path: Path) -> None:
    row = {"photo": "b.jpg", "images": ["a.jpg"], "conversations": LLAVA}
    record = _one(tmp_path, "llava", row, columns={"image": "photo"})
    assert record.images == (str((tmp_path / "b.jpg").resolve()),)


def test_max_rows_takes_the_first(tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.csv", [{"image": "a.jpg", "label": str(i)} for i in range(5)])
    records, labels = _read(path, "image_csv", max_rows=2)
    assert [r.row for r in records] == [0, 1]
    assert labels == ["label=0", "label=1"]


def test_a_quoted_cell_may_hold_lines_and_quotes(tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "label": 'one\n"two", three'}, {"image": "b.jpg", "label": "x" * 200_000}]
    records, _ = _read(_write(tmp_path / "rows.csv", rows), "image_csv")
    assert [r.truth["attributes"]["label"] for r in records] == ['one\n"two", three', "x" * 200_000]


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert read_table(str(tmp_path / "rows.jsonl")).rows == [(0, {"a": 1}), (1, {"a": 2})]


@pytest.fixture
def memory() -> str:
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/set/rows.jsonl", json.dumps({"image": "pictures/a.jpg", "conversations": LLAVA}).encode())
    system.pipe("/set/pictures/a.jpg", b"\xff\xd8abc")
    return "memory://set/rows.jsonl"


def test_rows_and_images_on_a_file_system_of_fsspec(memory: str) -> None:
    record = _read(memory, "llava")[0][0]
    assert record.images == ("memory://set/pictures/a.jpg",)
    assert read_bytes(record.images[0]) == b"\xff\xd8abc"
    with open_file(record.images[0]) as file:
        file.seek(2)
        assert file.read(3) == b"abc"
    with pytest.raises(DataError, match="no such file"):
        _read("memory://set/none.jsonl", "llava")


def test_rows_and_images_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    from ray_vlm.storage import Store, full_address

    folder = f"{bucket.partition('?')[0].rstrip('/')}/formats test"
    store = Store(full_address(bucket))
    store.write("formats test/rows.jsonl", json.dumps({"image": "a#1 %.jpg", "conversations": LLAVA}).encode())
    store.write("formats test/a#1 %.jpg", b"abc")
    record = _read(f"{folder}/rows.jsonl", "llava")[0][0]
    assert record.images == (f"{folder}/a#1 %.jpg",)
    assert read_bytes(record.images[0]) == b"abc"


def test_remote_images_stay_under_their_root() -> None:
    root = "s3://b/images?region=eu"
    assert resolve_image(root, "x/a.jpg") == "s3://b/images/x/a.jpg?region=eu"
    assert resolve_image(root, "s3://b/images/a.jpg") == "s3://b/images/a.jpg?region=eu"
    assert split_address("s3://b/images/rows.csv?region=eu")[0] == "s3://b/images?region=eu"
    assert split_address("s3://b/rows.csv")[0] == "s3://b"
    for name in ("../a.jpg", "/a.jpg", "s3://other/a.jpg", "x/../../a.jpg", "gs://b/a.jpg", "a::file:///etc/passwd"):
        with pytest.raises(ValueError, match="outside image_root"):
            resolve_image(root, name)


def test_local_images_stay_under_their_root(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "x").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    for name in ("a.jpg", "x/../a.jpg", str(root / "a.jpg"), f"file://{root}/a.jpg"):
        assert resolve_image(str(root), name) == str((root / "a.jpg").resolve())
    for name in ("../secret.jpg", "link.jpg", "/etc/passwd", f"{root}-other/a.jpg", "s3://b/a.jpg"):
        with pytest.raises(ValueError, match="outside image_root"):
            resolve_image(str(root), name)


def test_every_format_says_which_tasks_it_feeds() -> None:
    formats = set(Source.model_fields["format"].annotation.__args__)
    known = {*FORMAT_TASKS, "preference", "prompt", "rec"}
    assert formats == {*known, "auto"}
    assert set(FORMATS) <= known
    assert set(FORMAT_TASKS.values()) == set(TASKS)
