"""Folders with a folder of images for each class."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.data import Source
from ray_vlm.data.records import BadRow, SftRecord
from ray_vlm.data.sources.detect import detect_format
from ray_vlm.data.sources.formats import read_rows, source_version
from ray_vlm.errors import DataError


def _fill(root: Path, *names: str) -> str:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return str(root)


def _read(root: str, **options: Any) -> tuple[list[Any], list[str]]:
    return read_rows(Source(path=root, format="image_folder", **options))


def test_a_row_for_each_image(tmp_path: Path) -> None:
    root = _fill(tmp_path / "pets", "dog/2.JPG", "dog/1.png", "cat/b.webp", "cat/x y.jpeg", "cat/old/deep/b.jpg")
    _fill(
        tmp_path / "pets", ".DS_Store", "dog/.DS_Store", "dog/.hidden.png", ".git/a.png", "dog/Thumbs.db", "README.md"
    )
    rows, labels = _read(root)
    folder = str((tmp_path / "pets").resolve())
    assert [row.id for row in rows] == ["cat/b", "cat/old/deep/b", "cat/x y", "dog/1", "dog/2"]
    assert rows[2] == SftRecord("cat/x y", 2, (f"{folder}/cat/x y.jpeg",), (), {"attributes": {"label": "cat"}})
    assert [row.truth["attributes"]["label"] for row in rows] == ["cat"] * 3 + ["dog"] * 2
    assert labels == ["label=cat", "label=dog"]
    renamed, labels = _read(root, columns={"animal": "label"}, max_rows=1)
    assert (renamed[0].truth, len(renamed), labels) == ({"attributes": {"animal": "cat"}}, 1, ["animal=cat"])


def test_images_of_one_stem_are_one_group(tmp_path: Path) -> None:
    rows, _ = _read(_fill(tmp_path, "dog/1.png", "dog/1.jpg", "cat/1.jpg"))
    assert [(row.id, row.group) for row in rows] == [("cat/1", ""), ("dog/1", "dog/1"), ("dog/1#2", "dog/1")]


SPLIT = ("train/dog/1.png", "train/cat/2.png", "val/dog/3.png", "val/cat/4.png", "Test/cat/5.png")


@pytest.mark.parametrize(
    ("split", "ids"),
    [
        (None, ["cat/2", "dog/1"]),
        ("train", ["cat/2", "dog/1"]),
        ("val", ["cat/4", "dog/3"]),
        ("validation", ["cat/4", "dog/3"]),
        ("test", ["cat/5"]),
    ],
)
def test_a_split(tmp_path: Path, split: str | None, ids: list[str]) -> None:
    rows, _ = _read(_fill(tmp_path, *SPLIT), split=split)
    assert [row.id for row in rows] == ids


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    _, labels = _read(_fill(tmp_path, "test/1.png", "train/2.png"))
    assert labels == ["label=test", "label=train"]


def test_what_is_not_an_image_or_has_no_class_is_a_bad_row(tmp_path: Path) -> None:
    rows, labels = _read(_fill(tmp_path, "a.jpg", "dog/1.jpg", "dog/notes.txt", "cat/2.jpg"))
    bad = {row.id: row.reason for row in rows if isinstance(row, BadRow)}
    assert bad.keys() == {"a", "dog/notes"}
    assert "beside the folders of the classes" in bad["a"]
    assert "no image by its suffix" in bad["dog/notes"]
    assert labels == ["label=cat", "label=dog"]


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        ((), {}, "no folder of images for each class"),
        (("a.jpg", "b.jpg"), {}, "no folder of images for each class"),
        (("dog/1.png", "cat/2.png"), {"split": "test"}, r"classes \(cat, dog\) in place of splits. Remove `split`"),
        (SPLIT, {"split": "extra"}, "no folder of the split extra; there is Test, train, val"),
        (SPLIT[2:4], {}, "no folder of the split train; there is val"),
        ((*SPLIT, "valid/cat/1.png"), {"split": "validation"}, "2 folders of the split validation"),
        ((*SPLIT, "extra/cat/1.png"), {}, r"folders of splits \(Test, train, val\) and others \(extra\)"),
        (("dog/1.jpg", "cat/notes.txt"), {}, "cat: a folder without images"),
        (("dog/1.jpg", "dog /2.jpg"), {}, "differ only by spaces"),
        (("metadata.csv", "dog/1.jpg"), {}, r"format=image_csv for classes: path=.*/metadata\.csv"),
        (("train/metadata.jsonl", "train/dog/1.jpg"), {}, r"metadata\.jsonl lists what the images are"),
        (("dog/1.jpg",), {"image_root": "x"}, "image_root is not used"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path: Path, names: tuple[str, ...], options: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        _read(_fill(tmp_path, *names), **options)


def test_an_empty_class_a_file_and_nothing(tmp_path: Path) -> None:
    _fill(tmp_path / "pets", "dog/1.jpg")
    (tmp_path / "pets/cat").mkdir()
    with pytest.raises(DataError, match="pets/cat: a folder without images"):
        _read(str(tmp_path / "pets"))
    with pytest.raises(DataError, match="a file, and format=image_folder reads a folder"):
        _read(str(tmp_path / "pets/dog/1.jpg"))
    with pytest.raises(DataError, match="no such file"):
        _read(str(tmp_path / "none"))


def test_links_to_folders_are_followed_if_asked(tmp_path: Path) -> None:
    _fill(tmp_path, "store/1.jpg", "pets/cat/2.jpg")
    os.symlink(tmp_path / "store", tmp_path / "pets/dog")
    with pytest.raises(DataError, match="a link to a folder"):
        _read(str(tmp_path / "pets"))
    rows, _ = _read(str(tmp_path / "pets"), follow_links=True)
    assert [row.id for row in rows] == ["cat/2", "dog/1"]
    os.symlink(tmp_path / "pets", tmp_path / "pets/cat/loop")
    with pytest.raises(DataError, match="a link to a folder that it lies in"):
        _read(str(tmp_path / "pets"), follow_links=True)


def test_the_version_is_small_and_follows_the_names(tmp_path: Path) -> None:
    root = _fill(tmp_path / "pets", *(f"class{i % 5}/{i}.jpg" for i in range(500)))
    source = Source(path=root, format="image_folder")
    before = source_version(source)
    assert len(json.dumps(before)) < 300
    assert source_version(source) == before
    (tmp_path / "pets/class0/0.jpg").rename(tmp_path / "pets/class0/x.jpg")
    assert source_version(source) != before


@pytest.fixture
def store() -> Iterator[Any]:
    import fsspec

    system = fsspec.filesystem("memory")
    yield system
    system.rm("/pets", recursive=True)


def test_a_folder_in_an_object_store(store: Any) -> None:
    for name in (*SPLIT, "train/.cache/x.png", "train/dog/deep/6.png"):
        store.pipe(f"/pets/{name}", b"x")
    rows, labels = _read("memory://pets")
    assert [row.id for row in rows] == ["cat/2", "dog/1", "dog/deep/6"]
    assert rows[0].images == ("memory://pets/train/cat/2.png",)
    assert labels == ["label=cat", "label=dog"]
    source = Source(path="memory://pets", format="image_folder")
    before = source_version(source)
    store.pipe("/pets/train/cat/7.png", b"x")
    assert source_version(source)[1] == before[1] + 1
    assert detect_format(Source(path="memory://pets", format="auto")).format == "image_folder"
    with pytest.raises(DataError, match="memory://none: no such file"):
        _read("memory://none")
