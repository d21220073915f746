"""What the ranks agree on first: the check of the storage and the owner of the run. Threads stand in for ranks."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.errors import RunError
from ray_vlm.storage import Store
from ray_vlm.train.attempt import begin_attempt, check_owner, prove_storage


@dataclass
class _Group:
    """A process group of threads."""

    size: int
    values: dict[int, Any] = field(default_factory=dict)
    barrier: Any = None

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=20)


@dataclass
class _Rank:
    group: _Group
    rank: int
    ray: bool = True

    @property
    def world_size(self) -> int:
        return self.group.size

    def all_gather(self, value: Any) -> list[Any]:
        self.group.values[self.rank] = value
        self.group.barrier.wait()
        everyone = [self.group.values[r] for r in range(self.group.size)]
        self.group.barrier.wait()
        return everyone

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]


def _on_ranks(folders: list[Path], do: Any) -> list[Any]:
    group = _Group(len(folders))

    def run(rank: int) -> Any:
        try:
            return do(Store(folders[rank]), _Rank(group, rank))
        except RunError as error:
            return error

    with ThreadPoolExecutor(len(folders)) as pool:
        return list(pool.map(run, range(len(folders))))


def _folder(path: Path) -> Path:
    path.mkdir()
    (path / "run.json").write_text("{}")
    return path


def test_ranks_that_share_a_folder_agree(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "run")
    attempts = _on_ranks([folder] * 3, lambda store, context: begin_attempt(store, context, 1))
    assert len({(a.number, a.token) for a in attempts}) == 1
    assert sorted(p.name for p in folder.iterdir()) == [".attempt.json", "run.json"]
    again = _on_ranks([folder] * 2, lambda store, context: begin_attempt(store, context, 1))
    assert {a.number for a in again} == {2}


def test_folders_of_the_same_name_on_two_nodes_are_found_out_on_every_rank(tmp_path: Path) -> None:
    """The second has no run.json: `mkdir` on a node that does not share the disk."""
    one, two = _folder(tmp_path / "one"), tmp_path / "two"
    two.mkdir()
    errors = _on_ranks([one, two], lambda store, context: prove_storage(store, context, "ab", wait_s=0.2))
    assert all(isinstance(e, RunError) for e in errors)
    assert len(errors[0].problems) == len(errors[1].problems) == 4  # each misses the other, one the driver; the fix
    message = "\n".join(errors[0].problems)
    assert "does not see what the driver wrote" in message
    assert "does not see what worker 1" in message
    assert "file system that all nodes share" in message


def test_a_node_that_cannot_write_is_named(tmp_path: Path) -> None:
    folder, blocked = _folder(tmp_path / "run"), tmp_path / "file" / "run"
    (tmp_path / "file").write_text("")
    errors = _on_ranks([folder, blocked], lambda store, context: prove_storage(store, context, "ab", wait_s=0.2))
    assert all("worker 1 on" in e.problems[0] and "cannot write" in e.problems[0] for e in errors)


def test_an_older_attempt_finds_that_it_was_replaced(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "run")
    (old,) = _on_ranks([folder], lambda store, context: begin_attempt(store, context, 1))
    check_owner(Store(folder), old)
    (new,) = _on_ranks([folder], lambda store, context: begin_attempt(store, context, 1))
    with pytest.raises(RunError, match="taken over by attempt 2"):
        check_owner(Store(folder), old)
    check_owner(Store(folder), new)
    assert json.loads((folder / ".attempt.json").read_text())["attempt"] == 2
    assert os.listdir(folder)
