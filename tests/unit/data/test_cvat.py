"""CVAT for images 1.1, of tasks, jobs and projects."""

import pickle
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.data import Source
from ray_vlm.data.sources.formats import SourceReader, source_version
from ray_vlm.errors import DataError
from tests.support.annotations import make_image, objects, read_checked, reason, write

LABELS = (
    "<labels><label><name>dog</name><color>#fff</color><type>any</type><attributes/></label>"
    "<label><name>cat</name><attributes><attribute><name>age</name></attribute></attributes></label>"
    "<label><name>paw</name><type>points</type><parent>skeleton</parent></label></labels>"
)
TASK = f"<meta><task><id>1</id><name>pets</name><mode>annotation</mode>{LABELS}</task><dumped>now</dumped></meta>"
BOX = '<box label="dog" source="manual" occluded="0" xtl="10.50" ytl="20.00" xbr="30.00" ybr="40.00" z_order="0"></box>'


def _image(body: str = BOX, name: str = "a.png", number: int = 0, more: str = "") -> str:
    return f'<image id="{number}" name="{name}" width="64" height="48"{more}>\n{body}\n</image>'


def _file(*images: str, meta: str = TASK) -> str:
    head = '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n'
    return f"{head}{meta}\n{''.join(images)}</annotations>\n"


def _one(tmp_path: Path, image: str, **options: Any) -> Any:
    make_image(tmp_path / "a.png")
    write(tmp_path / "annotations.xml", _file(image))
    (row,) = read_checked(tmp_path / "annotations.xml", "cvat", **options)[0].values()
    return row


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        (BOX, (10.5, 20.0, 30.0, 40.0)),
        (BOX.replace("z_order", 'rotation="0.0" z_order'), (10.5, 20.0, 30.0, 40.0)),
        (BOX.replace("></box>", '><attribute name="age">3</attribute></box><tag label="cat"/>'), (10.5, 20, 30, 40)),
        ('<polygon label="dog" points="10.5,20.0;30.0,25.0;15.0,40.0"/>', (10.5, 20.0, 30.0, 40.0)),
        ('<ellipse label="dog" cx="20" cy="30" rx="5" ry="10"/>', (15.0, 20.0, 25.0, 40.0)),
        ('<mask label="dog" rle="0, 200" left="10" top="20" width="20" height="10"/>', (10.0, 20.0, 30.0, 30.0)),
    ],
)
def test_shapes_have_the_box_around_them(tmp_path: Path, shape: str, box: tuple[float, ...]) -> None:
    row = _one(tmp_path, _image(shape))
    assert row.id == "a"
    assert objects(row) == [("dog", box)]


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (_image(BOX.replace("z_order", 'rotation="12.5" z_order')), r"<image> 0 'a\.png': 'dog' is rotated by '12.5'"),
        (_image('<ellipse label="dog" cx="20" cy="30" rx="5" ry="10" rotation="1"/>'), "is rotated"),
        (_image('<polyline label="dog" points="1,2;3,4"/>'), "'dog' is a polyline, which has no box"),
        (_image('<points label="dog" points="1,2"/>'), "is a points"),
        (_image('<cuboid label="dog" xtl1="1"/>'), "is a cuboid"),
        (_image('<skeleton label="dog"><points label="paw" points="1,2"/></skeleton>'), "is a skeleton"),
        (_image('<sphere label="dog"/>'), "is a 'sphere', which is not read"),
        (_image('<polygon label="dog" points="1,2;3,4"/>'), "not three or more"),
        (_image('<polygon label="dog" points="1,2;3,4;5"/>'), "not three or more"),
        (_image('<polygon label="dog" points="1,2;3,4;5,x"/>'), "a point of 'dog' is 'x', not a finite number"),
        (_image(BOX.replace("10.50", "nan")), "xtl of 'dog' is 'nan'"),
        (_image('<box label="dog" xtl="1"/>'), "ytl of 'dog' is missing"),
        (_image(BOX.replace('"dog"', '""')), "the label of a box is empty"),
        (_image(name=""), "image is not named"),
        (_image(name="gone.png"), r"image 'gone.png' is not in .* \('images/gone.png' were tried too\)"),
        (_image(name="../../secret.png"), "lies outside|is not in"),
    ],
)
def test_images_that_cannot_be_used_are_named(tmp_path: Path, image: str, why: str) -> None:
    make_image(tmp_path / "secret.png")
    assert re.search(why, reason(_one(tmp_path / "x/y", image)))


