"""The index on disk: nothing is lost on the way, it is used again, and what breaks it is mended or named."""

import datetime
import errno
import json
import os
import pickle
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_vlm.cli import main
from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data import build, parallel, parts, rows, shards
from ray_vlm.data.index import Index
from ray_vlm.data.parallel import Spread
from ray_vlm.data.parts import Indexer, all_of, build_index
from ray_vlm.data.records import PreferenceRecord, PromptRecord, SftRecord
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.shards import IndexedRow, IndexFolder, Shard, pack_rows, read_record
from ray_vlm.data.spec import SampleSpec
from ray_vlm.data.suspicions import ShardSummary
from ray_vlm.errors import DataError, RunError


@pytest.fixture
def builder(tiny_models: dict[str, str]) -> SampleBuilder:
    return load_sample_builder(SampleSpec(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), ChatTask(), ()))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PIECE_ROWS", 4)


def _row(number: int, image: str = "a.png", answer: str = "It is grey.") -> str:
    turns = [{"from": "human", "value": f"<image>\nWhat is number {number}?"}, {"from": "gpt", "value": answer}]
    return json.dumps({"id": f"r{number}", "image": image, "conversations": turns}) + "\n"


def _source(folder: Path, rows: int = 14) -> Source:
    for number, name in enumerate("ab"):
        Image.new("RGB", (64, 48), (number, 9, 9)).save(folder / f"{name}.png")
    (folder / "rows.jsonl").write_text("".join(_row(i, "ab"[i % 2] + ".png") for i in range(rows)))
    return Source(path=str(folder / "rows.jsonl"), format="llava")


def _index(source: Source, builder: SampleBuilder, folder: Path, **data: Any) -> Index:
    return build_index(source, Data(**data), builder, str(folder))


def _files(folder: Path) -> dict[str, int]:
    """The shards of an index with the time of their last change."""
    paths = [*folder.glob("rows/*/*"), *folder.glob("tokens/*/*")]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in paths}


def _pack(record: Any, folder: Path) -> Any:
    (folder / "shard.arrow").write_bytes(memoryview(pack_rows([IndexedRow(record, record)], ShardSummary())))
    return read_record(Shard(folder / "shard.arrow"), 0, record.source)


@pytest.mark.parametrize(
    "record",
    [
        SftRecord("é", 7, ("/a.jpg", b"\xff"), ((3, 4), (5, 6)), {"boxes": ((1.5, 2.0, 3.0, 4.25),)}, {}, "g", 2),
        SftRecord("a", 0, (), (), {"output": {"keys": ["ctrl", ("c",)], "n": 2**70}}, {"history": ("x", "y")}),
        PreferenceRecord("b", 1, ("/a.jpg",), ((1, 2),), (("user", "<image>?"),), "yes", "no", "", 1),
        PromptRecord("c", 2, (), (), (("user", "hm"),), {"when": datetime.date(2026, 1, 2), "cost": Decimal("1.10")}),
        PromptRecord("d", 3, (), (), (("user", "hm"),), {"x": float("inf"), "z": b"\0", "on": True, "l": [None]}),
    ],
)
def test_a_record_comes_back_as_it_was(record: Any, tmp_path: Path) -> None:
    back = _pack(record, tmp_path)
    assert back == record
    assert repr(back) == repr(record)  # tuples stay tuples: the rows' fingerprint depends on it


