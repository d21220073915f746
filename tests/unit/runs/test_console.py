"""Progress lines: none for short work, then with rate and time left, and where they are sent."""

import logging
import time
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.distributed import DistributedContext
from ray_vlm.logs import PROGRESS, run_output
from ray_vlm.runs import console
from ray_vlm.runs.console import Console, Progress, follow, lasting, track
from ray_vlm.runs.monitor import Monitor, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.run_log import to_metrics


def test_what_is_quick_says_nothing(lines: list[str]) -> None:
    with lasting("loading"):
        assert list(track(range(1000), "checking rows", 1000)) == list(range(1000))
    assert lines == []


def test_what_lasts_says_how_far_it_is_ever_less_often(lines: list[str]) -> None:
    now = [100.0]
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


def test_work_that_cannot_say_how_far_it_is_says_how_long_it_has_taken(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr(console, "_FIRST_S", 0.01)
    with lasting("loading a base", lambda: "0.5 of 2.0 GiB in the cache"):
        while not lines:
            time.sleep(0.01)
    assert lines == ["loading a base: 0 s so far, 0.5 of 2.0 GiB in the cache"]


def test_progress_goes_to_stderr_but_that_of_a_run(capsys: pytest.CaptureFixture) -> None:
    PROGRESS.info("a line")
    with run_output():
        PROGRESS.info("another")
    PROGRESS.info("a third")
    assert capsys.readouterr() == ("another\n", "a line\na third\n")


def test_rank_0_s_lines_are_lines_of_its_run(tmp_path: Path, lines: list[str]) -> None:
    paths, logger = RunPaths(tmp_path), logging.getLogger("ray_vlm.train.worker")
    for rank in (0, 1):
        with to_metrics(paths, rank, 2, 5):
            PROGRESS.info("loading a base: 5 s so far")
            logger.info("\nstopping")
            logger.warning("step 7", extra={"step": 7})
            logger.debug("a detail")
            Console(10, 1).show({"kind": "note", "text": "a line of the file"})
    written = read_metrics(paths.metrics)
    assert [(line["kind"], line["attempt"], line["step"], line["text"]) for line in written] == [
        ("progress", 2, 5, "loading a base: 5 s so far"),
        ("note", 2, 5, "stopping"),
        ("note", 2, 7, "step 7"),
    ]
    lines.clear()
    for line in written:
        Console(10, 1).show(line)
    assert lines == ["loading a base: 5 s so far", "stopping", "step 7"]


def test_a_driver_says_that_it_waits_until_its_workers_speak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr(console, "_FIRST_S", 0.01)
    monkeypatch.setattr(console, "_EVERY_S", 0.01)
    with follow(paths := RunPaths(tmp_path), Console(10, 1)):
        while not lines:
            time.sleep(0.01)
        monitor = Monitor(paths.metrics, attempt=1)
        monitor.text("note", 0, "here")
        while "here" not in lines:
            time.sleep(0.01)
        time.sleep(0.05)
    monitor.close()
    assert set(lines) == {"waiting for the workers: 0 s so far", "here"}


def test_validation_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    from ray_vlm.config.schema import Evaluate
    from ray_vlm.evaluate.validate import AnswerValidation

    records: Any = range(5)
    validation = AnswerValidation(records, None, Evaluate(batch_size=2), "detection", DistributedContext())  # type: ignore[arg-type]
    monkeypatch.setattr(console, "_FIRST_S", -1.0)
    for _ in validation.batches():
        time.sleep(0.001)
    assert lines[0].startswith("validation: 2 of 5 rows, ")
    assert lines[-1].startswith("validation: 5 rows in ")
