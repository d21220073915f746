"""Pascal VOC as the devkit, LabelImg, Roboflow, CVAT and others write it."""

import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.data import Source
from ray_vlm.data.records import ImageRange
from ray_vlm.data.sources.formats import SourceReader, source_version
from ray_vlm.errors import DataError
from tests.support.annotations import make_image, objects, read_checked, reason, write

SIZE = "<size><width>64</width><height>48</height><depth>3</depth></size>"


def _object(name: str = "dog", box: tuple[Any, ...] = (10, 20, 30, 40), more: str = "") -> str:
    corners = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


def _xml(body: str, filename: str = "a.png", source: str = "", size: str = SIZE) -> str:
    return f"<annotation><folder>x</folder><filename>{filename}</filename>{source}{size}{body}</annotation>"


def _one(tmp_path: Path, xml: str | bytes, **options: Any) -> Any:
    """The row of an annotation in a plain VOC folder, whose image is a.png."""
    make_image(tmp_path / "JPEGImages/a.png")
    write(tmp_path / "Annotations/a.xml", xml)
    rows, _ = read_checked(tmp_path, "voc", **options)
    (row,) = rows.values()
    return row


DEVKIT = "<source><database>The VOC2007 Database</database><annotation>PASCAL VOC2007</annotation></source>"
LABELIMG = "<source><database>Unknown</database></source><segmented>0</segmented>"


@pytest.mark.parametrize(("source", "first"), [(DEVKIT, 1), (LABELIMG, 0), ("", 0)])
def test_the_devkit_counts_pixels_from_one_and_others_from_zero(tmp_path: Path, source: str, first: int) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    about = f"<pose>Left</pose><truncated>1</truncated><difficult>1</difficult>{part}"
    row = _one(tmp_path, _xml(_object(more=about) + _object("cat", ("1.5", " 2 ", "3e0", 4)), source=source))
    assert row.id == "a"
    assert objects(row) == [
        ("dog", (10.0 - first, 20.0 - first, 30.0, 40.0)),
        ("cat", (1.5 - first, 2.0 - first, 3.0, 4.0)),
    ]


def test_class_names_are_sorted_and_an_image_may_have_no_objects(tmp_path: Path) -> None:
    make_image(tmp_path / "JPEGImages/b.png")
    write(tmp_path / "Annotations/b.xml", _xml("", "b.png"))
    write(tmp_path / "Annotations/a.xml", _xml(_object("dog") + _object("cat")))
    make_image(tmp_path / "JPEGImages/a.png")
    rows, labels = read_checked(tmp_path, "voc")
    assert labels == ["cat", "dog"]
    assert objects(rows["b"]) == []


@pytest.mark.parametrize(
    ("xml", "why"),
    [
        (_xml("<object><bndbox/></object>"), "the <name> of an object is empty"),
        (_xml("<object><name>a</name></object>"), "'a' has no <bndbox>"),
        (_xml("<object><name>a</name><polygon><x1>1</x1></polygon></object>"), "'a' has a <polygon>, and only boxes"),
        (_xml("<object><type>robndbox</type><name>a</name><robndbox><cx>1</cx></robndbox></object>"), "<robndbox>"),
        (_xml(_object(more="<rotated>1</rotated>")), "is rotated"),
        (_xml(_object(box=("", 1, 2, 3))), "<xmin> of 'dog' is '', not a finite number"),
        (_xml(_object(box=("nan", 1, 2, 3))), "<xmin> of 'dog' is 'nan'"),
        (_xml(_object(box=(1, 1, 2, "1e400"))), "<ymax> of 'dog'"),
        ("<annotations/>", "begins with <annotations>, not with <annotation>"),
        ("<annotation>", "not readable as XML"),
        ("", "not readable as XML"),
        (b"<annotation><filename>\xff</filename></annotation>", "not readable as XML"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "not readable as XML"),
        ('<!DOCTYPE annotation [<!ENTITY a "b">]><annotation>&a;</annotation>', "document type or entities"),
        ('<!DOCTYPE annotation SYSTEM "file:///etc/passwd"><annotation/>', "document type or entities"),
        (_xml("<object><name>a&#x85;b</name></object>"), "control character"),
    ],
)
def test_annotations_that_cannot_be_used_are_named(tmp_path: Path, xml: str | bytes, why: str) -> None:
    text = reason(_one(tmp_path, xml))
    assert re.search(why, text)
    assert "Annotations/a.xml: " in text


