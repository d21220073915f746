"""Addresses, and the same files in a folder, in an object store and on a file system of fsspec."""

import os
from pathlib import Path

import pytest

from ray_vlm.runs.checkpoints import MANIFEST, checkpoint_name, commit, open_newest, replace_folder, write_part
from ray_vlm.runs.manifest import check_free, claim_run, find_run
from ray_vlm.storage import (
    Store,
    describe_file,
    describe_files,
    full_address,
    is_remote,
    join,
    kind_of,
    list_folder,
    open_file,
    read_bytes,
    replacing,
    split_address,
)


@pytest.fixture(params=["folder", "s3", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return Store(tmp_path / "run")
    if request.param == "memory":
        return Store(f"memory://runs/{tmp_path.name}")
    return Store(join(request.getfixturevalue("bucket"), tmp_path.name))


def test_files_by_name(store: Store) -> None:
    assert store.names() == []
    assert store.read("a.txt") is None
    store.write("a.txt", b"one")
    store.write("a.txt", b"two")
    store.write("folder/b.bin", b"123")
    assert store.names() == ["a.txt", "folder"]
    assert store.files() == {"a.txt": 3, "folder/b.bin": 3}
    assert store.read("a.txt") == b"two"
    store.remove("folder")
    store.remove("a.txt")
    store.remove("never there")
    assert store.names() == []


def test_what_lies_in_a_folder(store: Store) -> None:
    assert kind_of(store.address) is None
    assert list_folder(store.address) == []
    names = [f"{i:02d}.txt" for i in range(20)]
    for i, name in enumerate(names):
        store.write(name, b"x" * i)
    store.write("folder/deep/b.bin", b"123")
    inner = join(store.address, "folder")
    assert [kind_of(address) for address in (store.address, inner, join(store.address, "03.txt"))] == [
        *("folder", "folder", "file")
    ]
    assert kind_of(join(store.address, "none.txt")) is None
    assert [entry[:2] for entry in list_folder(store.address)] == [*((name, True) for name in names), ("folder", False)]
    assert [(entry.name, entry.is_file) for entry in list_folder(inner)] == [("deep", False)]
    if is_remote(store.address):
        deep = [entry.name for entry in list_folder(store.address, recursive=True) if entry.is_file]
        assert deep == [*names, "folder/deep/b.bin"]
    addresses = [join(store.address, name) for name in (*names, "none.txt", "folder/deep/b.bin")]
    about = describe_files(addresses)
    assert [known[0] if known else None for known in about[:20]] == list(range(20))
    assert about == describe_files(addresses)
    assert about[20] is None
    assert about[21] == describe_file(addresses[21])[1:]


def test_a_checkpoint_is_committed_found_and_replaced(store: Store, tmp_path: Path, lines: list[str]) -> None:
    for step in (5, 10):
        name = checkpoint_name(step, 1, "ab")
        files = {}
        for rank in range(2):
            part = write_part(store, name, f"rank{rank}", lambda f, r=rank: (f / f"{r}.bin").write_bytes(b"x" * 9))
            files |= part
        commit(store, name, files, step)
    checkpoint, folder = open_newest(store) or pytest.fail("none")
    assert lines == []
    assert (checkpoint.step, (folder / "1.bin").read_bytes()) == (10, b"x" * 9)
    store.write(f"{checkpoint.name}/0.bin", b"y" * 9)
    checkpoint, _ = open_newest(store) or pytest.fail("none")
    assert (checkpoint.step, len(lines)) == (5, 1)


def test_a_replaced_folder_holds_no_file_of_the_old_one(store: Store) -> None:
    replace_folder(store, "best", lambda f: (f / "old.bin").write_bytes(b"1"), 1)
    replace_folder(store, "best", lambda f: (f / "new.bin").write_bytes(b"2"), 2)
    assert sorted(store.files("best")) == [MANIFEST, "new.bin"]


def test_runs_in_an_object_store_are_claimed_found_and_refused(bucket: str, tmp_path: Path) -> None:
    base = join(bucket, tmp_path.name)
    first = claim_run(base, None, "sft")
    assert first.address == join(base, "sft-001")
    assert claim_run(base, None, "sft").address == join(base, "sft-002")
    for file in (first.run, first.resolved):
        file.write_text('{"attempts": []}')
    first.publish(first.run, first.resolved)
    with pytest.raises(Exception, match="already in use"):
        check_free(base, "sft-001", overwrite=False)
    assert first.remote is not None
    paths = find_run(base, "sft-001", "sft")
    assert paths is not None
    assert paths.run.read_text() == '{"attempts": []}'
    assert find_run(base, "sft-009", "sft") is None
    with pytest.raises(Exception, match="is incomplete"):
        find_run(base, None, "sft")
    first.discard()
    assert not first.root.exists()


def test_options_of_an_address_stay_at_its_end() -> None:
    assert join("s3://b/runs/?region=x", "name") == "s3://b/runs/name?region=x"
    assert join("file:///runs", "name") == os.path.join("/runs", "name")


@pytest.mark.parametrize(
    ("address", "folder", "name"),
    [
        ("s3://b/runs/a/?region=x", "s3://b/runs?region=x", "a"),
        ("s3://b/a b%20#1.csv", "s3://b", "a b%20#1.csv"),
        ("file:///runs/a", "/runs", "a"),
        ("/runs/a?b/", "/runs", "a?b"),
        ("a.csv", os.getcwd(), "a.csv"),
    ],
)
def test_an_address_is_split_into_folder_and_name(address: str, folder: str, name: str) -> None:
    assert split_address(address) == (folder, name)
    assert split_address(join(folder, name)) == (folder, name)


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("abfs://cont@account.dfs.core.windows.net/a/b", "cont/a/b"),
        ("abfs://account.blob.core.windows.net/cont/a", "cont/a"),
        ("gs://anonymous@b/a/c?scheme=http", "b/a/c"),
        ("s3://b/a%20d/?region=x", "b/a d"),
        ("s3://b?region=x", "b"),
        ("memory://b/a", "/b/a"),
    ],
)
def test_every_store_finds_its_path(address: str, path: str) -> None:
    assert Store(address)._locate()[1] == path
    assert Store(address)._locate("x")[1] == f"{path}/x"


def test_an_endpoint_becomes_part_of_an_address_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://h:1")
    once = full_address("s3://b/a?region=x")
    assert once == full_address(once) == "s3://b/a?region=x&endpoint_override=http%3A%2F%2Fh%3A1"
    assert full_address("gs://b/a") == "gs://b/a"


@pytest.mark.parametrize("scheme", ["https", "ftp", "fsspec+https", "simplecache::https"])
def test_nothing_is_read_from_the_web(scheme: str) -> None:
    for read in (open_file, lambda address: Store(address).read("a")):
        with pytest.raises(OSError, match="addresses are not read; download"):
            read(f"{scheme}://host/a.jpg")


def _write_half(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(b"ne")
        raise KeyboardInterrupt


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        _write_half(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a": b"old"}
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a": b"new"}
    assert read_bytes(f"file://{path}") == b"new"
