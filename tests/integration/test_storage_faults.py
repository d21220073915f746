"""Whole runs on storage that fails for real: what they say, what is left, and that they go on as if nothing was."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_vlm import storage as stores
from ray_vlm.cli import main
from ray_vlm.runs.checkpoints import open_newest
from ray_vlm.runs.monitor import current_lines, read_metrics
from ray_vlm.runs.paths import RunPaths, open_run
from ray_vlm.storage import Store, join
from ray_vlm.train.callbacks.metrics import MetricsCallback
from tests.support.faults import PAGE, SmallDisk, Stumbling, small_disk

STEPS = 6  # a checkpoint after every second, a validation after every third

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, scenes: Path, tiny_models: dict[str, str]) -> Write:
    """A function that writes the job of all these runs, kept in `output_dir`."""
    folder = tmp_path_factory.mktemp("jobs")

    def write(output_dir: str | Path) -> Path:
        rows = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "eval")}
        train = {"global_batch_size": 4, "micro_batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-3}
        sections = {
            "model": {"name": tiny_models["qwen3_vl"], "load_in_4bit": False},
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.2},
            "data": {**rows, "index_dir": str(folder / "index")},  # files on a small disk would stay mapped
            "train": train | {"precision": "fp32", "gradient_checkpointing": False},
            "checkpoint": {"every_steps": 2},
            "evaluate": {"every_steps": 3, "num_samples": 4, "max_new_tokens": 4},
            "cluster": {"num_workers": 0},
            "run": {"name": "run", "output_dir": str(output_dir)},
        }
        path = folder / "job.yaml"
        path.write_text(yaml.safe_dump(sections))
        return path

    return write


@pytest.fixture(scope="module")
def undisturbed(job: Write, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """The run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["train", str(job(folder))]) == 0
    return RunPaths(folder / "run")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 24) as small:
        yield small


