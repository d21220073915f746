"""The rehearsal of TRL's head on CUDA, against a head of its own that counts CUDA's tiles from the shapes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ray_vlm.config.schema import JobConfig
from ray_vlm.models.architectures import family_of, load_preset
from ray_vlm.models.memory import Batch, StepSettings
from ray_vlm.models.rehearse import Rehearsal

TILE_TOKENS, TILE_WORDS = 4096, 32768  # a tile of TRL's head


class CountedHead(torch.autograd.Function):
    """What TRL's head allocates on CUDA, from the shapes alone: one tile in bfloat16, seven numbers a token, and in the
    backward the tile again, a float32 gradient of the hidden states, and its copy in their dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        tokens = len(hidden)
        numbers = torch.empty(7, tokens)
        tile = torch.empty(min(tokens, TILE_TOKENS), TILE_WORDS, dtype=torch.bfloat16)
        ctx.save_for_backward(hidden)
        del numbers, tile
        return torch.empty(tokens), torch.empty(tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        (hidden,) = ctx.saved_tensors
        total = torch.empty(hidden.shape, dtype=torch.float32)
        tile = torch.empty(min(len(hidden), TILE_TOKENS), TILE_WORDS, dtype=torch.bfloat16)
        out = total.to(hidden.dtype)
        del tile
        return (out, *(None,) * 8)


@pytest.fixture(scope="module")
def rehearsal() -> Rehearsal:
    """A 2B model's head behind two of its layers, so that the head is the peak."""
    config = load_preset("Qwen/Qwen3-VL-2B-Instruct")
    config.text_config.num_hidden_layers = 2
    sections = {"model": {"name": "x"}, "data": {"train": {"path": "a"}}, "cluster": {"gpus_per_worker": 1}}
    job = JobConfig.model_validate(sections)
    settings = StepSettings(job.method, job.train, job.cluster, job.lora, job.model.load_in_4bit)
    return Rehearsal(config, family_of(config), settings)


def _on_cpus(settings: StepSettings) -> StepSettings:
    return replace(settings, cluster=settings.cluster.model_copy(update={"gpus_per_worker": 0}))


@pytest.mark.parametrize("labelled", [240, 5000])
def test_the_head_takes_what_cuda_takes(labelled: int, rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(1, 300, labelled=labelled)  # few tokens, so that the head is the peak of both phases
    on_cuda = rehearsal.run(batch)
    monkeypatch.setattr(rehearsal, "settings", _on_cpus(rehearsal.settings))
    on_cpu = rehearsal.run(batch)
    monkeypatch.setattr("trl.kernels.ChunkedLogProbFunction", CountedHead)
    counted = rehearsal.run(batch)
    for phase in ("head", "backward"):
        assert on_cuda.peaks[phase] == pytest.approx(counted.peaks[phase], rel=0.05), phase
    tokens = min(labelled, TILE_TOKENS)
    # On a CPU the tile has float32 copies, and the backward one of the vocabulary's weights.
    assert on_cpu.peaks["head"] >= on_cuda.peaks["head"] + 2 * 4 * tokens * TILE_WORDS
    words = 4 * TILE_WORDS * rehearsal.config.get_text_config().hidden_size
    assert on_cpu.peaks["backward"] >= on_cuda.peaks["backward"] + 0.9 * words


def test_operations_are_counted_as_before(rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def count() -> int:
        counter = FlopCounterMode(display=False)
        rehearsal.run(Batch(1, 64, labelled=32), watch=counter)
        return counter.get_total_flops()

    as_cuda = count()
    monkeypatch.setattr(rehearsal, "settings", _on_cpus(rehearsal.settings))
    assert as_cuda == count() > 0
