"""Progress lines: none for short work, then with rate and time left, and where they are sent."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.distributed import DistributedContext
from ray_vlm.runs import console
from ray_vlm.runs.console import Console, Progress, follow, lasting, send_progress, track
from ray_vlm.runs.monitor import Monitor, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.attempt import Attempt
from ray_vlm.train.run_log import send_worker_progress


def test_what_is_quick_says_nothing() -> None:
    lines: list[str] = []
    with send_progress(lines.append), lasting("loading"):
        assert list(track(range(1000), "checking rows", 1000)) == list(range(1000))
    assert lines == []


def test_what_lasts_says_how_far_it_is_ever_less_often() -> None:
    lines: list[str] = []
    now = [100.0]
    with send_progress(lines.append):
        progress = Progress("checking rows", 4000, clock=lambda: now[0])
        for done in range(4000):
            progress.reach(done)
            now[0] += 0.125  # 500 seconds in all
        progress.reach(4000)
        progress.reach(4000)
    assert lines[0] == "checking rows: 40 of 4,000 rows, 8 a second, 8:15 min left"
    assert lines[1].startswith("checking rows: 120 of 4,000 rows")
    assert 15 < len(lines) < 30
    assert lines[-1] == "checking rows: 4,000 rows in 8:20 min"


def test_work_that_cannot_say_how_far_it_is_says_how_long_it_has_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_FIRST_S", 0.01)
    lines: list[str] = []
    there = threading.Event()

    def write(text: str) -> None:
        lines.append(text)
        there.set()

    with send_progress(write), lasting("loading a base", lambda: "0.5 of 2.0 GiB in the cache"):
        assert there.wait(20)
    assert lines == ["loading a base: 0 s so far, 0.5 of 2.0 GiB in the cache"]


def test_lines_go_to_stderr_unless_a_run_takes_them(capsys: pytest.CaptureFixture) -> None:
    console.LOGGER.info("a line")
    with send_progress(lambda text: None):
        console.LOGGER.info("another")
    console.LOGGER.info("a third")
    assert capsys.readouterr() == ("", "a line\na third\n")


def test_a_worker_s_lines_are_lines_of_its_run(tmp_path: Path) -> None:
    paths, attempt = RunPaths(tmp_path), Attempt(2, "token")
    for rank in (0, 1):
        with send_worker_progress(paths, DistributedContext(rank, 2, "cpu", ray=True), attempt):
            console.LOGGER.info("loading a base: 5 s so far")
    (line,) = read_metrics(paths.metrics)
    assert (line["kind"], line["attempt"], line["text"]) == ("progress", 2, "loading a base: 5 s so far")
    lines: list[str] = []
    Console(10, 1, lines.append).show(line)
    assert lines == ["loading a base: 5 s so far"]


def test_a_driver_says_that_it_waits_until_its_workers_speak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_FIRST_S", 0.01)
    monkeypatch.setattr(console, "_EVERY_S", 0.01)
    lines: list[str] = []
    with follow(paths := RunPaths(tmp_path), Console(10, 1, lines.append)):
        while not lines:
            time.sleep(0.01)
        monitor = Monitor(paths.metrics, attempt=1)
        monitor.note(0, "here")
        while "here" not in lines:
            time.sleep(0.01)
        time.sleep(0.05)
    monitor.close()
    assert set(lines) == {"waiting for the workers: 0 s so far", "here"}


def test_validation_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_vlm.config.schema import Evaluate
    from ray_vlm.evaluate.validate import AnswerValidation

    records: Any = range(5)
    validation = AnswerValidation(records, None, Evaluate(batch_size=2), "detection", DistributedContext())  # type: ignore[arg-type]
    monkeypatch.setattr(console, "_FIRST_S", -1.0)
    lines: list[str] = []
    with send_progress(lines.append):
        for _ in validation.batches():
            time.sleep(0.001)
    assert lines[0].startswith("validation: 2 of 5 rows, ")
    assert lines[-1].startswith("validation: 5 rows in ")
