"""What a rank asks of the storage and gets from other ranks does not grow with their number. Threads are the ranks."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_vlm.config.schema import Checkpoint
from ray_vlm.data.rows import ListedRows
from ray_vlm.evaluate import validate
from ray_vlm.methods import reference
from ray_vlm.methods.clock import Clock
from ray_vlm.methods.loss_scale import LossScale
from ray_vlm.runs.paths import RunPaths, open_run
from ray_vlm.storage import Store
from ray_vlm.train import watchdog
from ray_vlm.train.attempt import Attempt, begin_attempt, check_owner
from ray_vlm.train.callbacks.checkpointing import CheckpointCallback
from ray_vlm.train.callbacks.metrics import StepTimer
from ray_vlm.train.callbacks.nonfinite import read_bad_steps
from ray_vlm.train.run_context import Progress, RunContext
from ray_vlm.train.stop import watch
from ray_vlm.train.watchdog import Watchdog, WorkerStatus
from tests.support.ranks import CountingStore, Group, PlayedRank, on_ranks

FEW, MANY = 4, 256
MOST_OPERATIONS = 4  # by which a rank among many may exceed one among few


class _Trainer:
    """Writes the names of files that a trainer writes, under ZeRO-3."""

    def __init__(self, rank: int):
        self.rank, self.state = rank, SimpleNamespace(global_step=5, save_to_json=self._save_state)

    def gather(self) -> None:
        pass

    def save_training_state(self, folder: Path) -> None:
        parts = folder / "global_step5"
        parts.mkdir()
        (folder / f"rng_state_{self.rank}.pth").write_text(f"state {self.rank}")
        for name in ("bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt", "zero_pp_rank_{}_mp_rank_00_model_states.pt"):
            (parts / name.format(self.rank)).write_text(name)
        if self.rank == 0:
            (folder / "scheduler.pt").write_text("rates")

    def save(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_text("weights")

    def _save_state(self, path: str) -> None:
        Path(path).write_text("{}")


def _losing(size: int) -> list[int]:
    """Return the ranks that could not read a row: as many among many as among few, because a checkpoint lists rows."""
    return [0, 1, size - 2, size - 1]


def _write_checkpoint(paths: RunPaths, context: PlayedRank, attempt: Attempt) -> CheckpointCallback:
    trainer: Any = _Trainer(context.rank)
    lost = [(context.rank, 7)] if context.rank in _losing(context.world_size) else []
    batches: Any = SimpleNamespace(lost=lost)
    plan: Any = None
    run = RunContext(paths, attempt, plan, context, trainer, Progress(), None)
    callback = CheckpointCallback(run, Checkpoint(keep=2), "loss", {"base": "x"}, batches, StepTimer())
    callback.write(trainer)
    return callback


def _start(paths: RunPaths, context: PlayedRank) -> Attempt:
    """What `start_worker` and `train_worker` ask of the storage before the first step."""
    log = paths.logs / f"rank-{context.rank}.log"
    paths.refresh(log)
    if context.rank == 0:
        paths.refresh(paths.metrics)
    attempt = begin_attempt(paths.store, context, 1)
    context.broadcast(read_bad_steps(paths) if context.rank == 0 else [])
    assert not watch(paths.store, context.rank)()
    if context.rank == 0:
        check_owner(paths.store, attempt)
    paths.publish(log)
    return attempt


class _Played:
    """A run of so many ranks at an address. `asked`, `once`, `received`: of each rank, in the last `play`."""

    def __init__(self, address: str, size: int):
        self.size, self.paths = size, [open_run(address) for _ in range(size)]
        self.asked: list[int] = []
        self.once: list[int] = []
        self.received: list[int] = []
        self.paths[0].store.write("run.json", b"{}")

    def play(self, do: Callable[[RunPaths, PlayedRank], Any]) -> list[Any]:
        group, stores = Group(self.size), [CountingStore(paths.address) for paths in self.paths]
        for paths, store in zip(self.paths, stores, strict=True):
            paths.__dict__["store"] = store  # in place of the cached property's
        results = on_ranks(stores, lambda store, context: do(self.paths[context.rank], context), group)
        self.asked, self.once = [store.asked.total() for store in stores], [len(store.once) for store in stores]
        self.received = group.received
        return results

    def close(self) -> None:
        for paths in self.paths:
            paths.discard()


def _check(few: _Played, many: _Played) -> None:
    """Compare a play of few ranks with one of many."""
    assert max(many.asked[1:]) <= max(few.asked[1:]) + MOST_OPERATIONS
    assert many.asked[0] <= few.asked[0] + MOST_OPERATIONS
    assert max(many.received[1:]) <= max(few.received[1:]) + 64, "bytes of numbers with more digits"
    assert many.received[0] <= few.received[0] * 1.1 * MANY / FEW


@pytest.fixture(params=["folder", "memory"])
def played(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    base = str(tmp_path) if request.param == "folder" else f"memory://runs/{tmp_path.name}"
    few, many = (_Played(f"{base}/{size}", size) for size in (FEW, MANY))
    yield few, many
    few.close()
    many.close()


def test_starts_and_checkpoints_of_256_ranks_ask_as_much_of_the_storage_as_those_of_4(played: Any) -> None:
    """A new run, a checkpoint, and an attempt that resumes from it."""
    few, many = played
    attempts = {run.size: run.play(_start) for run in played}
    _check(few, many)
    callbacks = {}
    for run in played:
        one: Attempt = attempts[run.size][0]
        callbacks[run.size] = run.play(lambda paths, context, one=one: _write_checkpoint(paths, context, one))
    _check(few, many)
    for run in played:
        lost = callbacks[run.size][0]._run.progress.lost
        assert lost == [(rank, 7) for rank in _losing(run.size)]
        resumed = run.play(_start)
        assert {(attempt.number, attempt.step) for attempt in resumed} == {(2, 5)}
        for rank in (0, 1, run.size - 1):
            assert (resumed[rank].folder / f"rng_state_{rank}.pth").read_text() == f"state {rank}"
        # Five of all ranks, one of them the model states of rank 0, which some versions of DeepSpeed read everywhere.
        assert {len(attempt.checkpoint.files) for attempt in resumed[1:]} == {4 + 3}
    _check(few, many)


def test_a_watched_step_asks_nothing_and_the_statuses_of_a_stall_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "describe_stacks", lambda: "")  # of all threads, which here are all ranks

    def dog(paths: RunPaths, rank: int, size: int, limit_s: float) -> Watchdog:
        status = WorkerStatus(rank, f"host{rank}", 100, "step" if rank else "forward", 2, 2, 3)
        return Watchdog(Clock("cpu"), lambda: status, paths.store, Attempt(1, "a"), size, limit_s, lambda: None)

    def step(paths: RunPaths, context: PlayedRank) -> None:
        with dog(paths, context.rank, context.world_size, limit_s=3.0):
            time.sleep(0.4)

    few, many = runs = [_Played(str(tmp_path / str(size)), size) for size in (FEW, MANY)]
    many.play(step)
    assert set(many.asked) == {0}
    for run in runs:
        run.play(lambda paths, context: dog(paths, context.rank, context.world_size, limit_s=60.0).report())
        text = json.loads(run.paths[0].store.read(watchdog.SENTENCE) or b"{}")["text"]
        assert text.startswith("worker 0 on host0 hangs")
    assert set(many.once[1:]) == set(few.once[1:]) == {3}, "two files written, and the message awaited"
    assert many.once[0] - MANY == few.once[0] - FEW, "rank 0 reads the status of each rank"


def test_a_validation_brings_other_ranks_only_its_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Batches, predictions, and a loss that is not finite on one rank."""
    monkeypatch.setattr(validate, "measure", lambda task, every: {"overall": {"rows": float(len(every))}})

    def agree(paths: RunPaths, context: PlayedRank) -> tuple[Any, ...]:
        options: Any = SimpleNamespace(batch_size=1, max_new_tokens=1)
        records: Any = [SimpleNamespace(row=0)] * (1 + context.rank % 2)
        builder: Any = None
        validation = validate.AnswerValidation(records, builder, options, "detection", context)
        predictions: Any = [SimpleNamespace(row=record.row, answer="a" * 100) for record in records]
        batches = sum(1 for _ in validation.batches())
        loss_scale = LossScale(accumulation=1)
        scaler: Any = SimpleNamespace(get_scale=lambda: 2.0)
        loss_scale._accelerator = SimpleNamespace(scaler=scaler)  # type: ignore[assignment]
        loss_scale.keep(torch.tensor(1.0 if context.rank else torch.nan))
        return batches, validation.score_task(predictions), loss_scale.explain_overflow(context)

    few, many = runs = [_Played(str(tmp_path / str(size)), size) for size in (FEW, MANY)]
    for run in runs:
        assert run.play(agree) == [(2, {"rows": 1.5 * run.size}, None)] * run.size
    _check(few, many)


