"""Data sets of the hub: the files of a split are fetched and read by the readers of their formats, and whatever stands
against that is one error with its fix. The hub is a server of this machine."""

import csv
import gzip
import io
import json
import logging
import os
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from ray_vlm.config.data import Data, Source
from ray_vlm.config.paths import absolute_paths, is_hub_data_set, resolve_paths
from ray_vlm.config.schema import JobConfig, Model
from ray_vlm.data.build import CheckLimits, build_rows
from ray_vlm.data.images import decode, read_image, read_size
from ray_vlm.data.parallel import Spread
from ray_vlm.data.records import BadRow, LocatedBytes, SftRecord
from ray_vlm.data.shards import IndexFolder
from ray_vlm.data.sources import hub as hub_module
from ray_vlm.data.sources.detect import settle_source
from ray_vlm.data.sources.files import find_files
from ray_vlm.data.sources.formats import SourceReader, read_rows, source_version
from ray_vlm.data.sources.hub import forget, hub_files, hub_root, pin_address
from ray_vlm.errors import DataError
from ray_vlm.storage import describe_file, read_bytes
from tests.support.hub_server import READER, STRANGER, Hub, use_hub, using_hub

FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
TURNS = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dog."}]
CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': cat
          '1': dog
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
---
# Pets
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with using_hub(monkeypatch, tmp_path) as served:
        yield served


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def _jpeg(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 24), (shade, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def _parquet(folder: Path, shades: range, features: datasets.Features | None = FEATURES) -> bytes:
    """Return a shard as `Dataset.push_to_hub` writes it."""
    rows = [{"image": {"bytes": _jpeg(i), "path": f"{i}.jpg"}, "label": i % 2} for i in shades]
    path = folder / "shard.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return path.read_bytes()


def _pets(folder: Path) -> dict[str, bytes | str]:
    """Return the files of a data set in shards, as `DatasetDict.push_to_hub` writes them."""
    return {
        "README.md": CARD,
        "data/train-00000-of-00002.parquet": _parquet(folder, range(3)),
        "data/train-00001-of-00002.parquet": _parquet(folder, range(3, 5)),
        "data/test-00000-of-00001.parquet": _parquet(folder, range(10, 12)),
    }


def _labels(source: Source) -> list[str]:
    return [record.truth["attributes"]["label"] for record in read_rows(source)[0] if isinstance(record, SftRecord)]


def _refusal(source: Source) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source)
    return str(caught.value)


def test_shards_are_fetched_for_the_split_alone_and_read_with_class_names(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit = hub.commit("me/pets", _pets(tmp_path))
    source = Source(path="me/pets", format="image_csv", split="test")
    with caplog.at_level(logging.INFO, "ray_vlm"):
        logging.getLogger("ray_vlm").propagate = True
        rows, labels = read_rows(source)
    assert labels == ["label=cat", "label=dog"]
    assert [len(row.images) for row in rows if not isinstance(row, BadRow)] == [1, 1]
    image = rows[0].images[0]  # type: ignore[union-attr]
    assert isinstance(image, LocatedBytes)
    assert image == _jpeg(10)
    assert image.location.address == str(
        tmp_path / f"home/hub/datasets--me--pets/snapshots/{commit}/data/test-00000-of-00001.parquet"
    )
    fetched = [request for request in hub.requests if request.startswith("GET") and ".parquet" in request]
    assert [request.rpartition("/")[2] for request in fetched] == ["test-00000-of-00001.parquet"]
    assert f"me/pets at commit {commit[:12]}: 1 file, 0.0 MB, split test" in caplog.text


def test_files_come_in_the_order_of_the_shards(hub: Hub, tmp_path: Path) -> None:
    hub.commit("me/pets", _pets(tmp_path))
    files = find_files(Source(path="me/pets", format="image_csv"))
    assert [Path(file).name for file in files] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]


