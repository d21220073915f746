"""The stalled worker is identified by the statuses of all; a thread that sees no progress writes them."""

import json
import threading
import time
from pathlib import Path

from ray_vlm.methods.clock import Clock
from ray_vlm.storage import Store
from ray_vlm.train.attempt import Attempt
from ray_vlm.train.watchdog import Watchdog, WorkerStatus, describe_stall, find_phase, is_waiting, take_sentence


def _at(
    rank: int, phase: str, batches: int, steps: int, rows: tuple[str, ...] = (), waits: bool = False
) -> WorkerStatus:
    return WorkerStatus(rank, f"host{rank}", 100 + rank, phase, batches, steps, 3, rows, waits)


def test_the_one_that_is_behind_is_named_with_its_rows() -> None:
    statuses = [_at(0, "step", 4, 4, ("a", "b")), _at(1, "data", 4, 3, ("c",))]
    assert describe_stall(statuses, 2, 60) == "worker 1 on host1 hangs for 1 minutes: waiting for rows, step 3, rows c"
    statuses = [_at(0, "step", 4, 2), _at(1, "forward", 4, 2, tuple("abcdefghij"))]
    assert describe_stall(statuses, 2, 60).startswith("worker 1 on host1 hangs")
    assert describe_stall(statuses, 2, 60).endswith("the forward pass, step 3, rows a, b, c, d, e, f, g, h and 2 more")


def test_one_that_is_seen_to_wait_for_others_is_not_the_one() -> None:
    statuses = [_at(0, "batch", 3, 2, ("a",), waits=True), _at(1, "batch", 3, 2, ("b",))]
    assert describe_stall(statuses, 2, 60) == "worker 1 on host1 hangs for 1 minutes: sampling answers, step 3, rows b"
    assert not is_waiting(threading.get_ident())


def test_a_collective_in_which_all_hang_and_a_worker_that_says_nothing() -> None:
    statuses = [_at(0, "step", 4, 4, ("a",)), _at(1, "step", 4, 4, ("b",))]
    assert describe_stall(statuses, 2, 90).startswith(
        "all workers hang for 1.5 minutes in the same place: the backward"
    )
    assert describe_stall(statuses[:1], 2, 60).startswith("worker 1 said nothing for 1 minutes while the others waited")
    assert describe_stall(statuses[:1], 1, 60).startswith("worker 0 on host0 hangs")


def test_the_innermost_phase_counts() -> None:
    assert find_phase([]) == "between"
    assert find_phase(["batch", "data"]) == "data"
    assert find_phase(["step", "forward"]) == "forward"
    assert find_phase(["validation", "something"]) == "validation"


def test_two_workers_agree_on_who_is_behind(tmp_path: Path) -> None:
    """Both clocks stop; both workers write stacks, one writes the message, both end."""
    store, ended, clocks = Store(tmp_path), [], [Clock("cpu"), Clock("cpu")]
    stands = [_at(0, "step", 2, 2), _at(1, "forward", 2, 1, ("row 7",))]
    dogs = [
        Watchdog(clock, lambda at=at: at, store, Attempt(3, "t"), 2, 0.3, lambda at=at: ended.append(at.rank))
        for clock, at in zip(clocks, stands, strict=True)
    ]
    for dog in dogs:
        dog.__enter__()
    until = time.monotonic() + 20
    while len(ended) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert sorted(ended) == [0, 1]
    stacks = (tmp_path / "stalls" / "attempt-3-rank-1.txt").read_text()
    assert "row 7" in stacks
    assert "test_two_workers_agree" in stacks, "the stack of the thread that should have moved"
    assert threading.main_thread().name in stacks
    sentence = take_sentence(store, 3)
    assert sentence is not None
    assert sentence.startswith(
        "worker 1 on host1 hangs for 0.005 minutes: the forward pass, step 3, rows row 7. Stacks"
    )
    assert take_sentence(store, 3) is None, "once"


def test_a_sentence_of_an_earlier_attempt_is_not_taken(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(".stall.json", json.dumps({"attempt": 2, "text": "old"}).encode())
    assert take_sentence(store, 3) is None
    store.write(".stall.json", b'{"atte')
    assert take_sentence(store, 3) is None


def test_phases_and_ticks_keep_it_quiet(tmp_path: Path) -> None:
    clock, ended = Clock("cpu"), []
    with Watchdog(clock, lambda: _at(0, "data", 1, 1), Store(tmp_path), Attempt(1, "t"), 1, 1.5, ended.append):
        for _ in range(8):
            with clock.phase("forward"):
                time.sleep(0.25)
            clock.tick()
    assert not ended
    assert clock.entered["forward"] == 8
    assert clock.inside == []
    assert not (tmp_path / "stalls").exists()
