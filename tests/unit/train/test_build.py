"""The engine of a job that trains."""

from types import SimpleNamespace
from typing import Any

import pytest

from ray_vlm.config.load import load_job
from ray_vlm.distributed import DistributedContext
from ray_vlm.engines.adapter_check import CheckedEngine
from ray_vlm.engines.own import OwnEngine
from ray_vlm.train import build
from tests.support.engines import RecordingEngine

GRPO = {"name": "grpo", "num_generations": 4, "max_completion_tokens": 100}


def _build(job: Any, portion: int | None = None, **sizes: Any) -> Any:
    spec: Any = SimpleNamespace(
        **({"prompt_tokens": 50, "eval_prompt_tokens": 0, "prompt_images": 2, "eval": None} | sizes)
    )
    model: Any = object()
    context = DistributedContext(local_world_size=8)
    return build.build_engine(job, spec, model, None, context, None, portion, lambda: None)  # type: ignore[arg-type]


def test_only_grpo_has_an_engine(job_file) -> None:
    assert _build(load_job(job_file())) is None
    engine = _build(load_job(job_file(method=GRPO)), 3)
    assert isinstance(engine, OwnEngine)
    assert (engine.group_batch, engine.device) == (3, "cpu")


@pytest.mark.parametrize(
    ("sizes", "method", "tokens"),
    [
        ({}, {}, 150),
        ({"eval": [], "eval_prompt_tokens": 130}, {}, 150),
        ({"eval": [], "eval_prompt_tokens": 160}, {}, 180),
        ({"eval": [], "eval_prompt_tokens": 80}, {"num_generations_eval": 2}, 180),
    ],
)
def test_vllm_has_room_for_training_and_validation(
    sizes: dict[str, Any], method: dict[str, Any], tokens: int, job_file, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(build, "build_training_engine", lambda *given: started.append(given) or RecordingEngine())
    method = GRPO | {"rollouts": "vllm", "sampler_sleep": 2} | method
    job = load_job(job_file(method=method, lora={"rank": 4, "target": ["language"]}, evaluate={"max_new_tokens": 20}))
    engine = _build(job, **sizes)
    assert isinstance(engine, CheckedEngine), "its answers are proved to be those of the adapter"
    assert isinstance(engine.engine, RecordingEngine)
    assert (engine.name, engine.max_gap) == ("method.rollouts=vllm", 0.001)
    ((settings, limits, _, _, _, sleep, share, engines),) = started
    assert (settings.model, limits.tokens, limits.images) == (job.model, tokens, 2)
    assert (sleep, share, engines) == (2, None, 8), "all workers of a machine start an engine"
