"""Run folders: complete files or none, lines with odd values, the console's lines."""

import json
import math
import threading
import time
from pathlib import Path

import pytest

from ray_vlm.errors import RunError
from ray_vlm.logs import run_output
from ray_vlm.runs.console import Console, follow
from ray_vlm.runs.manifest import claim_run
from ray_vlm.runs.monitor import Monitor, read_metrics
from ray_vlm.runs.paths import RunPaths, write_folder, write_json


def test_a_folder_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "best"
    write_folder(target, lambda folder: (folder / "a").write_text("old") and None)

    def broken(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(target, broken)
    assert (target / "a").read_text() == "old"
    write_folder(target, lambda folder: (folder / "b").write_text("new") and None)
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_json_is_never_half_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_counter_goes_on_and_two_launches_never_share(tmp_path: Path) -> None:
    made: list[str] = []
    threads = [
        threading.Thread(target=lambda: made.append(claim_run(str(tmp_path), None, "sft").root.name)) for _ in range(8)
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sorted(made) == [f"sft-{i:03d}" for i in range(1, 9)]


def test_an_output_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        claim_run(str(tmp_path / "file" / "runs"), "a", "sft")


def test_monitor_lines_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    import numpy as np

    monitor = Monitor(tmp_path / "m.jsonl", attempt=2)
    monitor.write("train", 1, 0.5, {"loss": math.nan, "learning_rate": np.float32(0.5), "grad_norm": math.inf})
    monitor.close()
    (line,) = read_metrics(tmp_path / "m.jsonl")
    assert (line["loss"], line["learning_rate"], line["grad_norm"], line["attempt"]) == (None, 0.5, None, 2)


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    line = {"kind": "train", "attempt": 1, "step": 1}
    (tmp_path / "m.jsonl").write_text(json.dumps(line) + '\n{"kind": "train"}\n{"kind": "tr')
    assert read_metrics(tmp_path / "m.jsonl") == [line]
    monitor = Monitor(tmp_path / "m.jsonl", attempt=2)
    monitor.start(0, {})
    monitor.close()
    assert [line["kind"] for line in read_metrics(tmp_path / "m.jsonl")] == ["train", "start"]


def test_logging_costs_under_a_millisecond(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "m.jsonl", attempt=1)
    started = time.process_time()  # CPU time: other processes may share the machine
    for step in range(500):
        monitor.write("train", step, 0.1, {"loss": 1.0, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens_per_s": 9.0})
    assert (time.process_time() - started) / 500 < 1e-3


def test_console_shows_one_line_every_n_steps_and_follows_a_file(tmp_path: Path, lines: list[str]) -> None:
    console = Console(num_steps=10, log_every_steps=5)
    path = tmp_path / "metrics.jsonl"
    with follow(RunPaths(tmp_path), console):
        monitor = Monitor(path, attempt=1)
        monitor.start(0, {"language": {"trainable": 1, "total": 10}})
        for step in range(1, 11):
            values = {"loss": 1.0, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens_per_s": 1234.0, "step_s": 0.1}
            monitor.write("train", step, 0.1, values)
        monitor.write("eval", 10, 1.0, {"loss": 0.5, "f1_50": 0.25})
        monitor.close()
    assert lines[0].startswith("trainable weights: 1,  10.00% of the base's             10")
    assert lines[1].startswith("step  5/10  epoch 0.10  loss   1.0000  lr 1.00e-04  grad   0.500     1,234 tok/s  left")
    assert lines[2].startswith("step 10/10")
    assert lines[3] == "validation at step 10: loss 0.5000  f1_50 0.2500"
    assert len(lines) == 4


def test_time_left_is_not_that_of_the_start(lines: list[str]) -> None:
    """The first step of an attempt is slower: it waits for the loaders and fills caches."""
    console = Console(num_steps=200, log_every_steps=1)
    line = {"kind": "train", "attempt": 1, "loss": 1.0, "epoch": 0.5}
    for step, ended in ((101, 60.0), (102, 62.0), (103, 64.0)):
        console.show(line | {"step": step, "time": ended, "step_s": ended})
    console.show({"kind": "start", "attempt": 2, "step": 103, "time": 70.0, "trainable": {}})
    console.show(line | {"step": 104, "time": 99.0, "step_s": 20.0})
    console.show(line | {"step": 200, "time": 199.0, "step_s": 1.0})
    assert [text.rpartition("left")[2].strip() for text in lines if text.startswith("step")] == [
        *("-", "3:16 min", "3:14 min", "-", "0 s")
    ]


def test_a_reader_who_leaves_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> None:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Gone())
    with run_output():
        Console(10, 1).show({"kind": "note", "attempt": 1, "step": 1, "text": "on it goes"})
    with pytest.raises(BrokenPipeError):  # any other work ends, quietly: `main` returns 141
        Console(10, 1).show({"kind": "note", "attempt": 1, "step": 1, "text": "on it goes"})


def test_tensorboard_gets_numbers_and_pictures_and_goes_on_where_a_run_was_resumed(tmp_path: Path) -> None:
    from PIL import Image
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import directory_check  # noqa: F401  (the reader below follows its format)

    from ray_vlm.runs.trackers import TensorBoardTracker

    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        tracker = TensorBoardTracker(tmp_path / "tb", first)
        monitor = Monitor(tmp_path / f"m{first}.jsonl", 1, [tracker])
        for step in steps:
            monitor.write("train", step, 0.1, {"loss": math.nan if step == 2 else 1.0, "grad_norm_vision": 2.0})
        monitor.write("eval", steps[-1], 0.1, {"f1_50": 0.5})
        monitor.pictures(steps[-1], lambda: [("a", Image.new("RGB", (8, 8)))])
        monitor.close()
    events = []
    for file in sorted((tmp_path / "tb").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            events.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    names = {value.tag for event in events for value in event.summary.value}
    assert names == {"train/batch_loss", "train/epoch", "train/grad_norm_vision", "eval/f1_50", "eval/sample_0"}
    assert any(event.session_log.status == 1 and event.step == 3 for event in events), "step 3 is done again"


def test_pictures_are_drawn_for_trackers_alone(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "m.jsonl", 1)
    monitor.pictures(1, lambda: pytest.fail("nobody looks"))
    monitor.close()