def test_class_names_of_the_card_hold_for_files_without_them(hub: Hub, tmp_path: Path) -> None:
    plain = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    files: dict[str, bytes | str] = {"README.md": CARD, "data/train-0.parquet": _parquet(tmp_path, range(4), plain)}
    files["data/test-0.parquet"] = files["data/train-0.parquet"]
    hub.commit("me/plain", files)
    assert _labels(Source(path="me/plain", format="image_csv")) == ["cat", "dog", "cat", "dog"]


def test_configurations(hub: Hub) -> None:
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.jsonl\n" for name in ("en", "de")
    )
    row = {"prompt": "Was?", "answer": "x"}
    files = {f"{name}.jsonl": json.dumps(row | {"id": name}) for name in ("en", "de")}
    hub.commit("me/texts", {"README.md": f"{card}---\n", **files})
    rows, _ = read_rows(Source(path="me/texts", config="de", format="prompt"))
    assert [row.id for row in rows] == ["de"]
    assert _refusal(Source(path="me/texts", format="prompt")) == (
        "me/texts: it has several configurations. Set `config` to one of en, de."
    )
    assert _refusal(Source(path="me/texts", config="fr", format="prompt")) == (
        "me/texts: no configuration 'fr'. Set `config` to one of en, de."
    )


def test_a_split_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    hub.commit("me/pets", _pets(tmp_path))
    assert _refusal(Source(path="me/pets", split="validation", format="image_csv")) == (
        "me/pets: no split 'validation'. Set `split` to one of train, test."
    )


def test_a_revision_is_a_branch_or_a_commit(hub: Hub) -> None:
    first = hub.commit("me/texts", {"train.jsonl": json.dumps({"prompt": "old"})})
    hub.commit("me/texts", {"train.jsonl": json.dumps({"prompt": "new"})})
    hub.commit("me/texts", {"train.jsonl": json.dumps({"prompt": "other"})}, branch="refs/convert/parquet")

    def prompt(revision: str | None) -> str:
        rows, _ = read_rows(Source(path="me/texts", format="prompt", revision=revision))
        return rows[0].prompt[0][1]  # type: ignore[union-attr]

    assert [prompt(None), prompt(first), prompt("refs/convert/parquet")] == ["new", "old", "other"]
    assert _refusal(Source(path="me/texts", format="prompt", revision="v9")) == (
        f"me/texts: no revision 'v9' on {hub.address}. Set `revision` to a branch, a tag or a commit."
    )


def test_train_and_test_come_from_one_commit(hub: Hub) -> None:
    rows = {"train.jsonl": json.dumps({"prompt": "old"}), "test.jsonl": json.dumps({"prompt": "old"})}
    hub.commit("me/texts", rows)
    train = source_version(Source(path="me/texts", format="prompt"))
    hub.commit("me/texts", {name: text.replace("old", "new") for name, text in rows.items()})
    test = source_version(Source(path="me/texts", format="prompt", split="test"))
    assert train[0] == test[0]
    forget()
    assert source_version(Source(path="me/texts", format="prompt"))[0] != train[0]


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("", "it is private, and HF_TOKEN is not set"),
        (STRANGER, "the token in use may not read it"),
        ("hf_wrong", "does not accept the token"),
    ],
)
def test_private_data_sets(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, reason: str) -> None:
    hub.commit("me/secret", {"train.jsonl": json.dumps({"prompt": "x"})}, private=True)
    source = Source(path="me/secret", format="prompt")
    use_hub(monkeypatch, hub.address, tmp_path / "home", token)
    assert reason in _refusal(source)
    use_hub(monkeypatch, hub.address, tmp_path / "home", READER)
    assert len(read_rows(source)[0]) == 1