@pytest.mark.parametrize(
    ("filename", "image"),
    [
        ("a.png", "a.png"),
        ("a", "a.png"),  # no suffix
        ("a.jpg", "a.png"),  # images were converted
        ("", "a.png"),
        ("C:\\pets\\a.png", "a.png"),
        ("other/folder/a.png", "a.png"),
        ("renamed.png", "a.png"),
        ("b &amp; c \u00e9.png", "b & c \u00e9.png"),
        ("sub/b.png", "sub/b.png"),
        ("../../secret.png", "a.png"),
    ],
)
def test_the_image_is_the_named_one_or_that_of_the_annotation_s_name(tmp_path: Path, filename: str, image: str) -> None:
    make_image(tmp_path / "secret.png")
    make_image(tmp_path / "data/JPEGImages" / image)
    row = _one(tmp_path / "data", _xml(_object(), filename)) if image == "a.png" else None
    if row is None:
        write(tmp_path / "data/Annotations/x.xml", _xml(_object(), filename))
        row = read_checked(tmp_path / "data", "voc")[0]["x"]
    assert row.images == (str(tmp_path / "data/JPEGImages" / image),)


def test_an_image_that_is_missing_or_ambiguous_is_a_bad_row(tmp_path: Path) -> None:
    for name in ("b.png", "b.jpg"):
        make_image(tmp_path / "JPEGImages" / name)
    write(tmp_path / "Annotations/b.xml", _xml(_object(), "x.png"))
    write(tmp_path / "Annotations/c.xml", _xml(_object(), "f/c.png"))
    write(tmp_path / "Annotations/d.xml", _xml(_object(), ""))
    rows, _ = read_checked(tmp_path, "voc")
    assert "x.png" in reason(rows["b"])
    assert "image 'JPEGImages/f/c.png' is not in" in reason(rows["c"])
    assert "'JPEGImages/c.png'" in reason(rows["c"])
    assert "image is not named" in reason(rows["d"])


def test_sizes_that_differ_make_the_row_bad_until_box_frame_is_set(tmp_path: Path) -> None:
    twice = "<size><width>128</width><height>96</height></size>"
    xml = _xml(_object(), size=twice)
    assert "lists 128x96 px" in reason(_one(tmp_path, xml))
    assert objects(_one(tmp_path, xml, box_frame="listed")) == [("dog", (5.0, 10.0, 15.0, 20.0))]
    assert objects(_one(tmp_path, xml, box_frame="image")) == [("dog", (10.0, 20.0, 30.0, 40.0))]
    for size in ("", "<size><width>0</width><height>0</height></size>", "<size><width/></size>"):
        assert objects(_one(tmp_path, _xml(_object(), size=size))) == [("dog", (10.0, 20.0, 30.0, 40.0))]


def _devkit(folder: Path, names: tuple[str, ...] = ("1", "2", "3")) -> Path:
    for name in names:
        make_image(folder / f"JPEGImages/{name}.png")
        write(folder / f"Annotations/{name}.xml", _xml(_object(), f"{name}.png"))
    make_image(folder / "JPEGImages/unlabelled.png")
    return folder


def test_splits_of_the_devkit(tmp_path: Path) -> None:
    folder = _devkit(tmp_path / "VOCdevkit/VOC2012")
    write(folder / "ImageSets/Main/train.txt", "3\r\n1\n\n3\n")
    write(folder / "ImageSets/Main/val.txt", "2\ngone\n")
    write(folder / "ImageSets/Main/dog_train.txt", "1  1\n3 -1\n")
    for path in (folder, tmp_path / "VOCdevkit"):
        assert list(read_checked(path, "voc")[0]) == ["3", "1"]
    rows, _ = read_checked(folder, "voc", split="validation")
    assert next(iter(rows)) == "2"
    assert "gone.xml: no such file" in reason(list(rows.values())[1])
    assert list(read_checked(folder, "voc", split="dog_train")[0]) == ["1", "3"]
    with pytest.raises(DataError, match="no split 'test' in ImageSets/Main, where there is dog_train, train, val"):
        read_checked(folder, "voc", split="test")
    (folder / "ImageSets/Main/train.txt").unlink()
    with pytest.raises(DataError, match=r"has no train.txt but dog_train, val\. Set `split`"):
        read_checked(folder, "voc")
    write(folder / "ImageSets/Main/default.txt", "2\n")  # CVAT
    assert list(read_checked(folder, "voc")[0]) == ["2"]


def test_the_folder_of_the_annotations_means_the_one_above(tmp_path: Path) -> None:
    folder = _devkit(tmp_path)
    assert list(read_checked(folder / "Annotations", "voc")[0]) == list(read_checked(folder, "voc")[0])