@pytest.mark.parametrize("rows", [0, 1, FEW + 1, 8 * FEW + 1])
def test_all_ranks_run_the_model_equally_often_in_a_validation(rows: int, tmp_path: Path) -> None:
    """Under ZeRO-3 each forward gathers weights from all ranks: one that ran it less often would stop the others."""
    everything: Any = [SimpleNamespace(row=row) for row in range(rows)]

    def list_batches(paths: RunPaths, context: PlayedRank) -> int:
        options: Any = SimpleNamespace(batch_size=4)
        share, padding = everything[context.rank :: context.world_size], everything[0] if everything else None
        builder: Any = None
        validation = validate.AnswerValidation(share, builder, options, "detection", context, padding)
        batches = list(validation.batches())
        assert [record for batch, counts in batches if counts for record in batch] == share
        assert all(batch for batch, _ in batches)
        return len(batches)

    most = math.ceil(math.ceil(rows / FEW) / 4)
    assert _Played(str(tmp_path), FEW).play(list_batches) == [most] * FEW


@pytest.mark.parametrize("size", [1, 3])
def test_the_ranks_share_the_pairs_of_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Seven pairs, two at a time, so that the last rank has fewer; the second run reads the first one's cache."""
    monkeypatch.setattr(reference, "describe_reference", lambda source, builder, records: {})

    class Pairs(ListedRows):
        def sample(self, builder: Any, number: int, images: Any = None) -> Any:
            return number

    records: Any = [SimpleNamespace(images=())] * 7
    pairs: Any = Pairs(records)
    asked: list[Any] = []

    def ask(rows: list[Any]) -> torch.Tensor:
        asked.extend(rows)
        return torch.tensor([[row + 0.25, -row - 0.5] for row in rows])

    def find(store: Store, context: PlayedRank) -> list[list[float]]:
        source: Any = None
        builder: Any = None
        return reference.ReferenceCache(store, source, context, batch_size=2).find(pairs, builder, ask).tolist()

    for _ in range(2):
        log_probs = on_ranks([Store(tmp_path)] * size, find)
        assert log_probs == [[[row + 0.25, -row - 0.5] for row in range(7)]] * size
        assert sorted(asked) == list(range(7))
