"""A plan whose arrays are files: the same steps, little in each process, and no harm from what happens to the files."""

import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ray_vlm.data import plan as module
from ray_vlm.data import plan_files
from ray_vlm.data.plan import MappedArray, Plan, epoch_order
from ray_vlm.data.plan_files import write_array
from ray_vlm.errors import RunError
from ray_vlm.runs.manifest import this_process
from tests.support import earlier_plan


def _draw_plan(rng: np.random.Generator, kind: int) -> Plan:
    num_rows = int(rng.integers(1, 150))
    factors = (
        None,
        rng.random(num_rows) * 3 + 1 / num_rows,
        rng.choice([0.5, 1.0, 2.0, 2.5, 1 / 3], num_rows) + 1.0 / num_rows,
        np.full(num_rows, float(rng.integers(1, 4))),
    )[kind]
    counted = bool(rng.random() < 0.4)
    return Plan(
        num_rows,
        int(rng.integers(1, 20)),
        int(rng.integers(1, 5)),
        int(rng.integers(1, 4)),
        num_epochs=float(rng.choice([0.5, 1.0, 2.0])),
        shuffle=bool(rng.random() < 0.7),
        seed=int(rng.integers(100)),
        repeat_factors=factors,
        token_costs=rng.lognormal(6, 1, num_rows).astype(np.float32) if rng.random() < 0.6 else None,
        whole_steps=bool(rng.random() < 0.5),
        tokens=rng.integers(5, 50, num_rows) if counted else None,
        max_tokens_per_micro_batch=100 if counted else 0,
    )


@pytest.mark.parametrize("kind", range(4))
def test_orders_are_those_of_earlier_versions(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 16)
    rng = np.random.default_rng(kind)
    for _ in range(40):
        plan = _draw_plan(rng, kind)
        most = plan.steps_per_epoch * plan.global_batch_size
        for epoch in range(2):
            before = earlier_plan.epoch_order(plan.num_rows, plan.shuffle, plan.seed, epoch, plan.repeat_factors, most)
            assert np.array_equal(plan.epoch_rows(epoch), before)


def test_the_order_of_many_rows_is_that_of_earlier_versions() -> None:
    factors = np.random.default_rng(0).choice([1.0, 1.4, 0.3], 2_500_000)
    for given in (None, factors):
        before = earlier_plan.epoch_order(len(factors), True, 7, 1, given)
        order = epoch_order(len(factors), True, 7, 1, given)
        assert order.dtype == np.int32
        assert np.array_equal(order, before)


@pytest.mark.parametrize("kind", range(4))
def test_a_stored_plan_has_the_same_steps(kind: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(10 + kind)
    for _ in range(15):
        plan = _draw_plan(rng, kind)
        stored = pickle.loads(pickle.dumps(plan.store(tmp_path)))
        assert (stored.num_steps, stored.accumulation) == (plan.num_steps, plan.accumulation)
        for step in range(plan.num_steps):
            assert np.array_equal(stored.step_rows(step), plan.step_rows(step))
            for rank in range(plan.world_size):
                assert stored.rank_step(step, rank) == plan.rank_step(step, rank)
        two = replace(plan, world_size=2)
        assert replace(stored, world_size=2).accumulation == two.accumulation, "as for workers that come and go"
    assert not list(tmp_path.glob(".*"))


def _large(num_rows: int = 1_000_000) -> Plan:
    rng = np.random.default_rng(0)
    factors, costs = rng.choice([1.0, 1.4], num_rows), rng.lognormal(6, 1, num_rows).astype(np.float32)
    return Plan(num_rows, 256, 4, 8, num_epochs=2, repeat_factors=factors, token_costs=costs)


def test_a_stored_plan_is_small_where_it_is_pickled(tmp_path: Path) -> None:
    plan = _large().store(tmp_path)
    plan.rank_step(0, 0)
    assert len(pickle.dumps(plan)) < 5000
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"repeat_factors", "token_costs", "order"}


