"""The samples of a WebDataset tar are rows, as github.com/webdataset/webdataset describes them; images stay in it."""

import gzip
import io
import json
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ray_vlm.config.data import Source
from ray_vlm.data.build import CheckLimits, build_rows
from ray_vlm.data.images import read_image
from ray_vlm.data.inner_images import read_inner
from ray_vlm.data.parallel import Spread
from ray_vlm.data.records import BadRow, ImageRange, SftRecord
from ray_vlm.data.shards import IndexFolder, load_shard, read_records
from ray_vlm.data.sources.formats import SourceReader, read_rows
from ray_vlm.data.sources.tables import open_table, read_table
from ray_vlm.data.sources.tar import TarImages
from ray_vlm.data.sources.webdataset import WebDatasetTable
from ray_vlm.errors import DataError

TURNS = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dog."}]


def _jpeg(shade: int, format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 24), (shade, 0, 0)).save(file, format)
    return file.getvalue()


def _tar(path: Path, *files: tuple[str, bytes | str | dict | list], **options: Any) -> Path:
    """Write a tar with files in this order; values that are no bytes and no text become JSON."""
    with tarfile.open(path, "w", **options) as tar:
        for name, value in files:
            data = (
                value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode()
            )
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def _cells(path: Path) -> list[dict[str, Any]]:
    return [row[1] for row in read_table(str(path)).rows if not isinstance(row, BadRow)]


def _reasons(path: Path) -> list[str]:
    return [row.reason for row in read_table(str(path)).rows if isinstance(row, BadRow)]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_img2dataset(tmp_path: Path, layout: int) -> None:
    """github.com/rom1504/img2dataset: `.jpg`, `.txt` with the caption, and `.json` with what is known of the image."""
    about = {"caption": "a dög", "url": "http://a.b/c.jpg", "key": "000000001", "status": "success", "width": 32}
    name = f"{'long/' * 30}000000001"
    tar = _tar(
        tmp_path / "00000.tar",
        *((f"{name}.jpg", _jpeg(1)), (f"{name}.txt", "a dög"), (f"{name}.json", about)),
        *(("2.jpg", _jpeg(2)), ("2.txt", "two"), ("2.json", about)),
        format=layout,
    )
    first, second = _cells(tar)
    assert {**first, "image": read_inner(first["image"])} == about | {"txt": "a dög", "id": name, "image": _jpeg(1)}
    assert isinstance(first["image"], ImageRange)
    assert first["image"].name == f"{name}.jpg"
    assert second["id"] == "2"
    records, _ = read_rows(Source(path=str(tar), format="image_csv", columns={"label": "txt"}))
    assert [r.truth for r in records if isinstance(r, SftRecord)] == [
        {"attributes": {"label": "a dög"}},
        {"attributes": {"label": "two"}},
    ]


def test_records_in_json(tmp_path: Path) -> None:
    tar = _tar(
        tmp_path / "shard-000000.tar",
        *(("a/1.jpg", _jpeg(1)), ("a/1.json", {"conversations": TURNS, "id": "same"})),
        *(("a/2.json", {"conversations": TURNS, "id": "same"}), ("a/2.png", _jpeg(2, "PNG"))),
    )
    records, _ = read_rows(Source(path=str(tar), format="llava"))
    assert [record.id for record in records] == ["a/1", "a/2"]
    assert [read_image(r.images[0]) for r in records if isinstance(r, SftRecord)] == [_jpeg(1), _jpeg(2, "PNG")]


def test_detection(tmp_path: Path) -> None:
    objects = {"ref": ["dog"], "bbox": [[1, 2, 30, 20]], "bbox_type": "real"}
    tar = _tar(tmp_path / "a.tar", ("1.jpg", _jpeg(1)), ("1.json", {"objects": objects}))
    (record,), labels = read_rows(Source(path=str(tar), format="objects"))
    assert isinstance(record, SftRecord)
    assert record.truth == {"boxes": ((1, 2, 30, 20),), "labels": ("dog",)}
    assert labels == ["dog"]


