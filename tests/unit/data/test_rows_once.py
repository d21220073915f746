"""Sources of several files: no row is lost, read twice, or read with images of another folder."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import feather, parquet

from ray_vlm.config.check import RULES
from ray_vlm.config.data import Source
from ray_vlm.config.paths import absolute_paths
from ray_vlm.config.row_files import expand_braces
from ray_vlm.config.schema import JobConfig
from ray_vlm.data import build
from ray_vlm.data.images import read_size
from ray_vlm.data.parallel import Spread
from ray_vlm.data.parts import load_parts
from ray_vlm.data.records import BadRow
from ray_vlm.data.shards import IndexFolder, load_shard, read_record
from ray_vlm.data.sources.files import find_files
from ray_vlm.data.sources.formats import read_rows
from ray_vlm.errors import ConfigError, DataError

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]


def _write(path: Path, *rows: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or [{"conversations": TURNS}]))
    return str(path)


def _error(*paths: Path) -> str:
    with pytest.raises(DataError) as error:
        read_rows(Source(path=tuple(map(str, paths)), format="llava"))
    return str(error.value)


# Which files


def test_a_link_to_a_parent_folder_gives_no_file_again(tmp_path: Path) -> None:
    path = _write(tmp_path / "a" / "b" / "1.jsonl")
    for name in ("up", "again"):
        (tmp_path / "a" / "b" / name).symlink_to(tmp_path)
    for pattern in ("**/*.jsonl", "**/**/1.jsonl", "a/**/b/*.jsonl", "a/**"):
        assert find_files(Source(path=str(tmp_path / pattern))) == (path,)


def test_a_file_is_not_read_through_two_names_of_its_folder(tmp_path: Path) -> None:
    path = _write(tmp_path / "run-1" / "1.jsonl")
    (tmp_path / "latest").symlink_to("run-1")
    assert f"{path}: listed twice" in _error(tmp_path / "*" / "1.jsonl")
    assert "is the same file" in _error(tmp_path / "latest" / "1.jsonl", tmp_path / "run-1" / ".." / "run-1" / "*")
    assert len(find_files(Source(path=str(tmp_path / "latest" / "*.jsonl")))) == 1


def test_files_with_the_same_content_in_one_place_are_two(tmp_path: Path) -> None:
    _write(tmp_path / "blobs" / "x.jsonl")
    (tmp_path / "rows").mkdir()
    for name in ("1.jsonl", "2.jsonl"):  # as the hub's cache has them
        (tmp_path / "rows" / name).symlink_to(tmp_path / "blobs" / "x.jsonl")
    assert len(find_files(Source(path=str(tmp_path / "rows")))) == 2


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "a" / "1.jsonl")
    _write(tmp_path / "b" / "2.jsonl")
    scan = os.scandir

    def refuse(path: str) -> Any:  # tests may run as a user who may read everything
        if str(path).rstrip("/").endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for pattern in ("**/*.jsonl", "*/*.jsonl"):
        assert "Permission denied" in _error(tmp_path / pattern)


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / "b.jsonl")
    for path in (tmp_path, tmp_path / "*.jsonl", tmp_path / "b.jsonl"):
        assert "b.jsonl: not readable (a pipe or a device" in _error(path)
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    assert "zero.jsonl: not readable (a pipe or a device" in _error(tmp_path / "zero.jsonl")


def test_pipes_among_annotations_and_images_are_refused_at_once(tmp_path: Path) -> None:
    for name in ("voc/1.xml", "cvat/annotations.xml", "photos.tar", "voc/2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    Image.new("RGB", (64, 48)).save(tmp_path / "voc" / "1.jpg")
    ((bad,), _) = read_rows(Source(path=str(tmp_path / "voc"), format="voc"))
    assert isinstance(bad, BadRow)
    assert "a pipe or a device" in bad.reason
    with pytest.raises(DataError, match=r"a pipe or a device"):
        read_rows(Source(path=str(tmp_path / "cvat"), format="cvat"))
    with pytest.raises(DataError, match=r"photos\.tar: not readable \(a pipe or a device"):
        read_rows(Source(path=_write(tmp_path / "a.jsonl"), format="llava", image_root=str(tmp_path / "photos.tar")))
    with pytest.raises(ValueError, match=r"a pipe or a device"):
        read_size(str(tmp_path / "voc" / "2.jpg"), 10**6)


def test_a_pattern_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "[z-a].jsonl is no pattern: bad character range z-a" in _error(tmp_path / "[z-a].jsonl")


@pytest.mark.parametrize("pattern", ["{0..999999}{0..999999}", "{a,b}" * 40, "{a,a}" * 40, "{0..9999999}"])
def test_braces_that_stand_for_too_many_names_are_refused_at_once(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"more than 100,000 names"):
        expand_braces(pattern)


def test_braces_have_no_limit_of_depth() -> None:
    assert expand_braces("{0..0}" * 3000) == ["0" * 3000]
    assert expand_braces("{b,{c,a}}{2..1}") == ["b2", "b1", "c2", "c1", "a2", "a1"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train_0/a.jsonl", "train_1/b.jsonl"], "train_0, train_1 are all folders of the split train"),
        (["train/a.jsonl", "training/b.jsonl"], "train, training are all folders of the split train"),
        (
            ["train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
            r"train-\*-of-00001, train-\*-of-00002 are files of several writings",
        ),
        (
            ["a-train-00000-of-00002.jsonl", "b-train-00001-of-00002.jsonl"],
            "1 of the 2 files of a-train are missing, the first a-train-00001-of-00002",
        ),
        (["train-0000-of-99999999999.jsonl"], "99999999998 of the 99999999999 files of train are missing"),
    ],
)
def test_no_file_of_a_split_is_passed_over(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        _write(tmp_path / name)
    with pytest.raises(DataError, match=message):
        find_files(Source(path=str(tmp_path)))


def test_several_data_sets_in_one_folder_are_counted_apart(tmp_path: Path) -> None:
    for name in ("a-train-00000-of-00001", "b-train-00000-of-00002", "b-train-00001-of-00002"):
        _write(tmp_path / f"{name}.jsonl")
    assert len(find_files(Source(path=str(tmp_path)))) == 3


def test_save_to_disk_lists_no_parent_folder(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": ".."}]}')
    assert "state.json lists no files of rows" in _error(tmp_path)


def test_a_data_set_of_the_hub_is_no_part_of_a_list() -> None:
    assert "owner/name: no such file or folder, and a data set of the hub is no part of a list" in _error(
        Path("owner/name"), Path("owner/other")
    )


@pytest.mark.parametrize("path", [[], [""], ["a.jsonl", ""]])
def test_a_list_has_names(path: list[str]) -> None:
    with pytest.raises(ValueError, match="a list of at least one path, none of them empty"):
        Source.model_validate({"path": path})


@pytest.mark.parametrize("first", ["a.parquet", "b.csv", "c.arrow"])
def test_tables_of_several_kinds_with_the_same_columns_are_one_source(tmp_path: Path, first: str) -> None:
    table = pa.table({"image": ["1.jpg"], "label": ["x"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("image,label\n1.jpg,x\n")
    feather.write_feather(table, tmp_path / "c.arrow", compression="uncompressed")
    names = [first, *({"a.parquet", "b.csv", "c.arrow"} - {first})]
    rows, labels = read_rows(Source(path=tuple(str(tmp_path / name) for name in names), format="image_csv"))
    assert (len(rows), labels) == (3, ["label=x"])


# Images


def test_files_without_a_common_folder_need_image_root(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open(f"memory://{tmp_path.name}/2.csv", "wt") as file:
        file.write("image,label\n1.jpg,x\n")
    (tmp_path / "1.csv").write_text("image,label\n1.jpg,x\n")
    paths = (str(tmp_path / "1.csv"), f"memory://{tmp_path.name}/2.csv")
    with pytest.raises(DataError, match=r"no folder has all of its files, .* Set image_root"):
        read_rows(Source(path=paths, format="image_csv"))
    rows, _ = read_rows(Source(path=paths, format="image_csv", image_root=str(tmp_path)))
    assert [row.images for row in rows if not isinstance(row, BadRow)] == [(str(tmp_path / "1.jpg"),)] * 2


def test_rows_of_a_renamed_folder_have_the_images_there(tmp_path: Path) -> None:
    folder, limits = IndexFolder(str(tmp_path / "index")), build.CheckLimits(10**6, "raise")
    source = Source(path=str(tmp_path / "v*" / "rows.jsonl"), format="prompt")

    def images() -> set[str]:
        names = build.build_rows(source, limits, "chat", folder, Spread()).names
        return {str(image) for name in names for image in read_record(load_shard(folder, name), 0).images}

    _write(tmp_path / "v1" / "rows.jsonl", {"prompt": "What?", "image": "1.jpg"})
    Image.new("RGB", (64, 48)).save(tmp_path / "v1" / "1.jpg")
    assert images() == {str(tmp_path / "v1" / "1.jpg")}
    (tmp_path / "v1").rename(tmp_path / "v2")
    assert images() == {str(tmp_path / "v2" / "1.jpg")}


# Bad rows


def test_bad_gui_steps_name_their_file(tmp_path: Path) -> None:
    head = "Task_id,Image_id,Instruction,Output,Grounding\n"
    good = 't,1.png,do,"{""action"": ""click""}","[1, 2]"\n'
    (tmp_path / "1.csv").write_text(head + good * 2)
    (tmp_path / "2.csv").write_text(head + good + "t,1.png,do,oops,\n" + good)
    rows, _ = read_rows(Source(path=str(tmp_path), format="gui_csv"))
    assert [(row.row, row.id) for row in rows] == [(i, f"t/{i}") for i in range(5)]
    (bad,) = (row for row in rows if isinstance(row, BadRow))
    assert bad.reason.startswith("2.csv row 1: Output holds 'oops'")


def test_reasons_can_be_printed_whatever_bytes_a_name_has(tmp_path: Path) -> None:
    for name in (b"\xff1.jsonl", b"\xff2.jsonl"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text("oops\n")
    rows, _ = read_rows(Source(path=str(tmp_path), format="llava"))
    assert [row.reason.encode()[:21] for row in rows if isinstance(row, BadRow)] == [
        b"\\udcff1.jsonl row 0: ",
        b"\\udcff2.jsonl row 0: ",
    ]


# Test rows are no training rows


def _job(folder: Path, **data: dict[str, Any]) -> JobConfig:
    sections = {name: {"format": "llava"} | section for name, section in data.items()}
    values = {
        "model": {"name": "tiny", "load_in_4bit": False},
        "task": {"name": "chat"},
        "data": sections,
        "run": {"output_dir": str(folder / "runs")},
    }
    return absolute_paths(JobConfig.model_validate(values))


def test_test_rows_are_not_learned_by_another_name_of_their_file(tmp_path: Path) -> None:
    names = [_write(tmp_path / "rows" / f"{i}.jsonl", *[{"conversations": TURNS}] * 3) for i in range(3)]
    for train, test in (
        (str(tmp_path / "rows" / "*.jsonl"), names[2]),
        (names[:2], names[1:]),
        (str(tmp_path / "rows"), names[1:]),
    ):
        with pytest.raises(ConfigError, match=r"data\.test and data\.train share [36] rows of .*/[12]\.jsonl"):
            load_parts(_job(tmp_path, train={"path": train}, test={"path": test}), ["train", "test"])
    parts = load_parts(_job(tmp_path, train={"path": names[:2]}, test={"path": names[2]}), ["train", "test"])
    assert (len(parts.train or ()), len(parts.test or ())) == (6, 3)
    first = {"path": str(tmp_path / "rows"), "max_rows": 4}
    parts = load_parts(_job(tmp_path, train=first, test={"path": names[2]}), ["train", "test"])
    assert (len(parts.train or ()), len(parts.test or ())) == (4, 3)


@pytest.mark.parametrize(
    ("train", "test", "is_same"),
    [
        ({"path": "a/b"}, {"path": "a/b", "split": "test"}, False),
        ({"path": "a/b"}, {"path": "a/b", "split": "train"}, True),
        ({"path": "a/b", "config": "x"}, {"path": "a/b", "config": "y"}, False),
        ({"path": "a/b"}, {"path": "a/b", "revision": "main"}, True),
        ({"path": "a.jsonl"}, {"path": ["a.jsonl"]}, True),
    ],
)
def test_splits_of_one_data_set_are_different_rows(train: dict[str, Any], test: dict[str, Any], is_same: bool) -> None:
    job = _job(Path("/tmp"), train=train, test=test)
    broken = [text for breaks, _, text in RULES if breaks(job)]
    assert any(text.startswith("the training rows cannot also give") for text in broken) == is_same