def test_arrays_that_are_there_are_not_written_again_and_damaged_ones_are(tmp_path: Path) -> None:
    plan = _large(1000)
    plan.store(tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    plan.store(tmp_path)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    damaged = next(tmp_path.glob("token_costs-*"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    plan.store(tmp_path)
    assert damaged.read_bytes() == whole


@pytest.mark.parametrize("harm", ["gone", "torn", "empty", "another"])
def test_an_array_that_cannot_be_read_is_named(harm: str, tmp_path: Path) -> None:
    plan = pickle.loads(pickle.dumps(_large(1000).store(tmp_path)))
    costs = next(tmp_path.glob("token_costs-*"))
    data = costs.read_bytes()
    if harm == "gone":
        costs.unlink()
    elif harm == "another":
        np.save(costs, np.zeros(3))
    else:
        costs.write_bytes(data[: len(data) // 2] if harm == "torn" else b"")
    with pytest.raises(RunError, match=r"token_costs-.*cannot be read .*--resume"):
        plan.rank_step(0, 0)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file.*cannot be written.*choose another"):
        _large(10).store(tmp_path / "file")


def _copy_of(address: str) -> Path:
    return Path(address.removeprefix("store:")) / "copy"


def test_another_node_uses_a_copy_of_its_own(tmp_path: Path) -> None:
    plan = _large(1000)
    stored = pickle.dumps(plan.store(tmp_path / "first", f"store:{tmp_path}", _copy_of))
    shutil.move(tmp_path / "first", tmp_path / "copy")
    there = pickle.loads(stored)
    assert there.rank_step(3, 1) == plan.rank_step(3, 1)
    assert list((tmp_path / "copy").glob("order-*-0.npy"))


def test_a_damaged_order_is_made_anew(tmp_path: Path) -> None:
    plan = _large(1000)
    plan.store(tmp_path).step_rows(0)
    order = next(tmp_path.glob("order-*"))
    order.write_bytes(order.read_bytes()[:100])
    assert np.array_equal(plan.store(tmp_path).epoch_rows(0), plan.epoch_rows(0))
    assert np.array_equal(np.load(order), plan.epoch_rows(0))


def test_orders_of_past_epochs_do_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_KEPT", 0)
    plan = replace(_large(1000), num_epochs=5).store(tmp_path)
    first = plan.epoch_rows(0)
    for epoch in range(5):
        plan.epoch_rows(epoch)
    assert len(list(tmp_path.glob("order-*"))) == 2
    assert len(np.unique(first)) == 1000, "who has mapped an order keeps it"


def test_a_folder_without_room_leaves_the_order_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = _large(1000)
    stored = plan.store(tmp_path)

    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_files, "write_array", refuse)
        assert np.array_equal(stored.epoch_rows(0), plan.epoch_rows(0))
    assert "No space left on device" in caplog.text
    assert not [path for path in tmp_path.iterdir() if "order" in path.name]


_OTHER = """
import pickle, sys, time
from pathlib import Path
from ray_vlm.data import plan as module
made = module.epoch_order
def count(*arguments):
    with open(sys.argv[2], "a") as file:
        file.write("made\\n")
    time.sleep(0.5)
    return made(*arguments)
module.epoch_order = count
plan = pickle.loads(Path(sys.argv[1]).read_bytes())
print(int(plan.epoch_rows(0).sum()), plan.epoch_rows(0)[:3].tolist())
"""


def test_processes_that_need_an_order_at_once_make_it_once(tmp_path: Path) -> None:
    plan = _large(1000)
    (tmp_path / "plan").write_bytes(pickle.dumps(plan.store(tmp_path / "arrays")))
    command = [sys.executable, "-c", _OTHER, str(tmp_path / "plan"), str(tmp_path / "log")]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {other.communicate(timeout=120)[0] for other in others}
    order = plan.epoch_rows(0)
    assert outputs == {f"{int(order.sum())} {order[:3].tolist()}\n"}
    assert (tmp_path / "log").read_text() == "made\n"


def _claims(folder: Path, plan: Plan, holder: object) -> Path:
    claim = folder / f".order-{plan._order_key}-0.npy.claim"
    claim.write_text(holder if isinstance(holder, str) else json.dumps(holder))
    return claim


def test_the_claim_of_a_dead_process_is_taken(tmp_path: Path) -> None:
    plan = _large(1000).store(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    claim = _claims(tmp_path, plan, {"host": platform.node(), "pid": ended.pid, "started": time.time()})
    started = time.monotonic()
    assert np.array_equal(plan.epoch_rows(0), _large(1000).epoch_rows(0))
    assert time.monotonic() - started < 30
    assert not claim.exists()


@pytest.mark.parametrize("holder", ["another machine", "half a claim", "a process that hangs"])
def test_a_claim_that_is_not_followed_by_an_order_is_waited_for_in_vain_once(
    holder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.4)
    plan = _large(1000).store(tmp_path)
    holders = {"another machine": {**this_process(), "host": "another"}, "half a claim": '{"ho'}
    claim = _claims(tmp_path, plan, holders.get(holder, this_process()))
    future = time.time() + 3600  # a clock that went back
    os.utime(claim, (future, future))
    started = time.monotonic()
    assert np.array_equal(plan.epoch_rows(0), _large(1000).epoch_rows(0))
    assert 0.3 < time.monotonic() - started < 30
    assert not claim.exists()


def test_an_order_that_another_process_makes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = _large(1000).epoch_rows(0)
    plan = _large(1000).store(tmp_path)
    claim = _claims(tmp_path, plan, this_process())
    monkeypatch.setattr(module, "epoch_order", None)  # it is not made here
    threading.Timer(0.3, lambda: write_array(tmp_path / claim.name[1 : -len(".claim")], order)).start()
    assert np.array_equal(plan.epoch_rows(0), order)


def test_a_process_keeps_few_pages_of_a_plan_that_it_reads_at_random(tmp_path: Path) -> None:
    plan = _large().store(tmp_path)
    rng = np.random.default_rng(0)
    plan.epoch_rows(0)

    def mapped_kib() -> int:
        """Memory of this process in pages of the plan's files."""
        total, counts = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split()[0] and not line.split()[0].endswith(":"):
                counts = str(tmp_path) in line
            elif counts and line.startswith("Rss:"):
                total += int(line.split()[1])
        return total

    for step in rng.integers(0, plan.steps_per_epoch, 100).tolist():
        plan.rank_step(step, 0)
    assert isinstance(plan.token_costs, MappedArray)
    assert mapped_kib() < 512
    assert plan.token_costs.whole().sum() > 0
    assert mapped_kib() > 2000, "the measure sees pages"


def test_an_order_stays_readable_while_another_process_is_epochs_ahead(tmp_path: Path) -> None:
    """Loaders of a few rows run several epochs ahead of a worker, and the first to reach an epoch deletes old files."""
    plan = Plan(50, 8, 2, 2).store(tmp_path)
    behind, ahead = (pickle.loads(pickle.dumps(plan)) for _ in range(2))
    order = behind._order(3)
    for epoch in range(40):
        ahead.epoch_rows(epoch)
    assert len(list(tmp_path.glob("order-*.npy"))) == 40, "few rows: their orders are kept"
    for file in tmp_path.glob("order-*.npy"):
        file.unlink()
    assert np.array_equal(order[:50], Plan(50, 8, 2, 2).epoch_rows(3)), "the file was mapped when it was opened"
