"""What a sampler's card holds. The rehearsed model is a stand-in."""

from types import SimpleNamespace
from typing import Any

import pytest

from ray_vlm.config.schema import JobConfig
from ray_vlm.machine import GIB
from ray_vlm.models.engine_memory import engine_of
from ray_vlm.models.memory import CUDA_CONTEXT, RowSize, StepSettings, Weights, group_bytes
from ray_vlm.models.sampler_memory import estimate_sampler

WEIGHTS = Weights(4 * GIB, 2 * GIB, 0.1 * GIB)
SIZE = RowSize(1024, 128, 0)
CARD = {"gpus_per_worker": 1, "gpu_memory_gib": 80}


@pytest.fixture
def rehearse() -> Any:
    """A function that returns a rehearsal of a GRPO job of an 8B base."""
    from ray_vlm.models.architectures import load_preset

    config = load_preset("Qwen/Qwen3-VL-8B-Instruct")

    def build(method: dict[str, Any], cluster: dict[str, Any] = CARD) -> Any:
        sections = {"method": {"name": "grpo"} | method, "cluster": cluster}
        job = JobConfig.model_validate({"model": {"name": "x"}, "data": {"train": {"path": "a"}}, **sections})
        settings = StepSettings(job.method, job.train, job.cluster, job.lora, job.model.load_in_4bit)
        return SimpleNamespace(settings=settings, config=config, weights=lambda: WEIGHTS)

    return build


def test_a_sampler_holds_the_base_and_the_answers_of_a_portion(rehearse: Any) -> None:
    assert estimate_sampler(rehearse({}), SIZE) is None
    one, three = (estimate_sampler(rehearse({"samplers": 2, "sampling_batch": n}), SIZE) for n in (1, 3))
    alone = group_bytes(rehearse({}).settings, rehearse({}).config, SIZE)
    assert alone > 0
    assert one is not None
    assert three is not None
    assert (one.parts["weights"], one.parts["CUDA's own"]) == (6 * GIB, CUDA_CONTEXT)
    assert (one.parts["sampling of answers"], three.parts["sampling of answers"]) == (alone, 3 * alone)
    on_cores = estimate_sampler(rehearse({"samplers": 1, "gpus_per_sampler": 0}), SIZE)
    assert on_cores is not None
    assert "CUDA's own" not in on_cores.parts


def test_the_workers_of_samplers_hold_no_engine(rehearse: Any) -> None:
    beside = rehearse({"samplers": 2})
    assert group_bytes(beside.settings, beside.config, SIZE) == 0
    vllm = rehearse({"samplers": 2, "rollouts": "vllm"})
    assert engine_of(vllm.settings, vllm.config, WEIGHTS, SIZE) is None
    sampler = estimate_sampler(vllm, SIZE)
    assert sampler is not None
    assert 0.8 * 80 * GIB < sampler.peak < 80 * GIB
