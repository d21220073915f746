"""`data check` and `data stats`: every row is accounted for, and the numbers are those of the rows."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_vlm.cli import main
from ray_vlm.config.data import Data, Source
from ray_vlm.config.load import load_job
from ray_vlm.data.images import decode
from ray_vlm.data.inspect.check import SourceCheck, check_sources, describe_check, group_bad, group_reason, plain
from ray_vlm.data.inspect.stats import box_classes, describe_stats, measure_rows, size_changes
from ray_vlm.data.parts import build_index, load_parts
from ray_vlm.data.records import BadRow
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import sample_spec
from tests.support.jobs import check_inputs


def _image(path: Path, size: tuple[int, int] = (100, 80)) -> bytes:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path)
    return path.read_bytes()


def _coco(folder: Path, files: dict[str, str], boxes: tuple = (), name: str = "rows.json") -> Path:
    """A COCO file with these ids and image files; boxes are (id, bbox)."""
    annotations = [{"image_id": i, "category_id": 1, "bbox": list(box)} for i, box in boxes]
    rows = {"images": [{"id": i, "file_name": f} for i, f in files.items()], "annotations": annotations}
    (folder / name).write_text(json.dumps(rows | {"categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]}))
    return folder / name


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Two good rows, two missing files, half a file, a box outside, and a file whose pixels are rotten."""
    good = _image(tmp_path / "good.jpg")
    (tmp_path / "half.jpg").write_bytes(good[: len(good) // 2])
    _image(tmp_path / "rotten.png")
    data = (tmp_path / "rotten.png").read_bytes()
    (tmp_path / "rotten.png").write_bytes(data[:200] + bytes(400) + data[600:])
    with pytest.raises(Exception, match=r"."):
        decode(str(tmp_path / "rotten.png"))
    files = {"a": "good.jpg", "b": "good.jpg", "c": "none (1).jpg", "d": "it's not.jpg", "e": "half.jpg"}
    return _coco(
        tmp_path, files | {"f": "good.jpg", "g": "rotten.png"}, (("f", (90, 10, 50, 5)), ("a", (1, 2, 30, 20)))
    )


def test_check_counts_every_row_and_groups_reasons(job_file: Any, broken: Path) -> None:
    job = load_job(job_file(data={"train": {"path": str(broken)}}))
    (check,) = check_sources(*check_inputs(job))
    assert (check.name, check.rows, check.usable, len(check.bad)) == ("train", 7, 3, 4)
    groups = group_bad(check.bad)
    assert [len(rows) for _, rows in groups] == [2, 1, 1]
    assert groups[0][0] == "image file is missing; mend the path or image_root"
    text = describe_check(check)
    assert "rows 7, usable 3, bad 4" in text
    missing = (
        f"image file is missing; mend the path or image_root ({broken.parent}/none (1).jpg) (1 more of this kind; "
    )
    assert re.search(rf"2  row 2 \(id c\) +{re.escape(missing)}--bad-rows PATH writes them all\)$", text, re.MULTILINE)
    (decoded,) = check_sources(*check_inputs(job), decode_images=True)
    assert (decoded.usable, decoded.bad[-1].id) == (2, "g")
    assert "cannot be decoded" in decoded.bad[-1].reason
    assert f"; fetch the file again, or remove the row ({broken.parent}/rotten.png)" in decoded.bad[-1].reason
    (half,) = (row for row in check.bad if row.id == "e")
    assert half.reason.startswith("image cannot be read (OSError: ")
    assert half.reason.endswith(f"; fetch the file again, or remove the row ({broken.parent}/half.jpg)")
    assert decoded.rows == decoded.usable + len(decoded.bad)


def test_a_value_that_all_rows_of_a_group_share_is_shown() -> None:
    reason = "class 'wascher' is not among the task's labels ['dryer', 'washer']; add it to task.labels or mend it"
    same = tuple(BadRow(i, str(i), reason) for i in range(6, 18))
    line = describe_check(SourceCheck("train", "rows.json", 20, 8, same, 1.0)).splitlines()[-1]
    assert line.split(maxsplit=5) == ["12", "row", "6", "(id", "6)", reason]
    other = BadRow(18, "18", reason.replace("wascher", "dyer"))
    line = describe_check(SourceCheck("train", "rows.json", 20, 7, (*same, other), 1.0)).splitlines()[-1]
    assert line.endswith(f"  {reason} (1 more of this kind; --bad-rows PATH writes them all)")


def test_check_finds_what_the_index_finds(job_file: Any, broken: Path) -> None:
    job = load_job(job_file(data={"train": {"path": str(broken)}}))
    data = Data(on_bad_row="quarantine")
    index = build_index(Source(path=str(broken)), data, load_sample_builder(sample_spec(job, ["dog", "cat"])))
    (check,) = check_sources(*check_inputs(job))
    assert check.bad == index.bad


def test_a_source_that_is_all_bad_or_no_file_at_all_stops_nothing(
    job_file: Any, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    all_bad = _coco(tmp_path, {"x": "no.jpg"}, name="all_bad.json")
    (tmp_path / "torn.json").write_text("{")
    data = {
        "train": {"path": str(broken)},
        "mix": [{"path": str(all_bad)}],
        "eval": {"path": str(tmp_path / "torn.json")},
    }
    job_path = job_file(data=data | {"test": 0.2})
    checks = list(check_sources(*check_inputs(load_job(job_path))))
    assert [(c.name, c.rows, c.usable) for c in checks] == [("eval", 0, 0), ("train", 7, 3), ("mix[0]", 1, 0)]
    assert "not readable" in checks[0].problems[0]
    lines = tmp_path / "bad.jsonl"
    assert main(["data", "check", str(job_path), "--bad-rows", str(lines)]) == 1
    output = capsys.readouterr().out
    assert "data.mix[0]" in output
    assert "cannot be used: " in output
    assert "20% of the training rows" in output
    bad = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(bad) == 5
    assert bad[-1] == {"part": "mix[0]", "row": 0, "id": "x", "reason": bad[-1]["reason"]}


def test_check_of_good_data_exits_with_0(job_file: Any, scenes: Path, capsys: pytest.CaptureFixture) -> None:
    job = job_file(data={"train": {"path": str(scenes / "train.json")}, "eval": {"path": str(scenes / "eval.json")}})
    assert main(["data", "check", str(job), "--decode", "data.train.max_rows=9"]) == 0
    out = capsys.readouterr().out
    assert "rows 9, usable 9, bad 0" in out
    assert "rows 12, usable 12, bad 0" in out


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("image is 1x4000 px; one side is over 200 times", "image is 3x900 px; one side is over 200 times"),
        ("id a b is used by 2 rows; make it unique", "id 7 is used by 13 rows; make it unique"),
        ("box [1.0, -2, 3, 4] (x1, y1, x2, y2) is empty", "box [90, 8, 7, 6.5] (x1, y1, x2, y2) is empty"),
        ("class 'it\\'s' is not among ['a', 'b']; add it", "class 'dog' is not among ['c']; add it"),
        ("/d/labels/x1.txt: line 1: class 9 is not", "/d/labels/b/y 2.txt: line 7: class 3 is not"),
        ("objects {'id': [0], 'bbox': [[1.0, ...]], 'category': [' is not {x}", "objects {'id': [9]} is not {x}"),
        ("image file is missing (/data/a (1).jpg)", "image file is missing (s3://bucket/b.jpg)"),
    ],
)
def test_like_reasons_become_equal(one: str, other: str) -> None:
    assert group_reason(one) == group_reason(other)


def test_unlike_reasons_stay_apart_and_nothing_raw_is_shown() -> None:
    assert group_reason("bbox [1] is not four numbers") != group_reason("bbox [1] is outside")
    assert plain("a\x1b[31m\u202eé漢\n") == "a\\x1b[31m\\u202eé漢\\n"
    assert plain("a\n\x07", keep="\n") == "a\n\\x07"


def test_stats_are_those_of_the_rows(job_file: Any, scenes: Path) -> None:
    job = load_job(job_file(data={"train": {"path": str(scenes / "train.json")}, "eval": 0.2}))
    stats = measure_rows(job)
    train = load_parts(job, ["train"]).train
    assert train is not None
    assert stats.parts == {"train": (40, 0), "eval": (10, 0)}
    labels = [label for record in load_parts(job, ["train", "eval"]).train.records for label in record.truth["labels"]]
    assert {e["tag"]: e["objects"] for e in stats.classes} == {name: labels.count(name) for name in set(labels)}
    assert sum(counts.total() for counts in stats.region_counts.values()) == len(labels) == len(stats.boxes)
    assert sum(box_classes(stats.boxes)) == len(labels)
    changes = size_changes(stats)
    assert changes["shrunk"] + changes["enlarged"] + changes["kept"] == len(stats.images) == 40
    own = next(e for e in stats.limits if e["own"])
    assert own["image_tokens"] == pytest.approx(stats.tokens["image"].mean())
    assert [e["dropped"] for e in stats.cuts] == [
        (stats.tokens["all"] > np.percentile(stats.tokens["all"], q, method="inverted_cdf")).sum()
        for q in (50, 90, 95, 99)
    ]


def test_other_limits_are_what_that_job_would_have(job_file: Any, tmp_path: Path) -> None:
    _image(tmp_path / "large.jpg", (900, 700))
    boxes = (("a", (10, 10, 300, 5)), ("a", (10, 10, 200, 200)))
    path = job_file(data={"train": {"path": str(_coco(tmp_path, {"a": "large.jpg"}, boxes))}})
    job = load_job(path, ["data.max_pixels=65536", "data.max_tokens=10"])
    stats = measure_rows(job)
    assert [e["above"] for e in stats.limits] == [1] * len(stats.limits)
    factor = load_sample_builder(sample_spec(job, ["dog"])).image_spec.factor
    other = next(e for e in stats.limits if e["max_pixels"] == 512 * factor**2)
    again = measure_rows(load_job(path, [f"data.max_pixels={512 * factor**2}"]))
    assert other["image_tokens"] == again.tokens["image"].mean()
    assert other["thin"] == (again.resized_boxes.min(axis=1) < 4).mean()
    assert stats.limits[0]["thin"] == 0.5
    text = describe_stats(stats)
    assert "1 (50.0%) are thinner than 4 pixels" in text
    assert "<- this job" in text
    assert "1 shrunk" in text


def test_stats_writes_a_picture_to_the_output(job_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    job = str(job_file())
    assert main(["data", "stats", job]) == 0
    assert Image.open(tmp_path / "runs" / "data" / f"{Path(job).stem}-stats.png").size[0] > 1000
    assert main(["data", "stats", job, "--output", str(tmp_path / "deep" / "a.png")]) == 0
    assert (tmp_path / "deep" / "a.png").is_file()
    assert f"picture: {tmp_path / 'deep' / 'a.png'}" in capsys.readouterr().out
    assert main(["data", "stats", job, "--output", str(tmp_path)]) == 1
    assert "Give another --output" in capsys.readouterr().err


def test_images_without_an_object_are_counted(job_file: Any, tmp_path: Path) -> None:
    _image(tmp_path / "a.jpg")
    boxes = (("a", (10, 10, 50, 50)), ("a", (10, 10, 20, 20)))
    path = job_file(data={"train": {"path": str(_coco(tmp_path, dict.fromkeys("abcd", "a.jpg"), boxes))}})
    stats = measure_rows(load_job(path))
    assert stats.without_object == 3
    assert "\n  3 images (75.0%) have no object\n" in describe_stats(stats)
    _coco(tmp_path, {"a": "a.jpg"})
    assert "\n\n0 boxes\n  1 images (100.0%) have no object\n" in describe_stats(measure_rows(load_job(path)))


def test_pairs_are_measured_by_their_texts(job_file: Any, tmp_path: Path) -> None:
    _image(tmp_path / "a.jpg")
    pair = {"prompt": "<image>Where is it?", "chosen": "Here.", "rejected": "Nowhere at all.", "images": ["a.jpg"]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    source = {"path": str(tmp_path / "pairs.jsonl"), "format": "preference"}
    stats = measure_rows(load_job(job_file(method="dpo", data={"train": source})))
    assert stats.without_object is None
    assert (len(stats.images), len(stats.boxes), stats.classes) == (1, 0, ())
    assert describe_stats(stats).startswith("rows: train 1\n")


def test_odd_class_names_can_be_drawn_and_do_not_reach_the_terminal_raw(job_file: Any, tmp_path: Path) -> None:
    from ray_vlm.data.inspect.stats import draw_stats

    _image(tmp_path / "a.jpg")
    path = _coco(tmp_path, {"a": "a.jpg"}, (("a", (1, 2, 30, 20)),))
    path.write_text(path.read_text().replace('"dog"', '"$a^{ 挖"'))
    stats = measure_rows(load_job(job_file(data={"train": {"path": str(path)}})))
    assert draw_stats(stats, "t$\x1b").startswith(b"\x89PNG")
