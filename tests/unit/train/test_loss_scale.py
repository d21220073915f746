"""float16: the scaler handles a gradient that overflows, and a resumed run restores its scale."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_vlm.config.load import load_job
from ray_vlm.distributed import DistributedContext
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.methods.loss_scale import LossScale
from ray_vlm.models.precision import autocast, describe_emulation, fastest_precision
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.driver import ALONE, TrialContext, train


def _loss_scale(scale: float | None, finite: bool) -> LossScale:
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    loss_scale = LossScale(accumulation=1)
    loss_scale.attach(SimpleNamespace(scaler=scaler, mixed_precision="no"))  # type: ignore[arg-type]
    loss_scale.keep(torch.tensor(1.0 if finite else torch.nan))
    return loss_scale


@pytest.mark.parametrize(
    ("scale", "finite", "explained"),
    [(65536.0, True, True), (65536.0, False, False), (1.0, True, False), (None, True, False)],
)
def test_whose_business_an_overflow_is(scale: float | None, finite: bool, explained: bool) -> None:
    message = _loss_scale(scale, finite).explain_overflow(DistributedContext())
    assert (message is not None) == explained
    assert message is None or "loss scale of 65536" in message


@pytest.fixture
def high_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scalers begin at a scale at which the first gradients overflow."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, init_scale=2.0**20))


def _train(path: Path, name: str, trial: TrialContext = ALONE, resume: bool = False, *more: str) -> RunPaths:
    job = load_job(
        path, ["train.precision=fp16", f"run.name={name}", "train.max_steps=3", "train.warmup_ratio=0", *more]
    )
    return train(job, path.read_text(), resume=resume, trial=trial)


def _notes(paths: RunPaths) -> list[str]:
    return [line["text"] for line in read_metrics(paths.metrics) if line["kind"] == "note"]


def test_a_run_in_float16_is_the_same_where_it_was_stopped(job_file: Any, high_scale: None, tmp_path: Path) -> None:
    """It is stopped while the scale still falls; with another scale other steps would be skipped."""
    from safetensors.torch import load_file

    from ray_vlm.errors import Interrupted

    path = job_file(train={"global_batch_size": 1, "micro_batch_size": 1})
    uninterrupted = _train(path, "whole")
    notes = [note for note in _notes(uninterrupted) if "float16 overflowed" in note]
    assert "at a loss scale of 1.04858e+06: the step is left out" in notes[0]
    assert len(notes) == 2, "the first two of three"
    assert not uninterrupted.bad_steps.exists(), "no fault of the rows"
    calls = []
    with pytest.raises(Interrupted):
        _train(path, "stopped", TrialContext(stop=lambda: len(calls) > 0 or bool(calls.append(1))))
    stopped = RunPaths(tmp_path / "runs" / "stopped")
    assert list(stopped.root.glob("checkpoint-*/scaler.pt"))
    _train(path, "stopped", resume=True)
    weights, expected = (load_file(p.final / "adapter_model.safetensors") for p in (stopped, uninterrupted))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert {tensor.dtype for tensor in expected.values()} == {torch.float32}
    assert any(float(tensor.abs().max()) > 0 for name, tensor in expected.items() if "lora_B" in name)
    assert json.loads(uninterrupted.resolved.read_text())["train"]["precision"] == "fp16"


def test_a_loss_that_is_no_number_is_a_fault_in_float16_too(job_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_vlm.methods.sft import WeightedSFTTrainer

    complete = WeightedSFTTrainer.complete

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        batch = complete(*args, **kwargs)
        return batch | {"pixel_values": batch["pixel_values"] * float("inf")}

    monkeypatch.setattr(WeightedSFTTrainer, "complete", staticmethod(spoiled))
    path = job_file(train={"global_batch_size": 2, "micro_batch_size": 2})
    with pytest.raises(RunError, match=r"step 1: the gradient is not finite. Rows: "):
        _train(path, "spoiled")


def test_float16_under_deepspeed_is_refused(job_file: Any) -> None:
    with pytest.raises(ConfigError, match=r"train.precision.*DeepSpeed scales the loss"):
        load_job(job_file(), ["train.precision=fp16", "cluster.deepspeed=zero2", "cluster.num_workers=1"])


@pytest.mark.parametrize(("capability", "best"), [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16")])
def test_cards_that_emulate_bfloat16_are_reported(
    capability: tuple[int, int], best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    message = describe_emulation("bf16", "cuda:0")
    assert (message is None) == (best == "bf16")
    assert message is None or "Set train.precision=fp16" in message
    assert fastest_precision("cuda:0") == best
    assert fastest_precision("cpu") == "fp32"
    assert describe_emulation("fp16", "cuda:0") is describe_emulation("bf16", "cpu") is None


def test_what_a_forward_is_cast_to() -> None:
    one = torch.ones(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with autocast(precision, "cpu"):  # type: ignore[arg-type]
            assert (one @ one).dtype == dtype