def test_gated_data_sets(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("me/gated", {"train.jsonl": json.dumps({"prompt": "x"})}, gated=True)
    source = Source(path="me/gated", format="prompt")
    for token in ("", STRANGER):
        use_hub(monkeypatch, hub.address, tmp_path / "home", token)
        assert f"me/gated: gated, and this account has no access. Ask for it on {hub.address}/datasets/me/gated" in (
            _refusal(source)
        )
    use_hub(monkeypatch, hub.address, tmp_path / "home", READER)
    assert len(read_rows(source)[0]) == 1


def test_a_name_that_is_neither_here_nor_there(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = JobConfig(model=Model(name="tiny"), data=Data(train=Source(path="dta/rows")))
    train = absolute_paths(resolve_paths(job, tmp_path / "job.yaml")).data.train
    assert train is not None
    assert train.path == "dta/rows"
    message = _refusal(train)
    assert message.startswith("dta/rows: there is no such file or folder here, and no data set of this name on ")
    assert f"on {hub.address}, or it is private, and HF_TOKEN" in message
    assert f"It was looked for in {tmp_path}" in message


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        use_hub(monkeypatch, address, tmp_path / "home")
        message = _refusal(Source(path="me/pets"))
    assert message.startswith("me/pets: there is no such file or folder here.")
    assert f"of the hub, but {address} cannot be reached (" in message
    assert "check the network, its proxy and HF_ENDPOINT." in message


def test_what_is_no_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me/here").mkdir(parents=True)
    assert is_hub_data_set("me/pets")
    assert is_hub_data_set("me/pets.v2")
    for path in (
        "me/here",
        "data/rows.json",
        "data/rows.CSV",
        "data/rows.jsonl.gz",
        "a/b/c",
        "rows",
        "/a/b",
        "s3://a/b",
    ):
        assert not is_hub_data_set(path), path


def test_a_script_is_not_run(hub: Hub, tmp_path: Path) -> None:
    hub.commit("me/code", {"code.py": f"open({str(tmp_path / 'ran')!r}, 'w')", "train.jsonl": "{}"})
    message = _refusal(Source(path="me/code", format="prompt"))
    assert "me/code: a data set with a script, code.py, and code of a data set is not run." in message
    assert "revision: refs/convert/parquet" in message
    assert not (tmp_path / "ran").exists()


def test_nothing_but_a_card(hub: Hub) -> None:
    hub.commit("me/empty", {"README.md": "# Soon"})
    assert "me/empty: no files with rows are in it" in _refusal(Source(path="me/empty"))


def test_a_folder_of_images(hub: Hub) -> None:
    files = {
        f"data/{split}/{name}/{i}.jpg": _jpeg(i) for split in ("train", "test") for name in ("a", "b") for i in (1, 2)
    }
    hub.commit("me/folder", files)
    (folder,) = hub_files(Source(path="me/folder", format="image_folder", split="test"))
    assert sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.jpg")) == [
        "a/1.jpg",
        "a/2.jpg",
        "b/1.jpg",
        "b/2.jpg",
    ]
    assert folder.endswith("data/test")
    assert Path(folder, "a/1.jpg").read_bytes() == _jpeg(1)
    assert not Path(folder, "../train").exists()


def test_a_folder_with_one_class(hub: Hub) -> None:
    hub.commit("me/folder", {f"train/cat/{i}.jpg": _jpeg(i) for i in range(3)})
    (folder,) = hub_files(Source(path="me/folder", format="image_folder"))
    assert os.listdir(folder) == ["cat"]


def test_images_with_metadata(hub: Hub) -> None:
    rows = [{"file_name": f"{i}.jpg", "label": "cat"} for i in range(2)]
    files = {f"train/{i}.jpg": _jpeg(i) for i in range(2)} | {"README.md": b"# Cats"}
    hub.commit("me/cats", files | {"train/metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()})
    records, labels = read_rows(
        Source(path="me/cats", format="image_csv", columns={"image": "file_name", "label": "label"})
    )
    assert labels == ["label=cat"]
    assert [read_image(record.images[0]) for record in records] == [_jpeg(0), _jpeg(1)]  # type: ignore[union-attr]


def test_rows_as_json_lines_beside_their_images(hub: Hub) -> None:
    rows = [{"image": f"images/{i}.jpg", "conversations": TURNS} for i in range(3)]
    files: dict[str, bytes | str] = {f"images/{i}.jpg": _jpeg(i) for i in range(3)}
    files |= {"llava_train.jsonl": "\n".join(map(json.dumps, rows)), "llava_test.jsonl": json.dumps(rows[0])}
    hub.commit("me/llava", files)
    records, _ = read_rows(Source(path="me/llava", format="llava"))
    assert [read_image(record.images[0]) for record in records] == [_jpeg(i) for i in range(3)]  # type: ignore[union-attr]
    assert len(read_rows(Source(path="me/llava", format="llava", split="test"))[0]) == 1


def test_rows_in_a_folder_and_images_in_another(hub: Hub) -> None:
    card = "---\nconfigs:\n- config_name: default\n  data_files: rows/train.json\n---\n"
    rows = [{"image": "images/1.jpg", "conversations": TURNS}]
    hub.commit("me/llava", {"README.md": card, "rows/train.json": json.dumps(rows), "images/1.jpg": _jpeg(1)})
    records, _ = read_rows(Source(path="me/llava", format="llava"))
    assert read_image(records[0].images[0]) == _jpeg(1)  # type: ignore[union-attr]


def test_rows_may_not_leave_the_data_set(hub: Hub) -> None:
    rows = [{"image": "../../../../../../secret.jpg", "conversations": TURNS}]
    hub.commit("me/evil", {"train.jsonl": json.dumps(rows[0]), "1.jpg": _jpeg(1)})
    (row,) = read_rows(Source(path="me/evil", format="llava"))[0]
    assert isinstance(row, BadRow)
    assert "lies outside image_root" in row.reason


@pytest.mark.parametrize("separator", [",", "\t"])
def test_csv(hub: Hub, separator: str) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows([["image", "label"], ["1.jpg", "1"], ["2.jpg", "cat"]])
    suffix = "csv" if separator == "," else "tsv"
    card = CARD.replace("data/train-*", f"train.{suffix}").replace("data/test-*", f"test.{suffix}")
    files = {f"{split}.{suffix}": text.getvalue() for split in ("train", "test")}
    hub.commit("me/csv", {"README.md": card, **files, "1.jpg": _jpeg(1), "2.jpg": _jpeg(2)})
    assert _labels(Source(path="me/csv", format="image_csv")) == ["dog", "cat"]


def test_a_csv_file_that_the_card_reads_otherwise_is_built(hub: Hub) -> None:
    card = '---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  sep: ";"\n---\n'
    hub.commit("me/csv", {"README.md": card, "train.csv": "prompt;answer\nWhat, and why?;x\n"})
    rows, _ = read_rows(Source(path="me/csv", format="prompt"))
    assert rows[0].prompt == (("user", "What, and why?"),)  # type: ignore[union-attr]


def test_images_of_two_splits_in_one_folder_are_built(hub: Hub, tmp_path: Path) -> None:
    """The folder would show the images of one split to the other."""
    files = {
        f"{name}/{split}_{i}.jpg": _jpeg(i) for name in ("cat", "dog") for split in ("train", "test") for i in (1, 2)
    }
    hub.commit("me/mixed", files)
    source = Source(path="me/mixed", format="image_csv", split="test")
    records, labels = read_rows(source)
    assert labels == ["label=cat", "label=dog"]
    assert sorted(read_image(record.images[0]) for record in records) == sorted([_jpeg(1), _jpeg(2)] * 2)  # type: ignore[union-attr]
    assert find_files(source)[0].startswith(str(tmp_path / "home/datasets"))


def test_images_in_an_archive(hub: Hub) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("cat/1.jpg", _jpeg(1))
    hub.commit("me/zip", {"train.zip": file.getvalue()})
    assert "me/zip: its images are in archives (train.zip), which are not read." in _refusal(
        Source(path="me/zip", format="image_csv")
    )


def test_all_files_of_a_data_set_for_formats_of_a_folder(hub: Hub) -> None:
    hub.commit(
        "me/yolo", {"data.yaml": "names: [a]", "train/images/1.jpg": _jpeg(1), "train/labels/1.txt": "0 .5 .5 1 1"}
    )
    (folder,) = hub_files(Source(path="me/yolo", format="yolo"))
    assert Path(folder, "train/labels/1.txt").read_text() == "0 .5 .5 1 1"
    assert Path(folder, "data.yaml").is_file()


def test_coco(hub: Hub) -> None:
    coco: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 32, "height": 24}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 10]}],
    }
    hub.commit("me/coco", {"train/_annotations.coco.json": json.dumps(coco), "train/1.jpg": _jpeg(1)})
    (record,), labels = read_rows(Source(path="me/coco"))
    assert labels == ["cat"]
    assert read_image(record.images[0]) == _jpeg(1)  # type: ignore[union-attr]


