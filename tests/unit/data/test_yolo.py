"""YOLO data sets as Ultralytics, Roboflow, darknet, CVAT and LabelImg write them."""

import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.data import Source
from ray_vlm.data.measure import measure_row
from ray_vlm.data.sources.formats import SourceReader, read_rows, source_version
from ray_vlm.data.suspicions import find_suspicions, summarise
from ray_vlm.errors import DataError
from tests.support.annotations import make_image, objects, read_checked, reason, write

YAML = "path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames: [cat, dog]\n"
BOX = "0 0.5 0.5 0.25 0.5\n"  # of 64x48: 24, 12, 40, 36
CORNERS = (24.0, 12.0, 40.0, 36.0)


def _one(tmp_path: Path, label: str | bytes | None, yaml: str = YAML, **options: Any) -> Any:
    """The row of an image with this label file; another image gives the data set a label."""
    write(tmp_path / "data.yaml", yaml)
    for name in ("a", "other"):
        make_image(tmp_path / f"images/train/{name}.png")
    write(tmp_path / "labels/train/other.txt", BOX)
    if label is not None:
        write(tmp_path / "labels/train/a.txt", label)
    rows, _ = read_checked(tmp_path / "data.yaml", "yolo", **options)
    assert list(rows)[1:] == ["images/train/other"]
    return rows[next(iter(rows))]


def test_a_box_is_given_in_pixels_of_its_image(tmp_path: Path) -> None:
    row = _one(tmp_path, "1 0.25 0.5 0.5 1\n0 0.5 0.5 0.25 0.5")
    assert row.id == "images/train/a"
    assert objects(row) == [("dog", (0.0, 0.0, 32.0, 48.0)), ("cat", CORNERS)]
    assert "box_units" not in row.context


@pytest.mark.parametrize("label", [None, "", "\n \r\n"])
def test_no_label_file_and_an_empty_one_are_an_image_without_objects(tmp_path: Path, label: str | None) -> None:
    assert objects(_one(tmp_path, label)) == []


@pytest.mark.parametrize(
    "label",
    [
        "0\t0.5\t0.5\t0.25\t0.5",
        "0 0.5 0.5 0.25 0.5  \r\n\r\n",
        "0 0.5 0.5 0.25 0.5\r",
        b"\xef\xbb\xbf0 0.5 0.5 0.25 0.5\n",
        "0.000000 5e-1 0.5 0.25 0.5",
        BOX + BOX,  # a line that is written twice is one object
        "0 0.375 0.25 0.625 0.25 0.5 0.75\n",  # a triangle
        "0 0.375 0.25 0.625 0.25 0.625 0.75 0.375 0.75\n",  # four points, upright
    ],
)
def test_spellings_of_one_box(tmp_path: Path, label: str | bytes) -> None:
    assert objects(_one(tmp_path, label)) == [("cat", CORNERS)]


@pytest.mark.parametrize(
    ("label", "why"),
    [
        ("2 0.5 0.5 0.25 0.5", r"a\.txt: line 1: class 2 is not among the 2 names, 0 to 1"),
        (BOX + "-1 0.5 0.5 0.25 0.5", "line 2: class -1 is not among"),
        ("cat 0.5 0.5 0.25 0.5", "class 'cat' is not a whole number"),
        ("0.5 0.5 0.5 0.25 0.5", "class '0.5' is not a whole number"),
        ("0 32 24 16 24", "32 is not a share of the image"),
        ("0 -0.5 0.5 0.25 0.5", "-0.5 is not a share"),
        ("0 nan 0.5 0.25 0.5", "'nan', not a finite number"),
        ("0 1_0 0.5 0.25 0.5", "not a finite number"),
        ("0 0,5 0.5 0.25 0.5", "not a finite number"),
        ("0 0.5 0.5 0.25 0.5 0.9", "six numbers, as of predictions"),
        ("0 0.5 0.5 0.25", "4 numbers; a box has 5"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "8 numbers; a box has 5"),
        (b"0 0.5 0.5 0.25 0.5\0", "NUL"),
        (b"\xff\xfe0\x000", "NUL"),
        (b"0 0.5 0.5 0.25 0.5 \xe9", "not UTF-8"),
    ],
)
def test_lines_that_cannot_be_used_are_named(tmp_path: Path, label: str | bytes, why: str) -> None:
    assert re.search(why, reason(_one(tmp_path, label)))


