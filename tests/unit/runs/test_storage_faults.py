"""Disks that are full or read-only at any page of a checkpoint, and object stores that fail or refuse."""

import errno
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_vlm import storage as stores
from ray_vlm.config.schema import Checkpoint
from ray_vlm.distributed import DistributedContext
from ray_vlm.errors import RunError
from ray_vlm.runs.checkpoints import MANIFEST, Damaged, checkpoint_name, open_checkpoint, open_newest, replace_folder
from ray_vlm.runs.manifest import claim_run, find_run
from ray_vlm.runs.monitor import Monitor, read_metrics
from ray_vlm.runs.paths import write_folder, write_json
from ray_vlm.storage import Store, join, making
from ray_vlm.train.attempt import Attempt
from ray_vlm.train.callbacks.checkpointing import CheckpointCallback
from ray_vlm.train.callbacks.metrics import StepTimer
from ray_vlm.train.run_context import Progress, RunContext
from tests.support.faults import SmallDisk, Stumbling, small_disk
from tests.support.lines import kept_lines

FILES = ("rng_state.pth", "optimizer.pt", "scheduler.pt", "adapter_model.safetensors", "trainer_state.json")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 2) as small:
        yield small


class _Trainer:
    """Writes what a real one does, with torch and safetensors; `at` is the file that it is in."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(global_step=0, log_history=[], save_to_json=self._save_state)
        self.at = ""

    def _torch(self, folder: str | Path, name: str, count: int) -> None:
        import torch

        self.at = name
        torch.save({"a": torch.arange(count, dtype=torch.float32), "b": [1, 2, 3]}, Path(folder) / name)

    def gather(self) -> None:
        pass  # only ZeRO-3 has parts

    def save_training_state(self, folder: Path) -> None:
        self._torch(folder, "rng_state.pth", 3000)
        self._torch(folder, "optimizer.pt", 9000)
        self._torch(folder, "scheduler.pt", 10)

    def save(self, folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        self.at = "adapter_model.safetensors"
        save_file({"a": torch.ones(5000)}, folder / self.at)

    def _save_state(self, path: str) -> None:
        self.at = "trainer_state.json"
        Path(path).write_text("x" * 6000)
        self.at = MANIFEST


def _writer(store: Store, trainer: _Trainer) -> CheckpointCallback:
    attempt = Attempt(1, "ab12")
    store.write(".attempt.json", json.dumps({"attempt": 1, "token": attempt.token}).encode())
    options = Checkpoint(keep=9, keep_best=0)
    batches: Any = SimpleNamespace(lost=[])
    plan: Any = None
    paths: Any = SimpleNamespace(store=store)
    run = RunContext(paths, attempt, plan, DistributedContext(), trainer, Progress(), None)  # type: ignore[arg-type]
    return CheckpointCallback(run, options, "loss", {"base": "x"}, batches, StepTimer())


def _checkpoint(writer: CheckpointCallback, trainer: _Trainer, step: int) -> None:
    trainer.state.global_step = step
    writer.write(trainer)  # type: ignore[arg-type]


def _refused(writer: CheckpointCallback, trainer: _Trainer, step: int) -> str | None:
    try:
        _checkpoint(writer, trainer, step)
    except RunError as error:
        return str(error)
    return None


def _whole(store: Store) -> int | None:
    with kept_lines() as lines:
        newest = open_newest(store)
    assert lines == []
    return newest[0].step if newest else None


def test_a_disk_that_fills_at_any_page_of_a_checkpoint_keeps_the_one_before(disk: SmallDisk) -> None:
    """Page by page more room, until the checkpoint fits; every file of it, its manifest too, is once the one that
    does not."""
    store, trainer, hit = Store(disk.path / "run"), _Trainer(), []
    writer = _writer(store, trainer)
    _checkpoint(writer, trainer, 1)
    before = store.files()
    for pages in range(60):
        disk.leave(pages)
        if (message := _refused(writer, trainer, 2)) is None:
            break
        assert f"checkpoint at step 2 cannot be written to {store.address}" in message
        assert "No space left on device" in message
        assert "--resume" in message
        assert store.files() == before, "what did not count is still in the way"
        assert _whole(store) == 1
        hit.append(trainer.at)
    assert set(hit) >= {*FILES, MANIFEST}
    assert _whole(store) == 2


def test_a_disk_that_turns_read_only_keeps_what_it_has(disk: SmallDisk) -> None:
    store, trainer = Store(disk.path / "run"), _Trainer()
    writer = _writer(store, trainer)
    _checkpoint(writer, trainer, 1)
    disk.make_read_only()
    with pytest.raises(RunError, match=r"step 2 cannot be written to .*Read-only file system.*--resume"):
        _checkpoint(writer, trainer, 2)
    assert _whole(store) == 1
    disk.make_writable()
    _checkpoint(writer, trainer, 2)
    assert _whole(store) == 2


def test_a_full_disk_leaves_the_old_file_and_the_old_folder(disk: SmallDisk) -> None:
    """`run.json` and `best/` are the old ones, and no partial file takes the remaining space."""
    trainer, file, folder = _Trainer(), disk.path / "run.json", disk.path / "best"
    write_json(file, {"a": 1})
    write_folder(folder, lambda f: (f / "old").write_text("old") and None)
    there = Store(disk.path).files()
    for pages in range(1, 4):
        disk.leave(pages)
        free = disk.free
        with pytest.raises(OSError, match="No space left on device") as refused:
            write_json(file, ["x" * 100] * 300)
        assert (refused.value.errno, refused.value.filename) == (errno.ENOSPC, str(file))
        with pytest.raises(OSError, match=r"No space left on device.*best"):
            write_folder(folder, trainer.save_training_state)
        assert disk.free == free
        disk.clear()
        assert Store(disk.path).files() == there
    assert json.loads(file.read_text()) == {"a": 1}
    assert (folder / "old").read_text() == "old"


def _write_lines(monitor: Monitor) -> None:
    for step in range(1, 999):
        monitor.write("train", step, 0.0, {"loss": 1.0})


def test_lines_of_metrics_that_a_full_disk_cut_off_hide_no_other(disk: SmallDisk) -> None:
    path = disk.path / "metrics.jsonl"
    monitor = Monitor(path, 1)
    disk.leave(1)
    with pytest.raises(OSError, match="No space left"):
        _write_lines(monitor)
    with pytest.raises(OSError, match="No space left"):
        monitor.close()
    assert not path.read_bytes().endswith(b"\n"), "no line was cut off; the test shows nothing"
    steps = len(read_metrics(path))
    disk.clear()
    monitor = Monitor(path, 2)
    monitor.write("train", steps + 1, 0.0, {"loss": 1.0})
    monitor.close()
    assert [line["step"] for line in read_metrics(path)] == list(range(1, steps + 2))


def test_what_is_no_fault_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), making(tmp_path):
        raise RuntimeError("CUDA out of memory")
    with pytest.raises(RecursionError), making(tmp_path / "run.json"):
        raise RecursionError
    with pytest.raises(OSError, match="unexpected pos 640 vs 598") as refused, making(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 640 vs 598")
    assert refused.value.filename == str(tmp_path)


def test_a_store_that_goes_away_for_a_while_is_waited_for(stumbling: tuple[str, Stumbling], tmp_path: Path) -> None:
    """At every request of a checkpoint; pyarrow retries writes by itself, but not reads."""
    base, app = stumbling
    store, trainer = Store(join(base, tmp_path.name)), _Trainer()
    writer = _writer(store, trainer)
    seen: set[tuple[str, str]] = set()

    def fault(method: str, path: str) -> int | str | None:
        request = method, path.rsplit("/", 1)[-1]
        known = request in seen
        seen.add(request)
        return None if known else "cut" if method == "PUT" else 503

    app.fault = fault
    _checkpoint(writer, trainer, 1)
    assert {path.rsplit("/", 1)[-1] for _, path in app.failed} >= {*FILES, MANIFEST, ".attempt.json"}
    assert _whole(store) == 1


def test_pyarrow_s_own_patience_is_not_all(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    store, left = Store("s3://b/run"), [3]

    def do() -> str:
        if left[0]:
            left[0] -= 1
            raise OSError("AWS Error UNKNOWN (HTTP status 503) during PutObject operation")
        return "done"

    with pytest.raises(OSError, match="503"):
        store._ask(do)  # it never answered: the endpoint may be wrong
    store._ask(lambda: None)
    assert (store._ask(do), left, slept) == ("done", [0], [1.0, 2.0])
    for error in (OSError("AWS Error ACCESS_DENIED during PutObject operation"), OSError(errno.ENOSPC, "full", "x")):
        store._ask(lambda: None)
        with pytest.raises(OSError, match=r"ACCESS_DENIED|full"):
            store._ask(lambda error=error: (_ for _ in ()).throw(error))
    assert len(slept) == 2, "what waiting does not mend was waited for"


def test_a_store_that_refuses_keeps_the_checkpoint_before(stumbling: tuple[str, Stumbling], tmp_path: Path) -> None:
    """At every file the store refuses it and all later ones."""
    base, app = stumbling
    store, trainer = Store(join(base, tmp_path.name)), _Trainer()
    writer = _writer(store, trainer)
    _checkpoint(writer, trainer, 1)
    for name in (".attempt.json", *FILES, MANIFEST):
        gone: list[str] = []

        def fault(method: str, path: str, name: str = name, gone: list[str] = gone) -> int | None:
            if path.endswith(name):
                gone.append(path)
            return 403 if gone else None

        app.fault = fault
        with pytest.raises(
            RunError, match=r"step 2 cannot be written to s3://.*ACCESS_DENIED.*fix the store.*--resume"
        ):
            _checkpoint(writer, trainer, 2)
        app.fault = lambda method, path: None
        assert gone
        checkpoint, folder = open_newest(store) or pytest.fail("none")
        assert checkpoint.step == 1
        shutil.rmtree(folder)
    _checkpoint(writer, trainer, 2)
    assert _whole(store) == 2


def test_best_in_a_store_counts_until_the_new_one_is_made(
    stumbling: tuple[str, Stumbling], tmp_path: Path, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names a full scratch disk and how to use another one, and the old `best/` stays complete."""
    base, _ = stumbling
    store, trainer = Store(join(base, tmp_path.name)), _Trainer()
    writer = _writer(store, trainer)
    replace_folder(store, "best", trainer.save, 1)
    monkeypatch.setattr(stores.tempfile, "tempdir", str(disk.path))
    for pages in (0, 1, 4):
        disk.leave(pages)
        with pytest.raises(OSError, match=rf"No space left on device: '{disk.path}"):
            replace_folder(store, "best", trainer.save, 2)
        message = rf"No space left on device: '{disk.path}.*make room in {disk.path}.*TMPDIR.*--resume"
        with pytest.raises(RunError, match=message):
            _checkpoint(writer, trainer, 2)
        with pytest.raises(OSError, match=rf"No space left on device: '{disk.path}"):
            open_checkpoint(store, "best")
        disk.clear()
        assert list(disk.path.iterdir()) == [], "what was half made is still in the way"
    assert open_checkpoint(store, "best")[0].step == 1


