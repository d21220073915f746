"""The index: every row is checked once, a bad one is named with its reason, and nothing is lost."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import Model
from ray_vlm.config.task import ChatTask, DetectionTask, GuiStepsTask
from ray_vlm.data.images import decode, read_size
from ray_vlm.data.parts import build_index
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import DataError


@pytest.fixture
def spec(tiny_models: dict[str, str]) -> SampleSpec:
    return SampleSpec(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), DetectionTask(), ("dog", "cat"))


def _image(path: Path, size: tuple[int, int] = (100, 80), **options) -> bytes:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path, **options)
    return path.read_bytes()


def _corpus(folder: Path) -> Source:
    """Two good rows and one of every kind of bad one."""
    good = _image(folder / "good.jpg")
    _image(folder / "good.png")
    (folder / "half.jpg").write_bytes(good[: len(good) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>not an image</html>")
    (folder / "folder.jpg").mkdir()
    _image(folder / "thin.png", (1, 4000))
    _image(folder / "large.png", (400, 300))
    names = ["good.jpg", "good.png", "half.jpg", "empty.jpg", "page.jpg", "folder.jpg", "none.jpg", "thin.png"]
    names += ["large.png", "../good.jpg", *["good.jpg"] * 7]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    images += [{"id": 16, "file_name": "good.jpg"}, {"file_name": "good.jpg"}]
    bad_boxes = [[10, 10, -5, 5], [90, 10, 50, 5], [1, 2, 3], [1, 2, float("nan"), 3], [1, 2, 3, 4], ["1", 2, 3, 4]]
    boxes = [{"image_id": 0, "category_id": 1, "bbox": [10, 20, 30, 40]}]
    boxes += [{"image_id": 10 + i, "category_id": 9 if i == 4 else 1, "bbox": b} for i, b in enumerate(bad_boxes)]
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    (folder / "rows.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return Source(path=str(folder / "rows.json"))


REASONS = {
    2: "truncated", 3: "empty", 4: "an HTML page", 5: "not a file", 6: "missing", 7: "over 200 times",
    8: "max_image_pixels", 9: "outside image_root", 10: "empty or inverted", 11: "outside its 100x80 image",
    12: "four finite", 13: "four finite", 14: "category_id 9", 15: "four finite", 16: "used by 2", 17: "used by 2",
    18: "needs an `id`",
}  # fmt: skip


def test_quarantine_keeps_the_good_and_names_each_bad_row(tmp_path: Path, spec: SampleSpec) -> None:
    data = Data(on_bad_row="quarantine", max_image_pixels=100_000)
    index = build_index(_corpus(tmp_path), data, load_sample_builder(spec))
    assert [record.row for record in index.records] == [0, 1]
    assert index.records[0].truth == {"boxes": ((10.0, 20.0, 40.0, 60.0),), "labels": ("dog",)}
    assert index.records[0].sizes == ((100, 80),)
    assert {bad.row for bad in index.bad} == set(REASONS)
    for bad in index.bad:
        assert REASONS[bad.row] in bad.reason
    assert len(index) + len(index.bad) == 19


def test_strict_refuses_with_rows_ids_and_reasons(tmp_path: Path, spec: SampleSpec) -> None:
    with pytest.raises(DataError) as error:
        build_index(_corpus(tmp_path), Data(max_image_pixels=100_000), load_sample_builder(spec))
    assert len(error.value.problems) == len(REASONS) + 1
    assert "row 2 (id 2)" in error.value.problems[0]
    assert "quarantine" in error.value.problems[-1]


def test_too_many_tokens_is_a_bad_row(tmp_path: Path, spec: SampleSpec) -> None:
    _image(tmp_path / "a.jpg")
    rows = {"images": [{"id": 7, "file_name": "a.jpg"}], "annotations": [], "categories": [{"id": 1, "name": "dog"}]}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"row 0 \(id 7\).*max_tokens=10"):
        build_index(Source(path=str(tmp_path / "rows.json")), Data(max_tokens=10), load_sample_builder(spec))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "not COCO"),
        ("{", "not readable"),
        ('{"images": [], "categories": []}', "not COCO"),
        ('{"images": [], "annotations": [], "categories": []}', "`categories` must list"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": null}]}', "`categories` must list"),
        ('{"images": [], "annotations": [], "categories": [{"id": [], "name": "a"}]}', "`categories` must list"),
        ('{"images": [], "annotations": [3], "categories": [{"id": 1, "name": "a"}]}', "annotation 0 has image_id 3"),
    ],
)
def test_unusable_files_are_refused_whole(tmp_path: Path, spec: SampleSpec, text: str, words: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=words):
        build_index(Source(path=str(tmp_path / "rows.json"), format="coco"), Data(), load_sample_builder(spec))


@pytest.mark.parametrize(
    ("image", "annotation", "reason"),
    [
        ({"id": []}, {}, "needs an `id`"),
        ({"id": None}, {}, "needs an `id`"),
        ({"file_name": "a\0b"}, {}, "is not a path"),
        ({"file_name": "\ud800.jpg"}, {}, "is not a path"),
        ({}, {"category_id": []}, "category_id \\[\\] is not"),
        ({}, {"bbox": [10**400, 1, 2, 3]}, "four finite numbers"),
        ({}, {"bbox": [100, 80, 0.9, 0.9]}, "from outside only"),
    ],
)
def test_odd_values_make_bad_rows(tmp_path: Path, spec: SampleSpec, image: dict, annotation: dict, reason: str) -> None:
    _image(tmp_path / "a.jpg")
    good = {"id": 1, "file_name": "a.jpg"}
    box = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]} | annotation
    rows = {"images": [good | image, good | {"id": 2}], "categories": [{"id": 1, "name": "dog"}]}
    rows["annotations"] = [box] if annotation else []
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    index = build_index(
        Source(path=str(tmp_path / "rows.json")), Data(on_bad_row="quarantine"), load_sample_builder(spec)
    )
    assert [r.row for r in index.records] == [1]
    assert re.search(reason, index.bad[0].reason)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP", "PNG", "JPEG"])
def test_half_a_file_is_bad_whatever_its_format(tmp_path: Path, kind: str) -> None:
    content = _image(tmp_path / "a.img", format=kind)
    read_size(str(tmp_path / "a.img"), 10**6)
    (tmp_path / "a.img").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cannot be read|truncated"):
        read_size(str(tmp_path / "a.img"), 10**6)


def test_a_motion_photo_with_a_film_behind_its_end_is_whole(tmp_path: Path) -> None:
    _image(tmp_path / "a.jpg")
    with open(tmp_path / "a.jpg", "ab") as file:
        file.write(b"ftypmp42" * 1000)
    assert read_size(str(tmp_path / "a.jpg"), 10**6) == (100, 80)


def test_a_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    import time

    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    started = time.process_time()  # others may be at work on this machine
    with pytest.raises(ValueError, match=r"400000000 pixels|decompression bomb"):
        read_size(str(tmp_path / "bomb.png"), 50_000_000)
    assert time.process_time() - started < 0.5


def test_a_turned_tiff_is_measured_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    _image(tmp_path / "a.tif", exif=exif)
    height, width, _ = decode(str(tmp_path / "a.tif")).shape
    assert read_size(str(tmp_path / "a.tif"), 10**6) == (width, height)


def test_token_counts_are_those_of_the_rows(scenes: Path, tiny_models: dict[str, str]) -> None:
    for name in tiny_models.values():
        labels = ("circle", "square", "triangle", "cross", "ring", "diamond")
        spec = SampleSpec(Model(name=name, load_in_4bit=False), DetectionTask(), labels)
        index = build_index(Source(path=str(scenes / "eval.json")), Data(), load_sample_builder(spec))
        for position, record in enumerate(index.records):
            row = load_sample_builder(spec).train_row(record)
            assert len(row.input_ids) == index.tokens[position]
            assert (row.labels != -100).sum() == index.answer_tokens[position]


def test_upright_size_and_pixels_follow_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    _image(tmp_path / "turned.jpg", (100, 80), exif=exif)
    assert read_size(str(tmp_path / "turned.jpg"), 10**6) == (80, 100)
    assert decode(str(tmp_path / "turned.jpg")).shape == (100, 80, 3)


@pytest.mark.parametrize(("mode", "expected"), [("RGBA", 255), ("LA", 255), ("I;16", 128), ("CMYK", None), ("P", None)])
def test_odd_modes_become_rgb(tmp_path: Path, mode: str, expected: int | None) -> None:
    pixels = np.full((40, 50), 128 * 257, np.uint16)
    image = Image.fromarray(pixels) if mode == "I;16" else Image.new(mode, (50, 40))
    name = "a.tif" if mode == "CMYK" else "a.png"
    image.save(tmp_path / name)
    out = decode(str(tmp_path / name))
    assert out.shape == (40, 50, 3)
    assert out.dtype == np.uint8
    if expected is not None:
        assert (out == expected).all()


@pytest.mark.parametrize(("units", "box"), [("norm1", [0.1, 0.25, 0.5, 0.75]), ("real", [10, 20, 50, 60])])
def test_boxes_in_shares_of_the_image_become_pixels(tmp_path: Path, spec: SampleSpec, units: str, box: list) -> None:
    _image(tmp_path / "a.jpg")
    row = {"images": ["a.jpg"], "objects": {"ref": ["dog"], "bbox": [box], "bbox_type": units}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    index = build_index(Source(path=str(tmp_path / "rows.jsonl"), format="objects"), Data(), load_sample_builder(spec))
    assert index.records[0].truth["boxes"] == ((10.0, 20.0, 50.0, 60.0),)
    assert index.records[0].context == {}


def test_a_source_says_what_its_numbers_mean(tmp_path: Path, spec: SampleSpec) -> None:
    _image(tmp_path / "a.jpg")
    row = {"images": ["a.jpg"], "objects": {"ref": ["dog"], "bbox": [[100, 250, 500, 750]]}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    source = Source(path=str(tmp_path / "rows.jsonl"), format="objects", box_units="relative_1000")
    assert build_index(source, Data(), load_sample_builder(spec)).records[0].truth["boxes"] == (
        (10.0, 20.0, 50.0, 60.0),
    )
    with pytest.raises(DataError, match="outside its 100x80 image; mend the box, or say what its numbers mean"):
        build_index(source.model_copy(update={"box_units": "pixels"}), Data(), load_sample_builder(spec))


def test_text_that_the_tokenizer_would_not_read_as_text_is_a_bad_row(tmp_path: Path, spec: SampleSpec) -> None:
    from dataclasses import replace

    _image(tmp_path / "a.jpg")
    for text, bad in (("<|im_start|>system", True), ("<|box_start|>(1,2),(3,4)<|box_end|>", False)):
        turns = [{"role": "user", "content": f"<image>{text}"}, {"role": "assistant", "content": "x"}]
        (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "images": ["a.jpg"]}))
        source = Source(path=str(tmp_path / "rows.jsonl"), format="messages")
        chat = replace(spec, task=ChatTask())
        if bad:
            with pytest.raises(DataError, match=r"row 0 .*does not read as text; remove it"):
                build_index(source, Data(), load_sample_builder(chat))
        else:
            assert len(build_index(source, Data(), load_sample_builder(chat))) == 1


def test_a_picture_of_floating_point_numbers_is_found_before_training(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((64, 64), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="convert it to 8 bit"):
        read_size(str(tmp_path / "a.tif"), 10**6)


def test_an_image_tag_too_many_is_reported(tmp_path: Path, spec: SampleSpec) -> None:
    from dataclasses import replace

    with pytest.raises(DataError, match="'<image>'"):
        load_sample_builder(replace(spec, task=DetectionTask(prompt="<image> find {labels}")))
    _image(tmp_path / "a.jpg")
    row = {"Task_id": "1", "Image_id": "a.jpg", "Instruction": "type <image>", "Output": {"action": "x"}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"Grounding": {}}))
    source = Source(path=str(tmp_path / "rows.jsonl"), format="gui_csv")
    with pytest.raises(DataError, match="2 <image> tags for 1 images"):
        build_index(source, Data(), load_sample_builder(replace(spec, task=GuiStepsTask())))


def test_a_tokenizer_that_was_saved_with_truncation_cuts_nothing(tmp_path: Path, tiny_models: dict[str, str]) -> None:
    import shutil

    folder = shutil.copytree(tiny_models["qwen3_vl"], tmp_path / "model")
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    spec = SampleSpec(Model(name=str(folder), load_in_4bit=False), DetectionTask(), ("dog",))
    assert len(load_sample_builder(spec)._ids("a dog and a cat")) > 2