def _at(monkeypatch: pytest.MonkeyPatch, step: int, do: Callable[[], None], event: str = "on_log") -> None:
    """Call `do` once at the end of that step: before what is validated and kept there, or after it ("on_save")."""
    old, done = getattr(MetricsCallback, event), []

    def then(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        old(self, args, state, control, **kwargs)
        if state.global_step == step and not done:
            done.append(step)
            do()

    monkeypatch.setattr(MetricsCallback, event, then)


def _refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What `train` says when it ends with the exit code of a failed run."""
    capsys.readouterr()
    assert main(["train", *map(str, words)]) == 1
    (message,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return message


def _go_on(path: Path) -> None:
    assert main(["train", str(path), "--resume"]) == 0


def _same(paths: RunPaths, undisturbed: RunPaths) -> None:
    """Raise unless every step, the adapters and the outcome are those of the undisturbed run."""

    def steps(of: RunPaths) -> list[tuple[Any, ...]]:
        lines = current_lines(read_metrics(of.metrics))
        return [(n["step"], n["loss"], n.get("grad_norm")) for n in lines if n["kind"] in ("train", "eval")]

    paths.refresh(paths.metrics, paths.run, paths.training_log)
    assert steps(paths) == steps(undisturbed)
    for name in ("final", "best"):
        weights = f"{name}/adapter_model.safetensors"
        assert paths.store.read(weights) == undisturbed.store.read(weights)
    run, log = (json.loads(file.read_text()) for file in (paths.run, paths.training_log))
    assert run["status"] == "finished"
    assert log["best_checkpoint"]["step"] == json.loads(undisturbed.training_log.read_text())["best_checkpoint"]["step"]
    assert not [name for name in paths.store.names() if name.startswith((".staging", ".final", ".best", ".run"))]


def _newest(store: Store) -> int:
    newest = open_newest(store)
    return newest[0].step if newest else 0


# Pages that are left after step 4: what does not fit is, with more and more of them, the checkpoint of that step, the
# next best/ and the checkpoint of step 6.
LEVELS = [0, *(pytest.param(pages, marks=pytest.mark.slow) for pages in (2, 5, 20, 60, 100, 140, 160, 180, 200))]


@pytest.mark.parametrize("pages", LEVELS)
def test_a_disk_that_fills_up_ends_the_run_which_goes_on_when_there_is_room(
    pages: int, job: Write, undisturbed: RunPaths, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    path, paths = job(disk.path), RunPaths(disk.path / "run")
    _at(monkeypatch, 4, lambda: disk.leave(pages))
    message = _refused(capsys, path)
    assert str(paths.root) in message
    assert "No space left on device" in message
    assert "go on with --resume" in message
    assert _newest(paths.store) == (4 if pages > 150 else 2)
    assert json.loads(paths.run.read_text())["status"] == ("failed" if pages > 4 else "running")
    assert read_metrics(paths.metrics)[-1]["step"] >= 4
    disk.clear()
    _go_on(path)
    _same(paths, undisturbed)


@pytest.mark.slow
def test_a_disk_that_is_full_when_all_is_trained(
    job: Write, undisturbed: RunPaths, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """`final/` does not fit any more, then only the last words of `run.json` do not."""
    path, paths = job(disk.path), RunPaths(disk.path / "run")
    _at(monkeypatch, STEPS, lambda: disk.leave(3), "on_save")
    assert "No space left on device" in _refused(capsys, path)
    assert not paths.final.exists()
    need, silent = sum(-(-size // PAGE) for size in undisturbed.store.files("final").values()), 0
    for pages in range(need - 3, need + 20):
        disk.leave(pages)
        if main(["train", str(path), "--resume"]) == 0:
            break
        message = capsys.readouterr().err
        assert "No space left on device" in message
        assert "go on with --resume" in message
        silent += paths.final.exists() and json.loads(paths.run.read_text())["status"] != "finished"
    assert silent, "final/ was there and the last words always fitted; the test shows nothing"
    _same(paths, undisturbed)


@pytest.mark.slow
def test_a_disk_that_cuts_off_a_line_of_metrics(
    job: Write, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    path, paths = job(disk.path), RunPaths(disk.path / "run")
    options = ("train.max_steps=20", "checkpoint.every_steps=100", "evaluate.every_steps=100")
    _at(monkeypatch, 1, lambda: disk.leave(0))
    message = _refused(capsys, path, *options)
    assert f"{paths.root}: [Errno 28] No space left on device" in message
    assert not paths.metrics.read_bytes().endswith(b"\n"), "no line was cut off; the test shows nothing"
    disk.clear()
    assert main(["train", str(path), "--resume", *options]) == 0
    steps = [n["step"] for n in current_lines(read_metrics(paths.metrics)) if n["kind"] == "train"]
    assert steps == list(range(1, 21))


def test_a_disk_that_turns_read_only_under_a_run(
    job: Write, undisturbed: RunPaths, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    path, paths = job(disk.path), RunPaths(disk.path / "run")
    _at(monkeypatch, 4, disk.make_read_only)
    message = _refused(capsys, path)
    assert f"checkpoint at step 4 cannot be written to {paths.root}" in message
    assert "Read-only file system" in message
    assert f"{paths.root}: [Errno 30] Read-only file system" in _refused(capsys, path, "--resume")
    disk.make_writable()
    assert _newest(paths.store) == 2
    _go_on(path)
    _same(paths, undisturbed)


def test_a_disk_that_is_full_before_anything_starts(job: Write, undisturbed: RunPaths, disk: SmallDisk, capsys) -> None:
    """Nothing half made is left in the way of the next try, nor of going on."""
    path, paths = job(disk.path), RunPaths(disk.path / "run")
    for pages in (0, 1, 2, 3):
        disk.leave(pages)
        message = _refused(capsys, path)
        assert "No space left on device" in message
        assert str(disk.path) in message
        assert not paths.root.exists() or "--resume" in message
    disk.clear()
    _go_on(path)
    _same(paths, undisturbed)


def _refuse(app: Stumbling, part: str) -> None:
    """Refuse everything, as with credentials that have expired, once something is written whose path has `part`."""
    matches: list[str] = []

    def fault(method: str, path: str) -> int | None:
        if part in path and method != "GET":
            matches.append(path)
        return 403 if matches else None

    app.fault = fault


def _mend(app: Stumbling) -> None:
    app.fault = lambda method, path: None


@pytest.mark.slow
def test_a_store_that_refuses_ends_the_run_which_goes_on_when_it_is_back(
    job: Write, undisturbed: RunPaths, stumbling: tuple[str, Stumbling], tmp_path: Path, monkeypatch, capsys
) -> None:
    base, app = stumbling
    path, address = job(join(base, tmp_path.name)), join(base, f"{tmp_path.name}/run")
    _at(monkeypatch, 4, lambda: _refuse(app, "checkpoint-4"))
    message = _refused(capsys, path)
    assert f"checkpoint at step 4 cannot be written to {address}" in message
    assert "ACCESS_DENIED" in message
    message = _refused(capsys, path, "--resume")
    assert "cannot be read" in message
    assert "ACCESS_DENIED" in message
    _mend(app)
    assert _newest(Store(address)) == 2
    _go_on(path)
    paths = open_run(address)
    _same(paths, undisturbed)
    paths.discard()


def test_a_store_that_refuses_the_last_words_gets_them_later(
    job: Write, undisturbed: RunPaths, stumbling: tuple[str, Stumbling], tmp_path: Path, monkeypatch, capsys
) -> None:
    """All is trained; what the driver writes of it cannot be kept."""
    base, app = stumbling
    path, address = job(join(base, tmp_path.name)), join(base, f"{tmp_path.name}/run")
    _at(monkeypatch, STEPS, lambda: _refuse(app, "training_log.json"), "on_save")
    message = _refused(capsys, path)
    assert f"{address}: " in message
    assert "ACCESS_DENIED" in message
    assert "go on with --resume" in message
    _mend(app)
    _go_on(path)
    paths = open_run(address)
    _same(paths, undisturbed)
    paths.discard()


@pytest.mark.slow
def test_a_scratch_disk_that_is_full_is_named(
    job: Write,
    undisturbed: RunPaths,
    stumbling: tuple[str, Stumbling],
    tmp_path: Path,
    disk: SmallDisk,
    monkeypatch,
    capsys,
) -> None:
    """Where files for an object store are made."""
    base, _ = stumbling
    path, address = job(join(base, tmp_path.name)), join(base, f"{tmp_path.name}/run")
    monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
    _at(monkeypatch, 4, lambda: disk.leave(5))
    message = _refused(capsys, path)
    assert f"checkpoint at step 4 cannot be written to {address}" in message
    assert f"No space left on device: '{disk.path}" in message
    assert "TMPDIR" in message
    message = _refused(capsys, path, "--resume")
    assert f"No space left on device: '{disk.path}" in message
    disk.clear()
    assert _newest(Store(address)) == 2
    _go_on(path)
    paths = open_run(address)
    _same(paths, undisturbed)
    paths.discard()


@pytest.mark.slow
def test_a_store_that_is_away_for_longer_than_pyarrow_waits(
    job: Write,
    undisturbed: RunPaths,
    stumbling: tuple[str, Stumbling],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    """In the middle of a checkpoint: waited for, and for no longer than it should be."""
    base, app = stumbling
    path, address = job(join(base, tmp_path.name)), join(base, f"{tmp_path.name}/run")
    away = [9.0]
    began: list[float] = []

    def fault(method: str, path: str) -> int | None:
        if "checkpoint-4" in path and path.endswith("optimizer.pt"):
            began.append(time.monotonic())
        return 503 if began and time.monotonic() < began[0] + away[0] else None

    app.fault = fault
    assert main(["train", str(path)]) == 0
    assert time.monotonic() > began[0] + away[0]
    paths = open_run(address)
    _same(paths, undisturbed)
    paths.discard()
    monkeypatch.setattr(stores, "_PATIENCE_S", 2.0)
    began.clear()
    away[0] = 1e9
    message = _refused(capsys, path, "run.name=other")
    assert "checkpoint at step 4 cannot be written" in message
    assert "SERVICE_UNAVAILABLE" in message
    _mend(app)
    assert _newest(Store(join(base, f"{tmp_path.name}/other"))) == 2