def test_numbers_and_texts_have_their_extension_as_name(tmp_path: Path) -> None:
    tar = _tar(
        tmp_path / "a.tar",
        *(
            ("1.jpg", _jpeg(1)),
            ("1.cls", "7\n"),
            ("1.index", "x7"),
            ("1.prompt.txt", "Why?"),
            ("1.meta.json", {"a": 1}),
        ),
        *(("1.tags.json", [1, 2]), ("1.JSON", {"cls": 9, "more": 1}), ("1.npy", b"\0\1")),
    )
    (cells,) = _cells(tar)
    del cells["image"]
    assert cells == {
        "cls": 7,
        "index": "x7",
        "prompt.txt": "Why?",
        "meta.json": {"a": 1},
        "tags.json": [1, 2],
        "more": 1,
        "id": "1",
    }


def test_several_images_in_order(tmp_path: Path) -> None:
    tar = _tar(
        tmp_path / "a.tar",
        *((f"1.{i}.jpg", _jpeg(i)) for i in range(3)),
        *(("2.jpg", _jpeg(1)), ("2.seg.png", _jpeg(2, "PNG"))),
        *(("3.left.jpg", _jpeg(1)), ("3.right.jpg", _jpeg(2))),
        *(("4.1.jpg", _jpeg(1)), ("4.0.jpg", _jpeg(2)), ("4.json", {"images": ["4.0.jpg", "x/4.1.jpg"]})),
        *(("5.1.jpg", _jpeg(1)), ("5.json", {"images": ["5.0.jpg", "5.1.jpg"]})),
    )
    numbered, masked, sides, listed = _cells(tar)
    assert [read_inner(image) for image in numbered["images"]] == [_jpeg(i) for i in range(3)]
    assert (read_inner(masked["image"]), read_inner(masked["seg.png"])) == (_jpeg(1), _jpeg(2, "PNG"))
    assert [image.name for image in sides["images"]] == ["3.left.jpg", "3.right.jpg"]
    assert [image.name for image in listed["images"]] == ["4.0.jpg", "4.1.jpg"]
    assert _reasons(tar) == [f"sample '5' of {tar}: its JSON lists 2 images, and it has 1 (.1.jpg); mend it"]


def test_keys_as_webdataset_takes_them(tmp_path: Path) -> None:
    """The key ends at the first dot of the name, and names without one, or that begin with it, are no samples."""
    tar = _tar(
        tmp_path / "a.tar",
        *(
            ("./v1.2/1.jpg", _jpeg(1)),
            ("./v1.2/1.seg.old.txt", "x"),
            ("README", "x"),
            (".DS_Store", "x"),
            ("._1.jpg", "x"),
        ),
    )
    with tarfile.open(tar, "a") as opened:
        folder = tarfile.TarInfo("v1.3")
        folder.type = tarfile.DIRTYPE
        opened.addfile(folder)
    (cells,) = _cells(tar)
    assert (cells["id"], cells["seg.old.txt"]) == ("v1.2/1", "x")
    assert not _reasons(tar)


def test_as_datasets_reads_it(tmp_path: Path) -> None:
    """`datasets` groups the same files, whose key it calls `__key__`."""
    import datasets

    tar = _tar(
        tmp_path / "a.tar",
        *(
            (f"{i}.{kind}", value)
            for i in range(3)
            for kind, value in (("jpg", _jpeg(i)), ("json", {"n": i}), ("cls", f"{i}"))
        ),
    )
    listed = datasets.load_dataset(
        "webdataset", data_files={"train": str(tar)}, split="train", streaming=True
    ).cast_column("jpg", datasets.Image(decode=False))
    samples = _cells(tar)
    assert [row["__key__"] for row in listed] == [cells["id"] for cells in samples]
    assert [row["jpg"]["bytes"] for row in listed] == [read_inner(cells["image"]) for cells in samples]
    assert [row["json"]["n"] for row in listed] == [cells["n"] for cells in samples]


def test_a_key_whose_files_are_apart_is_bad(tmp_path: Path) -> None:
    tar = _tar(
        tmp_path / "a.tar", *((f"{i}.{kind}", b"{}") for kind in ("jpg", "json") for i in range(2)), ("9.json", {})
    )
    assert [cells["id"] for cells in _cells(tar)] == ["9"]
    assert len(_reasons(tar)) == 4
    assert "sample '0' of " in _reasons(tar)[0]
    assert "other files of this key lie elsewhere in the tar" in _reasons(tar)[0]


