"""The calls of vLLM, with a fake engine: adapters are sent and never merged, prompts have one token for each image."""

import os
import sys
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ray_vlm.config.load import load_job
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.engines.interface import Sampling
from ray_vlm.engines.vllm import EngineLimits, EngineSettings, build_answerer, build_sampler, start_engine
from ray_vlm.errors import ConfigError, ModelError, RunError
from ray_vlm.train.prepare import prepare

FACTOR = 16  # pixels along a side of an image token of the tiny Qwen3-VL
LIMITS = EngineLimits(300, 2)


@dataclass
class FakeEngine:
    """Takes the arguments of `vllm.LLM`, records every call, and answers each prompt with fixed numbers."""

    options: dict[str, Any]
    calls: list[dict[str, Any]] = field(default_factory=list)

    def generate(self, prompts: list, params: list, lora_request: Any, use_tqdm: bool) -> list:
        from safetensors.numpy import load_file

        folder = Path(lora_request.path) if lora_request is not None else None
        weights = load_file(folder / "adapter_model.safetensors") if folder else {}
        files = sorted(path.name for path in folder.iterdir()) if folder else []
        self.calls.append(
            {"prompts": prompts, "params": params, "lora": lora_request, "weights": weights, "files": files}
        )

        def answer(number: int) -> Any:
            ids = [number + 20, 2]
            banned = {t: SimpleNamespace(logprob=-1000.0) for t in params[0].logprob_token_ids}
            logprobs = [banned | {t: SimpleNamespace(logprob=-0.5 * (i + 1))} for i, t in enumerate(ids)]
            return SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason="stop" if number % 2 else "length")

        return [
            SimpleNamespace(outputs=[answer(i) for i in range(p.n)], prompt_token_ids=range(self.expanded(prompt)))
            for prompt, p in zip(prompts, params, strict=True)
        ]

    def expanded(self, prompt: dict[str, Any]) -> int:
        """Return the tokens of a prompt as vLLM expands it: those of its images, which are not resized again."""
        images = prompt.get("multi_modal_data", {}).get("image", [])
        if images and prompt.get("mm_processor_kwargs") != {"do_resize": False}:
            return 0
        sides = [image.size for image in images]
        return len(prompt["prompt_token_ids"]) + sum(w // FACTOR * (h // FACTOR) - 1 for w, h in sides)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """Engines that were started."""
    started: list[FakeEngine] = []

    def start(**options: Any) -> FakeEngine:
        started.append(FakeEngine(options))
        return started[-1]

    module, lora, request = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    module.LLM, module.SamplingParams = start, lambda **options: SimpleNamespace(**options)  # type: ignore[attr-defined]
    request.LoRARequest = lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)  # type: ignore[attr-defined]
    for name, value in (("vllm", module), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, value)
    return started


def _engine(job: JobConfig) -> EngineSettings:
    return EngineSettings(job.model, job.train.precision, job.seed)


def _parts(job_file: Any) -> tuple[Any, Any, list]:
    method = {"name": "grpo", "num_generations": 4}
    prepared = prepare(load_job(job_file(method=method, lora={"rank": 4, "target": ["language"]})))
    builder = load_sample_builder(prepared.spec)
    return prepared.job, builder, [builder.prompt_row(r) for r in prepared.train.records[:2]]


