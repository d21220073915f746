"""Sources of several files: which files a path names, and their rows as those of one table."""

import gzip
import json
import os
import pickle
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from ray_vlm.config import row_files
from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data import build
from ray_vlm.data.inspect.check import group_reason
from ray_vlm.data.parallel import Spread
from ray_vlm.data.parts import build_index
from ray_vlm.data.records import BadRow, SftRecord
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.shards import IndexFolder
from ray_vlm.data.sources import file_set
from ray_vlm.data.sources import pieces as pieces_module
from ray_vlm.data.sources.file_set import FileSet
from ray_vlm.data.sources.files import describe_version, find_files
from ray_vlm.data.sources.formats import SourceReader, read_rows, source_version
from ray_vlm.data.sources.pieces import Piece
from ray_vlm.data.sources.tables import TableFile, open_table
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import DataError
from ray_vlm.storage import Store, join

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]
ROWS = [{"id": f"r{i}", "conversations": TURNS} for i in range(23)]
CLASSES = [{"image": f"{i}.jpg", "label": f"c{i % 3}"} for i in range(23)]


def _encode(suffix: str, rows: list[dict[str, Any]]) -> bytes:
    if suffix == ".jsonl":
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix in (".csv", ".tsv"):
        mark = "," if suffix == ".csv" else "\t"
        return "".join(
            mark.join(map(str, line)) + "\n" for line in [list(rows[0]), *(r.values() for r in rows)]
        ).encode()
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows)
    if suffix == ".parquet":
        parquet.write_table(table, sink, row_group_size=4)
    else:
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=4)
    return sink.getvalue().to_pybytes()


def _write(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_encode(path.suffix, rows))
    return str(path)


def _names(folder: Path, path: str | list[str], **settings: Any) -> list[str]:
    paths = [path] if isinstance(path, str) else path
    source = Source(path=tuple(str(folder / name) for name in paths), **settings)
    return [os.path.relpath(file, folder) for file in find_files(source)]


def _error(folder: Path, path: str | list[str], **settings: Any) -> str:
    with pytest.raises(DataError) as error:
        _names(folder, path, **settings)
    return str(error.value)