def test_labels_without_an_image_are_a_bad_row(tmp_path: Path) -> None:
    _one(tmp_path, BOX)
    write(tmp_path / "labels/train/gone.txt", BOX)
    write(tmp_path / "labels/train/classes.txt", "cat\ndog\n")  # LabelImg leaves it there
    rows, _ = read_checked(tmp_path, "yolo")
    assert len(rows) == 3
    assert "gone.txt" in reason(list(rows.values())[2])
    assert "no image of this name" in reason(list(rows.values())[2])


def test_oriented_boxes_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"YOLO OBB.*a\.txt: 0 0\.5 0\.1"):
        _one(tmp_path, "0 0.5 0.1 0.9 0.5 0.5 0.9 0.1 0.5\n")


def test_four_points_are_a_polygon_if_others_have_more(tmp_path: Path) -> None:
    label = "0 0.5 0.25 0.625 0.5 0.5 0.75 0.375 0.5\n1 0.1 0.1 0.2 0.1 0.2 0.2 0.15 0.25 0.1 0.2\n"
    assert objects(_one(tmp_path, label))[0] == ("cat", CORNERS)


def test_four_points_that_the_sample_did_not_show_are_a_bad_row(tmp_path: Path) -> None:
    label = BOX * 5000 + "0 0.5 0.1 0.9 0.5 0.5 0.9 0.1 0.5\n"
    assert "either an oriented box or a polygon" in reason(_one(tmp_path, label))


def test_a_pose_has_the_box_before_its_points(tmp_path: Path) -> None:
    yaml = YAML + "kpt_shape: [2, 3]\n"
    assert objects(_one(tmp_path, "0 0.5 0.5 0.25 0.5 0.1 0.1 2 0.9 0.9 0", yaml)) == [("cat", CORNERS)]
    assert "kpt_shape asks for 11" in reason(_one(tmp_path, "0 0.5 0.5 0.25 0.5 0.1 0.1", yaml))


def test_class_names_keep_their_order_and_gaps(tmp_path: Path) -> None:
    make_image(tmp_path / "images/train/a.png")
    write(tmp_path / "labels/train/a.txt", "7 0.5 0.5 0.25 0.5")
    write(tmp_path / "data.yaml", "train: images/train\nnames: {7: zebra, 0: dog, 3: 12}\n")
    rows, labels = read_checked(tmp_path, "yolo")
    assert labels == ["dog", "12", "zebra"]
    assert objects(rows["images/train/a"]) == [("zebra", CORNERS)]