def test_the_cache_is_used_without_a_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("me/pets", _pets(tmp_path))
    source = Source(path="me/pets", format="image_csv", split="test")
    labels, version = _labels(source), source_version(source)
    use_hub(monkeypatch, hub.address, tmp_path / "home", offline=True)
    before = len(hub.requests)
    assert _labels(source) == labels
    assert source_version(source) == version
    assert "HF_HUB_OFFLINE is set, and split 'train' is not in" in _refusal(source.model_copy(update={"split": None}))
    Path(find_files(source)[0]).unlink()
    forget()
    assert "1 of its files, such as data/test-00000-of-00001.parquet, are not in" in _refusal(source)
    assert len(hub.requests) == before


def test_a_fetched_file_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.commit("me/pets", _pets(tmp_path))
    source = Source(path="me/pets", format="image_csv")
    find_files(source)
    forget()
    before = len(hub.requests)
    find_files(source)
    assert not [request for request in hub.requests[before:] if ".parquet" in request]


def test_a_full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("me/texts", {"train.jsonl": json.dumps({"prompt": "x"})})

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    message = _refusal(Source(path="me/texts", format="prompt"))
    assert "is full. Make room there, or set HF_HOME to another disk." in message


def test_the_index_follows_the_commit(hub: Hub, tmp_path: Path) -> None:
    """Rows that are the same in another commit get the paths of its images."""
    row = json.dumps({"image": "1.jpg", "conversations": TURNS})
    source = Source(path="me/llava", format="llava")
    folder = IndexFolder(str(tmp_path / "index"))
    limits = CheckLimits(10**6, "raise")
    hub.commit("me/llava", {"train.jsonl": row, "1.jpg": _jpeg(1)})
    old = build_rows(source, limits, "chat", folder, Spread())
    assert build_rows(source, limits, "chat", folder, Spread()).names == old.names
    hub.commit("me/llava", {"train.jsonl": row, "1.jpg": _jpeg(200)})
    forget()
    new = build_rows(source, limits, "chat", folder, Spread())
    assert new.names != old.names
    assert hub_root(source) in read_rows(source)[0][0].images[0]  # type: ignore[union-attr,operator]


