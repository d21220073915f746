"""What the ranks agree on first: the check of the storage and the owner of the run. Threads stand in for ranks."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.errors import RunError
from ray_vlm.runs.checkpoints import commit, write_part
from ray_vlm.storage import Store
from ray_vlm.train.attempt import begin_attempt, check_owner, prove_storage
from tests.support.ranks import on_ranks


def _on_ranks(folders: list[Path], do: Any) -> list[Any]:
    return on_ranks([Store(folder) for folder in folders], do)


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


def test_a_rank_whose_own_file_was_altered_takes_all_ranks_to_the_checkpoint_before(
    tmp_path: Path, lines: list[str]
) -> None:
    """Only rank 2 opens the file; the ranks that are too many for the old number find none of their own."""
    folder = _folder(tmp_path / "run")
    for step in (5, 10):
        files = {}
        for rank in range(3):
            fill = lambda f, name=f"rng_state_{rank}.pth": (f / name).write_text(name)  # noqa: E731
            files |= write_part(Store(folder), f"checkpoint-{step}-a1-ab", f"rank{rank}", fill)
        commit(Store(folder), f"checkpoint-{step}-a1-ab", files, step)
    path = folder / "checkpoint-10-a1-ab" / "rng_state_2.pth"
    path.write_text(path.read_text()[::-1])
    attempts = _on_ranks([folder] * 4, lambda store, context: begin_attempt(store, context, 1))
    assert [(attempt.step, attempt.folder) for attempt in attempts] == [(5, folder / "checkpoint-5-a1-ab")] * 4
    own = [list(attempt.checkpoint.files) for attempt in attempts]
    assert own == [["rng_state_0.pth"], ["rng_state_1.pth"], ["rng_state_2.pth"], []]
    assert lines == ["checkpoint-10-a1-ab cannot be used: rng_state_2.pth was altered. Looking for the one before it."]
    attempts = _on_ranks([folder] * 2, lambda store, context: begin_attempt(store, context, 1))
    assert [attempt.step for attempt in attempts] == [10, 10], "no rank reads the altered file now"


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
