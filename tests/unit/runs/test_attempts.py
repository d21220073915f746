"""The outcome of each attempt, from `run.json` and the lines of metrics."""

from typing import Any

import pytest

from ray_vlm.runs.attempts import complete, tell_attempts


def _start(attempt: int, step: int, workers: int = 2) -> dict[str, Any]:
    return {"kind": "start", "attempt": attempt, "step": step, "num_workers": workers, "time": 100.0 + attempt}


def _steps(attempt: int, first: int, last: int) -> list[dict[str, Any]]:
    return [{"kind": "train", "attempt": attempt, "step": step} for step in range(first, last + 1)]


def test_an_attempt_that_ends_between_checkpoints_loses_steps() -> None:
    listed = [
        {"attempt": 1, "status": "failed", "error": "worker 1 died", "ended": 5.0},
        {"attempt": 2, "status": "finished", "ended": 9.0},
    ]
    lines = [_start(1, 0), *_steps(1, 1, 7), _start(2, 4), *_steps(2, 5, 10)]
    attempts = complete(listed, lines)
    assert [(a["from_step"], a["to_step"], a.get("lost_steps")) for a in attempts] == [(0, 7, 3), (4, 10, None)]
    assert tell_attempts(attempts) == (
        "2 attempts: worker 1 died at step 7 (3 steps done again). 3 of 10 steps done twice."
    )
    assert complete(attempts, lines) == attempts, "writing it down again changes nothing"


def test_attempts_that_ray_began_by_itself_are_found() -> None:
    """Ray changed the number of workers twice; the run's final status belongs to the last attempt."""
    listed = [{"attempt": 1, "status": "finished", "ended": 300.0, "driver": {"pid": 1}}]
    lines = [_start(1, 0, 2), *_steps(1, 1, 6), _start(2, 4, 1), *_steps(2, 5, 8), _start(3, 8, 2), *_steps(3, 9, 9)]
    attempts = complete(listed, lines)
    assert [a["status"] for a in attempts] == ["resized", "resized", "finished"]
    assert [a["workers"] for a in attempts] == [2, 1, 2]
    assert [a["ended"] for a in attempts] == [102.0, 103.0, 300.0]
    assert tell_attempts(attempts) == (
        "3 attempts: went on with 1 worker at step 6 (2 steps done again); went on with 2 workers at step 8. "
        "2 of 9 steps done twice."
    )


def test_one_that_never_trained_and_one_that_was_stopped() -> None:
    listed = [
        {"attempt": 1, "status": "failed", "error": "ControllerError: no room\nmore"},
        {"attempt": 2, "status": "interrupted"},
        {"attempt": 3, "status": "running"},
        {"attempt": 4, "status": "preempted", "error": "the machine of worker 0 will be taken away in 12 s"},
        {"attempt": 5, "status": "finished"},
    ]
    lines = [_start(2, 0), *_steps(2, 1, 3), _start(3, 3), *_steps(3, 4, 5), _start(4, 3), *_steps(4, 4, 6)]
    lines += [_start(5, 6), *_steps(5, 7, 8)]
    assert tell_attempts(complete(listed, lines)) == (
        "5 attempts: ControllerError: no room before its first step; stopped by a signal at step 3; ended without "
        "a message at step 5 (2 steps done again); the machine of worker 0 will be taken away in 12 s at step 6. "
        "2 of 8 steps done twice."
    )


@pytest.mark.parametrize(
    ("status", "extension"), [("finished", "was extended to step 10"), ("interrupted", "was extended")]
)
def test_an_extension_is_no_fault(status: str, extension: str) -> None:
    listed = [{"attempt": 1, "status": "finished"}, {"attempt": 2, "status": status}]
    lines = [_start(1, 0), *_steps(1, 1, 6), _start(2, 6), *_steps(2, 7, 10)]
    assert tell_attempts(complete(listed, lines)) == f"2 attempts: finished at step 6 and {extension}."


def test_a_run_that_went_through_at_once_says_nothing() -> None:
    assert tell_attempts(complete([{"attempt": 1, "status": "finished"}], [_start(1, 0), *_steps(1, 1, 4)])) is None
