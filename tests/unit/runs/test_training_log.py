"""`training_log.json`: readable while a run goes on and after its driver was killed, cheap to keep, and enough on its
own for every verb that looks at runs.
"""

import json
import platform
import time
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.cli import main
from ray_vlm.errors import RunError
from ray_vlm.runs.monitor import Monitor, TrainingLog, best_line, read_metrics, write_training_log
from ray_vlm.runs.paths import RunPaths
from ray_vlm.runs.read import complete_log, read_run
from ray_vlm.storage import Store, join
from tests.unit.runs.test_read import write_evaluation, write_run

JOB = {"method": {"name": "sft"}, "task": {"name": "detection"}, "model": {"name": "tiny"}}
JOB |= {"evaluate": {"metric": "f1_50"}, "run": {"name": "night"}}


def _dead_driver() -> dict[str, Any]:
    """A driver of this machine whose process is gone."""
    return {"host": platform.node(), "pid": 2**22 + 7, "started": 1.0}


def _write(path: Path, name: str, learning_rate: float = 1e-4, **changes: Any) -> Path:
    """Write the log of a run of two steps under any name."""
    entry = {"attempt": 1, "time": 1010.0, "epoch": 0.5}
    log: dict[str, Any] = {
        "run": {"name": name, "status": "finished", "step": 2, "num_steps": 2},
        "configuration": {**JOB, "run": {"name": None}, "train": {"learning_rate": learning_rate}},
        "training_history": [entry | {"step": step, "loss": 3.0 - step, "step_s": 1.0} for step in (1, 2)],
        "epoch_history": [entry | {"step": 2, "loss": 1.5, "learning_rate": learning_rate}],
        "validation_history": [entry | {"step": 2, "loss": 2.0, "f1_50": learning_rate * 1000}],
        "best_checkpoint": None,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(log | changes))
    return path


def test_the_log_can_be_read_at_any_moment_of_a_run(tmp_path: Path) -> None:
    log = TrainingLog(RunPaths(tmp_path), JOB, clock=lambda: 0.0)  # no time passes: nothing is due by the clock
    monitor = Monitor(tmp_path / "metrics.jsonl", 1, record=log.add)
    monitor.start(0, {}, num_steps=4)

    def read() -> dict[str, Any]:
        return json.loads((tmp_path / "training_log.json").read_text())

    assert read()["training_history"] == []
    assert (read()["run"]["status"], read()["run"]["num_steps"]) == ("running", 4)
    for step in (1, 2):
        monitor.write("train", step, step / 4, {"loss": float("nan"), "learning_rate": 1e-4})
    assert read()["training_history"] == []
    best = {"step": 2, "metrics": {"f1_50": 0.5, "loss": float("inf")}, "path": "best"}
    monitor.write("eval", 2, 0.5, {"loss": 2.0, "f1_50": 0.5}, best)
    assert [(entry["step"], entry["loss"]) for entry in read()["training_history"]] == [(1, None), (2, None)]
    assert read()["best_checkpoint"] == {"step": 2, "metrics": {"f1_50": 0.5, "loss": None}, "path": "best"}
    assert read()["configuration"] == JOB
    monitor.write("train", 3, 0.75, {"loss": 1.0})
    monitor.write("epoch", 3, 0.75, {"loss": 1.5, "learning_rate": 1e-4})
    assert read()["epoch_history"][0]["learning_rate"] == 1e-4
    assert read()["run"]["step"] == 3
    monitor.close()
    (tmp_path / "resolved.json").write_text(json.dumps(JOB))
    living = read()
    write_training_log(RunPaths(tmp_path), "finished", best)
    assert read() | {"run": {}} == living | {"run": {}}, "the end is written as the run was"
    assert (read()["run"]["status"], read()["run"]["step"]) == ("finished", 3)