def _member(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "1.json"
    return member


def test_samples_that_cannot_be_used(tmp_path: Path) -> None:
    tar = _tar(
        tmp_path / "a.tar",
        *(
            ("1.json", "{"),
            ("2.json", b"\xff"),
            ("3.jpg", b"a"),
            ("3.JPG", b"b"),
            ("4.txt", b"a\0b"),
            ("../5.txt", b"x"),
        ),
    )
    with tarfile.open(tar, "a") as opened:
        opened.addfile(_member("6.jpg", tarfile.SYMTYPE))
        opened.addfile(_member("7.jpg", tarfile.LNKTYPE))
        opened.addfile(_member("8.jpg", tarfile.FIFOTYPE))
    wanted = [
        "sample '1' of .*: its .json is not JSON",
        "sample '2' of .*: its .json is not UTF-8",
        "sample '3' of .*: it has two files .jpg; keep one, or name them .0.jpg and .1.jpg",
        "sample '4' of .*: holds NUL characters",
        r"'\.\./5\.txt' leaves the tar; write it with a plain name",
        "6.jpg is a link; put the file itself there",
        "7.jpg is a link",
        "8.jpg is neither a file nor a link",
    ]
    reasons = _reasons(tar)
    assert len(reasons) == len(wanted)
    for reason, pattern in zip(reasons, wanted, strict=True):
        assert pytest.RaisesExc(ValueError, match=pattern).matches(ValueError(reason)), (reason, pattern)


def test_a_large_text_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_vlm.data.sources.webdataset.MAX_LINE_BYTES", 10)
    tar = _tar(tmp_path / "a.tar", ("1.txt", "x" * 11), ("2.txt", "x" * 10))
    assert _reasons(tar)[0].endswith("its .txt has 11 bytes, above 10; shorten it")
    assert len(_cells(tar)) == 1


def test_a_sample_without_what_the_format_needs(tmp_path: Path) -> None:
    tar = _tar(
        tmp_path / "a.tar",
        *(("1.jpg", _jpeg(1)), ("1.json", {"conversations": TURNS}), ("2.jpg", _jpeg(1)), ("2.npy", b"x")),
        *(("3.mp4", b"x"), ("3.json", {"conversations": [{"from": "human", "value": "What?"}, TURNS[1]]})),
    )
    records, _ = read_rows(Source(path=str(tar), format="llava"))
    bad = [record for record in records if isinstance(record, BadRow)]
    assert [row.id for row in bad] == ["2", "3"]
    assert bad[0].reason.startswith("no conversations; the row has image, id (files .jpg, .npy). Fill it")
    assert "video" in bad[1].reason


def test_damage_is_named(tmp_path: Path) -> None:
    tar = _tar(tmp_path / "a.tar", *((f"{i}.jpg", _jpeg(i)) for i in range(5)))
    data = tar.read_bytes()
    with tarfile.open(tar) as opened:
        header = opened.getmembers()[2].offset
        last = opened.getmembers()[-1]
    cases = {
        "cut.tar": (data[:3000], "the tar is not complete"),
        "between.tar": (data[: last.offset], "the end of the tar is not marked, so it was cut off"),
        "zero.tar": (
            data[:header] + b"\7" * 512 + data[header + 512 :],
            f"damaged, no header of a tar is at byte {header}",
        ),
        "packed.tar": (
            gzip.compress(data),
            r"a compressed file, in which no sample can be read alone. Unpack it first",
        ),
        "text.tar": (b"no tar at all" * 100, "no tar file"),
    }
    for name, (damaged, reason) in cases.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=reason):
            read_rows(Source(path=str(tmp_path / name), format="image_csv"))
    with pytest.raises(DataError, match=r"none\.tar: no such file"):
        open_table(str(tmp_path / "none.tar"))
    empty = _tar(tmp_path / "empty.tar")
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(Source(path=str(empty), format="llava"))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(data))
    with pytest.raises(DataError, match=r"a compressed file.*`gunzip a\.tar\.gz`"):
        open_table(str(tmp_path / "a.tar.gz"))


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_pieces_are_read_alone_in_any_order(tmp_path: Path, layout: int) -> None:
    name = "é" * 120  # needs headers of its own
    files = [(f"{name}{i}.{kind}", f"{i}") for i in range(23) for kind in ("txt", "cls")]
    tar = _tar(tmp_path / "a.tar", *files, ("README", "x"), format=layout)
    table = open_table(str(tar))
    pieces = list(table.pieces(5))
    assert [(piece.first_row, piece.num_rows) for piece in pieces] == [(0, 5), (5, 5), (10, 5), (15, 5), (20, 3)]
    assert len({piece.fingerprint for piece in pieces}) == 5
    again = pickle.loads(pickle.dumps(table))
    rows = {row[0]: row[1] for piece in reversed(pieces) for row in again.read(pickle.loads(pickle.dumps(piece)))}
    assert [rows[i] for i in range(23)] == [{"txt": f"{i}", "cls": i, "id": f"{name}{i}"} for i in range(23)]
    assert isinstance(again, WebDatasetTable)


