"""What the check before the first step runs, and what it says of a card. The card is a stand-in."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_vlm.config.method import GrpoMethod
from ray_vlm.engines import own
from ray_vlm.engines.interface import Engine
from ray_vlm.engines.own import OwnEngine
from ray_vlm.errors import RunError
from ray_vlm.machine import GIB
from ray_vlm.methods.grpo import PlannedGRPOTrainer
from ray_vlm.models.architectures import load_preset
from ray_vlm.models.memory import token_bytes
from ray_vlm.models.rehearse import LiveBytes
from ray_vlm.train.memory_plan import Probe
from ray_vlm.train.oom_check import run_heaviest_batch
from tests.support.engines import RecordingEngine


class _Model(torch.nn.Linear):
    config = load_preset("Qwen/Qwen3-VL-8B-Instruct")


def _grpo_trainer(engine: Engine) -> Any:
    """Build what `try_rollout` reads of a trainer whose step has 4 prompts of 4 answers."""
    return SimpleNamespace(
        engine=engine,
        prompt_pixels=None,
        method=GrpoMethod(name="grpo", num_generations=4, max_completion_tokens=100),
        args=SimpleNamespace(device="cpu", per_device_train_batch_size=8, gradient_accumulation_steps=2),
        model=engine.model if isinstance(engine, OwnEngine) else None,
        inputs=SimpleNamespace(seed=0),
        recent=SimpleNamespace(start=lambda room: None),
    )


def test_sampling_is_tried_with_the_cache_of_whole_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With half of the prompts after the first try, as nothing more fits."""
    held: list[tuple[int, int, int]] = []

    def sample(model: Any, rows: Any, builder: Any, sampling: Any, seeds: Any, *rest: Any) -> Any:
        group_batch = rest[1]
        held.append((len(rows), group_batch or len(rows), live.now))
        assert sampling.max_new_tokens == 2
        assert {len(row.input_ids) for row in rows} == {9}
        if group_batch is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return [[] for _ in rows]

    monkeypatch.setattr(own, "sample_groups", sample)
    engine = OwnEngine(_Model(2, 2), None, "cpu")  # type: ignore[arg-type]
    trainer = _grpo_trainer(engine)
    rows: Any = [SimpleNamespace(input_ids=range(size), images=()) for size in (5, 9)]
    with LiveBytes() as live:
        assert PlannedGRPOTrainer.try_rollout(trainer, rows, "bf16") == 2
    one = token_bytes(_Model.config, "bf16") * 4 * (100 - 2)
    assert held == [(4, 4, 4 * one), (4, 2, 2 * one)]
    assert engine.group_batch == 2
    assert live.now == 0
    other = RecordingEngine()
    assert PlannedGRPOTrainer.try_rollout(_grpo_trainer(other), rows, "bf16") is None
    assert not other.calls


@pytest.mark.parametrize(("free", "fits"), [(30.0, True), (18.0, False)])
def test_what_was_reserved_is_printed_beside_what_was_allocated(
    free: float, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 GiB of weights, 20 in sampling and 22 in a step, 24 reserved at most and 6 at last."""
    peaks = iter([27 * GIB, 29 * GIB])
    answers = {
        "reset_peak_memory_stats": None,
        "memory_allocated": 7 * GIB,
        "max_memory_reserved": 24 * GIB,
        "memory_reserved": 6 * GIB,
        "mem_get_info": (free * GIB, 39.4 * GIB),
    }
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: next(peaks))
    trainer: Any = SimpleNamespace(
        model=_Model(2, 2),
        builder=None,
        args=SimpleNamespace(device="cuda:0"),
        try_rollout=lambda rows, precision: 3,
        try_heaviest_batch=lambda rows, precision: None,
        inputs=SimpleNamespace(rows=SimpleNamespace(sample=lambda builder, number: number)),
    )
    probe = Probe((0, 1), 1200, 21 * GIB)
    if not fits:
        with pytest.raises(
            RunError, match=r"with the optimizer 29\.0 of 24\.0 GiB; of the GPU's 39\.4 GiB other proce"
        ):
            run_heaviest_batch(trainer, probe, "bf16")
        return
    assert run_heaviest_batch(trainer, probe, "bf16") == (
        "the heaviest batch (2 rows of up to 1,200 tokens) took 22.000 GiB above the model, predicted 21.000 GiB; the "
        "answers to 3 prompts sampled at a time: 20.000 GiB above the model; with the optimizer 29.0 GiB allocated; "
        "24.0 reserved at the peak, of 36.0 that others leave of the GPU's 39.4"
    )