def test_class_names_have_the_order_of_the_file(tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")
    job = TASK.replace("task>", "job>")
    project = f"<meta><project><id>1</id>{LABELS}<tasks><task><id>3</id></task></tasks></project></meta>"
    for meta in (TASK, job, project):
        write(tmp_path / "annotations.xml", _file(_image(BOX.replace("dog", "cat")), meta=meta))
        assert read_checked(tmp_path, "cvat")[1] == ["dog", "cat"]
    write(tmp_path / "annotations.xml", _file(_image(), meta=""))
    assert read_checked(tmp_path, "cvat")[1] == ["dog"]


def test_images_lie_where_cvat_saves_them(tmp_path: Path) -> None:
    names = ["plain.png", "sub/a.png", "sub/b.png", "c d.png"]
    folders = ["", "images/", "images/Train/", "Train/"]
    for name, folder in zip(names, folders, strict=True):
        make_image(tmp_path / f"{folder}{name}")
    images = [_image(name=name, number=i, more=' subset="Train"') for i, name in enumerate(names)]
    write(tmp_path / "annotations.xml", _file(*images))
    rows, _ = read_checked(tmp_path, "cvat")
    assert list(rows) == ["plain", "sub/a", "sub/b", "c d"]
    assert [objects(row) for row in rows.values()] == [[("dog", (10.5, 20.0, 30.0, 40.0))]] * 4


def test_subsets_of_a_project(tmp_path: Path) -> None:
    images = []
    for number, subset in enumerate(("Train", "Validation", "Train", "night")):
        make_image(tmp_path / f"{number}.png")
        images.append(_image(name=f"{number}.png", number=number, more=f' subset="{subset}" task_id="1"'))
    project = f"<meta><project>{LABELS}<subsets>Train\nValidation\nnight</subsets></project></meta>"
    write(tmp_path / "annotations.xml", _file(*images, meta=project))
    expected = {None: ["0", "2"], "train": ["0", "2"], "val": ["1"], "eval": ["1"], "night": ["3"]}
    for split, names in expected.items():
        assert list(read_checked(tmp_path, "cvat", split=split)[0]) == names
    with pytest.raises(DataError, match="no image is in the subset 'test'; there is 'Train', 'Validation', 'night'"):
        read_checked(tmp_path, "cvat", split="test")
    write(tmp_path / "annotations.xml", _file(*images))  # without a list of subsets all images are rows
    assert len(read_checked(tmp_path, "cvat")[0]) == 4


def test_sizes_that_differ_make_the_row_bad_until_box_frame_is_set(tmp_path: Path) -> None:
    image = _image().replace('width="64" height="48"', 'width="128" height="96"')
    assert "lists 128x96 px" in reason(_one(tmp_path, image))
    assert objects(_one(tmp_path, image, box_frame="listed")) == [("dog", (5.25, 10.0, 15.0, 20.0))]
    assert objects(_one(tmp_path, _image().replace('width="64"', ""))) == [("dog", (10.5, 20.0, 30.0, 40.0))]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (_file("<track id='0' label='dog'><box frame='0'/></track>"), "has tracks, as `CVAT for video 1.1`"),
        ("<annotation><filename>a</filename></annotation>", "format=voc"),
        ("<svg/>", "begins with <svg>"),
        (_file(_image())[:-30], "not readable as XML"),
        ("", "not readable as XML"),
        ('<?xml version="1.0" encoding="klingon"?><annotations/>', "not readable"),
        ('<!DOCTYPE a [<!ENTITY a "b">]><annotations>&a;</annotations>', "document type or entities"),
        (_file(), "holds no rows"),
        (_file(meta=TASK.replace("dog", "")), "the name of a label is empty"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: str, why: str) -> None:
    write(tmp_path / "annotations.xml", content)
    with pytest.raises(DataError, match=why):
        read_checked(tmp_path, "cvat")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone.xml"):
        with pytest.raises(DataError, match="no such file"):
            read_checked(path, "cvat")
    with pytest.raises(DataError, match="has no columns"):
        read_checked(tmp_path, "cvat", columns={"image": "name"})


@pytest.mark.slow
def test_a_large_file_is_read_in_little_memory(tmp_path: Path) -> None:
    with open(tmp_path / "annotations.xml", "w") as file:
        head, _, tail = _file("@").partition("@")
        file.write(head)
        file.writelines(_image(name=f"{i}.png", number=i) for i in range(20_000))
        file.write(tail)
    source = Source(path=str(tmp_path), format="cvat")
    reader = pickle.loads(pickle.dumps(SourceReader(source)))
    tracemalloc.start()
    num_rows = sum(piece.num_rows for piece in reader.pieces(500))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_rows == 20_000
    assert peak < 4 * 2**20
    version = source_version(source)
    write(tmp_path / "annotations.xml", _file(_image()))
    assert source_version(source) != version