def test_the_adapter_is_sent_at_every_step_and_never_merged(job_file, engines: list[FakeEngine]) -> None:
    import torch

    from tests.support.stock import build_model

    job, builder, rows = _parts(job_file)
    model = build_model(job)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = SimpleNamespace(vllm_gpu_memory_utilization=0.3)
    sample = build_sampler(_engine(job), LIMITS, model, args)
    sampling, seeds = Sampling(4, 16, 0.9), [(0, 0, 3, 0), (0, 0, 5, 0)]
    groups = sample(model, rows, builder, sampling, seeds, "cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(1.0)
    sample(model, rows, builder, sampling, seeds, "cpu")
    engine = engines[0]
    assert len(engines) == 1
    assert engine.options["enable_lora"]
    assert engine.options["logprobs_mode"] == "processed_logprobs"
    assert engine.options["max_lora_rank"] >= 4
    assert [call["lora"].number for call in engine.calls] == [1, 2]
    assert engine.calls[0]["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    changed = [n for n, w in engine.calls[1]["weights"].items() if not np.array_equal(w, engine.calls[0]["weights"][n])]
    assert changed
    assert all("lora_B" in name for name in changed)
    for name, p in model.named_parameters():
        if "lora_B" not in name:
            assert torch.equal(p, before[name])
    assert [len(group) for group in groups] == [4, 4]
    assert [answer.finished for answer in groups[0]] == [False, True, False, True]
    assert groups[0][1].ids == [21, 2]
    assert groups[0][1].logprobs == [-0.5, -1.0]


def test_an_adapter_that_vllm_would_load_in_part_is_refused(job_file, engines: list[FakeEngine]) -> None:
    from tests.support.stock import build_model

    job, builder, rows = _parts(job_file)
    assert job.lora is not None
    wider = job.model_copy(update={"lora": job.lora.model_copy(update={"target": ["language", "vision"]})})
    args = SimpleNamespace(vllm_gpu_memory_utilization=0.3)
    model = build_model(wider)
    sample = build_sampler(_engine(job), LIMITS, model, args)
    with pytest.raises(ConfigError, match=r"model.adapter adapts vision too"):
        sample(model, rows, builder, Sampling(4, 16, 0.9), [(0,), (1,)], "cpu")
    assert not engines[0].calls


def test_prompts_and_sampling_as_vllm_takes_them(job_file, engines: list[FakeEngine]) -> None:
    from tests.support.stock import build_model

    job, builder, rows = _parts(job_file)
    args = SimpleNamespace(vllm_gpu_memory_utilization=0.3)
    model = build_model(job)
    build_sampler(_engine(job), LIMITS, model, args)(model, rows, builder, Sampling(4, 16), [(1,), (2,)], "cpu")
    call = engines[0].calls[0]
    for prompt, row in zip(call["prompts"], rows, strict=True):
        ids = np.array(prompt["prompt_token_ids"])
        assert (ids == builder.image_token_id).sum() == len(row.images) == 1
        assert len(ids) == len(row.input_ids) - (row.input_ids == builder.image_token_id).sum() + 1
        assert np.array_equal(np.array(prompt["multi_modal_data"]["image"][0]), row.images[0])
    first, second = call["params"]
    assert (first.n, first.max_tokens, first.top_k, first.logprobs) == (4, 16, -1, len(first.logprob_token_ids))
    assert first.seed != second.seed
    banned = {builder.image_token_id, model.config.image_token_id, model.config.video_token_id}
    assert first.logit_bias == dict.fromkeys(banned, -100.0)
    options = engines[0].options
    assert (options["max_model_len"], options["limit_mm_per_prompt"]) == (300, {"image": 2, "video": 0})
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"


def test_the_engine_has_room_for_the_ranks_of_the_adapter_that_trains(job_file, engines: list[FakeEngine]) -> None:
    """They may be those of `model.adapter`, or of `lora.ranks`, and not `lora.rank`."""
    from tests.support.stock import build_model

    job, _, _ = _parts(job_file)
    assert job.lora is not None
    larger = job.model_copy(update={"lora": job.lora.model_copy(update={"rank": 24})})
    build_sampler(_engine(job), LIMITS, build_model(larger), SimpleNamespace(vllm_gpu_memory_utilization=0.3))
    assert engines[0].options["max_lora_rank"] == 32


def test_another_prompt_than_that_of_training_ends_the_run(
    job_file, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when vLLM resizes images again, which is silent otherwise."""
    from tests.support.stock import build_model

    job, builder, rows = _parts(job_file)
    model = build_model(job)
    sample = build_sampler(_engine(job), LIMITS, model, SimpleNamespace(vllm_gpu_memory_utilization=0.3))
    monkeypatch.setattr(FakeEngine, "expanded", lambda self, prompt: 172)
    with pytest.raises(RunError, match=r"vllm makes 172 tokens of the prompt of row .*, and training \d+"):
        sample(model, rows, builder, Sampling(4, 16), [(1,), (2,)], "cpu")


@pytest.mark.parametrize(
    ("visible", "device", "expected"), [(None, "cuda:1", "1"), ("4,6", "cuda:1", "6"), ("4,6", "cpu", "4,6")]
)
def test_an_engine_sees_the_card_of_its_worker(
    visible: str | None,
    device: str,
    expected: str,
    job_file,
    engines: list[FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    seen = []
    start = sys.modules["vllm"].LLM  # type: ignore[attr-defined]
    monkeypatch.setattr(
        sys.modules["vllm"], "LLM", lambda **o: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]) or start(**o)
    )
    start_engine(replace(_engine(load_job(job_file())), device=device), LIMITS, "x", None)
    assert seen == [expected]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": {"top_p": 0.9}}, "top_p and top_k leave"),
        ({"method": {"top_k": 20}}, "top_p and top_k leave"),
        ({"method": {"temperature": 2.5}}, "temperatures up to 2"),
        ({"lora": {"modules_to_save": ["embed_tokens"]}}, "adapters without whole modules"),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_the_run(job_file, options: dict[str, Any], reason: str) -> None:
    method = {"name": "grpo", "num_generations": 4, "rollouts": "vllm"} | options.get("method", {})
    lora = {"rank": 4, "target": ["language"]} | options.get("lora", {})
    with pytest.raises(ConfigError, match=reason):
        load_job(job_file(method=method, lora=lora))


def test_a_missing_package_is_named(job_file, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.stock import build_model

    job, _, _ = _parts(job_file)
    args = SimpleNamespace(vllm_gpu_memory_utilization=0.3)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="vllm is not installed"):
        build_sampler(_engine(job), LIMITS, build_model(job), args)


def test_evaluation_asks_for_one_greedy_answer_with_the_adapter_in_its_folder(
    job_file, engines: list[FakeEngine], tmp_path: Path
) -> None:
    from tests.support.stock import build_model

    job, builder, rows = _parts(job_file)
    model = build_model(job)
    model.save_pretrained(tmp_path / "adapter")
    answers = build_answerer(_engine(job), str(tmp_path / "adapter"), builder, LIMITS, job.evaluate.max_new_tokens)(
        rows
    )
    assert answers == [builder.text([20, 2])] * 2
    assert engines[0].options["max_lora_rank"] == 8
    assert engines[0].options["max_model_len"] == 300
    call = engines[0].calls[0]
    assert call["lora"].path == str(tmp_path / "adapter")
    assert [(p.n, p.temperature, p.max_tokens) for p in call["params"]] == [(1, 0.0, job.evaluate.max_new_tokens)] * 2
    build_answerer(_engine(job), None, builder, LIMITS, job.evaluate.max_new_tokens)(rows)
    assert not engines[1].options["enable_lora"]
    assert engines[1].calls[0]["lora"] is None


def test_evaluation_refuses_an_adapter_that_vllm_would_load_in_part(
    job_file, engines: list[FakeEngine], tmp_path: Path
) -> None:
    from tests.support.stock import build_model

    job, builder, _ = _parts(job_file)
    assert job.lora is not None
    wider = job.model_copy(update={"lora": job.lora.model_copy(update={"target": ["language", "vision"]})})
    build_model(wider).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"evaluate\.engine: .*adapter adapts vision too"):
        build_answerer(_engine(job), str(tmp_path / "adapter"), builder, LIMITS, job.evaluate.max_new_tokens)
    assert not engines


def test_a_damaged_adapter_is_refused_before_the_engine_starts(
    job_file, engines: list[FakeEngine], tmp_path: Path
) -> None:
    from tests.support.stock import build_model

    job, builder, _ = _parts(job_file)
    build_model(job).save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: not readable as safetensors"):
        build_answerer(_engine(job), str(tmp_path / "adapter"), builder, LIMITS, job.evaluate.max_new_tokens)
    assert not engines


def test_an_evaluation_asks_the_engine_that_the_job_names(job_file, engines: list[FakeEngine]) -> None:
    from ray_vlm.evaluate.actors import InferenceJob, InferenceWorker
    from ray_vlm.evaluate.generate import answer_records

    prepared = prepare(load_job(job_file()))
    options = {"engine": "vllm", "max_new_tokens": 5}
    job = prepared.job.model_copy(update={"evaluate": prepared.job.evaluate.model_copy(update=options)})
    worker = InferenceWorker(InferenceJob(job, prepared.spec, prepared.train.records, None, ()))
    assert len(answer_records(worker, prepared.train.records[:3])) == 3
    assert answer_records(worker, prepared.train.records[:1])
    assert len(engines) == 1, "one engine for all batches"
    longest = max(len(worker.builder.prompt_row(record).input_ids) for record in prepared.train.records)
    assert engines[0].options["max_model_len"] == longest + 5


@pytest.mark.parametrize(("rank", "room"), [(4, 8), (8, 8), (24, 32), (600, 600)])
def test_the_maximum_rank_is_one_that_vllm_accepts(job_file, engines: list[FakeEngine], rank: int, room: int) -> None:
    start_engine(_engine(load_job(job_file())), LIMITS, "x", rank)
    assert engines[0].options["max_lora_rank"] == room
