"""Arrow files give the same rows as Parquet, and images in them are read again from their position in the file."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import ipc, parquet

from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import Model
from ray_vlm.config.task import ClassificationTask
from ray_vlm.data.images import decode, read_image
from ray_vlm.data.inner_images import read_inner
from ray_vlm.data.parts import build_index
from ray_vlm.data.records import BadRow, ImageRange, LocatedBytes
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.sources import arrow as arrow_module
from ray_vlm.data.sources.arrow import ArrowTable
from ray_vlm.data.sources.formats import read_rows
from ray_vlm.data.sources.tables import open_table
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import DataError
from ray_vlm.storage import describe_file

ROWS = [
    {
        "id": str(i),
        "image": {"bytes": bytes([i]) * (300 + i), "path": f"{i}.jpg"} if i % 7 else {"bytes": None, "path": "a.jpg"},
        "images": [{"bytes": bytes([i, j]) * 50, "path": None} for j in range(i % 3)] if i % 5 else None,
        "raw": b"x" * i if i % 4 else None,
        "raws": [b"y" * j for j in range(i % 4)],
        "text": "é" * i,
        "numbers": [[1, 2], [i]],
    }
    for i in range(40)
]


def _table(rows: list[dict[str, Any]] = ROWS) -> pa.Table:
    table = pa.Table.from_pylist(rows)
    kinds = pa.array([f"kind {i // 9}" for i in range(len(rows))]).dictionary_encode()
    pairs = pa.array([[b"a" * i, b"b" * i] for i in range(len(rows))], pa.list_(pa.large_binary(), 2))
    return table.append_column("kind", kinds).append_column("pair", pairs)


def _write(path: Path, table: pa.Table, rows: int = 13, kind: str = "stream", **options: Any) -> str:
    make = ipc.new_stream if kind == "stream" else ipc.new_file
    with make(str(path), table.schema, options=ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return str(path)


def _read(address: str, rows: int = 2048) -> list[Any]:
    """Read the pieces from the last to the first, each by a reader of its own."""
    table = open_table(address)
    data = pickle.dumps(table)
    pieces = list(table.pieces(rows))
    assert [piece.num_rows for piece in pieces[:-1]] == [min(rows, piece.num_rows) for piece in pieces[:-1]]
    read = [pickle.loads(data).read(piece) for piece in reversed(pieces)]
    return [row for part in reversed(read) for row in part]


def _located(value: object) -> Iterator[LocatedBytes]:
    if isinstance(value, LocatedBytes):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _located(part)
    elif isinstance(value, list):
        for part in value:
            yield from _located(part)


@pytest.mark.parametrize("kind", ["stream", "file"])
@pytest.mark.parametrize("batch", [1, 13, 40])
@pytest.mark.parametrize("rows", [1, 5, 2048])
@pytest.mark.parametrize("cut", [True, False])
def test_rows_and_positions(
    tmp_path: Path, kind: str, batch: int, rows: int, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrow_module, "_CUT_BYTES", 0 if cut else 2**40)
    address = _write(tmp_path / "rows.arrow", _table(), batch, kind)
    read = _read(address, rows)
    assert [number for number, _ in read] == list(range(40))
    assert [cells for _, cells in read] == _table().to_pylist()
    located = list(_located([cells for _, cells in read]))
    values = [v for row in _table().to_pylist() for v in _bytes(row)]
    assert sorted(located) == sorted(value for value in values if value)
    data = Path(address).read_bytes()
    for value in located:
        image = value.location
        assert isinstance(image, ImageRange)
        assert (image.address, image.version) == (address, describe_file(address)[1:])
        assert data[image.start : image.start + image.length] == value == read_inner(image)


def _bytes(value: object) -> Iterator[bytes]:
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _bytes(part)


def test_a_piece_of_a_large_batch_reads_its_own_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": bytes([i]) * 100_000, "label": f"l{i}"} for i in range(50)]
    address = _write(tmp_path / "rows.arrow", pa.Table.from_pylist(rows), 50)
    sizes: list[int] = []
    into, at = arrow_module._read_into, arrow_module._read_at

    def read_into(file: Any, position: int, target: memoryview) -> None:
        sizes.append(len(target))
        into(file, position, target)

    def read_at(file: Any, position: int, size: int) -> bytes:
        sizes.append(size)
        return at(file, position, size)

    monkeypatch.setattr(arrow_module, "_read_into", read_into)
    monkeypatch.setattr(arrow_module, "_read_at", read_at)
    table = open_table(address)
    assert sum(sizes) < 20_000
    pieces = list(table.pieces(10))
    sizes.clear()
    read = table.read(pieces[3])
    assert [cells for _, cells in read] == rows[30:40]  # type: ignore[misc]
    assert 1_000_000 < sum(sizes) < 1_020_000


def test_large_rows_make_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_vlm.data.sources.columns.PIECE_BYTES", 1000)
    table = pa.Table.from_pylist([{"image": b"x" * 100} for _ in range(40)])
    pieces = list(open_table(_write(tmp_path / "rows.arrow", table, 20)).pieces())
    assert sum(piece.num_rows for piece in pieces) == 40
    assert 5 < max(piece.num_rows for piece in pieces) <= 10
    assert len({piece.fingerprint for piece in pieces}) == len(pieces)


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_compressed_files_give_bytes_without_position(tmp_path: Path, codec: str) -> None:
    address = _write(tmp_path / "rows.arrow", _table(), kind="file", compression=codec)
    read = _read(address, 5)
    assert "is compressed, so images inside it are copied into the index" in (
        ArrowTable(address).describe_copies() or ""
    )
    assert ArrowTable(_write(tmp_path / "plain.arrow", _table())).describe_copies() is None
    assert [cells for _, cells in read] == _table().to_pylist()
    assert not list(_located([cells for _, cells in read]))


def test_feather(tmp_path: Path) -> None:
    from pyarrow import feather

    feather.write_feather(_table(), str(tmp_path / "a.feather"), compression="uncompressed")
    read = _read(str(tmp_path / "a.feather"))
    assert [cells for _, cells in read] == _table().to_pylist()
    assert all(read_inner(value.location) == value for value in _located([cells for _, cells in read]))
    (tmp_path / "b.feather").write_bytes(b"FEA1" + bytes(100))
    with pytest.raises(DataError, match=r"b\.feather: Feather of version 1\. Write it with version=2\."):
        open_table(str(tmp_path / "b.feather"))


@pytest.mark.parametrize("deltas", [True, False])
def test_dictionaries_that_grow_or_are_replaced(tmp_path: Path, deltas: bool) -> None:
    parts = [["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]]
    if not deltas:
        parts = [["a", "b"], ["x"], ["y", "z"]]
    kind = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema([("kind", kind), ("image", pa.binary())])
    address = str(tmp_path / "rows.arrow")
    options = ipc.IpcWriteOptions(emit_dictionary_deltas=deltas)
    with ipc.new_stream(address, schema, options=options) as writer:
        for words in parts:
            column = pa.DictionaryArray.from_arrays(pa.array(range(len(words)), pa.int32()), pa.array(words))
            writer.write_batch(pa.record_batch([column, pa.array([b"i"] * len(words))], schema=schema))
    read = _read(address, 1)
    assert [cells["kind"] for _, cells in read] == [word for words in parts for word in words]


def test_other_layouts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_module, "_CUT_BYTES", 0)
    columns = {
        "view": pa.array(["a long text that is not inside the view" * 3, "b"] * 4, pa.string_view()),
        "bytes": pa.array([b"a long value that is not inside the view" * 3, b"b"] * 4, pa.binary_view()),
        "fixed": pa.array([b"abc", b"def"] * 4, pa.binary(3)),
        "large": pa.array([["x"], None] * 4, pa.large_list(pa.large_string())),
        "map": pa.array([[("k", "v")], []] * 4, pa.map_(pa.string(), pa.string())),
        "null": pa.nulls(8),
        "id": pa.array([bytes(16), None] * 4, pa.uuid()),
    }
    table = pa.table(columns)
    read = _read(_write(tmp_path / "rows.arrow", table, 8), 3)
    assert [cells for _, cells in read] == table.to_pylist()
    assert [read_inner(value.location) for value in _located([cells for _, cells in read])] == [b"abc", b"def"] * 4


def test_files_of_datasets(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["dog", "cat"]), "id": Value("string")})
    photos = [Image.fromarray(np.full((20, 30, 3), 40 * i, np.uint8)) for i in range(5)]
    rows = {"image": photos, "label": [i % 2 for i in range(5)], "id": list("abcde")}
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    (file,) = (tmp_path / "set").glob("*.arrow")
    records, labels = read_rows(Source(path=str(file), format="image_csv", columns={"label": "label"}))
    assert labels == ["label=cat", "label=dog"]
    assert [record.truth["attributes"]["label"] for record in records] == ["dog", "cat", "dog", "cat", "dog"]  # type: ignore[union-attr]
    for record, photo in zip(records, photos, strict=True):
        (image,) = record.images  # type: ignore[union-attr]
        assert isinstance(image, LocatedBytes)
        assert np.array_equal(decode(read_inner(image.location)), np.asarray(photo))


def test_a_file_in_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr(arrow_module, "_CUT_BYTES", 0)
    data = Path(_write(tmp_path / "rows.arrow", _table(), 40)).read_bytes()
    fsspec.filesystem("memory").pipe("/arrow/rows.arrow", data)
    read = _read("memory://arrow/rows.arrow", 7)
    assert [cells for _, cells in read] == _table().to_pylist()
    for value in _located([cells for _, cells in read]):
        assert isinstance(value.location, ImageRange)
        assert data[value.location.start :][: value.location.length] == value


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, kind: str) -> None:
    whole = Path(_write(tmp_path / "rows.arrow", _table(), kind=kind)).read_bytes()
    for size in (*range(1, 40), *range(40, len(whole), 97), len(whole) - 8, len(whole) - 1):
        (tmp_path / "part.arrow").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"part\.arrow: (the file is not complete|not an Arrow file).*(Write|Give)"):
            open_table(str(tmp_path / "part.arrow"))


def test_the_end_mark_of_a_stream_must_be_there(tmp_path: Path) -> None:
    whole = Path(_write(tmp_path / "rows.arrow", _table())).read_bytes()
    (tmp_path / "part.arrow").write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"not complete \(it has no end mark\)\. Write or fetch it again\."):
        open_table(str(tmp_path / "part.arrow"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"PAR1 but no Parquet either", "not an Arrow file"),
        (b"\x10\x00\x00\x00" + b"\xff" * 60, "damaged, no message of an Arrow file is at byte 0"),
        (b"", "not complete"),
        (b"ARROW1\0\0" + b"x" * 40 + b"ARROW1", "its footer is missing"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "rows.arrow").write_bytes(data)
    with pytest.raises(DataError, match=rf"rows\.arrow: .*{words}"):
        open_table(str(tmp_path / "rows.arrow"))


def test_bytes_that_are_turned_over_are_an_error_or_other_rows(tmp_path: Path) -> None:
    """No damage ends the process, or raises another error than `DataError`."""
    whole = Path(_write(tmp_path / "rows.arrow", _table(), 20)).read_bytes()
    rng = np.random.default_rng(0)
    errors = 0
    for _ in range(300):
        data = bytearray(whole)
        start = rng.integers(0, len(whole) - 8)
        data[start : start + 8] = rng.bytes(8)
        (tmp_path / "bad.arrow").write_bytes(data)
        try:
            _read(str(tmp_path / "bad.arrow"))
        except DataError as error:
            errors += 1
            assert "bad.arrow: " in str(error)  # noqa: PT017
    assert errors > 20


def test_a_file_without_rows_and_one_with_a_name_twice(tmp_path: Path) -> None:
    address = _write(tmp_path / "rows.arrow", _table().slice(0, 0))
    with pytest.raises(DataError, match=r"holds no rows"):
        read_rows(Source(path=address, format="image_csv"))
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["image", "image"])
    with pytest.raises(DataError, match=r"a column name is there twice \(image, image\)\. Give each one name\."):
        open_table(_write(tmp_path / "twice.arrow", twice))


def test_a_file_that_changes_is_not_read(tmp_path: Path) -> None:
    table = open_table(_write(tmp_path / "rows.arrow", _table()))
    (piece,) = table.pieces()
    _write(tmp_path / "rows.arrow", _table().slice(0, 30))
    with pytest.raises(DataError, match=r"changed while it was read\. Start again"):
        table.read(piece)
    (again,) = open_table(str(tmp_path / "rows.arrow")).pieces()
    assert again.fingerprint != piece.fingerprint


def test_a_text_that_is_not_utf8_makes_its_row_bad(tmp_path: Path) -> None:
    raw = pa.array([b"dog", b"\xff\xfe", b"cat"]).cast(pa.binary()).view(pa.string())
    read = _read(_write(tmp_path / "rows.arrow", pa.table({"image": ["a.jpg"] * 3, "label": raw})))
    assert [isinstance(row, BadRow) for row in read] == [False, True, False]
    assert "row 1 holds a text that is not UTF-8" in read[1].reason


def _photos(folder: Path, count: int = 24) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(folder / f"{i}.png")
    return [{"id": str(i), "image": f"{i}.png", "label": "dog" if i % 2 else "cat"} for i in range(count)]


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_the_index_reads_the_same_pixels_as_from_files(
    tmp_path: Path, tiny_models: dict[str, str], compression: str | None
) -> None:
    rows = _photos(tmp_path)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    inside = [row | {"image": {"bytes": (tmp_path / row["image"]).read_bytes(), "path": row["image"]}} for row in rows]
    address = _write(tmp_path / "rows.arrow", pa.Table.from_pylist(inside), 10, compression=compression)
    labels = ("label=cat", "label=dog")
    spec = SampleSpec(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), ClassificationTask(), labels)
    builder = load_sample_builder(spec)

    def index(path: str, folder: str) -> Any:
        return build_index(Source(path=path, format="image_csv"), Data(), builder, str(tmp_path / folder))

    files, arrow = index(str(tmp_path / "rows.parquet"), "a"), index(address, "b")
    assert len(arrow) == len(files) == len(rows)
    for one, other in zip(files.records, arrow.records, strict=True):
        assert (one.id, one.sizes, one.truth) == (other.id, other.sizes, other.truth)
        assert read_image(other.images[0]) == Path(one.images[0]).read_bytes()
        assert isinstance(other.images[0], bytes if compression else ImageRange)
    size = sum(path.stat().st_size for path in (tmp_path / "b").rglob("*") if path.is_file())
    assert (size > 144_000) if compression else (size < 50_000)  # the images have 144,000 bytes
