"""Images inside files: the bytes that were written, groups read once and few of them kept, changed files refused."""

import io
import json
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data import inner_images, records
from ray_vlm.data.images import decode, read_image
from ray_vlm.data.index import Index
from ray_vlm.data.inner_images import read_inner
from ray_vlm.data.parts import build_index
from ray_vlm.data.records import ImageCell, ImageRange, LocatedBytes
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.sources import tables
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import DataError

GROUP_ROWS = 5


def _png(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _row(number: int, image: bytes | None = None) -> dict:
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": f"{number}"}]
    return {"images": [{"bytes": _png(number) if image is None else image, "path": None}], "messages": turns}


def _write(path: Path, rows: list[dict], group_rows: int = GROUP_ROWS, **options: object) -> Source:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group_rows, **options)
    return Source(path=str(path), format="messages")


@pytest.fixture
def index_of(tiny_models: dict[str, str], tmp_path: Path) -> Callable[..., Index]:
    spec = SampleSpec(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), ChatTask(), ())
    return lambda source, **data: build_index(source, Data(**data), load_sample_builder(spec), str(tmp_path / "index"))


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        inner_images, "_GROUPS", inner_images._Cache(inner_images.CACHE_BYTES, lambda c: c.get_total_buffer_size())
    )


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_cells_of_a_parquet_file_are_read_by_position(
    compression: str, tmp_path: Path, index_of: Callable[..., Index]
) -> None:
    source = _write(tmp_path / "rows.parquet", [_row(i) for i in range(12)], compression=compression)
    index = index_of(source)
    images = [record.images[0] for record in index.records]
    assert [(image.group, image.row, image.column, image.item) for image in images] == [
        (i // GROUP_ROWS, i % GROUP_ROWS, "images", 0) for i in range(12)
    ]
    assert [read_inner(image) for image in images] == [_png(i) for i in range(12)]
    held = sum(file.stat().st_size for file in (tmp_path / "index" / "rows").rglob("*.arrow"))
    assert held < 12 * len(_png(0)), "the index holds no images"


@pytest.mark.parametrize("kind", ["bytes", "struct", "list of bytes"])
def test_every_shape_of_a_cell(kind: str, tmp_path: Path) -> None:
    value = {"bytes": _png(1), "struct": {"bytes": _png(1), "path": "a.png"}, "list of bytes": [_png(0), _png(1)]}[kind]
    pq.write_table(pa.Table.from_pylist([{"image": value}]), tmp_path / "rows.parquet")
    table = tables.ParquetTable(str(tmp_path / "rows.parquet"))
    ((_, cells),) = table.read(next(table.pieces()))
    cell = cells["image"]
    image = cell["bytes"] if kind == "struct" else cell[1] if kind == "list of bytes" else cell
    assert isinstance(image, LocatedBytes)
    assert read_inner(image.location) == image == _png(1)


def test_a_group_is_read_once_and_few_are_kept(
    tmp_path: Path, index_of: Callable[..., Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(_write(tmp_path / "rows.parquet", [_row(i) for i in range(40)]))
    cells = [record.images[0] for record in index.records]
    one = len(_png(0)) * GROUP_ROWS
    for cell in cells:
        read_inner(cell)
    assert 8 * one < inner_images.read_group_bytes() < 1.1 * 8 * one, "each group once"
    small = inner_images._Cache(3 * one + 1000, inner_images._GROUPS.size)
    monkeypatch.setattr(inner_images, "_GROUPS", small)
    for cell in [*cells, *cells[:GROUP_ROWS]]:
        read_inner(cell)
    assert small._held <= small.limit
    assert len(small._values) <= 3
    assert small.read_bytes > 8.5 * one, "one that was dropped is read again"


def test_threads_that_need_one_group_read_it_once(tmp_path: Path, index_of: Callable[..., Index]) -> None:
    index = index_of(_write(tmp_path / "rows.parquet", [_row(i) for i in range(GROUP_ROWS)]))
    read: list[bytes] = []
    threads = [
        threading.Thread(target=lambda cell=record.images[0]: read.append(read_inner(cell))) for record in index.records
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read) == sorted(_png(i) for i in range(GROUP_ROWS))
    assert inner_images.read_group_bytes() < 2 * GROUP_ROWS * len(_png(0))


def test_a_group_too_large_to_keep_is_copied_into_the_index(
    tmp_path: Path, index_of: Callable[..., Index], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tables, "LARGEST_GROUP_BYTES", 1000)
    caplog.set_level("INFO", "ray_vlm")
    source = _write(tmp_path / "rows.parquet", [_row(i) for i in range(12)])
    index = index_of(source)
    assert [record.images[0] for record in index.records] == [_png(i) for i in range(12)]
    assert "3 row groups" in caplog.text
    assert "in data.index_dir" in caplog.text


def test_the_limit_counts_decoded_bytes(
    tmp_path: Path, index_of: Callable[..., Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dictionary holds an image that many rows show once, and the name of a column may have dots."""
    monkeypatch.setattr(tables, "LARGEST_GROUP_BYTES", 20 * len(_png(0)))
    pq.write_table(pa.table({"observation.image": [_png(0)] * 60}), tmp_path / "icons.parquet")
    table = tables.ParquetTable(str(tmp_path / "icons.parquet"))
    assert table.image_bytes[0] < tables.LARGEST_GROUP_BYTES
    (_, cells), *_ = table.read(next(table.pieces()))
    assert type(cells["observation.image"]) is bytes, "60 of them are above the limit"
    pq.write_table(pa.table({"observation.image": [_png(i) for i in range(60)]}), tmp_path / "photos.parquet")
    table = tables.ParquetTable(str(tmp_path / "photos.parquet"))
    assert table.image_bytes[0] > tables.LARGEST_GROUP_BYTES


def test_other_columns_of_bytes_reach_the_reward_functions_as_bytes(
    tmp_path: Path, tiny_models: dict[str, str]
) -> None:
    rows = [
        {"prompt": "<image>What?", "images": [_png(i)], "mask": b"12", "more": [{"bytes": _png(i), "path": None}]}
        for i in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    spec = SampleSpec(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), ChatTask(), (), kind="prompt")
    source = Source(path=str(tmp_path / "rows.parquet"), format="prompt", columns={"mask": "mask", "more": "more"})
    index = build_index(source, Data(), load_sample_builder(spec), str(tmp_path / "index"))
    columns = index.records[1].columns
    assert columns["mask"] == b"12"
    assert type(columns["mask"]) is bytes
    assert type(columns["more"][0]["bytes"]) is bytes
    assert read_inner(index.records[1].images[0]) == _png(1)


def test_a_member_of_a_tar_that_could_not_be_read_once_is_read_again(
    tmp_path: Path, index_of: Callable[..., Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_vlm.data import images

    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for number in range(3):
            (tmp_path / "a.png").write_bytes(_png(number))
            tar.add(tmp_path / "a.png", f"{number}.png")
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Noise."}]
    rows = [{"id": str(i), "image": f"{i}.png", "conversations": turns} for i in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    root = str(tmp_path / "photos.tar")
    source = Source(path=str(tmp_path / "rows.json"), format="llava", image_root=root)

    def fail(image: ImageRange) -> bytes:
        if image.name == "1.png":
            raise OSError("timeout")
        return read_inner(image)

    with monkeypatch.context() as patch:
        patch.setattr(images, "read_inner", fail)
        assert [bad.row for bad in index_of(source, on_bad_row="quarantine").bad] == [1]
    assert not index_of(source, on_bad_row="quarantine").bad


def test_a_file_that_changes_is_refused(tmp_path: Path, index_of: Callable[..., Index]) -> None:
    source = _write(tmp_path / "rows.parquet", [_row(i) for i in range(12)])
    index = index_of(source)
    cell = index.records[0].images[0]
    os.utime(tmp_path / "rows.parquet", ns=(1, 1))
    with pytest.raises(ValueError, match="changed since it was indexed"):
        read_inner(cell)


def test_a_tar_written_again_in_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        (tmp_path / "a.png").write_bytes(_png(0))
        tar.add(tmp_path / "a.png", "a.png")
    about = path.stat()
    image = ImageRange(str(path), (about.st_size, about.st_mtime_ns), 512, len(_png(0)), "a.png")
    assert read_inner(image) == _png(0)
    with open(path, "r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="changed since it was indexed"):
        read_inner(image)


def test_the_time_of_a_file_does_not_count_in_a_folder_that_ray_names_by_its_content(tmp_path: Path) -> None:
    """Each node unpacks the working directory of a job at a time of its own."""
    folder = tmp_path / "_ray_pkg_0123"
    folder.mkdir()
    (folder / "photos.bin").write_bytes(b"12345")
    assert read_inner(ImageRange(str(folder / "photos.bin"), (5, 1), 1, 3)) == b"234"
    with pytest.raises(ValueError, match="changed since it was indexed"):
        read_inner(ImageRange(str(folder / "photos.bin"), (6, 1), 1, 3))


def test_bytes_that_are_no_image_are_a_bad_row(tmp_path: Path, index_of: Callable[..., Index]) -> None:
    rows = [_row(0), _row(1, b"<html>not here</html>"), _row(2, _png(2)[:40])]
    index = index_of(_write(tmp_path / "rows.parquet", rows), on_bad_row="quarantine")
    assert [record.row for record in index.records] == [0]
    assert [bad.row for bad in index.bad] == [1, 2]
    assert "HTML" in index.bad[0].reason


def test_a_truncated_parquet_file_is_refused(tmp_path: Path, index_of: Callable[..., Index]) -> None:
    source = _write(tmp_path / "rows.parquet", [_row(i) for i in range(12)])
    data = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"rows\.parquet: not readable"):
        index_of(source)


def test_damaged_pages_are_an_error_with_the_group(tmp_path: Path, index_of: Callable[..., Index]) -> None:
    index = index_of(_write(tmp_path / "rows.parquet", [_row(i) for i in range(12)], compression="snappy"))
    cell = index.records[7].images[0]
    about = os.stat(tmp_path / "rows.parquet")
    data = bytearray((tmp_path / "rows.parquet").read_bytes())
    data[4 : len(data) * 3 // 4] = bytes(len(data) * 3 // 4 - 4)
    (tmp_path / "rows.parquet").write_bytes(bytes(data))
    os.utime(tmp_path / "rows.parquet", ns=(about.st_atime_ns, about.st_mtime_ns))
    with pytest.raises((ValueError, OSError), match=r"row group 1|Couldn't|Unexpected|decompress"):
        read_inner(cell)


def test_positions_survive_the_index_and_name_the_image() -> None:
    cell = ImageCell("/data/rows.parquet", (9, 8), 3, 4, "images", 1)
    assert str(cell) == "/data/rows.parquet (row group 3, row 4, column images, image 1)"
    assert str(ImageRange("/data/photos.tar", (1, 2), 512, 7, "a/b.jpg")) == "/data/photos.tar/a/b.jpg"
    assert json.dumps(str(records.ImageRange("/x.arrow", (1, 2), 512, 7))) == '"/x.arrow (byte 512)"'


def test_plain_jpegs_are_decoded_as_pillow_decodes_them() -> None:
    """The fast decoder takes some files, Pillow the rest; nobody can tell from the pixels."""
    rng = np.random.default_rng(0)
    for number in range(60):
        size = tuple(int(side) for side in rng.integers(1, 200, 2))
        picture = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).convert(
            ("RGB", "L", "CMYK", "YCbCr")[number % 4]
        )
        options: dict = {"quality": int(rng.integers(5, 101)), "subsampling": number % 3}
        if number % 5 == 0:
            options["progressive"] = True
        if number % 6 == 0:
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = 1 + number % 8
        file = io.BytesIO()
        picture.save(file, "JPEG", **options)
        data = file.getvalue()
        damaged = bytearray(data)
        damaged[len(data) // 2] ^= 0x55
        for case in (data, data[:-2], data[: len(data) // 2], bytes(damaged)):
            results = []
            for fast in (False, True):
                try:
                    results.append(decode(case, 40_000, fast=fast))
                except Exception as error:  # decoders raise exceptions of any type
                    results.append(type(error))
            assert type(results[0]) is type(results[1])
            assert results[0] is results[1] or np.array_equal(*results)


def test_a_jpeg_that_is_turned_behind_its_frame_is_left_to_pillow() -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(file, "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 3
    part = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    data = file.getvalue()
    scan = data.index(b"\xff\xda")
    turned = data[:scan] + b"\xff\xe1" + (len(part) + 2).to_bytes(2, "big") + part + data[scan:]
    assert np.array_equal(decode(turned), decode(data)[::-1, ::-1])
    assert np.array_equal(decode(turned, 1600, fast=True), decode(turned))


def test_a_jpeg_larger_than_its_row_says_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_vlm.data import images

    file = io.BytesIO()
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(file, "JPEG")
    assert images._is_plain_jpeg(file.getvalue(), 3000)
    assert not images._is_plain_jpeg(file.getvalue(), 2999)
    assert not images._is_plain_jpeg(file.getvalue()[:30], 3000)
    assert read_image(file.getvalue()) == file.getvalue()