def test_between_validations_the_clock_writes_and_a_long_log_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    took = 0.0

    def clock() -> float:
        now[0] += took  # called before and after a write, which thus takes `took`
        return now[0]

    log = TrainingLog(RunPaths(tmp_path), JOB, clock=clock)
    file = tmp_path / "training_log.json"

    def known(kind: str, step: int) -> int:
        log.add({"kind": kind, "attempt": 1, "step": step, "time": 0.0, "loss": 1.0})
        return len(json.loads(file.read_text())["training_history"]) if file.is_file() else 0

    assert known("train", 1) == 1
    assert known("train", 2) == 1
    now[0] += 10.0
    assert known("train", 3) == 3
    took = 2.0
    assert known("checkpoint", 3) == 3
    assert known("eval", 3) == 3
    written: list[int] = []

    def count(write: Any = log.write) -> None:
        written.append(1)
        write()

    monkeypatch.setattr(log, "write", count)
    for step in range(4, 10_000):
        log.add({"kind": "train", "attempt": 1, "step": step, "time": 0.0, "loss": 1.0})
    assert 1 <= len(written) <= 4, "at 2 s each, no more than the steps' half a millisecond pays for"


def test_keeping_the_log_costs_under_a_millisecond_a_step(tmp_path: Path) -> None:
    """Including a step's other lines, in a run with many earlier steps."""
    values = {"loss": 1.0, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens_per_s": 9.0, "step_s": 0.5, "data_s": 0.1}
    line = {"kind": "train", "attempt": 1, "time": time.time(), "epoch": 0.1} | values
    before = [line | {"step": step} for step in range(1, 10_001)]
    log = TrainingLog(RunPaths(tmp_path), JOB, before)
    monitor = Monitor(tmp_path / "metrics.jsonl", 2, record=log.add)
    monitor.start(10_000, {})
    started = time.process_time()  # CPU time: other processes may share the machine
    for step in range(10_001, 11_001):
        monitor.write("train", step, 0.1, values)
        if step % 250 == 0:
            monitor.write("eval", step, 0.1, {"loss": 1.0})
    assert (time.process_time() - started) / 1000 < 1e-3
    monitor.close()
    log.write()
    assert len(json.loads((tmp_path / "training_log.json").read_text())["training_history"]) == 11_000


def test_the_next_attempt_completes_what_a_killed_one_left(tmp_path: Path) -> None:
    killed = Monitor(tmp_path / "metrics.jsonl", 1)
    killed.start(0, {})
    for step in (1, 2, 3, 4):
        killed.write("train", step, 0.1, {"loss": float(step)})
        if step == 2:
            killed.write("eval", 2, 0.1, {"loss": 2.0, "f1_50": 0.5})
    training_log = TrainingLog(RunPaths(tmp_path), JOB, read_metrics(tmp_path / "metrics.jsonl"))
    monitor = Monitor(tmp_path / "metrics.jsonl", 2, record=training_log.add)
    monitor.start(3, {})
    log = json.loads((tmp_path / "training_log.json").read_text())
    assert [entry["step"] for entry in log["training_history"]] == [1, 2, 3], "step 4 is done again"
    assert log["best_checkpoint"]["step"] == 2
    assert log["run"]["step"] == 3
    monitor.write("train", 4, 0.1, {"loss": 9.0})
    monitor.write("checkpoint", 4, 0.1, {"checkpoint_s": 1.0})
    log = json.loads((tmp_path / "training_log.json").read_text())
    assert [(entry["attempt"], entry["loss"]) for entry in log["training_history"]][-1] == (2, 9.0)


def test_looking_at_a_run_whose_driver_was_killed_completes_its_log(tmp_path: Path, capsys) -> None:
    folder = write_run(
        tmp_path / "a", status="running", attempts=[{"attempt": 1, "started": 1.0, "driver": _dead_driver()}]
    )
    _write(folder / "training_log.json", "a", run={"name": "a", "status": "running"}, training_history=[])
    assert main(["runs", "show", str(folder)]) == 0
    assert "died" in capsys.readouterr().out
    log = json.loads((folder / "training_log.json").read_text())
    assert (log["run"]["status"], len(log["training_history"])) == ("died", 2)
    assert log["best_checkpoint"]["metrics"]["f1_50"] == pytest.approx(0.1)
    state = (folder / "training_log.json").stat().st_mtime_ns
    assert main(["runs", "export", str(folder), "--csv", "-"]) == 0
    assert (folder / "training_log.json").stat().st_mtime_ns == state, "once"
    living = write_run(tmp_path / "b", status="running", attempts=[{"driver": _dead_driver() | {"host": "elsewhere"}}])
    complete_log(read_run(str(living)))
    assert not (living / "training_log.json").exists(), "another machine may still drive it"


def test_in_an_object_store_too(bucket: str, tmp_path: Path) -> None:
    """The attempt publishes its log, and a reader completes it."""
    from ray_vlm.runs.trackers import KeptFiles

    address = join(bucket, f"{tmp_path.name}/far")
    made = tmp_path / "made"
    made.mkdir()
    paths, store = RunPaths(made, address), Store(address)
    driver = {"status": "running", "attempts": [{"attempt": 1, "started": 1.0, "driver": _dead_driver()}]}
    store.write("run.json", json.dumps(driver).encode())
    store.write("resolved.json", json.dumps(JOB).encode())
    log, files = TrainingLog(paths, JOB), KeptFiles(paths)

    def publish() -> None:
        paths.publish(paths.metrics)
        files.publish(everything=monitor.closed)

    monitor = Monitor(paths.metrics, 1, publish=publish, record=log.add)
    monitor.start(0, {}, num_steps=9)
    for name in ("wandb/offline-run-1/run-x.wandb", "wandb/debug.log", "tensorboard/events.1"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text("x")
    monitor.write("train", 1, 0.1, {"loss": 1.0})
    monitor.publish()
    assert {"training_log.json", "wandb/offline-run-1/run-x.wandb", "tensorboard/events.1"} <= set(store.files())
    assert "wandb/debug.log" not in store.files()
    (made / "wandb/offline-run-1/run-x.wandb").write_text("more")
    monitor.publish()
    assert store.read("wandb/offline-run-1/run-x.wandb") == b"x", "it grows all the time: now and then is enough"
    files.publish(everything=True)
    assert store.read("wandb/offline-run-1/run-x.wandb") == b"more"
    assert json.loads(store.read("training_log.json") or b"")["training_history"] == []
    run = read_run(address)
    assert (run.status, run.step) == ("died", 1)
    complete_log(run)
    content = json.loads(store.read("training_log.json") or b"")
    assert (content["run"]["status"], len(content["training_history"])) == ("died", 1)
    alone = read_run(f"{join(address, 'training_log.json')}")
    assert (alone.name, alone.step, alone.num_steps) == ("far", 1, 9)


def test_a_log_alone_is_a_run_for_every_verb(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = _write(tmp_path / "mail" / "from_ada.json", "night", 1e-4), _write(tmp_path / "x" / "log.json", "day", 3e-4)
    run = read_run(str(a))
    assert (run.name, run.status, run.step, run.num_steps, run.num_attempts) == ("night", "finished", 2, 2, 1)
    assert run.best is not None
    assert (run.best["step"], run.wall_s) == (2, 1.0)
    assert run.faults == ()
    assert main(["runs", "show", "mail/from_ada.json"]) == 0
    output = capsys.readouterr().out
    assert "sft of detection on tiny" in output
    assert "the best by f1_50" in output
    assert "a training log without its run's folder, of the run night" in output
    assert "ray_vlm ?" not in output
    assert main(["runs", "export", str(a), "--csv", "-"]) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "kind",
        *["train"] * 2,
        "epoch",
        "eval",
    ]
    assert main(["runs", "plot", str(a), "--metric", "loss"]) == 0
    assert main(["runs", "export", str(a), "--csv"]) == 0
    assert {p.name for p in (tmp_path / "mail").iterdir()} == {
        "from_ada.json",
        *("from_ada-plot.png", "from_ada-plot.svg", "from_ada-metrics.csv"),
    }
    capsys.readouterr()
    assert main(["runs", "compare", str(a), str(b), "--html"]) == 0
    output = capsys.readouterr().out
    assert "train.learning_rate" in output
    assert "0.300*" in output
    assert "a training log without its run's folder" in output
    assert (tmp_path / "mail" / "compare-night-vs-day.html").is_file()


def test_a_folder_with_nothing_but_the_log_is_that_run(tmp_path: Path, capsys) -> None:
    _write(tmp_path / "a" / "training_log.json", "night")
    assert read_run(str(tmp_path / "a")).name == "night"
    assert main(["runs", "list", str(tmp_path)]) == 0
    assert "finished" in capsys.readouterr().out
    _write(tmp_path / "a" / "training_log.json", "night", run=None)  # as earlier versions wrote it
    assert (read_run(str(tmp_path / "a")).name, read_run(str(tmp_path / "a")).status) == ("a", "?")


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "cut off"), ("[]", "no training log"), ('{"configuration": {}}', "no training log")]
)
def test_a_file_that_is_no_log_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RunError, match=reason):
        read_run(str(tmp_path / "x.json"))


