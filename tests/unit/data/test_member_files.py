"""Rows that are files: one annotated image in the files of every tool, through the index."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.data import Source
from ray_vlm.data.build import CheckLimits, build_rows, prune
from ray_vlm.data.parallel import Spread
from ray_vlm.data.records import BadRow
from ray_vlm.data.shards import IndexFolder, load_shard, read_records
from ray_vlm.data.sources.formats import read_rows
from ray_vlm.data.sources.member_files import Member, MemberFiles
from ray_vlm.errors import DataError
from tests.support.annotations import make_image, objects, write

FORMATS = ("yolo", "voc", "labelme", "cvat", "label_studio", "hf_objects")


def _annotate(folder: Path, format: str, labels: list[str]) -> Path:
    """Write two images of 64x48, the first with boxes 16, 12, 32, 36 of `labels`; return the path of the rows."""
    names = ("a.png", "b.png")
    for name in names:
        make_image(folder / name)
    first = [labels, []]
    if format == "yolo":
        for name, its in zip(names, first, strict=True):
            lines = "".join(f"{sorted({*labels, 'cat'}).index(label)} 0.375 0.5 0.25 0.5\n" for label in its)
            write(folder / f"{name[0]}.txt", lines)
        write(folder / "classes.txt", "\n".join(sorted({*labels, "cat"})))
    elif format == "voc":
        box = "<bndbox><xmin>16</xmin><ymin>12</ymin><xmax>32</xmax><ymax>36</ymax></bndbox>"
        for name, its in zip(names, first, strict=True):
            shapes = "".join(f"<object><name>{label}</name>{box}</object>" for label in its)
            write(folder / f"{name[0]}.xml", f"<annotation><filename>{name}</filename>{shapes}</annotation>")
    elif format == "labelme":
        for name, its in zip(names, first, strict=True):
            shapes = [{"label": x, "shape_type": "rectangle", "points": [[16, 12], [32, 36]]} for x in its]
            write(folder / f"{name[0]}.json", json.dumps({"imagePath": name, "shapes": shapes}))
    elif format == "cvat":
        box = '<box label="{}" xtl="16" ytl="12" xbr="32" ybr="36"/>'
        images = [
            f'<image name="{n}">{"".join(map(box.format, its))}</image>' for n, its in zip(names, first, strict=True)
        ]
        write(folder / "annotations.xml", f"<annotations>{''.join(images)}</annotations>")
    else:
        return write(
            folder / "rows.json", json.dumps([_row(format, n, its) for n, its in zip(names, first, strict=True)])
        )
    return folder


def _row(format: str, name: str, labels: list[str]) -> dict[str, Any]:
    if format == "hf_objects":
        return {"id": name[0], "image": name, "objects": {"bbox": [[16, 12, 16, 24]] * len(labels), "category": labels}}
    value = {"x": 25, "y": 25, "width": 25, "height": 50}
    result = [{"type": "rectanglelabels", "value": {**value, "rectanglelabels": [label]}} for label in labels]
    return {"data": {"image": name}, "annotations": [{"result": result}]}


@pytest.mark.parametrize("format", FORMATS)
def test_every_tool_gives_the_same_rows_and_a_change_makes_them_anew(tmp_path: Path, format: Any) -> None:
    data, folder = tmp_path / "data", IndexFolder(str(tmp_path / "index"))

    def build(labels: list[str]) -> tuple[str, ...]:
        source = Source(path=str(_annotate(data, format, labels)), format=format)
        shards = build_rows(source, CheckLimits(10**6, "raise"), "detection", folder, Spread())
        records = [row for name in shards.names for row in read_records(load_shard(folder, name), 0, 2)]
        assert [row.id for row in records] == ["a", "b"]
        assert objects(records[0]) == [(label, (16.0, 12.0, 32.0, 36.0)) for label in labels]
        assert objects(records[1]) == []
        assert records[0].images == (str(data / "a.png"),)
        assert set(shards.labels) >= set(labels)
        return shards.names

    before = build(["dog"])
    after = build(["horse", "cat"])
    assert set(before).isdisjoint(after)
    assert prune(folder)[0] >= 2  # the shard and the listing of before
    assert build(["horse", "cat"]) != before


def test_files_that_are_too_large_or_gone_make_bad_rows(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"sub/{name}.txt", name * 100)
    members = [Member("", str(tmp_path / f"sub/{name}.txt"), 100) for name in ("a", "gone")]
    table = MemberFiles(str(tmp_path), [*members, Member("x.png", "")], lambda m, data: {"data": data}, max_bytes=99)
    rows = [row for piece in table.pieces(2) for row in table.read(piece)]
    assert [row.id for row in rows if isinstance(row, BadRow)] == ["sub/a", "sub/gone"]
    assert "the file has 100 bytes, above 99" in rows[0].reason  # type: ignore[union-attr]
    assert "gone.txt: no such file; add it" in rows[1].reason  # type: ignore[union-attr]
    assert rows[2] == (2, {"data": None})


@pytest.mark.parametrize("format", ["yolo", "voc", "labelme", "cvat"])
def test_several_paths_are_refused(tmp_path: Path, format: Any) -> None:
    paths = tuple(str(_annotate(tmp_path / name, format, ["dog"])) for name in "ab")
    source = Source(path=paths, format=format)
    folder = IndexFolder(str(tmp_path / "index"))
    with pytest.raises(DataError, match=r"entry of\s+data\.mix"):
        build_rows(source, CheckLimits(10**6, "raise"), "detection", folder, Spread())


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "hf_objects"])
def test_broken_files_make_bad_rows_or_one_error(tmp_path: Path, format: Any) -> None:
    """Bytes are changed, cut out and doubled: rows are good or bad, or the file is refused; nothing else is raised."""
    path = _annotate(tmp_path, format, ["dog", "cat"])
    files = sorted(file for file in tmp_path.iterdir() if file.suffix != ".png")
    good = {file: file.read_bytes() for file in files}
    source = Source(path=str(path), format=format)
    pick = random.Random(0)
    outcomes: Counter[str] = Counter()
    for _ in range(300):
        file = pick.choice(files)
        data = bytearray(good[file])
        for _ in range(pick.choice((1, 1, 2, 8))):
            start = pick.randrange(len(data) + 1)
            end = min(len(data), start + pick.choice((0, 1, 1, 4, 40)))
            new = pick.choice(
                (b"", b"\0", b"\xff", b"<", b'"', b"-", b"9" * 9, b"[", bytes(data[start:end]) * 2, b"nan")
            )
            data[start:end] = new
        file.write_bytes(bytes(data))
        try:
            rows = read_rows(source)[0]
            outcomes.update("bad" if isinstance(row, BadRow) else "good" for row in rows)
            assert all(row.reason for row in rows if isinstance(row, BadRow))
        except DataError:
            outcomes["refused"] += 1
        file.write_bytes(good[file])
    assert outcomes["good"] > 20
    assert outcomes["bad"] + outcomes["refused"] > 100


NONSENSE: list[Any] = [None, True, 0, -1, 1e300, float("nan"), "", "x", "\0", [], [[]], {}, [None], {"x": 1}, [[1, 2]]]


@pytest.mark.parametrize("format", ["labelme", "label_studio"])
def test_nonsense_in_json_makes_bad_rows(tmp_path: Path, format: Any) -> None:
    path = _annotate(tmp_path, format, ["dog"])
    file = path if path.is_file() else path / "a.json"
    source = Source(path=str(path), format=format)
    pick, bad = random.Random(0), 0
    for _ in range(300):
        content = json.loads(file.read_bytes())
        kept = json.dumps(content)
        node: Any = content
        while isinstance(node, dict | list) and node:
            parent, key = node, pick.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node = parent[key]
            if pick.random() < 0.3:
                break
        parent[key] = pick.choice(NONSENSE)
        file.write_text(json.dumps(content))
        bad += sum(isinstance(row, BadRow) for row in read_rows(source)[0])
        file.write_text(kept)
    assert 100 < bad < 500
