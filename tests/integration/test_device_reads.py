"""What a micro-batch reads back from the device: nothing by this package, and by TRL what stock TRL reads."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ray_vlm.models import surgery
from tests.support.device_reads import DeviceReads, count_reads
from tests.support.parity import make_method_job
from tests.support.stock import checkpointed, our_trainer, stock_trainer
from tests.support.twins import slow_but

BETAS = {"sft": 0.0, "dpo": 0.5, "grpo": 0.04}
FEED = ("data/", "methods/", "train/")  # rooms whose part of a micro-batch is planned on the host


def _reads(job: Any, rows: int, answers: Any, build: Any = our_trainer) -> DeviceReads:
    """The reads of a micro-batch: taken from its step, forward and backward. GRPO's sampling is left out."""
    trainer, (batch,) = build(job, [range(rows)], answers)
    checkpointed(trainer).current_gradient_accumulation_steps = 1
    samples = None
    if job.method.name == "grpo":
        samples = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    with count_reads(str(trainer.args.device)) as reads:
        (sample, *_), num_items = samples or trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        trainer.training_step(trainer.model, sample, num_items)
    return reads


@pytest.fixture(scope="module", params=slow_but(["grpo"], BETAS))
def counted(
    request: Any, tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str]
) -> tuple[DeviceReads, DeviceReads]:
    """The reads of this package's trainer and of stock TRL's, of one method."""
    method = request.param
    job, answers = make_method_job(tmp_path_factory.mktemp("reads"), tiny_models["qwen3_vl"], method, BETAS[method])
    with pytest.MonkeyPatch.context() as patch:
        # The head on CPUs chooses labelled positions by a mask, which is a read; on a GPU TRL's head has all positions.
        patch.setattr(surgery, "score_labelled", lambda model: None)
        own, stock = (_reads(job, 2 if answers else 3, answers, build) for build in (our_trainer, stock_trainer))
    return own, stock


def test_the_feed_reads_nothing_back(counted: tuple[DeviceReads, DeviceReads]) -> None:
    own, stock = counted
    print(f"\n{own.listed()}\nstock:\n{stock.listed()}")
    assert not {place for place in own.of("ray_vlm") if place.startswith(FEED)}
    expected = stock.of("trl")
    assert expected, "TRL reads numbers for its log"
    assert {place: n for place, n in own.of("trl").items() if n > expected.get(place, 0)} == {}


def test_a_micro_batch_reads_nothing_back(counted: tuple[DeviceReads, DeviceReads]) -> None:
    own, stock = counted
    assert not own.of("ray_vlm")
    for owner in ("transformers", "backward", "other"):
        assert sum(own.of(owner).values()) <= sum(stock.of(owner).values()), owner


def test_every_kind_of_read_is_counted() -> None:
    """Also in a backward pass that recomputes, and none where shapes are known."""
    values, mask = torch.arange(4.0, requires_grad=True), torch.tensor([True, False, True, False])

    def layer(x: torch.Tensor) -> torch.Tensor:
        return (x * x.tolist()[1]).exp()

    with count_reads() as reads:
        bool(mask[0])
        values[: int(mask.sum())]
        values[mask]
        mask.nonzero()
        values.detach().to("cpu")
        torch.equal(mask, mask)
        values.repeat_interleave(torch.tensor([1, 2, 1, 0]))
        checkpoint(layer, values, use_reentrant=False).sum().backward()
    assert sum(reads.values()) == 9
    with count_reads() as reads:
        values.detach()[mask] = 0.0
        torch.where(mask, values, 0.0).masked_fill(mask, 1.0).repeat_interleave(2).sum()
        values.repeat_interleave(torch.tensor([1, 2, 1, 0]), output_size=4)
        values[torch.tensor([0, 1])].to(torch.float64)
    assert not reads, reads.listed()