def test_a_row_of_the_index_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    with pytest.raises(DataError, match="cannot be read"):
        _pack(PromptRecord("a", 0, (), (), (("user", "x"),), {"x": Evil()}), tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.usefixtures("small_pieces")
def test_a_second_index_reads_nothing(tmp_path: Path, builder: SampleBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(tmp_path)
    first = _index(source, builder, tmp_path / "index")
    assert len(_files(tmp_path / "index")) == 8
    for name in ("SourceReader", "SizeCache", "load_sample_builder"):
        monkeypatch.setattr(build, name, None)
    second = _index(source, builder, tmp_path / "index")
    assert second.records.name == first.records.name
    assert list(second.records) == list(first.records)
    assert [record.id for record in second.records] == [f"r{i}" for i in range(14)]
    assert second.fingerprint() == first.fingerprint()


def test_an_index_is_small_where_it_is_pickled_and_makes_the_same_samples(
    tmp_path: Path, builder: SampleBuilder
) -> None:
    index = _index(_source(tmp_path), builder, tmp_path / "index")
    assert len(pickle.dumps(index)) < 1000
    back = pickle.loads(pickle.dumps(index))
    for number in (0, 5, -1):
        sample, expected = back.records.sample(builder, number), builder.row(index.records[number])
        assert np.array_equal(sample.input_ids, expected.input_ids)
        assert np.array_equal(sample.labels, expected.labels)
        assert all(np.array_equal(a, b) for a, b in zip(sample.images, expected.images, strict=True))
    with pytest.raises(IndexError):
        back.records[14]


@pytest.mark.usefixtures("small_pieces")
def test_what_changes_a_source_makes_only_the_pieces_anew_that_it_touches(
    tmp_path: Path, builder: SampleBuilder
) -> None:
    source = _source(tmp_path, 8)
    _index(source, builder, tmp_path / "index")
    before = _files(tmp_path / "index")
    lines = Path(source.path).read_text().splitlines(keepends=True)
    Path(source.path).write_text("".join([*lines[:5], _row(5, "b.png", "It is red."), *lines[6:], _row(8)]))
    index = _index(source, builder, tmp_path / "index")
    after = _files(tmp_path / "index")
    assert index.records[5].truth["answer"] == "It is red."
    assert len(index) == 9
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 4  # the rows and the tokens of the second piece and of the third


@pytest.mark.usefixtures("small_pieces")
def test_a_build_that_was_killed_is_gone_on_with(
    tmp_path: Path, builder: SampleBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, written = _source(tmp_path), []
    write = IndexFolder.write

    def dying(self: IndexFolder, name: str, data: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(IndexFolder, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            _index(source, builder, tmp_path / "index")
    before = _files(tmp_path / "index")
    assert len(before) == 2
    assert len(_index(source, builder, tmp_path / "index")) == 14
    assert {name: time for name, time in _files(tmp_path / "index").items() if name in before} == before


@pytest.mark.usefixtures("small_pieces")
def test_a_full_disk_is_named_and_what_is_done_is_kept(
    tmp_path: Path, builder: SampleBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, count, write = _source(tmp_path), [0], IndexFolder.write

    def full(self: IndexFolder, name: str, data: Any) -> None:
        count[0] += 1
        if count[0] > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(IndexFolder, "write", full)
        with pytest.raises(RunError, match=r"index_dir='.*index' cannot be written .*No space left.*another folder"):
            _index(source, builder, tmp_path / "index")
    assert len(_files(tmp_path / "index")) == 3
    assert len(_index(source, builder, tmp_path / "index")) == 14


@pytest.mark.usefixtures("small_pieces")
def test_damaged_files_and_those_of_another_version_are_made_again(
    tmp_path: Path, builder: SampleBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _source(tmp_path)
    expected = list(_index(source, builder, tmp_path / "index").records)
    parts_folder = next((tmp_path / "index" / "parts").iterdir())
    shards.load_shard.cache_clear()
    for number, name in enumerate(sorted(_files(tmp_path / "index"))):
        path = tmp_path / "index" / name
        path.write_bytes(path.read_bytes()[: number * 50])
    assert list(_index(source, builder, tmp_path / "index").records) == expected
    (parts_folder / "about.json").unlink()
    assert list(_index(source, builder, tmp_path / "index").records) == expected
    (parts_folder / "positions.npy").write_bytes(b"")  # as a power loss leaves it
    assert list(_index(source, builder, tmp_path / "index").records) == expected
    monkeypatch.setattr(build, "VERSION", 99)
    monkeypatch.setattr(shards, "VERSION", 99)
    before = _files(tmp_path / "index")
    assert list(_index(source, builder, tmp_path / "index").records) == expected
    assert len(_files(tmp_path / "index")) == 2 * len(before)


def test_a_shard_that_is_lost_under_a_run_is_named(tmp_path: Path, builder: SampleBuilder) -> None:
    index = _index(_source(tmp_path), builder, tmp_path / "index")
    shards.load_shard.cache_clear()
    for name in _files(tmp_path / "index"):
        (tmp_path / "index" / name).unlink()
    with pytest.raises(DataError, match=r"arrow: this file of the index is gone or damaged"):
        index.records[0]


@pytest.mark.usefixtures("small_pieces")
def test_only_the_rows_of_a_lost_shard_are_replaced(
    tmp_path: Path, builder: SampleBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "WAITS_S", ())
    monkeypatch.setattr(rows, "_OTHERS", 3)
    index = _index(_source(tmp_path, 24), builder, tmp_path / "index")
    lost = index.records.where(5)[1]
    shards.load_shard.cache_clear()
    (tmp_path / "index" / lost).unlink()
    with pytest.raises(DataError, match=lost.replace("+", r"\+")):
        rows.make_row(builder, index.records, 5, replace_unreadable=False)
    made = [rows.make_row(builder, index.records, number, replace_unreadable=True).number for number in range(24)]
    assert [number for number in range(24) if made[number] != number] == [4, 5, 6, 7]
    assert not {4, 5, 6, 7} & set(made)


@pytest.mark.usefixtures("small_pieces")
def test_a_clock_that_went_back_makes_nothing_anew(tmp_path: Path, builder: SampleBuilder) -> None:
    source = _source(tmp_path)
    _index(source, builder, tmp_path / "index")
    before = _files(tmp_path / "index")
    os.utime(source.path, (1, 1))
    assert len(_index(source, builder, tmp_path / "index")) == 14
    assert _files(tmp_path / "index") == before


def test_the_index_is_built_ahead_and_pruned(job_file: Any, tmp_path: Path, scenes: Path, capsys: Any) -> None:
    data = {"train": {"path": str(scenes / "train.json")}, "index_dir": str(tmp_path / "index")}
    path = str(job_file(data=data))
    assert main(["data", "index", path]) == 0
    out = capsys.readouterr().out
    assert "data.train: 50 rows" in out
    assert f"index: {tmp_path / 'index'}" in out
    assert main(["data", "index", path, "--prune"]) == 0
    assert "pruned: 0 files" in capsys.readouterr().out


def test_bad_rows_are_checked_again_when_their_images_change(tmp_path: Path, builder: SampleBuilder) -> None:
    source = _source(tmp_path, 3)
    (tmp_path / "b.png").rename(tmp_path / "away.png")
    index = _index(source, builder, tmp_path / "index", on_bad_row="quarantine")
    assert [bad.id for bad in index.bad] == ["r1"]
    assert "missing" in index.bad[0].reason
    (tmp_path / "away.png").rename(tmp_path / "b.png")
    assert not _index(source, builder, tmp_path / "index").bad
    (tmp_path / "b.png").unlink()
    assert not _index(source, builder, tmp_path / "index").bad  # what was good stays; a loader reports what is gone


def test_a_resumed_run_keeps_rows_whose_images_are_gone_and_a_new_run_does_not(
    tmp_path: Path, builder: SampleBuilder
) -> None:
    source = _source(tmp_path, 6)
    image = str(tmp_path / "b.png")
    (tmp_path / "b.png").unlink()
    indexer = Indexer(IndexFolder(str(tmp_path / "index")), Data(on_bad_row="quarantine"), "chat", Spread())
    resumed = indexer.join(all_of(indexer.read(source, {image: (64, 48)})), builder.spec)
    assert [record.sizes for record in resumed.records] == [((64, 48),)] * 6
    assert len(indexer.join(all_of(indexer.read(source)), builder.spec)) == 3


def test_a_source_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, builder: SampleBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, measure = _source(tmp_path), build.measure_row

    def append(*args: Any) -> Any:
        with open(source.path, "a", encoding="utf-8") as file:
            file.write(_row(99))
        return measure(*args)

    monkeypatch.setattr(build, "measure_row", append)
    with pytest.raises(DataError, match="has changed while it was read"):
        _index(source, builder, tmp_path / "index")


@pytest.mark.usefixtures("small_pieces")
def test_two_builds_at_once_make_one_index(tmp_path: Path, builder: SampleBuilder) -> None:
    source, made = _source(tmp_path, 40), []
    threads = [
        threading.Thread(target=lambda: made.append(_index(source, builder, tmp_path / "index"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({index.records.name for index in made}) == 1
    assert [record.id for record in made[0].records] == [f"r{i}" for i in range(40)]


@pytest.mark.usefixtures("small_pieces")
def test_prune_keeps_what_the_sources_need(tmp_path: Path, builder: SampleBuilder) -> None:
    source, folder = _source(tmp_path, 8), IndexFolder(str(tmp_path / "index"))
    _index(source, builder, tmp_path / "index")
    (tmp_path / "other.jsonl").write_text(_row(1))
    _index(source.model_copy(update={"path": str(tmp_path / "other.jsonl")}), builder, tmp_path / "index")
    before = _files(tmp_path / "index")
    assert build.prune(folder) == (0, 0)
    (tmp_path / "other.jsonl").unlink()
    count, size = build.prune(folder)
    assert count == 8  # its rows, its tokens, its listing and the five files of its part
    assert size > 0
    assert set(_files(tmp_path / "index")) < set(before)
    assert len(_index(source, builder, tmp_path / "index")) == 8


def test_rows_that_share_an_id_are_numbered_through_the_index(tmp_path: Path, builder: SampleBuilder) -> None:
    source = _source(tmp_path, 1)
    Path(source.path).write_text(_row(1) + _row(2) + _row(1))
    index = _index(source, builder, tmp_path / "index")
    assert [(record.id, record.group) for record in index.records] == [("r1", "r1"), ("r2", ""), ("r1#2", "r1")]


def _double(item: int) -> int:
    if item == 13:
        raise DataError("thirteen")
    if item == 17:
        os.kill(os.getpid(), 9)
    print("a library prints")  # it must not get between the results
    return 2 * item


def test_processes_do_the_work_and_their_errors_are_raised() -> None:
    assert sorted(Spread(2).run(_double, range(9))) == list(range(0, 18, 2))
    with pytest.raises(DataError, match="thirteen"):
        list(Spread(2).run(_double, range(10, 30)))
    with pytest.raises(RunError, match=r"has ended \(signal 9, for example for want of memory\)"):
        list(Spread(2).run(_double, [1, 2, 3, 17, 4]))


def test_few_items_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_run_in_processes", None)
    assert list(Spread(8).run(_double, [4])) == [8]


def test_a_script_without_a_main_guard_can_build_in_processes(tmp_path: Path) -> None:
    script = "from ray_vlm.data.parallel import Spread\nprint('started')\nprint(sum(Spread(2).run(abs, range(-9, 0))))"
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["started", "45"]


def test_the_index_lies_where_the_job_says(job_file: Any, scenes: Path, tmp_path: Path) -> None:
    from ray_vlm.config.load import load_job

    train = {"path": str(scenes / "train.json"), "max_rows": 4}
    job = load_job(job_file(data={"train": train, "index_dir": str(tmp_path / "elsewhere")}))
    assert parts.load_parts(job, ["train"]).train is not None
    assert (tmp_path / "elsewhere" / "rows").is_dir()
