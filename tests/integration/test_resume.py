"""Going on where a run was: the same numbers as if it had never stopped, and what is refused."""

import io
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from ray_vlm.cli import main
from ray_vlm.config.load import load_job
from ray_vlm.data.feed import Feed
from ray_vlm.errors import ConfigError, Interrupted, ModelError, RunError
from ray_vlm.runs.monitor import current_lines, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train import build
from ray_vlm.train import prepare as preparation
from ray_vlm.train.driver import train


def _train(path: Path, *overrides: str, resume: bool = False) -> RunPaths:
    return train(load_job(path, overrides), path.read_text(), resume=resume)


def _steps(paths: RunPaths) -> list[tuple[int, float, float]]:
    lines = current_lines(read_metrics(paths.metrics))
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"]


def _same_adapter(one: RunPaths, two: RunPaths) -> bool:
    from safetensors.torch import load_file

    a, b = (load_file(paths.final / "adapter_model.safetensors") for paths in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal at the end of that step, once."""
    from ray_vlm.train.callbacks.metrics import MetricsCallback

    old, sent = MetricsCallback.on_log, []

    def on_log(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        old(self, args, state, control, **kwargs)
        if state.global_step == step and not sent:
            sent.append(step)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsCallback, "on_log", on_log)


def test_a_stopped_run_goes_on_bit_for_bit(job_file, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of the second epoch, after a signal; with dropout, so random state counts too. The run that
    stops makes batches ahead, as on a GPU, which are lost then."""
    data = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "eval")}
    evaluate = {"every_steps": 3, "num_samples": 4}
    lora = {"rank": 4, "alpha": 8, "dropout": 0.2}
    path = job_file(data=data, evaluate=evaluate, lora=lora, train={"max_steps": 16}, checkpoint={"every_steps": 4})
    undisturbed = _train(path, "run.name=whole")
    ahead: list[Feed] = []
    feed = build.Feed
    monkeypatch.setattr(build, "Feed", lambda *args: ahead.append(feed(*args[:-1], 3)) or ahead[-1])  # type: ignore[func-returns-value]
    _stop_after(monkeypatch, 9)
    with pytest.raises(Interrupted, match="stopped at step 10 of 16") as stop:
        _train(path, "run.name=stopped")
    assert stop.value.exit_code == 143
    assert len(ahead) == 1
    assert "ray-vlm-feed" not in {thread.name for thread in threading.enumerate()}
    paths = RunPaths(undisturbed.root.parent / "stopped")
    assert json.loads(paths.run.read_text())["status"] == "interrupted"
    assert not paths.final.exists()
    _train(path, "run.name=stopped", resume=True)
    assert _steps(paths) == _steps(undisturbed)
    assert _same_adapter(paths, undisturbed)
    run, log = json.loads(paths.run.read_text()), json.loads(paths.training_log.read_text())
    assert [a["status"] for a in run["attempts"]] == ["interrupted", "finished"]
    assert run["attempts"][1]["from_step"] == 10
    other = json.loads(undisturbed.training_log.read_text())
    for history in ("epoch_history", "validation_history"):
        assert [(e["step"], e["loss"]) for e in log[history]] == [(e["step"], e["loss"]) for e in other[history]]
    assert [line["epoch"] for line in log["training_history"]] == [line["epoch"] for line in other["training_history"]]
    assert log["best_checkpoint"]["step"] == other["best_checkpoint"]["step"]


