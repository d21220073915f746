"""What the GRPO trainer asks of its engine, and the bound on `rollout_gap`. The trainer is a real one."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_vlm.engines.own import OwnEngine
from ray_vlm.engines.rollout_gap import describe_gap, largest_gap
from ray_vlm.errors import RunError
from tests.support.engines import RecordingEngine
from tests.support.parity import make_method_job
from tests.support.stock import our_trainer


def _build(tmp_path: Path, tiny_models: dict[str, str], injected: bool, **method: Any) -> tuple[Any, Any]:
    job, answers = make_method_job(tmp_path, tiny_models["qwen3_vl"], "grpo", 0.0)
    assert job.lora is not None
    lora = job.lora.model_copy(update={"target": ["language"]})
    job = job.model_copy(update={"method": job.method.model_copy(update=method), "lora": lora})
    trainer, batches = our_trainer(job, [[0, 1]], answers if injected else ())
    trainer.current_gradient_accumulation_steps = 1
    return trainer, batches[0]


def _take_step(trainer: Any, batch: Any) -> None:
    samples, num_items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    trainer.training_step(trainer.model, samples[0], num_items)


def test_the_engine_is_updated_and_asked_once_a_step(tmp_path: Path, tiny_models: dict[str, str]) -> None:
    trainer, batch = _build(tmp_path, tiny_models, True, max_completion_tokens=16)
    assert not trainer.use_vllm, "TRL corrects for engines that run a model of their own only"
    for _ in range(2):
        _take_step(trainer, batch)
    assert [name for name, _ in trainer.engine.calls] == ["update", "sample"] * 2
    (_, model), (_, (rows, sampling, seeds, pixels)) = trainer.engine.calls[:2]
    assert model is trainer.model
    assert rows == batch, "each prompt once"
    assert (sampling.num_generations, sampling.max_new_tokens) == (4, 16)
    assert seeds == [(trainer.inputs.seed, 0, row.number, 0) for row in batch]
    assert pixels == trainer.prompt_pixels


@pytest.mark.parametrize("rollouts", ["vllm", "server"])
def test_trl_corrects_for_an_engine_that_runs_another_model(
    rollouts: str, tmp_path: Path, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_vlm.train import build

    monkeypatch.setattr(build, "build_engine", lambda *_: RecordingEngine())
    url = "http://127.0.0.1:1/v1" if rollouts == "server" else None
    trainer, _ = _build(tmp_path, tiny_models, True, rollouts=rollouts, sampler_url=url)
    assert trainer.use_vllm


def test_a_gap_above_the_bound_ends_the_run_after_its_line(tmp_path: Path, tiny_models: dict[str, str]) -> None:
    """The injected answers say that each of their tokens was certain."""
    trainer, batch = _build(tmp_path, tiny_models, True)
    lines: list[dict[str, Any]] = []
    trainer.callback_handler.on_log = lambda args, state, control, logs: lines.append(logs)
    _take_step(trainer, batch)
    trainer.state.global_step = 7
    with pytest.raises(RunError, match=r"step 7: rollout_gap is \d.*above 0\.001 \(method\.max_rollout_gap\)"):
        trainer.log({"loss": 1.0})
    assert lines[0]["rollout_gap"] > 1
    trainer.log({"loss": 1.0})
    assert "rollout_gap" not in lines[1], "a line without a step has no gap"


@pytest.mark.parametrize(("given", "bound"), [({}, 0.001), ({"max_rollout_gap": 1e-12}, 1e-12)])
def test_the_own_loop_stays_below_the_bound(
    given: dict[str, float], bound: float, tmp_path: Path, tiny_models: dict[str, str]
) -> None:
    trainer, batch = _build(tmp_path, tiny_models, False, max_completion_tokens=6, **given)
    assert isinstance(trainer.engine, OwnEngine)
    assert trainer.largest_gap == bound
    _take_step(trainer, batch)
    if given:
        with pytest.raises(RunError, match="above 1e-12"):
            trainer.log({"loss": 1.0})
    else:
        trainer.log({"loss": 1.0})


def test_dropout_leaves_no_bound_of_its_own(tmp_path: Path, tiny_models: dict[str, str]) -> None:
    trainer, _ = _build(tmp_path, tiny_models, True)
    trainer.model.drop = torch.nn.Dropout(0.1)
    assert trainer._largest_gap() == math.inf
    trainer.method = trainer.method.model_copy(update={"max_rollout_gap": 0.5})
    assert trainer._largest_gap() == 0.5


def test_the_bound_follows_the_precision() -> None:
    assert [largest_gap(None, precision) for precision in ("fp32", "bf16", "fp16")] == [0.001, 0.1, 0.1]
    assert largest_gap(None, "fp32", "cuda:0") == 0.1, "in TF32"
    assert largest_gap(0.02, "fp32") == largest_gap(0.02, "bf16") == 0.02


def test_likely_causes_are_those_of_the_engine() -> None:
    own, other = (describe_gap(3, 0.5, 0.1, rollouts) for rollouts in ("transformers", "vllm"))
    assert own.startswith("step 3: rollout_gap is 0.5, above 0.1 (method.max_rollout_gap).")
    assert "adapter that did not arrive" in other
    assert "adapter that did not arrive" not in own
