"""The same run files in a folder and in an object store."""

import os
from pathlib import Path

import pytest

from ray_vlm.runs.checkpoints import MANIFEST, checkpoint_name, commit, open_newest, replace_folder, write_part
from ray_vlm.runs.manifest import check_free, claim_run, find_run
from ray_vlm.runs.store import Store, join


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return Store(tmp_path / "run")
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