def test_a_second_signal_leaves_at_once(job_file, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from ray_vlm.train.stop import StopRequest

    before = signal.getsignal(signal.SIGINT)

    def twice() -> None:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            assert request.wanted
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert "A second signal ends the run at once" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_before_the_first_step_leaves_at_once(job_file, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the base is loaded there is nothing to keep: no step is trained for the sake of a checkpoint."""

    def interrupted(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(build, "load_base", interrupted)
    path = job_file(train={"max_steps": 2})
    with pytest.raises(
        Interrupted, match=r"stopped before the first step; --resume goes on \(run\.name=early\)"
    ) as stop:
        _train(path, "run.name=early")
    assert stop.value.exit_code == 143
    run = json.loads((path.parent / "runs" / "early" / "run.json").read_text())
    assert run["status"] == run["attempts"][0]["status"] == "interrupted"
    assert not list((path.parent / "runs" / "early").glob("checkpoint-*"))


def test_resume_from_the_one_before_a_damaged_checkpoint(job_file, capsys) -> None:
    path = job_file(train={"max_steps": 6}, checkpoint={"every_steps": 2})
    undisturbed = _train(path, "run.name=whole")
    paths = _train(path, "train.max_steps=6")
    newest = next(paths.root.glob("checkpoint-6-*"))
    (newest / "optimizer.pt").write_bytes(b"torn")
    for name in ("final", "training_log.json"):
        target = paths.root / name
        target.unlink() if target.is_file() else [f.unlink() for f in target.iterdir()]
    run = json.loads(paths.run.read_text())
    paths.run.write_text(json.dumps(run | {"status": "failed", "result": None}))
    capsys.readouterr()
    _train(path, resume=True)
    out = capsys.readouterr().out
    assert f"{newest.name} cannot be used: optimizer.pt has 4 bytes" in out
    assert "attempt 2 goes on from step 4" in out
    assert _steps(paths) == _steps(undisturbed)
    assert _same_adapter(paths, undisturbed)


def test_a_finished_run_says_so_and_goes_on_for_more_epochs(job_file, capsys) -> None:
    path = job_file(train={"max_steps": 2})
    _train(path)
    capsys.readouterr()
    assert main(["train", str(path), "--resume"]) == 0
    assert "is finished; for more steps raise" in capsys.readouterr().out
    paths = _train(path, "train.max_steps=4", "train.log_every_steps=1", resume=True)
    assert [step for step, _, _ in _steps(paths)] == [1, 2, 3, 4]
    run = json.loads(paths.run.read_text())
    paths.run.write_text(json.dumps(run | {"status": "failed", "result": None}))
    with pytest.raises(RunError, match="behind the 3 steps of this job"):
        _train(path, "train.max_steps=3", resume=True)


def test_what_decides_learning_may_not_change(job_file, scenes: Path) -> None:
    path = job_file()
    _train(path)
    with pytest.raises(ConfigError) as error:
        _train(path, "train.max_steps=9", "train.learning_rate=0.5", "lora.rank=8", "seed=3", resume=True)
    assert [p.split("`")[1] for p in error.value.problems] == ["lora.rank", "seed", "train.learning_rate"]
    assert "was 4 and is now 8" in error.value.problems[0]


def test_resume_names_the_newest_run_or_starts_one(job_file) -> None:
    path = job_file(train={"max_steps": 1})
    first = _train(path, "run.name=null", resume=True)
    assert first.root.name == "sft-qwen3_vl-detection-001"
    assert _train(path, "run.name=null", "train.max_steps=2", resume=True).root == first.root


def test_other_rows_and_another_base_are_refused(
    job_file, scenes: Path, tmp_path: Path, tiny_models: dict[str, str]
) -> None:
    import shutil

    data, model = tmp_path / "a" / "scenes", tmp_path / "a" / "model"
    shutil.copytree(scenes, data)
    shutil.copytree(tiny_models["qwen3_vl"], model)
    rows = {"train": {"path": str(data / "train.json")}}
    path = job_file(data=rows, model={"name": str(model), "load_in_4bit": False}, train={"max_steps": 1})
    _train(path)
    moved = tmp_path / "b"
    shutil.move(tmp_path / "a", moved)
    there = [f"model.name={moved / 'model'}", f"data.train.path={moved / 'scenes' / 'train.json'}"]
    _train(path, *there, "train.max_steps=2", resume=True)  # the same contents in another place
    coco = json.loads((moved / "scenes" / "train.json").read_text())
    coco["images"].reverse()
    (moved / "scenes" / "train.json").write_text(json.dumps(coco))
    with pytest.raises(RunError, match="trained on other rows"):
        _train(path, *there, "train.max_steps=3", resume=True)
    coco["images"].reverse()
    coco["categories"].append({"id": 99, "name": "zebra"})
    (moved / "scenes" / "train.json").write_text(json.dumps(coco))
    with pytest.raises(RunError, match=r"another question: class names \[.*'diamond'\], now \[.*'zebra'\]"):
        _train(path, *there, "train.max_steps=3", resume=True)
    coco["categories"].pop()
    (moved / "scenes" / "train.json").write_text(json.dumps(coco))
    from ray_vlm.demo.tiny import write_untrained

    shutil.rmtree(moved / "model")
    torch.manual_seed(7)
    write_untrained(moved / "model", "qwen3_vl")
    _perturb(moved / "model")
    with pytest.raises(ModelError, match="another base"):
        _train(path, *there, "train.max_steps=3", resume=True)


def _perturb(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    name = next(n for n in weights if "embed_tokens" in n)
    weights[name] = weights[name] + 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def test_a_run_that_is_being_trained_is_not_resumed(job_file) -> None:
    import psutil

    path = job_file(train={"max_steps": 1})
    paths = _train(path)
    run = json.loads(paths.run.read_text())
    attempt = run["attempts"][-1]
    del attempt["ended"]
    parent = psutil.Process(os.getppid())
    attempt["driver"] |= {"pid": parent.pid, "started": parent.create_time()}
    paths.run.write_text(json.dumps(run))
    with pytest.raises(RunError, match=f"is being trained by process {parent.pid}"):
        _train(path, "train.max_steps=2", resume=True)


def test_a_disk_that_refuses_a_checkpoint_stops_with_the_way_on(job_file, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray_vlm.train.callbacks.checkpointing as checkpoint

    path = job_file(train={"max_steps": 4}, checkpoint={"every_steps": 2})
    real, calls = checkpoint.write_part, []

    def full(store: Any, name: str, part: str, fill: Any) -> Any:
        calls.append(name)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(store, name, part, fill)

    monkeypatch.setattr(checkpoint, "write_part", full)
    with pytest.raises(RunError, match=r"step 4 cannot be written.*No space left.*--resume"):
        _train(path)
    paths = _train(path, resume=True)
    assert json.loads(paths.run.read_text())["attempts"][1]["from_step"] == 2


def test_a_step_without_a_trained_token_stops_the_run(job_file, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    import numpy as np

    from ray_vlm.data import samples
    from ray_vlm.data.spec import IGNORED

    real = samples.SampleBuilder.sample

    def masked(self: Any, *args: Any) -> Any:
        row = real(self, *args)
        return replace(row, labels=np.full_like(row.labels, IGNORED))

    monkeypatch.setattr(samples.SampleBuilder, "sample", masked)
    with pytest.raises(Exception, match="not one token of the global batch is trained"):
        _train(job_file())


def test_a_run_in_an_object_store_is_the_same_run(
    job_file, scenes: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, resumed and evaluated with nothing left on this machine in between."""
    from ray_vlm.evaluate.run import evaluate
    from ray_vlm.runs.checkpoints import fetch_folder
    from ray_vlm.storage import Store, join

    data = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "eval", "test")}
    evaluate_options = {"every_steps": 3, "num_samples": 4, "max_new_tokens": 4}
    path = job_file(data=data, evaluate=evaluate_options, train={"max_steps": 8}, checkpoint={"every_steps": 2})
    here = _train(path, "run.name=here")
    base = join(bucket, tmp_path.name)
    _stop_after(monkeypatch, 5)
    with pytest.raises(Interrupted):
        _train(path, f"run.output_dir={base}", "run.name=there")
    there = _train(path, f"run.output_dir={base}", "run.name=there", resume=True)
    assert there.address == join(base, "there")
    names = {"/".join(name.split("/")[:1]).split("-a")[0] for name in Store(there.address).files()}
    assert names == {p.name.split("-a1-")[0] for p in here.root.iterdir()}
    for folder in ("final", "best"):
        weights = Path(fetch_folder(there.uri(folder))) / "adapter_model.safetensors"
        assert weights.read_bytes() == (here.root / folder / "adapter_model.safetensors").read_bytes()
    log = json.loads(Store(there.address).read("training_log.json") or b"")
    assert [line["loss"] for line in log["training_history"]] == [loss for _, loss, _ in _steps(here)]
    metrics = evaluate(load_job(path), there.uri("best"), tmp_path / "out")
    assert metrics["num_rows"] == 12
    with pytest.raises(RunError, match="cannot be used"):
        fetch_folder(there.uri("nothing"))


