"""Sources are read in pieces: joined they are the whole, each stands alone, and no file is held."""

import csv
import io
import json
import os
import pickle
import random
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from ray_vlm.config.data import Source
from ray_vlm.data.image_paths import resolve_image
from ray_vlm.data.records import BadRow
from ray_vlm.data.sources import pieces as pieces_module
from ray_vlm.data.sources.formats import SourceReader, labels_of_piece, merge_labels, read_rows, unique_ids
from ray_vlm.data.sources.pieces import MAX_LINE_BYTES
from ray_vlm.data.sources.tables import open_table, read_table
from ray_vlm.errors import DataError

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]
LLAVA = [{"id": str(i), "image": f"{i % 3}.jpg", "conversations": TURNS} for i in range(23)]
CLASSES = [{"id": str(i // 2), "image": f"{i}.jpg", "place": f"p{i % 3}", "label": f"é{i % 5}"} for i in range(23)]
STEP = {"Image_id": "a.png", "Instruction": "Open it.", "Output": '{"action": "wait"}', "Grounding": ""}
STEPS = [STEP | {"Task_id": str(i // 4)} for i in range(23)]
COCO = {
    "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(23)],
    "annotations": [{"image_id": i % 25, "category_id": 1 + i % 2, "bbox": [1, 2, 3, 4]} for i in range(40)],
    "categories": [{"id": 2, "name": "dog"}, {"id": 1, "name": "cat"}],
}


def _write(path: Path, rows: Any) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table, max_chunksize=9)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=9)
    return path


CASES: list[tuple[str, str, Any]] = [
    *((name, "llava", LLAVA) for name in ("a.jsonl", "a.json", "a.parquet", "a.arrow")),
    ("data.json", "llava", {"about": {"by": ["x"]}, "data": LLAVA, "more": 1}),
    *((name, "image_csv", CLASSES) for name in ("a.jsonl", "a.json", "a.parquet", "a.arrow", "a.csv", "a.tsv")),
    *((name, "gui_csv", STEPS) for name in ("a.jsonl", "a.csv")),
    ("a.json", "coco", COCO),
]


@pytest.mark.parametrize("max_rows", [None, 1, 8, 12])
@pytest.mark.parametrize(("name", "format", "rows"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_pieces_of_any_size_joined_are_the_whole(
    tmp_path: Path, name: str, format: str, rows: Any, max_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(path=str(_write(tmp_path / name, rows)), format=format, max_rows=max_rows)
    whole, labels = read_rows(source)
    assert len(whole) == (max_rows or 23) + (format == "coco")  # the annotations of images that are not listed
    reader = SourceReader(source)
    ids = [row.id for piece in reader.pieces() for row in reader.read(piece)]
    changes = unique_ids(source, ids, [isinstance(row, BadRow) for row in whole])
    monkeypatch.setattr(pieces_module, "_BLOCK", 50)
    for size in (1, 4, 9, 100):
        pieces = list(reader.pieces(size))
        assert all(piece.num_rows <= size for piece in pieces)
        assert [piece.first_row for piece in pieces] == [
            sum(p.num_rows for p in pieces[:i]) for i in range(len(pieces))
        ]
        assert all(type(value) in (int, str, tuple) for piece in pieces for value in vars(piece).values())
        other = pickle.loads(pickle.dumps(reader))
        read = [other.read(piece) for piece in pickle.loads(pickle.dumps(pieces[::-1]))][::-1]
        assert [len(records) for records in read] == [piece.num_rows for piece in pieces]
        joined = [row for records in read for row in records]
        assert [changes[i][0] if i in changes else row.id for i, row in enumerate(joined)] == [row.id for row in whole]
        assert [replace(row, id="", group="") if i in changes else row for i, row in enumerate(joined)] == [
            replace(row, id="", group="") if i in changes else row for i, row in enumerate(whole)
        ]
        listed = [labels_of_piece(piece, records) for piece, records in zip(pieces, read, strict=True)]
        assert merge_labels(source, listed) == labels


def _prints(source: Source) -> list[str]:
    return [piece.fingerprint for piece in SourceReader(source).pieces(4)]


@pytest.mark.parametrize(("name", "format"), [("a.jsonl", "llava"), ("a.json", "llava"), ("a.csv", "image_csv")])
def test_a_change_of_one_row_leaves_the_other_pieces(tmp_path: Path, name: str, format: str) -> None:
    rows = LLAVA if format == "llava" else CLASSES
    source = Source(path=str(_write(tmp_path / name, rows)), format=format)
    before = _prints(source)
    assert len(set(before)) == len(before) == 6
    os.utime(source.path, (1, 1))
    assert _prints(source) == before
    _write(tmp_path / name, [*rows[:9], rows[9] | {"image": "another one.jpg"}, *rows[10:]])
    assert [a == b for a, b in zip(before, _prints(source), strict=True)] == [True, True, False, True, True, True]
    _write(tmp_path / name, [*rows, *rows[:5]])
    assert [a == b for a, b in zip(before, _prints(source), strict=False)] == [True] * 5 + [False]
    _write(tmp_path / name, rows[1:])
    assert set(before).isdisjoint(_prints(source))  # the numbers of all rows are other ones
    assert _prints(source.model_copy(update={"max_rows": 6})) != _prints(source)[:2]


def test_a_change_of_coco_leaves_the_pieces_of_other_images(tmp_path: Path) -> None:
    source = Source(path=str(_write(tmp_path / "a.json", COCO)))
    before = _prints(source)
    assert before == _prints(source)
    boxes = [*COCO["annotations"][:9], COCO["annotations"][9] | {"bbox": [5, 5, 5, 5]}, *COCO["annotations"][10:]]
    _write(tmp_path / "a.json", COCO | {"annotations": boxes})
    assert [a == b for a, b in zip(before, _prints(source), strict=True)] == [True, True, False, True, True, True]
    _write(tmp_path / "a.json", COCO | {"categories": COCO["categories"][::-1]})
    assert _prints(source) == [_prints(source)[0], *before[1:]] != before  # the first piece has the class names


def test_every_row_depends_on_the_names_that_are_attributes(tmp_path: Path) -> None:
    source = Source(path=str(_write(tmp_path / "a.jsonl", CLASSES)), format="image_csv")
    before = _prints(source)
    _write(tmp_path / "a.jsonl", [*CLASSES[:-1], CLASSES[-1] | {"color": "red"}])
    assert set(before).isdisjoint(_prints(source))
    named = source.model_copy(update={"columns": {"label": "label"}})
    assert _prints(named)[:5] == [name.partition("-")[0] for name in before[:5]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.arrow"])
def test_a_changed_file_is_another_file(tmp_path: Path, name: str) -> None:
    source = Source(path=str(_write(tmp_path / name, CLASSES)), format="image_csv")
    reader = SourceReader(source)
    piece = list(reader.pieces(4))[2]
    before = reader.read(piece)
    _write(tmp_path / name, [row | {"label": "x" * 9} for row in CLASSES])
    os.utime(source.path, (1, 1))
    if name == "a.csv":
        assert reader.read(piece) == before  # its piece has the rows
    else:
        with pytest.raises(DataError, match=r"changed while it was read\. Start again"):
            reader.read(piece)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match="no such file"):
        list(SourceReader(source).pieces())


def test_a_bad_line_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in CLASSES]
    lines[10:10] = ["", "{", "  "]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines))
    reader = SourceReader(Source(path=str(tmp_path / "a.jsonl"), format="image_csv"))
    pieces = list(reader.pieces(4))
    bad = [row.reason for row in reader.read(pieces[2]) if isinstance(row, BadRow)]
    assert len(bad) == 1
    assert bad[0].startswith("line 12 is not JSON")
    assert sum(piece.num_rows for piece in pieces) == 24
    assert [piece.first_line for piece in pieces[2:4]] == [9, 15]


@pytest.mark.parametrize("size", [MAX_LINE_BYTES - 1, MAX_LINE_BYTES, MAX_LINE_BYTES + 5_000_000])
def test_a_long_line_is_not_held(tmp_path: Path, size: int) -> None:
    good = b'{"image": "a.jpg", "label": "dog"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + b" " * size + b"\n" + b"x" * size + b"\n" + good)
    (tmp_path / "a.csv").write_bytes(b'image,label\na.jpg,dog\n"' + b"x" * size + b"\na.jpg,dog\n")
    for name, number in (("a.jsonl", 3), ("a.csv", 3)):
        rows = read_table(str(tmp_path / name)).rows
        assert [isinstance(row, BadRow) for row in rows] == [False, True, False]
        length = size + 1 + (name == "a.csv")
        words = f"line {number} is {length} bytes long, above" if length > MAX_LINE_BYTES else f"line {number} is not"
        assert rows[1].reason.startswith(words)  # type: ignore[union-attr]


def _records(text: str) -> list[list[str] | str]:
    """What Python's reader makes of a whole text; behind a broken record it goes on at the line behind its first."""
    lines = [line + "\n" for line in text.split("\n")]
    records: list[list[str] | str] = []
    at = 0
    while at < len(lines):
        reader, start = csv.reader(lines[at:], strict=True), 0
        try:
            for cells in reader:
                start = reader.line_num
                records += [cells] if any(cells) or len(cells) > 1 else []
            break
        except csv.Error as error:
            records.append(f"line {at + start + 1} is not CSV ({error}); write a quote inside quotes twice")
            at += start + 1
    return records


@pytest.mark.parametrize("block", [3, 64])
def test_csv_is_what_python_reads(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "_BLOCK", block)
    pick = random.Random(0)
    atoms = [
        '"',
        '""',
        ",",
        "\n",
        "\r\n",
        "a",
        " ",
        "é",
        "x,y\n",
        '"q",b\n',
        '"a\nb",c\n',
        '"a""b",\n',
        "\n\n",
        "a,b\n",
    ]
    for _ in range(300):
        text = "".join(pick.choice(atoms) for _ in range(pick.randrange(25)))
        (tmp_path / "a.csv").write_bytes(b"one,two\n" + text.encode())
        table = open_table(str(tmp_path / "a.csv"))
        rows = [row for piece in table.pieces(3) for row in table.read(piece)]
        expected = _records("one,two\n" + text)[1:]
        assert len(rows) == len(expected)
        for number, (row, cells) in enumerate(zip(rows, expected, strict=True)):
            if isinstance(cells, str):
                assert row == BadRow(number, "", cells)
            elif len(cells) == 2:
                assert row == (number, dict(zip(("one", "two"), cells, strict=True)))
            else:
                assert f"has {len(cells)} cells for 2 columns" in row.reason  # type: ignore[union-attr]


VALUES = [
    "1",
    "-2.5e3",
    "NaN",
    "-Infinity",
    "null",
    "true",
    '"é\\n\\ud83d\\ude00"',
    "[]",
    "[[1, {}], 2]",
    '{"a": 1, "a": 2}',
]
VALUES += ['{"a": {"b": [1.0, "]"]}}', "12345678901234567890", '"\\\\"', "{}"]
BROKEN = [
    "[1,]",
    "[1 2]",
    "[",
    '["a',
    "[tru]",
    '[{"a"}]',
    "[1]]",
    '{"data": [1]',
    '{"data": [1], 2: 3}',
    '{"data" [1]}',
    "",
]


@pytest.mark.parametrize("block", [3, 17, 2**20])
def test_a_json_list_is_what_python_reads(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "_BLOCK", block)
    pick = random.Random(0)
    path = tmp_path / "a.json"
    for _ in range(100):
        blank = [pick.choice(["", " ", "\n", "\r\n\t"]) for _ in range(3)]
        values = [f'{blank[0]}{{"x": {pick.choice(VALUES)}}}{blank[1]}' for _ in range(pick.randrange(1, 9))]
        text = f"[{','.join(values)}]{blank[2]}"
        if pick.random() < 0.5:
            text = f'{{"about": {pick.choice(VALUES)}, "data" : {text}, "x": {pick.choice(VALUES)}}}'
        path.write_text(text, encoding=pick.choice(["utf-8", "utf-8-sig"]))
        value = json.loads(text)
        expected = value if isinstance(value, list) else value["data"]
        assert repr(read_table(str(path)).rows) == repr(list(enumerate(expected)))
    for text in BROKEN:
        path.write_text(text)
        with pytest.raises(json.JSONDecodeError) as error:
            json.loads(text)
        with pytest.raises(
            DataError, match=rf"\(char {error.value.pos}\)" if text != "[1,]" else "not readable as UTF-8"
        ):
            read_table(str(path))
    path.write_text('{"data": [{}], "data": [{}]}')
    with pytest.raises(DataError, match="`data` twice"):
        read_table(str(path))
    path.write_bytes(b'\xef\xbb\xbf["a", "\xff"]')
    with pytest.raises(DataError, match=r"0xff in position 10"):
        read_table(str(path))


def test_lines_that_end_with_a_carriage_return_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "_BLOCK", 5)
    for end, num_rows in (("\r", 3), ("\n", 3), ("\r\n", 3)):
        (tmp_path / "a.jsonl").write_bytes(f'{{"a":\t1}}{end}{end}{{"a": 2}}{end}{{"a": 3}}'.encode())
        table = open_table(str(tmp_path / "a.jsonl"))
        assert [len(table.read(piece)) for piece in table.pieces(2)] == [2, 1]
        assert len(read_table(str(tmp_path / "a.jsonl")).rows) == num_rows


def test_parquet_is_decoded_once_for_pieces_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"a": i, "image": b"x" * 1000} for i in range(100)]
    sizes = [0, 3, 2, 60, 1, 34]
    with parquet.ParquetWriter(tmp_path / "a.parquet", pa.Table.from_pylist(rows).schema) as writer:
        for i, size in enumerate(sizes):
            first = sum(sizes[:i])
            writer.write_table(pa.Table.from_pylist(rows[first : first + size], writer.schema))
    table = open_table(str(tmp_path / "a.parquet"))
    decoded: list[int] = []
    decode = type(table)._decode  # type: ignore[attr-defined]
    monkeypatch.setattr(type(table), "_decode", lambda self, number: decoded.append(number) or decode(self, number))
    monkeypatch.setattr("ray_vlm.data.sources.tables._BATCH_ROWS", 7)
    pieces = list(table.pieces(20))
    expected = [(0, 5), (5, 20), (25, 20), (45, 20), (65, 1), (66, 20), (86, 14)]
    assert [(piece.first_row, piece.num_rows) for piece in pieces] == expected
    assert [row for piece in pieces for row in table.read(piece)] == list(enumerate(rows))
    assert decoded == [1, 2, 3, 4, 5]
    for piece in (pieces[4], pieces[1], pieces[3], pieces[2]):
        number = piece.first_row
        assert table.read(piece) == list(enumerate(rows))[number : number + piece.num_rows]


def test_large_rows_make_pieces_of_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pieces", "columns"):
        monkeypatch.setattr(f"ray_vlm.data.sources.{name}.PIECE_BYTES", 4000)
    rows = [{"a": f"{i}" + "x" * 999} for i in range(20)]
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"):
        table = open_table(str(_write(tmp_path / name, rows)))
        pieces = list(table.pieces())
        assert len(pieces) >= 5
        assert [row for piece in pieces for row in table.read(piece)] == list(enumerate(rows))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", pytest.param("large.jsonl", marks=pytest.mark.slow)])
def test_no_file_is_held(tmp_path: Path, name: str) -> None:
    row = {"image": "a.jpg", "label": "x" * 5000}
    num_rows = 40_000 if name == "large.jsonl" else 8_000
    path, line = tmp_path / name, json.dumps(row)
    with open(path, "w") as file:
        file.write({".json": "[" + line, ".csv": "image,label\n"}.get(path.suffix, ""))
        for _ in range(num_rows):
            file.write({".json": "," + line, ".csv": f"a.jpg,{row['label']}\n"}.get(path.suffix, line + "\n"))
        file.write("]" if path.suffix == ".json" else "")
    reader = SourceReader(Source(path=str(path), format="image_csv", columns={"label": "label"}))
    tracemalloc.start()
    assert sum(len(reader.read(piece)) for piece in reader.pieces(512)) == num_rows + (path.suffix == ".json")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 24e6  # of 40 MB and of 200 MB


def test_an_unclosed_quote_does_not_hold_the_file(tmp_path: Path) -> None:
    line = b"a.jpg," + b"x" * 10_000 + b"\n"
    with open(tmp_path / "a.csv", "wb") as file:
        file.write(b'image,label\na.jpg,"dog\n')
        for _ in range(6000):
            file.write(line)
    table = open_table(str(tmp_path / "a.csv"))
    tracemalloc.start()
    rows = [row for piece in table.pieces(64) for row in table.read(piece) if row and isinstance(row, BadRow)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [row.reason for row in rows] == [
        "line 2 is not CSV (field larger than field limit (16777216)); write a quote inside quotes twice"
    ]
    assert peak < 150e6  # a character of the cell that is tried takes four bytes


def test_ids_are_made_unique_as_one_by_one() -> None:
    pick = random.Random(0)
    words = ["a", "b", "a#2", "a#3", "a#2#2", "a#02", "", "é" * 9, "12345678", "123456789", "x" * 17, "a\n#2"]
    source = Source(path="a.jsonl", format="llava")
    for _ in range(500):
        ids = [pick.choice(words) for _ in range(pick.randrange(20))]
        bad = [pick.random() < 0.2 for _ in ids]
        counts, met, expected = Counter(ids), Counter[str](), {}
        for i, name in enumerate(ids):
            if counts[name] > 1 and not bad[i]:
                met[name] += 1
                while met[name] > 1 and f"{name}#{met[name]}" in counts:
                    met[name] += 1
                expected[i] = (name if met[name] == 1 else f"{name}#{met[name]}", name)
        column = pa.array(ids, pa.string())
        cut = pick.randrange(len(ids) + 1)
        assert unique_ids(source, ids, bad) == expected
        assert unique_ids(source, column, np.array(bad, bool)) == expected
        assert unique_ids(source, pa.chunked_array([column[:cut], column[cut:]], pa.string()), bad) == expected
    steps = Source(path="a.csv", format="gui_csv")
    assert unique_ids(steps, ["a", "b", "a"], [False, False, True]) == {0: "id a is used by 2 rows; make it unique"}
    assert unique_ids(Source(path="a.json", format="coco"), ["a", "a"], [False] * 2) == {}


def test_a_link_in_a_folder_that_is_known_is_seen(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (tmp_path / "in" / "sub" / "real.jpg").write_bytes(b"x")
    root = str(tmp_path / "in")
    assert resolve_image(root, "sub/a.jpg") == os.path.realpath(f"{root}/sub/a.jpg")
    (tmp_path / "in" / "sub" / "a.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "in" / "sub" / "b.jpg").symlink_to("real.jpg")
    (tmp_path / "in" / "out").symlink_to(tmp_path)
    for name in ("sub/a.jpg", "out/secret.jpg", "sub/../../secret.jpg"):
        with pytest.raises(ValueError, match="outside"):
            resolve_image(root, name)
    assert resolve_image(root, "sub/b.jpg") == os.path.realpath(f"{root}/sub/real.jpg")
    assert resolve_image(root, "out/secret.jpg", follow_links=True) == f"{os.path.realpath(root)}/out/secret.jpg"


def test_rows_may_lie_in_a_store() -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/pieces/a.jsonl", "".join(json.dumps(row) + "\n" for row in LLAVA).encode())
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(LLAVA), buffer, row_group_size=9)
    fsspec.filesystem("memory").pipe("/pieces/a.parquet", buffer.getvalue())
    for name in ("a.jsonl", "a.parquet"):
        reader = SourceReader(Source(path=f"memory://pieces/{name}", format="llava"))
        pieces = list(reader.pieces(4))
        assert [row.id for piece in pieces[::-1] for row in reader.read(piece)[::-1]] == [
            row["id"] for row in LLAVA[::-1]
        ]