def test_several_data_sets_in_a_folder_are_named(tmp_path: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        _devkit(tmp_path / year)
    with pytest.raises(DataError, match="holds the data sets VOC2007, VOC2012"):
        read_checked(tmp_path, "voc")


def test_images_beside_the_annotations(tmp_path: Path) -> None:
    """LabelImg, also in folders of folders."""
    for name in ("a", "sub/a"):
        make_image(tmp_path / f"{name}.png")
        write(tmp_path / f"{name}.xml", _xml(_object(), "a.png", LABELIMG))
    rows, _ = read_checked(tmp_path, "voc")
    assert {name: row.images for name, row in rows.items()} == {  # type: ignore[union-attr]
        "a": (str(tmp_path / "a.png"),),
        "sub/a": (str(tmp_path / "sub/a.png"),),
    }


def test_roboflow_has_a_folder_for_each_split(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        make_image(tmp_path / split / f"{split}_jpg.rf.1.jpg")
        write(tmp_path / split / f"{split}_jpg.rf.1.xml", _xml(_object(), f"{split}_jpg.rf.1.jpg"))
    assert list(read_checked(tmp_path, "voc")[0]) == ["train_jpg.rf.1"]
    assert list(read_checked(tmp_path, "voc", split="val")[0]) == ["valid_jpg.rf.1"]
    assert list(read_checked(tmp_path / "valid", "voc", split="val")[0]) == ["valid_jpg.rf.1"]


@pytest.mark.parametrize("folders", [("annotations", "images"), ("Annotations", "JPEGImages/sub"), ("Annotations", "")])
def test_other_names_of_the_folders(tmp_path: Path, folders: tuple[str, str]) -> None:
    make_image(tmp_path / folders[1] / "a.png")
    nested = "sub/" if "sub" in folders[1] else ""
    write(tmp_path / folders[0] / f"{nested}a.xml", _xml(_object()))
    (row,) = read_checked(tmp_path, "voc")[0].values()
    assert objects(row) == [("dog", (10.0, 20.0, 30.0, 40.0))]


def test_images_in_another_folder_or_a_tar(tmp_path: Path) -> None:
    import tarfile

    write(tmp_path / "data/Annotations/a.xml", _xml(_object(), "a.jpg"))
    make_image(tmp_path / "pictures/a.png")
    (row,) = read_checked(tmp_path / "data", "voc", image_root=str(tmp_path / "pictures"))[0].values()
    assert objects(row) == [("dog", (10.0, 20.0, 30.0, 40.0))]
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "pictures/a.png", "a.jpg")
    (row,) = read_checked(tmp_path / "data", "voc", image_root=str(tmp_path / "images.tar"))[0].values()
    assert isinstance(row.images[0], ImageRange)  # type: ignore[union-attr]


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_checked(tmp_path / "nowhere", "voc")
    with pytest.raises(DataError, match=r"has no \.xml files"):
        read_checked(tmp_path, "voc")
    _devkit(tmp_path)
    with pytest.raises(DataError, match="has no columns"):
        read_checked(tmp_path, "voc", columns={"image": "x"})
    with pytest.raises(DataError, match="this machine alone"):
        source_version(Source(path="s3://bucket/data", format="voc"))


def test_the_version_changes_with_an_annotation(tmp_path: Path) -> None:
    source = Source(path=str(_devkit(tmp_path)), format="voc")
    version = source_version(source)
    assert source_version(source) == version
    assert len(repr(version)) < 400
    reader = pickle.loads(pickle.dumps(SourceReader(source)))
    write(tmp_path / "Annotations/2.xml", _xml(_object("horse"), "2.png"))
    assert source_version(source) != version
    (piece,) = SourceReader(source).pieces()
    assert [row.truth["labels"] for row in reader.read(piece)] == [("dog",), ("horse",), ("dog",)]


def test_a_file_name_of_another_image_beside_the_own_one_is_a_bad_row(tmp_path: Path) -> None:
    """Files were renamed, and `<filename>` was not: the devkit's readers take the own name, others `<filename>`."""
    for name in ("a.png", "b.png"):
        make_image(tmp_path / "JPEGImages" / name)
        write(tmp_path / f"Annotations/{name[0]}.xml", _xml(_object(), "a.png"))
    rows, _ = read_checked(tmp_path, "voc")
    assert objects(rows["a"])
    assert "<filename> names 'JPEGImages/a.png', and 'JPEGImages/b.png' has the annotation's own" in reason(
        rows["JPEGImages/b"]
    )


def test_an_image_of_a_folder_like_the_annotation_s_goes_before_others_of_its_name(tmp_path: Path) -> None:
    for folder in ("", "n/"):
        make_image(tmp_path / f"JPEGImages/{folder}a.png")
        write(tmp_path / f"Annotations/{folder}a.xml", _xml(_object(), "a.png"))
    rows, _ = read_checked(tmp_path, "voc")
    assert [rows[name].images[0].removeprefix(f"{tmp_path}/") for name in ("a", "n/a")] == [  # type: ignore[union-attr]
        "JPEGImages/a.png",
        "JPEGImages/n/a.png",
    ]


def test_a_devkit_s_header_with_pixels_from_zero(tmp_path: Path) -> None:
    row = _one(tmp_path, _xml(_object(box=(0, 5, 30, 40)) + _object(box=(10, 20, 64, 48)), source=DEVKIT))
    assert [box for _, box in objects(row)] == [(0.0, 5.0, 30.0, 40.0), (10.0, 20.0, 64.0, 48.0)]