def test_odd_entries_of_a_log_are_reported_and_left_out(tmp_path: Path) -> None:
    odd = _write(tmp_path / "x.json", "a", training_history=[None, {"step": "1"}], validation_history=3)
    run = read_run(str(odd))
    assert [line["kind"] for line in run.lines] == ["epoch"]
    assert "2 of 2 entries of its training_history are altered" in run.faults


def test_results_go_to_a_folder_under_the_names_of_their_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        write_run(tmp_path / "outputs" / name)
    assert main(["runs", "plot", "a", "--metric", "loss", "--output", "plots/"]) == 0
    assert main(["runs", "plot", "a", "b", "--metric", "loss", "--output", "plots"]) == 0, (
        "a folder that is there needs no slash"
    )
    assert main(["runs", "export", "a", "--csv", "plots/"]) == 0
    assert main(["runs", "compare", "a", "b", "--html", "plots"]) == 0
    names = {"a.png", "a.svg", "a-vs-b.png", "a-vs-b.svg", "a.csv", "compare-a-vs-b.html"}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == names
    assert main(["runs", "plot", "a", "--output", "elsewhere"]) == 2
    assert "elsewhere/" in capsys.readouterr().err


def test_two_comparisons_do_not_overwrite_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        write_evaluation(write_run(tmp_path / "outputs" / name), "best", 0.5)
    assert main(["runs", "compare", "a", "b", "--html"]) == 0
    assert main(["runs", "compare", "a", "c", "--html"]) == 0
    assert main(["runs", "compare", *["a", "b", "c"] * 20, "--html"]) == 0
    pages = sorted(path.name for path in (tmp_path / "outputs").glob("*.html"))
    assert pages[:1] == ["compare-a-vs-b.html"]
    assert "compare-a-vs-c.html" in pages
    assert len(pages) == 3