def test_a_run_that_stopped_early_is_done(job_file, scenes: Path, capsys) -> None:
    data = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "eval")}
    evaluate = {"every_steps": 1, "num_samples": 2, "max_new_tokens": 4, "metric": "parse_rate"}
    train_options = {"max_steps": 9, "early_stopping_patience": 2, "learning_rate": 1e-12}
    path = job_file(data=data, evaluate=evaluate, train=train_options)
    paths = _train(path)
    stopped_at = len(_steps(paths))
    assert stopped_at < 9
    _train(path, resume=True)
    assert "is finished" in capsys.readouterr().out
    assert len(_steps(paths)) == stopped_at


def test_a_run_folder_half_written_is_told(job_file) -> None:
    path = job_file(train={"max_steps": 1})
    paths = _train(path)
    paths.run.write_text(paths.run.read_text()[:40])
    with pytest.raises(RunError, match=r"is incomplete \(run.json is missing or cut off"):
        _train(path, resume=True)


def test_a_run_that_died_before_final_was_written_gets_the_trained_one(job_file) -> None:
    """The newest checkpoint is already of the last step: nothing is left to train, and `final/` is its adapter."""
    import shutil

    path = job_file(train={"max_steps": 3})
    paths = _train(path)
    trained = (paths.final / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(paths.final)
    run = json.loads(paths.run.read_text())
    paths.run.write_text(json.dumps(run | {"status": "running", "result": None}))
    _train(path, resume=True)
    assert (paths.final / "adapter_model.safetensors").read_bytes() == trained


def test_new_intervals_hold_on_resume(job_file) -> None:
    path = job_file(train={"max_steps": 2}, checkpoint={"every_steps": 100, "keep": 9})
    _train(path)
    paths = _train(path, "train.max_steps=6", "checkpoint.every_steps=2", resume=True)
    assert {p.name.split("-a")[0] for p in paths.root.glob("checkpoint-*")} == {f"checkpoint-{s}" for s in (2, 4, 6)}


def test_a_run_that_lost_rows_goes_on_without_their_files(
    job_file, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images deleted while training: their places are taken, counted over all attempts, and kept when it is resumed."""
    from ray_vlm.data import rows as data_rows
    from ray_vlm.train import driver

    monkeypatch.setattr(data_rows, "WAITS_S", (0.0, 0.0))
    copy = tmp_path / "scenes"
    shutil.copytree(scenes, copy)
    images = [image["file_name"] for image in json.loads((copy / "train.json").read_text())["images"]]
    launch = driver.launch

    def lose(*args: Any, **kwargs: Any) -> Any:
        for name in images[:9]:
            (copy / name).unlink(missing_ok=True)
        return launch(*args, **kwargs)

    monkeypatch.setattr(driver, "launch", lose)
    data = {"train": {"path": str(copy / "train.json")}, "eval": None, "on_bad_row": "quarantine"}
    train_section = {"max_steps": None, "global_batch_size": 4, "micro_batch_size": 4}
    path = job_file(data=data, train=train_section, checkpoint={"every_steps": 2})
    undisturbed = _train(path, "run.name=whole")
    for name in images[:9]:
        shutil.copy(scenes / name, copy / name)
    _stop_after(monkeypatch, 7)
    with pytest.raises(Interrupted):
        _train(path, "run.name=stopped")
    shutil.rmtree(undisturbed.root.parent / ".index")  # it is made again from what the run has kept
    paths = _train(path, "run.name=stopped", resume=True)
    assert _steps(paths) == _steps(undisturbed)
    lost_rows, expected = (json.loads(p.run.read_text())["result"]["lost_rows"] for p in (paths, undisturbed))
    assert lost_rows == expected
    assert len(lost_rows) == 9
    assert not paths.bad_rows.exists(), "they are no bad rows of this run: they were good when it began"
    (paths.root / data_rows.SIZES_FILE).write_bytes(b"PAR1")
    shutil.rmtree(undisturbed.root.parent / ".index")
    with pytest.raises(RunError, match="other rows"):
        _train(path, "run.name=stopped", "train.num_epochs=2", resume=True)


def test_a_run_keeps_the_shuffle_that_was_chosen_for_it(
    job_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """It goes on in windows where a new run would shuffle fully, since its process keeps more; and a run of an earlier
    version, which knew `true` only, goes on with a full shuffle where a new one would have windows."""
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Noise."}]
    rows = []
    for number in range(24):
        buffer = io.BytesIO()
        noise = np.random.default_rng(number).integers(0, 255, (40, 40, 3)).astype(np.uint8)
        Image.fromarray(noise).save(buffer, "PNG")
        rows.append({"id": str(number), "image": {"bytes": buffer.getvalue(), "path": "a.png"}, "conversations": turns})
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=4)
    source = {"path": str(tmp_path / "rows.parquet"), "format": "llava"}
    path = job_file(task="chat", data={"train": source}, train={"max_steps": 4})

    def stop(name: str, cache_bytes: int) -> RunPaths:
        """Stop a run after two steps."""
        with monkeypatch.context() as patch:
            patch.setattr(preparation, "CACHE_BYTES", cache_bytes)
            _stop_after(patch, 2)
            with pytest.raises(Interrupted):
                _train(path, f"run.name={name}")
        return RunPaths(tmp_path / "runs" / name)

    full, run = _train(path, "run.name=full"), stop("windows", 80_000)
    window = json.loads(run.resolved.read_text())["data"]["shuffle"]["window"]
    whole = _train(path, "run.name=whole", f"data.shuffle.window={window}")
    capsys.readouterr()
    assert _steps(_train(path, "run.name=windows", resume=True)) == _steps(whole) != _steps(full)
    assert f"\nshuffle: windows of {window} rows" in capsys.readouterr().out
    old = stop("old", 10**9)
    resolved = json.loads(old.resolved.read_text())
    assert resolved["data"]["shuffle"] == "full"
    old.resolved.write_text(json.dumps(resolved | {"data": resolved["data"] | {"shuffle": True}}))
    monkeypatch.setattr(preparation, "CACHE_BYTES", 80_000)
    assert _steps(_train(path, "run.name=old", resume=True)) == _steps(full)