def test_a_store_that_refuses_when_a_run_is_looked_for(
    stumbling: tuple[str, Stumbling], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, app = stumbling
    monkeypatch.setattr(stores.tempfile, "tempdir", str(tmp_path))
    base = join(base, tmp_path.name)
    paths = claim_run(base, "run", "sft")
    paths.store.write("resolved.json", b"{}")
    paths.store.write("run.json", b'{"attempts": []}')
    for name in ("resolved.json", "metrics.jsonl"):
        app.fault = lambda method, path, name=name: 403 if path.endswith(name) else None
        with pytest.raises(RunError, match=r"run.output_dir='s3://.*cannot be read .*ACCESS_DENIED"):
            find_run(base, "run", "sft")
    app.fault = lambda method, path: None
    assert list(tmp_path.iterdir()) == [paths.root], "what was half fetched is still in the way"
    assert find_run(base, "run", "sft") is not None


def test_a_checkpoint_cut_off_in_the_store_is_reported(stumbling: tuple[str, Stumbling], tmp_path: Path) -> None:
    base, _ = stumbling
    store, trainer = Store(join(base, tmp_path.name)), _Trainer()
    _checkpoint(_writer(store, trainer), trainer, 1)
    name = checkpoint_name(1, 1, "ab12")
    store.write(f"{name}/optimizer.pt", b"half")
    with pytest.raises(Damaged, match=r"optimizer.pt has 4 bytes"):
        open_checkpoint(store, name)