def test_runs_are_found_by_name_in_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "outputs" / "scenes")
    for name in ("001", "002"):
        write_run(tmp_path / "outputs" / "sweep" / "trials" / name)
    (tmp_path / "scenes").mkdir()  # a folder of data by the same name
    assert main(["runs", "show", "scenes"]) == 0
    assert main(["runs", "list", "sweep"]) == 0
    assert "2 runs" not in capsys.readouterr().out
    assert main(["runs", "list", "sweep"]) == 0
    output = capsys.readouterr().out
    assert "outputs/sweep/trials/001" in output
    assert "outputs/sweep/trials/002" in output
    assert main(["runs", "show", "002"]) == 0, "a trial whose name no other run has"
    assert main(["runs", "show", "sweep/trials/001"]) == 0
    capsys.readouterr()
    assert main(["runs", "show", "sweep"]) == 1
    assert "a folder of 2 runs: `ray-vlm runs list sweep`" in capsys.readouterr().err
    assert main(["runs", "show", "nowhere"]) == 1
    assert "nor a run of that name in outputs/" in capsys.readouterr().err
    assert main(["runs", "list", "nowhere"]) == 0
    assert "no runs under nowhere" in capsys.readouterr().out


def test_of_equal_validations_the_one_with_the_lower_loss_is_the_best() -> None:
    lines = [
        {"kind": "eval", "attempt": 1, "step": step, "f1_50": f1, "loss": loss}
        for step, f1, loss in ((1, 0.0, 3.0), (2, 0.0, 2.0), (3, 0.0, 2.0), (4, None, 1.0))
    ]
    best, lowest = best_line(lines, "f1_50"), best_line(lines, "loss")
    assert best is not None
    assert lowest is not None
    assert (best["step"], lowest["step"]) == (3, 4)
    assert best_line(lines, "reward") is None
