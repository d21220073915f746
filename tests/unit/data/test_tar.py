"""A tar file as `image_root` gives the same rows and pixels as the folder that it holds, and nothing is unpacked."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import Model
from ray_vlm.config.task import DetectionTask
from ray_vlm.data.build import CheckLimits, build_rows, prune
from ray_vlm.data.images import read_image
from ray_vlm.data.inner_images import read_inner
from ray_vlm.data.measure import measure_row
from ray_vlm.data.parallel import Spread
from ray_vlm.data.parts import build_index
from ray_vlm.data.records import BadRow, ImageRange
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.shards import IndexFolder, load_shard, read_records
from ray_vlm.data.sources.formats import SourceReader, read_rows
from ray_vlm.data.sources.tar import TarImages, find_image, open_images, tar_of
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import DataError
from ray_vlm.storage import describe_file

FILES = {f"{folder}/{i}.png": bytes([i]) * (600 * i) for folder in ("a", "b b") for i in range(1, 6)}
TURNS = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dog."}]
MESSAGES = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A dog."}]
OBJECTS = {"ref": ["dog"], "bbox": [[1, 2, 30, 30]], "bbox_type": "real"}
STEP = {"Instruction": "Open it.", "Output": '{"action": "wait"}', "Grounding": ""}
ROWS: dict[str, Any] = {
    "llava": lambda name: {"image": name, "conversations": TURNS},
    "messages": lambda name: {"images": [name], "messages": MESSAGES},
    "objects": lambda name: {"images": [{"path": name}], "objects": OBJECTS},
    "image_csv": lambda name: {"image": name, "label": "dog"},
    "gui_csv": lambda name: STEP | {"Image_id": name, "Task_id": name},
    "preference": lambda name: {"prompt": "What?", "images": [name], "chosen": "a", "rejected": "b"},
    "prompt": lambda name: {"prompt": "What?", "image": name},
}


def _tar(path: Path, files: dict[str, bytes] = FILES, **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def _member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_member_is_a_range_of_the_file(tmp_path: Path, layout: int) -> None:
    files = FILES | {f"{'long/' * 30}é.png": b"long", "empty.png": b""}
    tar = _tar(tmp_path / "images.tar", files, format=layout)
    images = pickle.loads(pickle.dumps(TarImages(str(tar))))
    for name, data in files.items():
        image = images.find(name)
        assert image == ImageRange(str(tar), describe_file(str(tar))[1:], image.start, len(data), name)
        assert read_inner(image) == data
        assert str(image) == f"{tar}/{name}"


def test_it_is_small(tmp_path: Path) -> None:
    tar = _tar(tmp_path / "images.tar", {f"{'deep/' * 10}{i}.png": b"x" for i in range(2000)})
    assert len(pickle.dumps(TarImages(str(tar)))) < 2000 * 24 + 2000


def test_names_are_normalised_and_spelled_as_those_of_files(tmp_path: Path) -> None:
    files = {"./a.jpg": b"1", "b//c.jpg": b"2", "/abs/d e.jpg": b"3", "../out.jpg": b"4", "a%20b.jpg": b"5"}
    images = TarImages(str(_tar(tmp_path / "images.tar", files)))
    for name in ("a.jpg", "./a.jpg", "b/c.jpg", ".//b/./c.jpg", "abs/d e.jpg", "abs/d%20e.jpg", r"abs\d e.jpg"):
        read_inner(images.find(name))
    assert read_inner(images.find(r"b\c.jpg")) == b"2"
    assert read_inner(images.find("a%20b.jpg")) == b"5"
    assert images.find("./a.jpg").name == "a.jpg"


def test_the_last_of_two_members_of_one_name_counts(tmp_path: Path) -> None:
    path = _tar(tmp_path / "images.tar", {"a.jpg": b"old", "b.jpg": b"b"})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("./a.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"new"))
    assert read_inner(TarImages(str(path)).find("a.jpg")) == b"new"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "none.jpg",
            r"image 'none\.jpg' is not in .*images\.tar, which begins with a/1\.png, a/2\.png, a/3\.png",
        ),
        ("link.jpg", r"image 'link\.jpg' of .*images\.tar is a link; put the file itself there"),
        ("hard.jpg", "is a link; put the file itself there"),
        ("folder", "is a folder; give the path of an image"),
        ("pipe.jpg", "is neither a file nor a link; mend the path"),
        ("disk.jpg", "is neither a file nor a link; mend the path"),
        ("../a/1.png", r"image '\.\./a/1\.png' lies outside image_root .*images\.tar; give a path inside it"),
        ("a/../a/1.png", "lies outside image_root"),
        (r"..\a\1.png", "is not in"),
        ("/a/1.png", "lies outside image_root"),
        ("file:///a/1.png", "lies outside image_root"),
        ("s3://bucket/a.png", "lies outside image_root"),
        ("https://a.b/c.png", "URLs are not read; download it"),
        ("data:image/png;base64,xx", "data: URI"),
        ("", "is not a path"),
        ("a\0b", "is not a path"),
        (".", "is not in"),
    ],
)
def test_names_that_cannot_be_used(tmp_path: Path, name: str, reason: str) -> None:
    path = _tar(tmp_path / "images.tar")
    with tarfile.open(path, "a") as tar:
        tar.addfile(_member("link.jpg", tarfile.SYMTYPE, "a/1.png"))
        tar.addfile(_member("hard.jpg", tarfile.LNKTYPE, "a/1.png"))
        tar.addfile(_member("folder", tarfile.DIRTYPE))
        tar.addfile(_member("pipe.jpg", tarfile.FIFOTYPE))
        tar.addfile(_member("disk.jpg", tarfile.BLKTYPE))
    with pytest.raises(ValueError, match=reason):
        TarImages(str(path)).find(name)


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "holes.jpg", "GNU.sparse.realsize": "9"}
    with tarfile.open(tmp_path / "images.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("x/holes.jpg")
        member.pax_headers = pax
        data = b"1\n0\n9\n".ljust(512, b"\0") + b"123456789"
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
        tar.addfile(tarfile.TarInfo("b.jpg"))
    images = TarImages(str(tmp_path / "images.tar"))
    with pytest.raises(ValueError, match=r"'holes\.jpg' of .* is a sparse file, which is not read"):
        images.find("holes.jpg")
    assert images.find("b.jpg").length == 0


@pytest.mark.parametrize("name", ["images.tar", "images.tar.gz", "images.tgz", "images"])
@pytest.mark.parametrize(
    ("pack", "tool"),
    [
        (gzip.compress, "gunzip"),
        (bz2.compress, "bunzip2"),
        (lzma.compress, "unxz"),
        (lambda data: pa.compress(data, "zstd", asbytes=True), "unzstd"),
    ],
)
def test_compressed_files_are_to_be_unpacked(tmp_path: Path, name: str, pack: Any, tool: str) -> None:
    path = tmp_path / name
    path.write_bytes(pack(_tar(tmp_path / "plain.tar").read_bytes()))
    with pytest.raises(DataError, match=rf"image_root .*{name}: a compressed file.* Unpack it first \(`{tool} {name}`"):
        open_images(str(path))


def test_a_tar_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    whole = _tar(tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + last.size
    for size in (end - 1, end - 600, last.offset_data + 1, last.offset_data, last.offset + 100, 700, 513):
        (tmp_path / "part.tar").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"image_root .*part\.tar: the tar is not complete .* Write or fetch it"):
            TarImages(str(tmp_path / "part.tar"))
    (tmp_path / "part.tar").write_bytes(whole[: last.offset])  # some writers leave the end mark out
    assert TarImages(str(tmp_path / "part.tar")).find("b b/4.png").length == 2400


def test_damage_between_members_is_named(tmp_path: Path) -> None:
    data = bytearray(_tar(tmp_path / "whole.tar").read_bytes())
    with tarfile.open(tmp_path / "whole.tar") as tar:
        third = tar.getmembers()[2]
    data[third.offset : third.offset + 100] = b"x" * 100
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(DataError, match=rf"bad\.tar: damaged, no header of a tar is at byte {third.offset}\. Write or"):
        TarImages(str(tmp_path / "bad.tar"))


def test_members_that_point_back_do_not_hang(tmp_path: Path) -> None:
    """A size below zero leads `tarfile` to the same header for ever."""
    member = tarfile.TarInfo("a.jpg")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    first = tarfile.TarInfo("b.jpg").tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "bad.tar").write_bytes(first + first + bytes(header) + bytes(1024))
    with pytest.raises(DataError, match="Write or fetch it again"):
        TarImages(str(tmp_path / "bad.tar"))


@pytest.mark.parametrize("data", [b"", b"no tar", b"no tar" * 1000, bytes(10240)])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "images.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"image_root .*images\.tar: .*Give "):
        open_images(str(tmp_path / "images.tar"))


def test_what_is_a_tar_and_what_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    assert tar_of(str(tmp_path / "folder.tar")) == tar_of(str(tmp_path)) == tar_of(None) == tar_of("s3://b/x") == ""
    assert tar_of("s3://b/x.tar?region=a") == "s3://b/x.tar?region=a"
    assert open_images(str(tmp_path / "folder.tar")) == str(tmp_path / "folder.tar")
    with pytest.raises(DataError, match=r"image_root .*none\.tar: no such file\. Give the tar or the folder"):
        open_images(str(tmp_path / "none.tar"))


def test_headers_are_read_once_until_the_file_changes(tmp_path: Path) -> None:
    path = str(_tar(tmp_path / "images.tar"))
    first = open_images(path)
    assert open_images(path) is first
    _tar(tmp_path / "images.tar", {"other.png": b"x"})
    assert open_images(path) is not first


def test_a_tar_in_an_object_store(tmp_path: Path) -> None:
    import fsspec

    data = _tar(tmp_path / "images.tar").read_bytes()
    fsspec.filesystem("memory").pipe("/tars/images.tar", data)
    images = open_images("memory://tars/images.tar")
    assert isinstance(images, TarImages)
    for name, content in FILES.items():
        image = images.find(name)
        assert (image.address, data[image.start : image.start + image.length]) == (images.address, content)


def _photos(folder: Path) -> list[str]:
    rng = np.random.default_rng(1)
    folder.mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(6)]


def _coco(names: list[str]) -> dict[str, Any]:
    return {
        "images": [{"id": i, "file_name": name, "width": 50, "height": 40} for i, name in enumerate(names)],
        "annotations": [{"image_id": i, "category_id": 1, "bbox": [1, 2, 30, 20]} for i in range(len(names))],
        "categories": [{"id": 1, "name": "dog"}],
    }


def _pack(folder: Path) -> Path:
    with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
        tar.add(folder, ".")
    return folder.with_suffix(".tar")


@pytest.mark.parametrize("format", ["coco", *ROWS])
def test_rows_of_every_format_find_their_images(tmp_path: Path, format: Any) -> None:
    names = _photos(tmp_path / "images")
    tar = _pack(tmp_path / "images")
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(_coco(names) if format == "coco" else [ROWS[format](name) for name in names]))
    files, _ = read_rows(Source(path=str(path), format=format, image_root=str(tmp_path / "images")))
    reader = pickle.loads(pickle.dumps(SourceReader(Source(path=str(path), format=format, image_root=str(tar)))))
    inside = [row for piece in reader.pieces() for row in reader.read(piece)]
    assert len(files) == len(inside) == len(names)
    for one, other in zip(files, inside, strict=True):
        assert not isinstance(one, BadRow)
        assert not isinstance(other, BadRow)
        assert isinstance(other.images[0], ImageRange)
        assert read_inner(other.images[0]) == Path(str(one.images[0])).read_bytes()
        first, second = measure_row(one, 10**6), measure_row(other, 10**6)
        assert not isinstance(first, BadRow)
        assert not isinstance(second, BadRow)
        assert first.sizes == second.sizes == ((50, 40),)


def test_a_member_that_is_no_image_is_named(tmp_path: Path) -> None:
    tar = _tar(tmp_path / "images.tar", {"a.png": b"no image"})
    (tmp_path / "rows.json").write_text(json.dumps(_coco(["a.png", "b.png"])))
    rows, _ = read_rows(Source(path=str(tmp_path / "rows.json"), image_root=str(tar)))
    bad = [measure_row(row, 10**6) for row in rows]
    assert all(isinstance(row, BadRow) for row in bad)
    assert bad[0].reason.endswith(f"({tar}/a.png)")  # type: ignore[union-attr]
    assert "'b.png' is not in" in bad[1].reason  # type: ignore[union-attr]


def test_the_index_reads_the_same_pixels_and_holds_none(tmp_path: Path, tiny_models: dict[str, str]) -> None:
    names = _photos(tmp_path / "images")
    tar = _pack(tmp_path / "images")
    (tmp_path / "rows.json").write_text(json.dumps(_coco(names)))
    spec = SampleSpec(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), DetectionTask(), ("dog",))
    builder = load_sample_builder(spec)

    def index(root: Path, folder: str) -> Any:
        source = Source(path=str(tmp_path / "rows.json"), image_root=str(root))
        return build_index(source, Data(), builder, str(tmp_path / folder))

    files, packed = index(tmp_path / "images", "a"), index(tar, "b")
    assert len(files) == len(packed) == len(names)
    shutil.rmtree(tmp_path / "images")
    for one, other in zip(files.records, packed.records, strict=True):
        assert (one.id, one.sizes, one.truth) == (other.id, other.sizes, other.truth)
        assert Path(one.images[0]).name == other.images[0].name
        with tarfile.open(tar) as opened:
            member = opened.extractfile(f"./{other.images[0].name}")
            assert member is not None
            assert read_image(other.images[0]) == member.read()
    assert (
        sum(path.stat().st_size for path in (tmp_path / "b").rglob("*") if path.is_file()) < 20_000 < tar.stat().st_size
    )


@pytest.mark.parametrize("format", ["coco", "image_csv"])
def test_a_tar_that_is_written_again_is_indexed_again(tmp_path: Path, format: Any) -> None:
    names = _photos(tmp_path / "images")
    tar = _pack(tmp_path / "images")
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(_coco(names) if format == "coco" else [ROWS[format](name) for name in names]))
    source = Source(path=str(path), format=format, image_root=str(tar))
    task = "detection" if format == "coco" else "classification"
    folder = IndexFolder(str(tmp_path / "index"))

    def build() -> tuple[tuple[str, ...], list[bytes]]:
        shards = build_rows(source, CheckLimits(10**6, "raise"), task, folder, Spread())
        records = [r for name in shards.names for r in read_records(load_shard(folder, name), 0, len(names))]
        return shards.names, [read_image(record.images[0]) for record in records]

    before, data = build()
    assert build()[0] == before
    shutil.copy(tmp_path / "images" / "0.png", tmp_path / "images" / "+.png")  # comes first: all others move
    _pack(tmp_path / "images")
    after, again = build()
    assert again == data
    assert set(after).isdisjoint(before)
    assert prune(folder)[0] == 2  # the shard and the listing of before
    assert build()[0] == after
    assert prune(folder)[0] == 0


def test_folders_are_found_as_before(tmp_path: Path) -> None:
    assert find_image(str(tmp_path), "a.jpg") == str(tmp_path.resolve() / "a.jpg")


def test_damaged_bytes_are_an_error_or_other_names(tmp_path: Path) -> None:
    """No damage ends the process, or raises another error than `DataError`."""
    long = {f"{'long/' * 30}{i}.png": b"x" * 700 for i in range(4)}
    rng, errors = np.random.default_rng(0), 0
    for layout in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        whole = _tar(tmp_path / "whole.tar", long, format=layout).read_bytes()
        for _ in range(300):
            data = bytearray(whole)
            start = rng.integers(0, len(whole) - 8)
            data[start : start + 8] = rng.bytes(8)
            (tmp_path / "bad.tar").write_bytes(data)
            try:
                TarImages(str(tmp_path / "bad.tar"))
            except DataError as error:
                errors += 1
                assert "bad.tar: " in str(error)  # noqa: PT017
    assert errors > 20
