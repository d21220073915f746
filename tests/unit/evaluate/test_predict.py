"""What `predict` reads and writes names images as the table or the command line does."""

import csv
import gzip
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from ray_vlm.data.draw import draw_values
from ray_vlm.data.images import read_image
from ray_vlm.errors import ConfigError, DataError, RunError
from ray_vlm.evaluate.predict import _result, _write, read_inputs
from ray_vlm.evaluate.predictor import build_question
from ray_vlm.evaluate.run import load_result


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two photos in a folder of the current one, as a submitted job has them in a temporary folder."""
    (tmp_path / "photos").mkdir()
    for name in ("a b.png", "c.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_results_name_images_as_they_were_given(photos: Path) -> None:
    Path("rows.json").write_text(
        json.dumps([{"images": ["photos/a b.png", "photos/c.png"]}, {"images": "../out.png"}, {"images": None}])
    )
    inputs = read_inputs(["photos", "photos/c.png", "rows.json"], "?", "chat")
    results = [_result(entry, entry.error or "not asked") for entry in inputs]
    assert [(result["id"], result["images"]) for result in results] == [
        ("a b.png", ["photos/a b.png"]),
        ("c.png", ["photos/c.png"]),
        ("photos/c.png", ["photos/c.png"]),
        ("row 0", ["photos/a b.png", "photos/c.png"]),
        ("row 1", ["../out.png"]),
        ("row 2", []),
    ]
    assert all(Path(str(image)).is_absolute() for entry in inputs for image in entry.ask.images), "for the replicas"
    _write("found.csv", results)
    with open("found.csv", newline="") as file:
        cells = [row["images"] for row in csv.DictReader(file)]
    assert cells[:3] == ["photos/a b.png", "photos/c.png", "photos/c.png"]
    assert json.loads(cells[3]) == ["photos/a b.png", "photos/c.png"]
    assert cells[4:] == ["../out.png", ""]


def test_images_may_lie_in_the_table_itself(photos: Path) -> None:
    data = (photos / "photos" / "c.png").read_bytes()
    rows = [{"images": [{"bytes": data, "path": "c.png"}]}, {"images": [{"bytes": None, "path": "photos/c.png"}]}]
    parquet.write_table(pa.Table.from_pylist(rows), "rows.parquet")
    inside, beside = read_inputs(["rows.parquet"], "?", "chat")
    assert inside.error is beside.error is None
    assert (inside.names, beside.names) == (("row 0",), ("photos/c.png",))
    assert build_question(inside.ask, 0, "chat", 10**6).images == (data,)


def test_rows_may_be_a_pattern_a_folder_of_shards_or_a_tar(photos: Path) -> None:
    data = (photos / "photos" / "c.png").read_bytes()
    (photos / "shards").mkdir()
    for number, name in enumerate(("a b.png", "c.png", "a b.png")):
        row = {"id": f"r{number}", "images": [{"bytes": (photos / "photos" / name).read_bytes(), "path": name}]}
        parquet.write_table(pa.Table.from_pylist([row]), f"shards/part-{number}.parquet")
    for given in ("shards/part-*.parquet", "shards"):
        read = read_inputs([given], "?", "chat")
        assert [entry.ask.id for entry in read] == ["r0", "r1", "r2"]
        assert build_question(read[1].ask, 0, "chat", 10**6).images == (data,)
    with gzip.open("rows.jsonl.gz", "wt") as file:
        file.write(json.dumps({"image": "photos/c.png"}) + "\n")
    assert read_inputs(["rows.jsonl.gz"], "?", "chat")[0].names == ("photos/c.png",)
    with tarfile.open("samples.tar", "w") as tar:
        for name in ("a b.png", "c.png"):
            tar.add(f"photos/{name}", name)
    samples = read_inputs(["samples.tar"], "?", "chat")
    assert [entry.ask.id for entry in samples] == ["a b", "c"]
    assert build_question(samples[1].ask, 0, "chat", 10**6).images == (data,)
    (photos / "shards" / "photo.png").write_bytes(data)
    assert [entry.ask.id for entry in read_inputs(["shards"], "?", "chat")] == ["photo.png"], "images come first"


def test_images_of_a_table_may_lie_in_a_tar(photos: Path) -> None:
    with tarfile.open("photos.tar", "w") as tar:
        tar.add("photos", "inside")
    Path("rows.json").write_text(json.dumps([{"images": ["inside/a b.png", "inside/c.png"]}, {"images": "d.png"}]))
    good, bad = read_inputs(["rows.json"], "?", "chat", "photos.tar")
    assert good.names == ("inside/a b.png", "inside/c.png")
    record = build_question(good.ask, 0, "chat", 10**6)
    assert record.sizes == ((64, 64), (64, 64))
    assert [read_image(image) for image in record.images] == [
        (photos / "photos" / name).read_bytes() for name in ("a b.png", "c.png")
    ]
    assert draw_values(good.ask.images[0], {}, ()).size[0] >= 64, "as --draw does"
    assert bad.error is not None
    assert "'d.png' is not in" in bad.error
    with pytest.raises(DataError, match=r"rows\.json: no tar file .* Give a folder of images, or a tar"):
        read_inputs(["rows.json"], "?", "chat", "rows.json")
    with pytest.raises(ConfigError, match=r"--image-root nowhere: no such folder\. Give the folder .*, or a tar"):
        read_inputs(["rows.json"], "?", "chat", "nowhere")


@pytest.mark.parametrize(
    ("files", "reason"),
    [((), "no such folder"), (("x",), "holds no metrics.json"), (("metrics.json",), "holds no predictions.jsonl")],
)
def test_a_folder_without_an_evaluation_is_named(tmp_path: Path, files: tuple[str, ...], reason: str) -> None:
    for name in files:
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / name).write_text("{}")
    with pytest.raises(RunError, match=reason) as error:
        load_result(tmp_path / "old", "old", "detection")
    assert "Errno" not in str(error.value)
    assert "Give a folder that `ray-vlm evaluate` wrote" in str(error.value)
