"""Images inside a row, as data URIs."""

import base64
import csv
import json
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.data import Source
from ray_vlm.data.images import read_size
from ray_vlm.data.measure import measure_row
from ray_vlm.data.records import BadRow
from ray_vlm.data.shards import IndexedRow, IndexFolder, load_shard, pack_rows, read_record
from ray_vlm.data.sources.data_uris import LARGEST_URI, read_data_uri
from ray_vlm.data.sources.formats import read_rows
from ray_vlm.data.suspicions import summarise

PNG = base64.b64decode(  # one red pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
BODY = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{BODY}"


@pytest.mark.parametrize(
    "uri",
    [
        URI,
        f"  {URI}\n",
        f"DATA:Image/PNG;Base64,{BODY}",
        f"data:image/png;charset=utf-8;name=a.png;base64,{BODY}",
        f"data:image/png;base64,{BODY[:40]}\r\n{BODY[40:]}",
    ],
)
def test_spellings(uri: str) -> None:
    assert read_data_uri(uri) == PNG


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        (f"data:{BODY}", "without a type and a comma"),
        (f"data:;base64,{BODY}", "type 'text/plain', which is no image"),
        (f"data:,{BODY}", "type 'text/plain', which is no image"),
        (f"data:application/pdf;base64,{BODY}", "'application/pdf', which is no image"),
        (f"data:image/png,{BODY}", "is not base64"),
        (f"data:image/png;base64,{BODY[:-3]}", "is not base64"),
        (f"data:image/png;base64,{BODY[:10]}*{BODY[10:]}", "is not base64"),
        (f"data:image/png;base64,{BODY.replace('+', '-').replace('/', '_')}", "is not base64"),
        ("data:image/png;base64,ä", "is not base64"),
        ("data:image/png;base64,", "without data"),
        ("data:image/png;base64," + "A" * LARGEST_URI, "above"),
        ("data:image/png;" + "x" * 5000, "without a type and a comma"),
    ],
)
def test_faults(uri: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_data_uri(uri)


ANSWER = {"role": "assistant", "content": "A dog."}
TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]
ROWS: dict[str, dict[str, Any]] = {
    "llava": {"image": URI, "conversations": TURNS},
    "messages": {"images": [URI], "messages": [{"role": "user", "content": "What?"}, ANSWER]},
    "query_response": {"images": [URI], "query": "What?", "response": "A dog."},
    "alpaca": {"image": URI, "instruction": "What?", "output": "A dog."},
    "image_csv": {"image": URI, "label": "dog"},
    "objects": {"images": [URI], "objects": {"ref": ["dog"], "bbox": [[0, 0, 1, 1]]}},
    "preference": {"image": URI, "prompt": "What?", "chosen": "A dog.", "rejected": "A cat."},
    "prompt": {"images": URI, "prompt": "What?", "solution": "dog"},
    "rec": {"image": URI, "problem": "Where?", "solution": [0, 0, 1, 1]},
    "openai": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URI}}]}, ANSWER],
    },
}


@pytest.mark.parametrize("format", ROWS)
def test_every_format_reads_them(tmp_path: Path, format: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[format]))
    ((record,), _) = read_rows(Source(path=str(tmp_path / "rows.jsonl"), format=format))  # type: ignore[arg-type]
    assert record.images == (PNG,)
    assert read_size(record.images[0], 100) == (1, 1)


def test_a_list_of_them_in_csv(tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        rows = [["query", "response", "images"], ["<image><image>?", "A dog.", json.dumps([URI, URI])]]
        csv.writer(file).writerows(rows)
    ((record,), _) = read_rows(Source(path=str(tmp_path / "rows.csv"), format="query_response"))
    assert record.images == (PNG, PNG)


def test_the_index_holds_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS["openai"]))
    source = Source(path=str(tmp_path / "rows.jsonl"), format="openai")
    (read,), labels = read_rows(source)
    checked = measure_row(read, 100)
    assert not isinstance(checked, BadRow)
    folder = IndexFolder(str(tmp_path / "index"))
    folder.write(
        "rows/a.arrow", pack_rows([IndexedRow(read, checked, ())], summarise(source, [(read, checked)], labels))
    )
    assert read_record(load_shard(folder, "rows/a.arrow"), 0) == checked


def test_a_bad_one_makes_its_row_bad(tmp_path: Path) -> None:
    row = ROWS["llava"] | {"image": "data:image/png;base64,!"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    ((bad,), _) = read_rows(Source(path=str(tmp_path / "rows.jsonl"), format="llava"))
    assert isinstance(bad, BadRow)
    assert "not base64" in bad.reason


def test_a_file_name_of_coco_is_none(tmp_path: Path) -> None:
    data = {"images": [{"id": 1, "file_name": URI}], "annotations": [], "categories": [{"id": 1, "name": "dog"}]}
    (tmp_path / "rows.json").write_text(json.dumps(data))
    ((bad,), _) = read_rows(Source(path=str(tmp_path / "rows.json"), format="coco"))
    assert isinstance(bad, BadRow)
    assert "data: URI in place of a name" in bad.reason