@pytest.fixture(params=["folder", "memory"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A folder, and one in an object store."""
    return Store(tmp_path if request.param == "folder" else f"memory://files/{tmp_path.name}")


SHARDS = ["shard-10.jsonl", "shard-2.jsonl", "shard-1.jsonl", "b/shard-3.jsonl", "b/c/x.jsonl", ".hidden.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", ["shard-1.jsonl", "shard-2.jsonl", "shard-10.jsonl"]),
        ("shard-[12].jsonl", ["shard-1.jsonl", "shard-2.jsonl"]),
        ("shard-[!1].jsonl", ["shard-2.jsonl"]),
        ("*/*.jsonl", ["b/shard-3.jsonl"]),
        ("**/*.jsonl", ["b/c/x.jsonl", "b/shard-3.jsonl", "shard-1.jsonl", "shard-2.jsonl", "shard-10.jsonl"]),
        ("b/**/x.jsonl", ["b/c/x.jsonl"]),
        ("shard-{2,1}.jsonl", ["shard-2.jsonl", "shard-1.jsonl"]),
        ("{b/shard-3,shard-10}.jsonl", ["b/shard-3.jsonl", "shard-10.jsonl"]),
        ("{b/*,shard-{1..2}}.jsonl", ["b/shard-3.jsonl", "shard-1.jsonl", "shard-2.jsonl"]),
        ("part-{000..002}.csv", ["part-000.csv", "part-001.csv", "part-002.csv"]),
        ("part-{2..0}[0-9].csv", []),
    ],
)
def test_a_pattern_names_the_same_files_on_a_disk_and_in_a_store(
    anywhere: Store, pattern: str, names: list[str]
) -> None:
    for name in [*SHARDS, *(f"part-00{i}.csv" for i in range(3)), "readme.txt"]:
        anywhere.write(name, b"x")
    pattern = join(anywhere.address, pattern)
    if not names:
        with pytest.raises(DataError, match="no file matches"):
            find_files(Source(path=pattern))
    else:
        assert list(find_files(Source(path=pattern))) == [join(anywhere.address, name) for name in names]


def test_braces_are_a_promise_that_each_file_is_there(anywhere: Store) -> None:
    for number in (0, 1, 3):
        anywhere.write(f"p-{number:03d}.jsonl", b"x")
    with pytest.raises(DataError, match=r"p-\{000\.\.004\}\.jsonl: there is no .*p-002\.jsonl, .*p-004\.jsonl\. Fetch"):
        find_files(Source(path=join(anywhere.address, "p-{000..004}.jsonl")))
    with pytest.raises(DataError, match="stands for more than 100,000 names"):
        find_files(Source(path=join(anywhere.address, "p-{0..99999999}.jsonl")))


def test_question_marks_are_wildcards_of_paths_and_options_of_addresses(tmp_path: Path) -> None:
    for name in ("a1.csv", "a2.csv", "a22.csv"):
        _write(tmp_path / name)
    assert _names(tmp_path, "a?.csv") == ["a1.csv", "a2.csv"]
    with pytest.raises(DataError, match=r"`\?` begins its options. Write `\*` or `\[0-9\]`"):
        find_files(Source(path="s3://bucket/a?.csv"))


def test_a_file_with_marks_of_a_pattern_in_its_name_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run[1] {a,b}").mkdir()
    for name in ("a[1].csv", "a1.csv", "run[1] {a,b}/b*.csv", "run[1] {a,b}/b1.csv"):
        _write(tmp_path / name, CLASSES)
    assert _names(tmp_path, "a[1].csv") == ["a[1].csv"]
    assert _names(tmp_path, "run[1] {a,b}/b*.csv") == ["run[1] {a,b}/b*.csv"]
    assert _names(tmp_path, "run[1] {a,b}/b[0-9].csv") == ["run[1] {a,b}/b1.csv"]
    assert _names(tmp_path, "run[1] {a,b}/{b1,b*}.csv") == ["run[1] {a,b}/b1.csv", "run[1] {a,b}/b*.csv"]


def test_a_list_keeps_its_order_and_names_no_file_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "b.jsonl", "more/c.jsonl"):
        _write(tmp_path / name)
    assert _names(tmp_path, ["b.jsonl", "more/*.jsonl", "a.jsonl"]) == ["b.jsonl", "more/c.jsonl", "a.jsonl"]
    message = _error(tmp_path, ["b.jsonl", "*.jsonl"])
    assert f"{tmp_path}/b.jsonl: listed twice, by '{tmp_path}/b.jsonl' and by '{tmp_path}/*.jsonl'" in message
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"listed twice, by 'a\.jsonl' and by '\./a\.jsonl'"):
        find_files(Source(path=("a.jsonl", "./a.jsonl")))
    with pytest.raises(DataError, match="no such file"):
        read_rows(Source(path=("a.jsonl", "gone.jsonl"), format="llava"))


@pytest.mark.parametrize("path", ["a.jsonl", "*.jsonl", "{a,b}.jsonl"])
def test_files_have_no_splits(tmp_path: Path, path: str) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        _write(tmp_path / name)
    assert "split=test is set, and a file or a pattern has no splits" in _error(tmp_path, path, split="test")


def test_a_name_of_nothing_is_no_file(tmp_path: Path) -> None:
    for name in ("gone.jsonl", "gone", "gone/gone"):
        assert f"{tmp_path}/{name}: no such file. Give `path` the location" in _error(tmp_path, name)
    with pytest.raises(DataError, match="no such file"):
        find_files(Source(path="memory://none/gone.jsonl"))
    with pytest.raises(DataError, match=r"not readable .*addresses are not read; download the file"):
        find_files(Source(path="https://host/a.jsonl"))


def _fill(store: Store, *names: str) -> str:
    for name in names:
        store.write(name, b"x")
    return store.address


def test_a_folder_of_shards_is_read_in_natural_order(anywhere: Store) -> None:
    folder = _fill(anywhere, *SHARDS[:3], "_SUCCESS", "_old.jsonl", "README.md", "dataset_info.json", "images/1.jpg")
    names = ["shard-1.jsonl", "shard-2.jsonl", "shard-10.jsonl"]
    assert list(find_files(Source(path=folder))) == [join(folder, name) for name in names]
    with pytest.raises(DataError, match="split=test is set, but the names of its files, such as shard-1"):
        find_files(Source(path=folder, split="test"))


@pytest.mark.parametrize(
    "names",
    [
        ["train-00001-of-00002.parquet", "train-00000-of-00002.parquet", "test-00000-of-00001.parquet"],
        ["train/b-1.parquet", "train/b-0.parquet", "test/c.parquet", "README.md"],
        ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"],
        ["train_1.parquet", "train_0.parquet", "test.parquet", "train/1.jpg"],
    ],
)
def test_of_a_folder_with_splits_one_is_read(anywhere: Store, names: list[str]) -> None:
    folder = _fill(anywhere, *names)
    train = [join(folder, names[1]), join(folder, names[0])]
    assert list(find_files(Source(path=folder))) == train
    assert list(find_files(Source(path=folder, split="train"))) == train
    assert list(find_files(Source(path=folder, split="test"))) == [join(folder, names[2])]
    with pytest.raises(DataError, match=r"split validation; there are .*te.*Set `split` to one"):
        find_files(Source(path=folder, split="validation"))


def test_names_of_splits_have_their_usual_forms(tmp_path: Path) -> None:
    for name in ("train_sft-00000-of-00001.parquet", "dev-00000-of-00001.parquet"):
        _write(tmp_path / name, CLASSES)
    assert _names(tmp_path, ".", split="train_sft") == ["train_sft-00000-of-00001.parquet"]
    for name in ("validation", "val", "dev"):
        assert _names(tmp_path, ".", split=name) == ["dev-00000-of-00001.parquet"]
    assert "no file of the split train; there are validation, train_sft" in _error(tmp_path, ".")


@pytest.mark.parametrize(
    "names",
    [
        ["part-00000-of-00002.parquet", "part-00001-of-00002.parquet"],
        ["part-0001-of-0002.csv", "part-0002-of-0002.csv"],
        ["train-00000-of-00002-5e6d9a4c0e1b2f3a.parquet", "train-00001-of-00002-b5e96e5b6c2d8f2a.parquet"],
        ["imdb-train-00000-of-00002.arrow", "imdb-train-00001-of-00002.arrow"],
        ["data-00000-of-00001.arrow"],
    ],
)
def test_shards_that_are_counted_are_of_train_or_of_no_split(anywhere: Store, names: list[str]) -> None:
    folder = _fill(anywhere, *names)
    assert list(find_files(Source(path=folder))) == [join(folder, name) for name in names]


def test_a_link_to_a_file_that_is_gone_is_a_missing_file(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "annex")
    for path in (tmp_path, tmp_path / "*.jsonl", tmp_path / "{a,b}.jsonl"):
        with pytest.raises(DataError, match=r"b\.jsonl: no such file"):
            read_rows(Source(path=str(path), format="llava"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jsonl", "b.jsonl", "c.csv"], r"files of several kinds, 2 \.jsonl and 1 \.csv\. Say which .*\*\.jsonl"),
        (["a.jsonl", "a.jsonl.gz"], r"several kinds, 1 \.jsonl and 1 \.jsonl\.gz"),
        (["x/1.jpg", "notes.txt"], r"no file with rows is in this folder; it holds notes\.txt, x/\. Give a folder"),
        ([".keep"], r"it holds \.keep"),
        (["train.jsonl", "extra.jsonl"], r"extra\.jsonl and files of the splits train are in one folder"),
        (["a.jsonl", "train/b.jsonl"], r"rows may be a\.jsonl in it, or those in its folder train"),
        (
            ["train-00000-of-00003.csv", "train-00002-of-00003.csv"],
            r"1 of the 3 files of train are missing, the first tra",
        ),
        (["test.jsonl"], r"no file of the split train; there are test\. Set `split`"),
    ],
)
def test_a_folder_that_does_not_say_which_files_are_meant_is_refused(
    anywhere: Store, names: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        find_files(Source(path=_fill(anywhere, *names)))


def test_save_to_disk_is_read_as_it_was_written(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"image": f"{i}.jpg", "label": f"c{i}"} for i in range(30)])
    rows.save_to_disk(tmp_path / "one", num_shards=11)
    assert len(_names(tmp_path, "one")) == 11
    records, _ = read_rows(Source(path=str(tmp_path / "one"), format="image_csv"))
    labels = [row.truth["attributes"]["label"] for row in records if isinstance(row, SftRecord)]
    assert labels == [f"c{i}" for i in range(30)]
    DatasetDict({"train": rows, "dev": rows.select(range(3))}).save_to_disk(tmp_path / "two")
    assert _names(tmp_path, "two") == ["two/train/data-00000-of-00001.arrow"]
    assert _names(tmp_path, "two", split="dev") == ["two/dev/data-00000-of-00001.arrow"]
    assert "no split test; save_to_disk wrote train, dev. Set `split`" in _error(tmp_path, "two", split="test")


def test_the_order_of_save_to_disk_is_that_of_its_list(anywhere: Store) -> None:
    files = [{"filename": "b.arrow"}, {"filename": "a.arrow"}]
    anywhere.write("state.json", json.dumps({"_data_files": files, "_split": "train"}).encode())
    folder = anywhere.address
    assert find_files(Source(path=folder)) == (join(folder, "b.arrow"), join(folder, "a.arrow"))
    with pytest.raises(DataError, match="wrote the split train here, and split=test"):
        find_files(Source(path=folder, split="test"))
    for listed in ([{"filename": "../b.arrow"}], [], ["b.arrow"]):
        anywhere.write("state.json", json.dumps({"_data_files": listed}).encode())
        with pytest.raises(DataError, match=r"state\.json lists no files of rows"):
            find_files(Source(path=folder))
    anywhere.write("state.json", b"{")
    with pytest.raises(DataError, match=r"state\.json: not readable as JSON"):
        find_files(Source(path=folder))


def test_shards_in_s3_are_one_source(bucket: str, tmp_path: Path) -> None:
    folder = join(bucket, tmp_path.name)
    for i in range(20):
        Store(folder).write(f"part-{i}.parquet", _encode(".parquet", ROWS[i : i + 1]))
    for path in (join(folder, "part-*.parquet"), folder, join(folder, "part-{0..19}.parquet")):
        source = Source(path=path, format="llava")
        records, _ = read_rows(source)
        assert [record.id for record in records] == [f"r{i}" for i in range(20)]
        version = source_version(source)
        assert version == source_version(source)
        assert len(version) == 60
    Store(folder).write("part-3.parquet", _encode(".parquet", ROWS[:2]))
    assert source_version(source) != version


# The rows of several files


def _split_up(folder: Path, suffix: str, rows: list[dict[str, Any]], counts: tuple[int, ...]) -> Source:
    start = 0
    for i, count in enumerate(counts):
        _write(folder / f"s-{i}{suffix}", rows[start : start + count])
        start += count
    assert start == len(rows)
    return Source(path=str(folder / f"s-*{suffix}"), format="llava" if rows is ROWS else "image_csv")


@pytest.mark.parametrize("counts", [(10, 1, 12), (1,) * 23, (23,), (9, 9, 5)])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_rows_of_shards_are_those_of_one_file(
    tmp_path: Path, suffix: str, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = CLASSES if suffix == ".csv" else ROWS
    source = _split_up(tmp_path, suffix, rows, counts)
    whole, labels = read_rows(Source(path=_write(tmp_path / f"whole{suffix}", rows), format=source.format))
    assert not any(isinstance(row, BadRow) for row in whole)
    assert read_rows(source) == (whole, labels)
    for max_rows in (1, 10, 11, 22):
        limited, _ = read_rows(source.model_copy(update={"max_rows": max_rows}))
        assert limited == whole[:max_rows]
    reader = SourceReader(source)
    monkeypatch.setattr(pieces_module, "_BLOCK", 50)
    for size in (1, 4, 9, 100):
        pieces = list(reader.pieces(size))
        assert all(piece.num_rows <= size for piece in pieces)
        assert len({piece.fingerprint for piece in pieces}) == len(pieces)
        other = pickle.loads(pickle.dumps(reader))
        joined = [row for piece in pickle.loads(pickle.dumps(pieces)) for row in other.read(piece)]
        assert joined == whole
    assert len(list(reader.pieces(100))) == 1, "small shards share a piece"


def test_gui_steps_may_be_shards_and_coco_is_one_file(tmp_path: Path) -> None:
    step = {"Image_id": "a.png", "Instruction": "Open it.", "Output": '{"action": "wait"}', "Grounding": ""}
    steps = [step | {"Task_id": str(i // 4)} for i in range(10)]
    for name, some in (
        ("s-0", steps[:5]),
        ("s-1", [*steps[5:], step | {"Task_id": "9", "Output": "{"}]),
        ("all", steps),
    ):
        _write(tmp_path / f"{name}.jsonl", some)
    whole = read_rows(Source(path=str(tmp_path / "all.jsonl"), format="gui_csv"))[0]
    shards = read_rows(Source(path=str(tmp_path / "s-*.jsonl"), format="gui_csv"))[0]
    assert shards[:10] == whole
    coco = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [], "categories": [{"id": 1, "name": "dog"}]}
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(coco).encode()))
    (row, *_), _ = read_rows(Source(path=str(tmp_path / "a.json.gz")))
    assert row.id == "1"
    _write(tmp_path / "b.json")
    with pytest.raises(DataError, match="2 files, and format=coco is read from one"):
        read_rows(Source(path=str(tmp_path / "?.json*")))


def test_pieces_stay_small_in_rows_and_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_set, "PIECE_BYTES", 700)
    source = _split_up(tmp_path, ".jsonl", ROWS, (2,) * 11 + (1,))
    sizes = [piece.num_bytes for piece in SourceReader(source).pieces()]
    assert len(sizes) > 3
    assert all(200 < size <= 700 for size in sizes)


def test_a_longer_row_moves_only_the_pieces_near_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_set, "PIECE_BYTES", 700)
    source = _split_up(tmp_path, ".jsonl", ROWS, (1,) * 23)

    def pieces() -> list[tuple[int, str]]:
        return [(piece.first_row, piece.fingerprint) for piece in SourceReader(source).pieces(10)]

    before = pieces()
    assert {0, 10, 20} < {row for row, _ in before}
    _write(tmp_path / "s-1.jsonl", [ROWS[1] | {"note": "x" * 500}])
    after = pieces()
    assert [row for row, _ in before if row < 10] != [row for row, _ in after if row < 10]
    assert [pair for pair in before if pair[0] >= 10] == [pair for pair in after if pair[0] >= 10]


def test_a_set_pickles_small_and_its_pieces_hold_their_own_files(tmp_path: Path) -> None:
    source = _split_up(tmp_path, ".parquet", ROWS * 20, (1,) * 460)
    reader = SourceReader(source.model_copy(update={"format": "llava"}))
    assert len(pickle.dumps(reader)) < 3000
    (piece,) = reader.pieces(1000)
    assert len(pickle.dumps(piece)) < 460 * 300


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_a_changed_shard_makes_only_its_own_pieces_anew(tmp_path: Path, suffix: str) -> None:
    source = _split_up(tmp_path, suffix, CLASSES, (6, 5, 7, 5))

    def prints() -> list[str]:
        return [piece.fingerprint for piece in SourceReader(source).pieces(7)]

    before = prints()
    assert len(before) == 4
    _write(tmp_path / f"s-1{suffix}", [row | {"image": "another one.jpg"} for row in CLASSES[6:11]])
    assert [a == b for a, b in zip(before, prints(), strict=True)] == [True, False, True, True]
    _write(tmp_path / f"s-4{suffix}", CLASSES)
    assert prints()[2:4] == before[2:]


def test_a_shard_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".parquet", ".arrow"):
        source = _split_up(tmp_path, suffix, ROWS, (11, 12))
        reader = SourceReader(source)
        (piece,) = reader.pieces(100)
        _write(tmp_path / f"s-1{suffix}", ROWS[:12])
        with pytest.raises(DataError, match=rf"s-1\{suffix}: changed while it was read"):
            reader.read(piece)


def test_bad_rows_name_their_shard_and_the_row_in_it(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0]) + "\n"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text(good * 3)
    (tmp_path / "y.jsonl").write_text(good + "\n{oops\n" + good + '{"id": "no turns"}\n')
    source = Source(path=(str(tmp_path / "a" / "x.jsonl"), str(tmp_path / "y.jsonl")), format="llava")
    bad = [row for row in read_rows(source)[0] if isinstance(row, BadRow)]
    assert [row.row for row in bad] == [4, 6]
    assert bad[0].reason.startswith("y.jsonl row 1: line 3 is not JSON")
    assert bad[1].reason.startswith("y.jsonl row 3: no conversations")


def test_bad_rows_of_the_index_name_their_shard_and_are_looked_at_again(tmp_path: Path) -> None:
    asked = {"from": "human", "value": "<image>?"}
    rows = [{"id": f"r{i}", "conversations": TURNS} for i in range(6)]
    rows[4] = {"id": "r4", "image": "gone.png", "conversations": [asked, TURNS[1]]}
    rows[5] = {"id": "r5", "conversations": [TURNS[0], {"from": "gpt", "value": "a dog " * 300}]}
    source = Source(path=_split_up(tmp_path, ".jsonl", rows, (3, 3)).path, format="llava")
    builder = load_sample_builder(SampleSpec(Model(name="tiny", load_in_4bit=False), ChatTask(), ()))
    folder = str(tmp_path / "index")
    data = Data(on_bad_row="quarantine", max_tokens=200)
    missing, long = build_index(source, data, builder, folder).bad
    assert (missing.row, long.row) == (4, 5)
    assert missing.reason.startswith("s-1.jsonl row 1: image file is missing")
    assert long.reason.startswith("s-1.jsonl row 2: ")
    assert "above data.max_tokens=200" in long.reason
    assert group_reason(long.reason) == group_reason(long.reason.replace("s-1.jsonl row 2", "b/s-17.jsonl row 3"))
    Image.new("RGB", (64, 48)).save(tmp_path / "gone.png")
    (still,) = build_index(source, data, builder, folder).bad
    assert still == long


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"image": "a", "label": "b"}, {"image": "a"}, "b.parquet has no label"),
        ({"image": "a"}, {"image": "a", "label": "b"}, "a.parquet has no label"),
        ({"image": "a", "n": "1"}, {"image": "a", "n": 1}, r"n \(whole number, there text\)"),
        ({"image": "a", "n": 1.5}, {"image": "a", "n": 1}, r"n \(whole number, there number\)"),
        ({"n": [{"x": 1}]}, {"n": [{"x": "1"}]}, r"n \(list<object<x: text>>, there list<object<x: whole number>>\)"),
    ],
)
def test_shards_of_different_columns_are_refused(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    paths = [_write(tmp_path / "a.parquet", [first]), _write(tmp_path / "b.parquet", [second])]
    with pytest.raises(DataError, match=message) as error:
        FileSet(paths)
    assert str(error.value).startswith(f"{paths[1]}: its columns are not those of {paths[0]}")


def test_types_that_give_the_same_values_agree(tmp_path: Path) -> None:
    values = [
        pa.table({"t": pa.array(["a"]), "l": pa.array([[{"x": 1}]]), "n": pa.array([1], pa.int32())}),
        pa.table({"n": pa.array([1]), "l": pa.array([[{"x": None}]]), "t": pa.array(["a"], pa.large_string())}),
        pa.table({"t": pa.nulls(1), "l": pa.array([[]]), "n": pa.nulls(1)}),
        pa.table({"t": pa.array(["a"]).dictionary_encode(), "l": pa.nulls(1), "n": pa.array([1], pa.uint8())}),
    ]
    paths = []
    for i, table in enumerate(values):
        paths.append(str(tmp_path / f"{i}.parquet"))
        parquet.write_table(table, paths[-1])
    table = FileSet(paths)
    (piece,) = table.pieces()
    rows = [row for row in table.read(piece) if not isinstance(row, BadRow)]
    assert [row[1]["t"] for row in rows] == ["a", "a", None, "a"]


def test_numbers_of_classes_are_not_mixed_with_plain_numbers(tmp_path: Path) -> None:
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}}}
    table = pa.table({"image": ["a.jpg"], "label": [1]})
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "a.parquet")
    parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"label \(whole number, there whole number of classes\)"):
        FileSet([str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")])


def test_json_and_tables_are_not_one_source(tmp_path: Path) -> None:
    paths = (_write(tmp_path / "a.csv", CLASSES), _write(tmp_path / "b.jsonl", CLASSES))
    with pytest.raises(DataError, match=r"b\.jsonl and .*a\.csv: files of JSON and tables with columns are not shards"):
        FileSet(paths)


def test_copies_of_images_are_described_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"image": [b"x" * 100], "label": ["a"]})
    for i in range(3):
        with pa.ipc.new_stream(
            str(tmp_path / f"{i}.arrow"), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
        ) as stream:
            stream.write_table(table)
    line = SourceReader(Source(path=str(tmp_path), format="image_csv")).describe_copies()
    assert line is not None
    assert f"{tmp_path / '0.arrow'} is compressed" in line
    assert "the same is true of 2 more files" in line


def test_images_lie_beside_the_shards(tmp_path: Path) -> None:
    for name in ("a/s.jsonl", "b/s.jsonl", "b/t.jsonl"):
        _write(tmp_path / "rows" / name, [{"image": "1.jpg", "label": "x"}])
    reader = SourceReader(Source(path=str(tmp_path / "rows" / "b" / "*.jsonl"), format="image_csv"))
    assert reader.root == SourceReader(Source(path=str(tmp_path / "rows/b/s.jsonl"), format="image_csv")).root
    across = SourceReader(Source(path=str(tmp_path / "rows" / "*" / "s.jsonl"), format="image_csv"))
    beside = Source(path=str(tmp_path / "rows/b/s.jsonl"), format="image_csv", image_root=str(tmp_path / "rows"))
    assert across.root == SourceReader(beside).root


def test_the_version_of_many_files_is_small_and_sees_each(tmp_path: Path) -> None:
    paths = [_write(tmp_path / f"{i}.jsonl", ROWS[:1]) for i in range(300)]
    version = describe_version(paths)
    assert len(json.dumps(version)) < 10_000
    assert version == describe_version(paths)
    os.utime(paths[299], (1, 1))
    changed = describe_version(paths)
    assert [a == b for a, b in zip(version, changed, strict=True)].count(False) == 1
    assert build._first_changed(version, changed).endswith(f"{tmp_path}/295.jsonl to 299.jsonl")


def test_an_index_of_shards_is_kept_and_pruned(tmp_path: Path) -> None:
    source = _split_up(tmp_path / "rows", ".jsonl", ROWS, (10, 10, 3))
    folder, limits = IndexFolder(str(tmp_path / "index")), build.CheckLimits(10**6, "raise")
    made = build.build_rows(source, limits, "chat", folder, Spread())
    listed = Source(path=find_files(source), format="llava")
    build.build_rows(listed, limits, "chat", folder, Spread())
    assert build.prune(folder) == (0, 0)
    assert build.build_rows(source, limits, "chat", folder, Spread()) == made
    (tmp_path / "rows" / "s-2.jsonl").unlink()
    assert build.prune(folder)[0] == 4  # a listing and a shard each
    assert folder.store.files() == {}


# Compressed files


def _zstd(data: bytes) -> bytes:
    return (
        subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout
        if _HAS_ZSTD
        else _frame(data)
    )


def _frame(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


_HAS_ZSTD = any(os.access(f"{folder}/zstd", os.X_OK) for folder in os.get_exec_path())
PACKERS = {".gz": gzip.compress, ".zst": _zstd}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_rows_of_a_compressed_file_are_those_inside(tmp_path: Path, suffix: str, packed: str) -> None:
    rows = CLASSES if suffix in (".csv", ".tsv") else ROWS
    settings: dict[str, Any] = {"format": "llava" if rows is ROWS else "image_csv"}
    plain = read_rows(Source(path=_write(tmp_path / f"a{suffix}", rows), **settings))
    data, pack = _encode(suffix, rows), PACKERS[packed]
    name = f"b{suffix.upper()}{packed}"
    for content in (pack(data), pack(data[:100]) + pack(data[100:]), pack(b"\xef\xbb\xbf" + data)):
        (tmp_path / name).write_bytes(content)
        assert read_rows(Source(path=str(tmp_path / name), **settings)) == plain
    pieces = list(SourceReader(Source(path=str(tmp_path / name), **settings)).pieces(4))
    assert [piece.num_rows for piece in pieces] == [4, 4, 4, 4, 4, 3]
    assert all(piece.holds_rows for piece in pieces)


@pytest.mark.parametrize("packed", PACKERS)
def test_a_compressed_file_that_is_cut_off_or_damaged_is_refused(tmp_path: Path, packed: str) -> None:
    data = b"".join(json.dumps(row | {"id": os.urandom(8).hex()}).encode() + b"\n" for row in ROWS)
    first = PACKERS[packed](data)
    content, path = first + PACKERS[packed](data), tmp_path / f"a.jsonl{packed}"
    for size in (0, 1, 3, 10, len(first) - 1, len(first) + 1, len(first) + 9, len(content) - 5, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"a\.jsonl.*(cut off|is no (gzip|zstd) file)"):
            read_rows(Source(path=str(path), format="llava"))
    for position in (len(first) // 2, len(content) - 6):
        path.write_bytes(content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :])
        with pytest.raises(DataError, match="cut off or damaged; fetch or compress it again"):
            read_rows(Source(path=str(path), format="llava"))
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"it is no (gzip|zstd) file, whatever its name says"):
        open_table(str(path))


def test_bad_lines_of_a_compressed_file_keep_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(pieces_module, "_BLOCK", 50)
    lines = [json.dumps(ROWS[0]), "", "{", json.dumps({"long": "x" * 2000}), json.dumps(ROWS[1])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.ndjson.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    plain, packed = (open_table(str(tmp_path / name)) for name in ("a.jsonl", "a.ndjson.gz"))
    rows = [[row for piece in table.pieces(2) for row in table.read(piece)] for table in (plain, packed)]
    assert rows[0] == rows[1]
    assert len(rows[1]) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.parquet.gz", r"\.parquet inside \.gz is not read.*Unpack it \(gunzip\)"),
        ("a.arrow.zst", r"\.arrow inside \.zst is not read.*Unpack it \(unzstd\)"),
        ("a.jsonl.bz2", r"rows are not read from \.bz2.*compress it as \.gz or \.zst"),
        ("a.gz", r"rows are not read from \.gz\. Give a \.json, .*in \.gz or \.zst"),
    ],
)
def test_other_compressed_files_are_refused_with_advice(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=message):
        open_table(str(tmp_path / name))


def test_no_more_is_unpacked_than_is_worked_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of compressed files hold rows, so they are made one after another, also behind a file that is not one."""
    _write(tmp_path / "0.jsonl")
    for i in range(1, 6):
        (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(_encode(".jsonl", ROWS)))
    begun: list[str] = []
    worked: list[int] = []
    plain, begin = build.RowsWork.__call__, file_set._begin

    def work(self: build.RowsWork, piece: Piece) -> build.ShardInfo:
        worked.append(len(begun))
        return plain(self, piece)

    def note(rows: int, table: TableFile) -> Iterator[Piece]:
        begun.append(table.address)
        return begin(rows, table)

    monkeypatch.setattr(build, "PIECE_ROWS", 23)
    monkeypatch.setattr(build.RowsWork, "__call__", work)
    monkeypatch.setattr(file_set, "_begin", note)
    source, limits = Source(path=str(tmp_path / "*"), format="llava"), build.CheckLimits(10**6, "raise")
    build.build_rows(source, limits, "chat", IndexFolder(str(tmp_path / "index")), Spread())
    assert worked == [3, 3, 4, 5, 6, 6]


def test_files_of_a_store_are_opened_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"memory://side/{tmp_path.name}")
    for i in range(8):
        store.write(f"{i}.jsonl", _encode(".jsonl", ROWS[i : i + 1]))
    barrier, plain = threading.Barrier(8, timeout=20), file_set.open_table

    def open_together(address: str) -> Any:
        barrier.wait()  # broken if files are opened one after another
        return plain(address)

    monkeypatch.setattr(file_set, "open_table", open_together)
    table = FileSet([join(store.address, f"{i}.jsonl") for i in range(8)])
    rows = [row for piece in table.pieces() for row in table.read(piece)]
    assert [row[1]["id"] for row in rows if not isinstance(row, BadRow)] == [f"r{i}" for i in range(8)]


def test_natural_order() -> None:
    names = ["a10b2", "a2b10", "a2b9", "a02", "A1", "10", "9", "a"]
    assert sorted(names, key=row_files.natural_key) == ["9", "10", "A1", "a", "a02", "a2b9", "a2b10", "a10b2"]