def test_addresses_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    commit = hub.commit("me/pets", _pets(tmp_path))
    address = "hf://datasets/me/pets/data/test-00000-of-00001.parquet"
    assert pin_address(address) == f"hf://datasets/me/pets@{commit}/data/test-00000-of-00001.parquet"
    assert pin_address(address.replace("pets", "pets@main")) == pin_address(address)
    assert pin_address(pin_address(address)) == pin_address(address)
    assert pin_address("hf://datasets/me/pets") == f"hf://datasets/me/pets@{commit}"
    assert pin_address("hf://datasets/me/pets@main/") == f"hf://datasets/me/pets@{commit}"
    assert pin_address("s3://bucket/a.parquet") == "s3://bucket/a.parquet"
    source = Source(path=address, format="image_csv")
    assert _labels(source) == ["cat", "dog"]
    assert SourceReader(source).table.address == pin_address(address)
    assert describe_file(pin_address(address))[1] == len(read_bytes(pin_address(address)))
    other = _pets(tmp_path) | {"data/test-00000-of-00001.parquet": _parquet(tmp_path, range(20, 22))}
    newer = hub.commit("me/pets", other)
    assert describe_file(pin_address(address).replace(commit, newer))[2] != describe_file(pin_address(address))[2]


def test_an_address_of_another_branch(hub: Hub, tmp_path: Path) -> None:
    commit = hub.commit(
        "me/pets", {"default/train/0.parquet": _parquet(tmp_path, range(2))}, branch="refs/convert/parquet"
    )
    for revision in ("refs/convert/parquet", "refs%2Fconvert%2Fparquet"):
        address = f"hf://datasets/me/pets@{revision}/default/train/0.parquet"
        assert pin_address(address) == f"hf://datasets/me/pets@{commit}/default/train/0.parquet"
        assert _labels(Source(path=address, format="image_csv")) == ["cat", "dog"]