def test_pieces_with_much_text_are_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_vlm.data.sources.webdataset.PIECE_BYTES", 100)
    tar = _tar(tmp_path / "a.tar", *((f"{i}.{kind}", b"x" * 40) for i in range(5) for kind in ("txt", "jpg")))
    assert [piece.num_rows for piece in open_table(str(tar)).pieces()] == [2, 2, 1]


def test_max_rows(tmp_path: Path) -> None:
    tar = _tar(tmp_path / "a.tar", *((f"{i}.json", {"prompt": "x"}) for i in range(5)))
    assert len(read_rows(Source(path=str(tar), format="prompt", max_rows=3))[0]) == 3


def test_a_tar_that_changes_is_refused(tmp_path: Path) -> None:
    tar = _tar(tmp_path / "a.tar", ("1.txt", "x"))
    table = open_table(str(tar))
    (piece,) = table.pieces()
    _tar(tar, ("1.txt", "y" * 2000))
    with pytest.raises(DataError, match="changed while it was read"):
        table.read(piece)


def test_the_index_holds_positions(tmp_path: Path) -> None:
    tar = _tar(
        tmp_path / "a.tar",
        *((f"{i}.{k}", v) for i in range(3) for k, v in (("jpg", _jpeg(i)), ("json", {"conversations": TURNS}))),
    )
    folder = IndexFolder(str(tmp_path / "index"))
    source = Source(path=str(tar), format="llava")
    shards = build_rows(source, CheckLimits(10**6, "raise"), "chat", folder, Spread())
    (name,) = shards.names
    records = read_records(load_shard(folder, name), 0, 3)
    images = [record.images[0] for record in records]
    assert [read_inner(image) for image in images] == [_jpeg(i) for i in range(3)]  # type: ignore[arg-type]


def test_a_tar_is_still_a_folder_of_images(tmp_path: Path) -> None:
    tar = _tar(tmp_path / "a.tar", ("1.jpg", _jpeg(1)), ("1.json", {"conversations": TURNS}))
    assert read_inner(TarImages(str(tar)).find("1.jpg")) == _jpeg(1)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "1.jpg", "conversations": TURNS}))
    reader = SourceReader(Source(path=str(tmp_path / "rows.jsonl"), format="llava", image_root=str(tar)))
    (record,) = [row for piece in reader.pieces() for row in reader.read(piece)]
    assert read_image(record.images[0]) == _jpeg(1)  # type: ignore[union-attr]


def test_memory_is_small(tmp_path: Path) -> None:
    tar = _tar(tmp_path / "a.tar", *((f"{i:06}.cls", b"1") for i in range(4_000)))
    table = open_table(str(tar))
    tracemalloc.start()
    num_rows = sum(piece.num_rows for piece in table.pieces())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_rows == 4_000
    assert peak < 3 * 2**20 + 100 * 4_000


@pytest.mark.parametrize("path", ["", "shard-{000000..000002}.tar", "shard-*.tar"])
def test_shards(tmp_path: Path, path: str) -> None:
    for i in range(3):
        _tar(
            tmp_path / f"shard-{i:06}.tar",
            *((f"{i}{j}.{k}", v) for j in range(2) for k, v in (("jpg", _jpeg(i)), ("cls", "7"))),
        )
    source = Source(path=str(tmp_path / path), format="image_csv", columns={"label": "cls"})
    records, labels = read_rows(source)
    assert [record.id for record in records] == ["00", "01", "10", "11", "20", "21"]
    assert labels == ["label=7"]
    assert [read_image(r.images[0]) for r in records if isinstance(r, SftRecord)] == [_jpeg(i // 2) for i in range(6)]


def test_a_tar_beside_rows_has_their_images(tmp_path: Path) -> None:
    _tar(tmp_path / "images.tar", ("1.jpg", _jpeg(1)))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "1.jpg", "conversations": TURNS}))
    source = Source(path=str(tmp_path), format="llava", image_root=str(tmp_path / "images.tar"))
    (record,), _ = read_rows(source)
    assert read_image(record.images[0]) == _jpeg(1)  # type: ignore[union-attr]
