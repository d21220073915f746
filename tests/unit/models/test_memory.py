"""Memory: the count of live bytes, the batches of each method, and predictions compared with real steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ray_vlm.cli import main
from ray_vlm.config.schema import JobConfig, Lora, Model
from ray_vlm.config.train import Recompute
from ray_vlm.demo.shapes import draw
from ray_vlm.demo.tiny import write_untrained
from ray_vlm.models.architectures import family_of, load_preset
from ray_vlm.models.layouts import PackedGroup, PackingOptions
from ray_vlm.models.load import load_config, load_model
from ray_vlm.models.memory import (
    GIB,
    Batch,
    Estimate,
    RowSize,
    StepSettings,
    Weights,
    describe,
    merge_of,
    micro_sizes,
    moment_bytes,
    plan_batch,
    shared_out,
)
from ray_vlm.models.rehearse import LiveBytes, Rehearsal, choose
from tests.support.memory import compare, tiny_job


def _settings(**sections: Any) -> StepSettings:
    job = JobConfig.model_validate({"model": {"name": "x"}, "data": {"train": {"path": "a"}}, **sections})
    return StepSettings(job.method, job.train, job.cluster, job.lora, job.model.load_in_4bit)


def _micro_sizes(settings: StepSettings, size: RowSize) -> list[RowSize]:
    return micro_sizes(settings.method, settings.train, size)


def test_a_storage_counts_once_and_until_it_is_freed() -> None:
    weight = torch.ones(100)
    with LiveBytes([weight]) as live:
        a = weight * 2
        view = a[:50].reshape(5, 10)
        assert live.now == 400
        b = a + view.sum()
        assert live.now == 800
        live.begin("later")
        del a, view
        assert live.now == 400
        c = b.double()
        assert live.now == 1200
        weight.add_(1)
        del b, c
    assert live.now == 0
    assert live.peak == 1200
    assert live.peaks["later"] == 1200


def test_batches_of_each_method() -> None:
    size = RowSize(16, 10, 8, longest_answer=5)
    sft = _settings(train={"micro_batch_size": 2})
    assert plan_batch(sft, _micro_sizes(sft, size), 2, PackingOptions()) == Batch(2, 34, (64, 64), labelled=16)
    uneven = [RowSize(0, 10, tokens) for tokens in (90, 40, 40)]
    assert plan_batch(sft, uneven, 2, PackingOptions()) == Batch(3, 100, labelled=170)
    groups = (PackedGroup(0, 100), PackedGroup(100, 50), PackedGroup(150, 50))
    assert plan_batch(sft, uneven, 2, PackingOptions(pack=True)) == Batch(
        1, 200, groups=groups, spread=(3, 100), labelled=170
    )
    dpo = _settings(method="dpo", train={"micro_batch_size": 2})
    assert plan_batch(dpo, _micro_sizes(dpo, size), 2, PackingOptions()) == Batch(4, 31, (64,) * 4, labelled=16)
    share = PackingOptions(share=True)
    pairs = (PackedGroup(0, 26, (5, 3)), PackedGroup(34, 26, (5, 3)))
    assert plan_batch(dpo, _micro_sizes(dpo, size), 2, share) == Batch(
        1, 68, (64, 64), groups=pairs, spread=(4, 31), labelled=16
    )
    grpo = _settings(
        method={"name": "grpo", "num_generations": 4, "max_completion_tokens": 7},
        train={"micro_batch_size": 8, "global_batch_size": 16},
    )
    answers = (PackedGroup(0, 26, (7,) * 4), PackedGroup(54, 26, (7,) * 4))
    assert plan_batch(grpo, _micro_sizes(grpo, size), 2, share) == Batch(
        1, 108, (64, 64), groups=answers, spread=(8, 33), labelled=56, copies=2.0
    )


@pytest.mark.parametrize("bits", [True, False])
def test_weights_are_those_of_the_loaded_model(bits: bool, tiny_models: dict[str, str]) -> None:
    spec = Model(name=tiny_models["qwen3_vl"], load_in_4bit=bits)
    settings = _settings(
        model={"name": spec.name, "load_in_4bit": bits}, train={"precision": "fp32"}, lora=Lora(rank=4).model_dump()
    )
    weights = Rehearsal(load_config(spec), family_of(load_config(spec)), settings).weights()
    quantised = plain = 0
    for parameter in load_model(spec, precision="fp32").parameters():
        if type(parameter).__name__ == "Params4bit":
            state = parameter.quant_state
            quantised += parameter.numel() + state.absmax.numel() + 4 * state.state2.absmax.numel()
        else:
            plain += parameter.numel() * 4
    assert weights.plain == plain
    assert weights.quantised == pytest.approx(quantised, rel=0.01)


CASES = [
    ("sft", 8, True, 2, ["language"], {}),
    ("sft", 8, "selective", 2, ["language"], {}),
    ("sft", 8, False, 2, ["language", "connector", "vision"], {"min_pixels": 30000, "max_pixels": 40000}),
    ("dpo", 8, False, 2, ["language"], {}),
    ("grpo", 8, True, 4, ["language"], {}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def test_predictions_are_near_the_memory_of_a_step(case: tuple, tmp_path: Path) -> None:
    draw(tmp_path / "scenes", "studio", "train", 12)
    write_untrained(tmp_path / "qwen2_5_vl", "qwen2_5_vl")
    real, predicted, _ = compare(tiny_job(tmp_path, "qwen2_5_vl", case))
    assert predicted == pytest.approx(real, rel=0.12)


def test_checkpointing_trades_memory() -> None:
    config = load_preset("Qwen/Qwen2-VL-2B-Instruct")
    config.text_config.num_hidden_layers, config.vision_config.depth = 12, 8  # of 28 and 32
    config.text_config.layer_types = config.text_config.layer_types[:12]
    rehearsal = Rehearsal(config, family_of(config), _settings())
    peaks = [rehearsal.run(Batch(1, 1024, (1024,)), layers).peak for layers in (12, "selective", 6, 0)]
    assert peaks == sorted(peaks)
    assert peaks[3] > 2 * peaks[0]
    assert merge_of(config) == 2


class _FakeRehearsal:
    """A rehearsal of 4 layers: each row takes 2 GiB, and each layer that stores its activations 1 GiB more, or all
    layers together 1.2 GiB if they store products only."""

    num_layers, largest, config = 4, 0.0, None

    def __init__(self, settings: StepSettings):
        self.settings, self.merge, self.packing = settings, 2, PackingOptions()

    def weights(self) -> Weights:
        return Weights(10 * GIB, 0, 0)

    def run(self, batch: Batch, layers: Recompute) -> Any:
        stored = 1.2 if layers == "selective" else 4 - layers
        live = LiveBytes()
        live.begin("backward")
        live.peak = live.peaks["backward"] = int(batch.rows * (2 + stored) * GIB)
        return live


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        *((11.9, None), (12, (1, 4)), (13.1, (1, 3)), (13.5, (1, "selective")), (14.5, (1, "selective"))),
        *((15, (1, 1)), (16, (1, 0)), (23, (2, 0)), (100, (8, 0))),
    ],
)
def test_what_recomputes_least_and_then_the_largest_batch(room: float, expected: Any) -> None:
    choice = choose(_FakeRehearsal(_settings()), RowSize(8, 4, 4), [1, 2, 4, 8], room * GIB)  # type: ignore[arg-type]
    assert (choice and (choice.micro, choice.layers)) == expected
    assert choice is None or choice.estimate.peak <= room * GIB


def test_answers_are_sampled_in_portions_that_fit() -> None:
    """A step of 8 prompts, whose answers take 1.7 GiB each; a row of 8 answers takes 2 GiB in training."""
    method = {"name": "grpo", "num_generations": 8, "max_completion_tokens": 256}
    settings = _settings(method=method, train={"global_batch_size": 64, "micro_batch_size": 8})
    rehearsal: Any = _FakeRehearsal(settings)
    rehearsal.config, rehearsal.packing = load_preset("Qwen/Qwen3-VL-8B-Instruct"), PackingOptions(share=True)
    portions = {}
    for room in (11, 15, 18, 40):
        choice = choose(rehearsal, RowSize(1024, 128, 0), [8], room * GIB)
        portions[room] = choice and (choice.estimate.group_batch, choice.estimate.when)
    assert portions == {11: None, 15: (2, "sampling"), 18: (4, "sampling"), 40: (None, "sampling")}


def test_memory_under_zero() -> None:
    """A base of 40 GiB and 8 GiB of trained weights, on 4 workers."""

    def total(preset: str | None, **changes: Any) -> dict[str, float]:
        cluster = {"num_workers": 4, "deepspeed": preset} | changes
        return shared_out(_settings(cluster=cluster).cluster, "bf16", Weights(30 * GIB, 10 * GIB, 8 * GIB), 1.0)

    plain, one, two, three = (total(preset) for preset in (None, "zero1", "zero2", "zero3"))
    assert plain["Adam's two moments"] == 16 * GIB
    assert one["Adam's two moments, float32 copy"] == 6 * GIB
    assert (one["gradients"], two["gradients"]) == (4 * GIB, GIB)
    assert (two["base in 4 bit"], three["base in 4 bit"]) == (
        30 * GIB,
        (30 * GIB - three["scales of the base in 4 bit"]) / 4,
    )
    assert three["scales of the base in 4 bit"] == pytest.approx(30 * GIB / 33, rel=0.02), "whole on each worker"
    assert "base in 4 bit" not in total("zero3_offload")
    assert "Adam's two moments, float32 copy" not in total("zero2_offload")
    sums = [sum(parts.values()) for parts in (plain, one, two, three, total("zero3_offload"))]
    assert sums == sorted(sums, reverse=True)


def test_moments_in_8_bit() -> None:
    """8 GiB of trained weights, a quarter of them embeddings, whose moments stay in float32."""
    weights = Weights(0, 0, 8 * GIB, 2 * GIB)
    scales = 6 / 4 * 2 * 4 / 256 * GIB
    assert moment_bytes("adamw", weights) == 16 * GIB
    assert moment_bytes("adamw_8bit", weights) == pytest.approx(2 * 6 / 4 * GIB + scales + 4 * GIB)
    assert moment_bytes("paged_adamw_8bit", weights) == pytest.approx(scales)
    parts = shared_out(_settings().cluster, "bf16", weights, 1.0, "adamw_8bit")
    assert parts["Adam's two moments"] == moment_bytes("adamw_8bit", weights)


def test_the_verdict() -> None:
    lines = describe(Estimate({"base": 30 * 2.0**30}, "backward"), [24, 40])
    assert lines[-2:] == [
        "  card of 24 GiB (22 for torch): does NOT fit, 8.00 GiB too much",
        "  card of 40 GiB (39.4 for torch): fits, 9.40 GiB left",
    ]


def test_a_known_model_is_planned_without_a_download(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "model: {name: Qwen/Qwen3-VL-2B-Instruct}\ndata: {train: {path: nowhere.json}}\n"
        "train: {global_batch_size: 1, micro_batch_size: 1}\ncluster: {gpus_per_worker: 1, gpu_memory_gib: 40}\n"
    )
    assert main(["memory", str(job), "--tokens", "256,50,100"]) == 0
    output = capsys.readouterr().out
    assert "base in 4 bit" in output
    assert "card of 40 GiB (39.4 for torch): fits" in output
    assert "train.memory=auto: micro_batch_size " in output


def test_a_job_is_planned_from_its_rows(job_file: Any, capsys: pytest.CaptureFixture) -> None:
    assert main(["memory", str(job_file()), "--card", "0.0001"]) == 0
    output = capsys.readouterr().out
    assert "does NOT fit" in output
    assert "train.memory=auto: nothing fits" in output