def test_the_variables_of_the_environment_are_honoured(hub: Hub, tmp_path: Path) -> None:
    """A new process reads HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE."""
    hub.commit("me/secret", {"train.jsonl": json.dumps({"prompt": "x"})}, private=True)
    program = (
        "from ray_vlm.config.data import Source\n"
        "from ray_vlm.data.sources.files import find_files\n"
        "print(*find_files(Source(path='me/secret', format='prompt')))"
    )
    variables = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "new"), "HF_TOKEN": READER}
    for offline in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=variables | {"HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split()[-1].startswith(str(tmp_path / "new/hub/datasets--me--secret"))
        assert Path(done.stdout.split()[-1]).is_file()


def test_a_list_holds_no_data_set_of_the_hub() -> None:
    source = Source(path=("me/pets", "me/cats"))
    assert not hub_module.is_hub(source)


def test_tars_are_webdatasets(hub: Hub) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in (("1.jpg", _jpeg(1)), ("1.json", json.dumps({"conversations": TURNS}).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    hub.commit("me/shards", {"train-000000.tar": file.getvalue()})
    (record,), _ = read_rows(Source(path="me/shards", format="llava"))
    assert read_image(record.images[0]) == _jpeg(1)  # type: ignore[union-attr]


def test_images_by_addresses_of_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.commit("me/llava", {"images/1.jpg": _jpeg(1)})
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": "images/1.jpg", "conversations": TURNS}))
    source = Source(path=str(rows), format="llava", image_root=f"hf://datasets/me/llava@{commit}")
    (record,), _ = read_rows(source)
    assert read_image(record.images[0]) == _jpeg(1)  # type: ignore[union-attr]
    for address in (f"{source.image_root}/none.jpg", f"{source.image_root}/images"):
        for read in (read_bytes, describe_file):
            with pytest.raises(FileNotFoundError):
                read(address)
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_rows(Source(path=f"hf://datasets/me/llava@{commit}/none.jsonl", format="llava"))
    with pytest.raises(DataError, match=r"me/none: there is no such file .* no data set of this name"):
        read_rows(Source(path="hf://datasets/me/none/rows.jsonl", format="llava"))


def test_an_address_without_a_network_is_an_error_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        use_hub(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path / "home")
        address = f"hf://datasets/me/pets@{'0' * 40}/rows.jsonl"
        for read in (read_bytes, describe_file):
            with pytest.raises(OSError, match="the hub cannot be reached"):
                read(address)
        with pytest.raises(DataError, match="the hub cannot be reached"):
            read_rows(Source(path=address, format="llava"))


def test_all_shards_are_read(hub: Hub, tmp_path: Path) -> None:
    hub.commit("me/pets", _pets(tmp_path))
    assert _labels(Source(path="me/pets", format="image_csv")) == ["cat", "dog", "cat", "dog", "cat"]


@pytest.mark.parametrize("format", ["image_folder", "auto"])
def test_rows_of_a_folder_of_images(hub: Hub, tmp_path: Path, format: Any) -> None:
    files = {f"{split}/{name}/{i}.jpg": _jpeg(i) for split in ("train", "test") for name in ("a", "b") for i in (1, 2)}
    hub.commit("me/folder", files)
    source = Source(path="me/folder", format=format, split="test")
    records, labels = read_rows(source)
    assert labels == ["label=a", "label=b"]
    assert [read_image(record.images[0]) for record in records] == [_jpeg(1), _jpeg(2)] * 2  # type: ignore[union-attr]
    settled = settle_source(source)
    shards = build_rows(
        settled, CheckLimits(10**6, "raise"), "classification", IndexFolder(str(tmp_path / "i")), Spread()
    )
    assert sum(shards.counts) == 4


def test_yolo(hub: Hub) -> None:
    files: dict[str, bytes | str] = {"data.yaml": "names: [a]\ntrain: train/images\nval: valid/images\n"}
    for folder in ("train", "valid"):
        files |= {f"{folder}/images/1.jpg": _jpeg(1), f"{folder}/labels/1.txt": "0 .5 .5 1 1"}
    hub.commit("me/yolo", files)
    for format in ("yolo", "auto"):
        for split in (None, "validation"):
            (record,), labels = read_rows(Source(path="me/yolo", format=format, split=split))
            assert labels == ["a"]
            assert read_image(record.images[0]) == _jpeg(1)  # type: ignore[union-attr]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "json.gz", "csv.gz"])
def test_compressed_rows(hub: Hub, suffix: str) -> None:
    text = "prompt\nWhy?\n" if suffix.startswith("csv") else json.dumps({"prompt": "Why?"})
    text = f"[{text}]" if suffix.startswith("json.") else text
    hub.commit("me/texts", {f"train.{suffix}": gzip.compress(text.encode())})
    (record,), _ = read_rows(Source(path="me/texts", format="prompt"))
    assert record.prompt == (("user", "Why?"),)  # type: ignore[union-attr]


def test_addresses_with_wildcards(hub: Hub, tmp_path: Path) -> None:
    commit = hub.commit("me/pets", _pets(tmp_path))
    source = Source(path="hf://datasets/me/pets/data/train-*.parquet", format="image_csv")
    assert _labels(source) == ["cat", "dog", "cat", "dog", "cat"]
    assert [file.partition("@")[2].partition("/")[0] for file in find_files(source)] == [commit] * 2
    folder = Source(path="hf://datasets/me/pets/data", format="image_csv", split="test")
    assert _labels(folder) == ["cat", "dog"]


def test_a_file_that_another_node_has_in_its_cache(hub: Hub) -> None:
    """Nodes of a cluster read the paths of the driver's cache."""
    row = json.dumps({"image": "1.jpg", "conversations": TURNS})
    hub.commit("me/llava", {"train.jsonl": row, "1.jpg": _jpeg(1)})
    (record,), _ = read_rows(Source(path="me/llava", format="llava"))
    (image,) = record.images  # type: ignore[union-attr]
    Path(str(image)).unlink()
    for read in (read_image, decode):
        with pytest.raises(FileNotFoundError, match="set HF_HOME to a folder that all nodes see"):
            read(image)
    with pytest.raises(ValueError, match="image file is missing; it is in the hub's cache"):
        read_size(str(image), 10**6)


def test_a_cache_that_another_program_has_filled(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a cluster without a network, to which the cache was copied."""
    import huggingface_hub

    hub.commit("me/pets", _pets(tmp_path))
    source = Source(path="me/pets", format="image_csv")
    snapshot = huggingface_hub.snapshot_download(
        "me/pets", repo_type="dataset", endpoint=hub.address, cache_dir=tmp_path / "home/hub"
    )
    use_hub(monkeypatch, hub.address, tmp_path / "home", offline=True)
    assert [Path(file).stem for file in find_files(source)] == [f"train-0000{i}-of-00002" for i in range(2)]
    assert _labels(source.model_copy(update={"split": "test"})) == ["cat", "dog"]
    assert "no split 'val'" in _refusal(source.model_copy(update={"split": "val"}))
    Path(snapshot, "data/train-00000-of-00002.parquet").unlink()
    forget()
    assert "has not all shards like data/train-00001-of-00002.parquet" in _refusal(source)
