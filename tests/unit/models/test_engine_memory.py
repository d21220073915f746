"""What a vLLM engine takes of a worker's GPU, and what that leaves the trainer. The card is a stand-in."""

from dataclasses import replace
from typing import Any

import pytest

from ray_vlm.config.schema import JobConfig
from ray_vlm.machine import GIB
from ray_vlm.models.card_memory import CardMemory
from ray_vlm.models.engine_memory import EngineMemory, describe_lack, engine_of, plan_engine, plan_share
from ray_vlm.models.memory import RowSize, StepSettings, Weights

WEIGHTS = Weights(4 * GIB, 2 * GIB, 0.1 * GIB)
SIZE = RowSize(1024, 128, 0)


def _settings(method: dict[str, Any], cluster: dict[str, Any]) -> StepSettings:
    sections = {"method": {"name": "grpo", "num_generations": 8, "rollouts": "vllm"} | method, "cluster": cluster}
    job = JobConfig.model_validate(
        {"model": {"name": "x"}, "data": {"train": {"path": "a"}}, "train": {"global_batch_size": 64}, **sections}
    )
    return StepSettings(job.method, job.train, job.cluster, job.lora, job.model.load_in_4bit)


@pytest.fixture
def config() -> Any:
    """The configuration of an 8B base: 36 layers, 8 heads of keys of 128 numbers."""
    from ray_vlm.models.architectures import load_preset

    return load_preset("Qwen/Qwen3-VL-8B-Instruct")


def test_an_engine_holds_the_base_and_the_keys_of_all_its_sequences(config: Any) -> None:
    engine = plan_engine(config, "bf16", 6 * GIB, 1400, 64, sleeps=False)
    assert engine.weights == 6 * GIB
    assert engine.cache == 2 * 36 * 8 * 128 * 2 * 1408 * 64  # whole blocks
    assert 1.5 * GIB < engine.own < 3 * GIB
    assert engine.asleep == engine.total == engine.weights + engine.cache + engine.own
    assert plan_engine(config, "bf16", 6 * GIB, 1400, 64, sleeps=True).asleep < 1.5 * GIB
    many = plan_engine(config, "bf16", 0, 1400, 10_000, sleeps=True)
    assert many.cache == 4 * engine.cache, "vLLM runs 256 sequences at a time"


def test_a_worker_has_an_engine_where_vllm_samples_on_its_gpu(config: Any) -> None:
    card = {"gpus_per_worker": 1, "gpu_memory_gib": 80}
    engine = engine_of(_settings({"max_completion_tokens": 256}, card), config, WEIGHTS, SIZE)
    assert engine is not None
    assert engine == plan_engine(config, "bf16", 6 * GIB, 1024 + 128 + 256, 64, sleeps=True)
    assert engine_of(_settings({"rollouts": "transformers"}, card), config, WEIGHTS, SIZE) is None
    assert engine_of(_settings({}, {}), config, WEIGHTS, SIZE) is None
    awake = engine_of(_settings({"sampler_sleep": 0}, card), config, WEIGHTS, SIZE)
    assert awake is not None
    assert awake.asleep == awake.total


def test_the_share_that_a_job_names_is_taken_of_its_card(config: Any) -> None:
    method = {"trl": {"vllm_gpu_memory_utilization": 0.5}}
    engine = engine_of(_settings(method, {"gpus_per_worker": 1, "gpu_memory_gib": 40}), config, WEIGHTS, SIZE)
    assert engine is not None
    assert engine.total == pytest.approx(0.5 * 39.4 * GIB)
    assert engine.asleep < 2 * GIB
    awake = engine_of(
        _settings(method | {"sampler_sleep": 0}, {"gpus_per_worker": 1, "gpu_memory_gib": 40}), config, WEIGHTS, SIZE
    )
    assert awake is not None
    assert awake.asleep == pytest.approx(0.5 * 39.4 * GIB)


def test_an_engine_that_does_not_fit_beside_the_trainer_is_refused_with_numbers() -> None:
    engine = EngineMemory(6 * GIB, 12.33 * GIB, 2 * GIB, 1 * GIB)
    card = CardMemory(total=40 * GIB, free=20 * GIB, reserved=9 * GIB, allocated=8 * GIB)
    assert plan_share(engine, card) == 0.51
    assert describe_lack(0.51 * card.total, engine, card) is None
    tight = replace(card, free=19 * GIB)
    lack = describe_lack(0.51 * card.total, engine, tight)
    assert lack is not None
    assert lack.startswith(
        "vllm takes 20.4 GiB of the GPU (planned: weights 6.0, cache 12.3, its own 2.0), and beside the trainer 20.0 "
        "of 40.0 GiB are free. Lower train.global_batch_size"
    )


@pytest.mark.parametrize("sleep", [None, 0])
def test_the_estimate_of_a_step_has_the_engine(tiny_models: dict[str, str], sleep: int | None) -> None:
    """Asleep it leaves the card to the trainer, so the peak is while answers are sampled."""
    from ray_vlm.models.families import FAMILIES
    from ray_vlm.models.load import load_config
    from ray_vlm.models.rehearse import Rehearsal, estimate

    card = {"gpus_per_worker": 1, "gpu_memory_gib": 80}
    settings = _settings({"sampler_sleep": sleep}, card)
    model = JobConfig.model_validate(
        {"model": {"name": tiny_models["qwen3_vl"]}, "data": {"train": {"path": "a"}}}
    ).model
    rehearsal = Rehearsal(load_config(model), FAMILIES["qwen3_vl"], settings)
    engine = engine_of(settings, rehearsal.config, rehearsal.weights(), RowSize(16, 20, 0))
    assert engine is not None
    planned = estimate(rehearsal, [RowSize(16, 20, 0)])
    assert planned.parts["vLLM, all the time"] == engine.asleep
    assert planned.parts.get("sampling of answers", 0) == engine.total - engine.asleep
    assert planned.when == "sampling" if sleep is None else planned.when != "sampling"
    assert planned.step > 0
    assert planned.peak > engine.total