@pytest.mark.parametrize(
    ("yaml", "why"),
    [
        ("train: images/train\n", "`names` and `train`"),
        ("train: images/train\nnames: []\n", "`names` is no list"),
        ("train: images/train\nnames: [no]\n", "yes or no.*quotes"),
        ("train: images/train\nnames: {a: b}\n", "Number the classes"),
        ("train: images/train\nnames: ['']\n", "is empty"),
        ("train: images/train\nnc: 3\nnames: [a, b]\n", "nc is 3, and there are 2 names"),
        ("train: nowhere\nnames: [a]\n", "'nowhere' of train is not in .*beside data.yaml"),
        ("train: images/val\nnames: [a]\n", "'images/val' of train"),
        ("val: images/train\nnames: [a]\n", "no split 'train'; there is val"),
        ("train: data.yaml\nnames: [a]\n", "neither a folder nor a .txt"),
        ("train: {a: b}\nnames: [a]\n", "`train` is no folder"),
        ("kpt_shape: 3\ntrain: images/train\nnames: [a]\n", "kpt_shape"),
        ("train: images/train\nnames: {0: a, 0: b}\n", "line 2: '0' is there twice"),
        ("train: images/train\ntrain: images\nnames: [a]\n", "'train' is there twice"),
        ("a: &x [1]\nb: *x\nnames: [a]\n", "aliases"),
        ("- a\n", "not the description"),
        ("a: [b\n", "not readable as YAML"),
        ("train: !!python/object/apply:os.getcwd []\nnames: [a]", "not readable as YAML"),
        ("train: images/train\npath: 3\nnames: [a]\n", "`path` is no text"),
    ],
)
def test_descriptions_that_cannot_be_used(tmp_path: Path, yaml: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        _one(tmp_path, BOX, yaml)


def test_splits_by_their_names(tmp_path: Path) -> None:
    write(tmp_path / "data.yaml", "train: train/images\nval: valid/images\ntest: test/images\nnames: [cat]\n")
    for split in ("train", "valid", "test"):
        make_image(tmp_path / split / "images" / f"{split}.png")
        write(tmp_path / split / "labels" / f"{split}.txt", BOX)
    expected = {None: "train", "train": "train", "val": "valid", "validation": "valid", "eval": "valid", "test": "test"}
    for split, name in expected.items():
        rows, _ = read_checked(tmp_path, "yolo", split=split)
        assert list(rows) == [f"{name}/images/{name}"]
        assert objects(rows[f"{name}/images/{name}"]) == [("cat", CORNERS)]
    with pytest.raises(DataError, match="no split 'minival'; there is train, val, test"):
        read_checked(tmp_path, "yolo", split="minival")


def test_roboflow_s_paths_lead_out_of_its_folder(tmp_path: Path) -> None:
    """As Roboflow's YOLOv8 export: `../train/images`, though the folder lies beside data.yaml."""
    write(tmp_path / "data.yaml", "train: ../train/images\nval: ../valid/images\n\nnc: 1\nnames: ['cat']\n")
    make_image(tmp_path / "train/images/a_jpg.rf.0a1b.jpg")
    write(tmp_path / "train/labels/a_jpg.rf.0a1b.txt", BOX)
    write(tmp_path / "README.roboflow.txt", "x")
    rows, _ = read_checked(tmp_path, "yolo")
    assert objects(rows["train/images/a_jpg.rf.0a1b"]) == [("cat", CORNERS)]


@pytest.mark.parametrize("path", ["/content/datasets/pets", "../datasets/pets", "C:\\data\\pets", ".", "./"])
def test_a_path_of_another_machine_means_the_folders_beside_the_file(tmp_path: Path, path: str) -> None:
    assert objects(_one(tmp_path, BOX, YAML.replace("path: .", f"path: {path}"))) == [("cat", CORNERS)]


def test_a_path_elsewhere_on_this_machine_is_named_with_the_setting_that_allows_it(tmp_path: Path) -> None:
    _one(tmp_path / "data", BOX)
    yaml = write(tmp_path / "jobs/pets.yaml", YAML.replace("path: .", f"path: {tmp_path / 'data'}"))
    with pytest.raises(DataError, match=f"lies outside that; set image_root={tmp_path / 'data'}"):
        read_checked(yaml, "yolo")
    rows, _ = read_checked(yaml, "yolo", image_root=str(tmp_path / "data"))
    assert list(rows) == ["images/train/a", "images/train/other"]
    assert objects(rows["images/train/a"]) == [("cat", CORNERS)]


def test_a_list_of_images(tmp_path: Path) -> None:
    """As of COCO's data.yaml: lines relative to the list's folder; images that it leaves out are no rows."""
    for name in ("a", "b", "c"):
        make_image(tmp_path / f"images/{name}.png")
        write(tmp_path / f"labels/{name}.txt", BOX)
    write(tmp_path / "train.txt", f"./images/b.png\r\n{tmp_path}/images/a.png\n\n./images/gone.png\n./images/b.png\n")
    write(tmp_path / "data.yaml", "train: train.txt\nnames: [cat]\n")
    rows, _ = read_checked(tmp_path, "yolo")
    assert list(rows) == ["images/b", "images/a", "images/gone"]
    assert objects(rows["images/a"]) == [("cat", CORNERS)]
    assert "gone.png" in reason(rows["images/gone"])


def test_darknet_as_cvat_exports_it(tmp_path: Path) -> None:
    """CVAT's YOLO 1.1: paths begin with `data/`, which is no folder, and labels lie beside the images."""
    write(tmp_path / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    write(tmp_path / "obj.names", "cat\ndog\n")
    write(tmp_path / "train.txt", "data/obj_train_data/a.png\ndata/obj_train_data/sub/b.png\n")
    for name in ("a", "sub/b"):
        make_image(tmp_path / f"obj_train_data/{name}.png")
        write(tmp_path / f"obj_train_data/{name}.txt", "1 0.5 0.5 0.25 0.5")
    rows, labels = read_checked(tmp_path, "yolo")
    assert labels == ["cat", "dog"]
    assert list(rows) == ["obj_train_data/a", "obj_train_data/sub/b"]
    assert objects(rows["obj_train_data/sub/b"]) == [("dog", CORNERS)]


@pytest.mark.parametrize(
    "folders", [("images", "labels"), ("images", "images"), ("", ""), ("train/images", "train/labels")]
)
@pytest.mark.parametrize("classes", ["classes.txt", "labels/classes.txt"])
def test_a_folder_without_a_description(tmp_path: Path, folders: tuple[str, str], classes: str) -> None:
    """As of LabelImg and Label Studio: `classes.txt`, and labels in a folder of their own or beside the images."""
    write(tmp_path / classes, "cat\r\ndog\r\n")
    make_image(tmp_path / folders[0] / "a b.png")
    write(tmp_path / folders[1] / "a b.txt", BOX)
    rows, labels = read_checked(tmp_path, "yolo")
    assert labels == ["cat", "dog"]
    assert [objects(row) for row in rows.values()] == [[("cat", CORNERS)]]
    assert list(rows) == [f"{folders[0]}/a b".lstrip("/")]


def test_a_split_without_any_label_is_refused(tmp_path: Path) -> None:
    make_image(tmp_path / "images/train/a.png")
    write(tmp_path / "data.yaml", YAML)
    with pytest.raises(
        DataError, match=r"none of 1 images of train has a label file, such as .*labels/train/a\.txt or"
    ):
        read_checked(tmp_path, "yolo")


def test_links_out_of_the_data_set(tmp_path: Path) -> None:
    _one(tmp_path / "real", BOX)
    data = tmp_path / "data"
    write(data / "data.yaml", YAML)
    (data / "images").mkdir()
    shutil.copytree(tmp_path / "real/labels", data / "labels")
    os.symlink(tmp_path / "real/images/train", data / "images/train")
    with pytest.raises(DataError, match=r"a link to .* set follow_links=true"):
        read_checked(data, "yolo")
    rows, _ = read_checked(data, "yolo", follow_links=True)
    assert objects(rows["images/train/a"]) == [("cat", CORNERS)]
    (data / "images/train").unlink()
    (data / "images/train").mkdir()
    os.symlink(tmp_path / "real/images/train/a.png", data / "images/train/a.png")
    write(data / "labels/train/other.txt", "")
    rows, _ = read_checked(data, "yolo")
    assert "it is a link" in reason(rows["images/train/a"])
    write(tmp_path / "secret.txt", BOX)
    (data / "labels/train/a.txt").unlink()
    os.symlink(tmp_path / "secret.txt", data / "labels/train/a.txt")
    with pytest.raises(DataError, match=r"labels/train/a\.txt: a link to .*secret\.txt, outside"):
        read_checked(data, "yolo")
    write(data / "train.txt", "images/train/a.png")
    write(data / "data.yaml", "train: train.txt\nnames: [cat]\n")
    with pytest.raises(DataError, match=r"labels/train/a\.txt: a link to"):
        read_checked(data, "yolo")


def test_boxes_that_are_cut_to_their_image_are_counted_alone(tmp_path: Path) -> None:
    _one(tmp_path, "0 0.5 0.5 0.25 0.5\n0 0.9 0.5 0.4 0.5\n")
    source = Source(path=str(tmp_path), format="yolo")
    rows, _ = read_rows(source)
    checked = [measure_row(row, 10**8, "clip") for row in rows]
    assert objects(checked[0])[1][1][2] == 64.0
    (note,) = find_suspicions(source, summarise(source, zip(rows, checked, strict=True)), ["cat", "dog"], "clip")
    assert note.endswith("1 boxes cut to their image (data.on_bad_box=clip)")


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    _one(tmp_path, BOX)
    os.symlink(tmp_path / "images", tmp_path / "images/train/again")
    assert len(read_checked(tmp_path, "yolo")[0]) == 2


@pytest.mark.parametrize("entry", ["../../etc", "/etc", "images/../../secret"])
def test_no_entry_leaves_the_folder(tmp_path: Path, entry: str) -> None:
    make_image(tmp_path / "secret/a.png")
    write(tmp_path / "secret/a.txt", BOX)
    write(tmp_path / "data/data.yaml", f"train: {entry}\nnames: [a]\n")
    with pytest.raises(DataError, match="of train is not in"):
        read_checked(tmp_path / "data", "yolo")


def test_columns_and_tars_are_refused(tmp_path: Path) -> None:
    _one(tmp_path, BOX)
    with pytest.raises(DataError, match="has no columns"):
        read_checked(tmp_path, "yolo", columns={"group": "site"})
    write(tmp_path / "a.tar", b"\0" * 1024)
    with pytest.raises(DataError, match="image_root is a tar"):
        read_checked(tmp_path, "yolo", image_root=str(tmp_path / "a.tar"))
    with pytest.raises(DataError, match="no such file or folder"):
        read_checked(tmp_path / "nowhere", "yolo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no data\.yaml"):
        read_checked(tmp_path / "empty", "yolo")
    (tmp_path / "data.yaml").write_text("names: [a]")
    with pytest.raises(
        DataError, match=r"empty: has no data\.yaml, and .* has\. Give that folder as `path`, and `split`"
    ):
        read_checked(tmp_path / "empty", "yolo")


def test_the_version_is_small_and_changes_with_every_file(tmp_path: Path) -> None:
    _one(tmp_path, BOX)
    source = Source(path=str(tmp_path), format="yolo")
    versions = [source_version(source)]
    pieces = [[piece.fingerprint for piece in SourceReader(source).pieces(1)]]

    def changed() -> bool:
        versions.append(source_version(source))
        pieces.append([piece.fingerprint for piece in SourceReader(source).pieces(1)])
        return versions[-1] != versions[-2] and pieces[-1] != pieces[-2]

    assert len(repr(versions[0])) < 400
    assert source_version(source) == versions[0]
    write(tmp_path / "labels/train/a.txt", BOX + "1 0.5 0.5 0.25 0.5")
    assert changed()
    assert [a == b for a, b in zip(*pieces[-2:], strict=True)] == [False, True]
    make_image(tmp_path / "images/train/new.png")
    assert changed()
    write(tmp_path / "data.yaml", YAML.replace("dog", "fox"))
    assert changed()
    (tmp_path / "labels/train/a.txt").unlink()
    assert changed()
    reader = pickle.loads(pickle.dumps(SourceReader(source)))
    assert len(reader.read(next(SourceReader(source).pieces()))) == 3


def test_class_names_are_the_texts_that_were_written(tmp_path: Path) -> None:
    """YAML reads 007 as 7 and 1.10 as 1.1."""
    make_image(tmp_path / "images/a.png")
    write(tmp_path / "labels/a.txt", "1 0.5 0.5 0.25 0.5")
    for names in ("[1, 007, 1.10, '02']", "{0: 1, 1: 007, 2: 1.10, 3: '02'}"):
        write(tmp_path / "data.yaml", f"train: images\nval: images\nnames: {names}\n")
        rows, labels = read_checked(tmp_path, "yolo")
        assert labels == ["1", "007", "1.10", "02"]
        assert rows["images/a"].truth["labels"] == ("007",)  # type: ignore[union-attr]


def test_a_folder_of_the_split_without_any_label_file_is_an_error(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        make_image(tmp_path / folder / "images/a.png")
    write(tmp_path / "one/labels/a.txt", "0 0.5 0.5 0.25 0.5")
    write(tmp_path / "data.yaml", "train: [one/images, two/images]\nval: one/images\nnames: [dog]\n")
    with pytest.raises(DataError, match="none of the 1 images of 'two/images' has a label file"):
        read_checked(tmp_path, "yolo")
    write(tmp_path / "two/labels/a.txt", "")
    assert [len(objects(row)) for row in read_checked(tmp_path, "yolo")[0].values()] == [1, 0]
