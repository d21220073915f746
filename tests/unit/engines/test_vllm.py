"""The calls of vLLM, with a fake engine: adapters are sent and never merged, prompts have one token for each image."""

import logging
import os
import sys
import types
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ray_vlm.config.load import load_job
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.engines import adapter_files, vllm_start
from ray_vlm.engines.adapter_files import AdapterFiles, choose_root
from ray_vlm.engines.interface import Sampling
from ray_vlm.engines.vllm import TOWER_FAMILIES, VllmEngine, build_answering_engine, build_training_engine
from ray_vlm.engines.vllm_start import (
    AdapterRoom,
    EngineLimits,
    EngineSettings,
    child_variables,
    plan_sleep,
    start_engine,
    warn_untried,
)
from ray_vlm.errors import ConfigError, ModelError, RunError
from ray_vlm.machine import GIB
from ray_vlm.models.card_memory import CardMemory
from ray_vlm.models.libraries import quiet_libraries
from ray_vlm.train.prepare import prepare

FACTOR = 16  # pixels along a side of an image token of the tiny Qwen3-VL
LIMITS = EngineLimits(300, 2)
ARGS: Any = SimpleNamespace(vllm_gpu_memory_utilization=0.3)
FOUR = Sampling(4, 16, 0.9)
SEEDS = [(0, 0, 3, 0), (0, 0, 5, 0)]


@dataclass
class FakeEngine:
    """Takes the arguments of `vllm.LLM`, records every call, and answers each prompt with fixed numbers."""

    options: dict[str, Any]
    calls: list[dict[str, Any]] = field(default_factory=list)
    pushes: list[dict[str, Any]] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    loaded: Any = None
    fails: Exception | None = None
    image_token: int = 0

    @property
    def llm_engine(self) -> Any:
        core = SimpleNamespace(shutdown=lambda: self.events.append("shutdown"))
        return SimpleNamespace(add_lora=self.add_lora, engine_core=core)

    def add_lora(self, request: Any) -> bool:
        from safetensors.numpy import load_file

        folder = Path(request.path)
        files = sorted(path.name for path in folder.iterdir())
        weights = load_file(folder / "adapter_model.safetensors")
        self.pushes.append({"lora": request, "files": files, "weights": weights})
        self.events.append("push")
        self.loaded = request.number
        return True

    def sleep(self, level: int) -> None:
        self.events.append(f"sleep {level}")

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.events.append(f"wake {tags}")

    def collective_rpc(self, method: str) -> None:
        self.events.append(method)
        self.loaded = None

    def generate(self, prompts: list, params: list, lora_request: Any, use_tqdm: bool) -> list:
        if self.fails is not None:
            raise self.fails
        self.events.append("generate")
        assert lora_request is None or lora_request.number == self.loaded, "vLLM would read the adapter again"
        self.calls.append({"prompts": prompts, "params": params, "lora": lora_request})

        def answer(number: int, one: Any) -> Any:
            ids = [number + 20, 2]
            logprobs = None
            if one.logprobs is not None:
                banned = {t: SimpleNamespace(logprob=-1000.0) for t in one.logprob_token_ids}
                logprobs = [banned | {t: SimpleNamespace(logprob=-0.5 * (i + 1))} for i, t in enumerate(ids)]
            return SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason="stop" if number % 2 else "length")

        return [
            SimpleNamespace(outputs=[answer(i, p) for i in range(p.n)], prompt_token_ids=self.expanded(prompt))
            for prompt, p in zip(prompts, params, strict=True)
        ]

    def expanded(self, prompt: dict[str, Any]) -> list[int]:
        """Return a prompt's tokens as vLLM expands it: with those of its images, which are not resized again."""
        images = iter(prompt.get("multi_modal_data", {}).get("image", []))
        ids: list[int] = []
        for token in prompt["prompt_token_ids"]:
            count = 1
            if token == self.image_token:
                width, height = next(images).size
                count = width // FACTOR * (height // FACTOR)
            ids += [token] * count
        return ids if prompt.get("mm_processor_kwargs") == {"do_resize": False} else ids[1:]


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
    logger = types.ModuleType("vllm.logger")
    logger.DEFAULT_LOGGING_CONFIG = {"handlers": {}, "loggers": {"vllm": {"handlers": ["vllm"]}}}  # type: ignore[attr-defined]
    for value in (module, lora, request, logger):
        name = value.__name__
        monkeypatch.setitem(sys.modules, name, value)
    return started


def _settings(job: JobConfig, device: str = "cpu") -> EngineSettings:
    return EngineSettings(job.model, job.train.precision, job.seed, device)


@dataclass
class Setup:
    """A job, its rows, and the model that trains."""

    job: JobConfig
    builder: Any
    rows: list
    model: Any
    engines: list[FakeEngine]

    def start(self, device: str = "cpu", **options: Any) -> tuple[VllmEngine, FakeEngine]:
        engine = build_training_engine(_settings(self.job, device), LIMITS, self.model, self.builder, ARGS, **options)
        self.engines[-1].image_token = self.builder.image_token_id
        return engine, self.engines[-1]

    def change(self) -> None:
        import torch

        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if "lora_B" in name:
                    p.add_(1.0)


def _set_up(job_file: Any, engines: list[FakeEngine], **lora: Any) -> Setup:
    from tests.support.stock import build_model

    method = {"name": "grpo", "num_generations": 4}
    prepared = prepare(load_job(job_file(method=method, lora={"rank": 4, "target": ["language"]} | lora)))
    builder = load_sample_builder(prepared.spec)
    rows = [builder.prompt_row(r) for r in prepared.train.records[:2]]
    return Setup(prepared.job, builder, rows, build_model(prepared.job), engines)


@pytest.fixture
def setup(job_file: Any, engines: list[FakeEngine]) -> Setup:
    """A job with an adapter on the language model."""
    return _set_up(job_file, engines)


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    """An empty folder that stands for /dev/shm."""
    (tmp_path / "memory").mkdir()
    return tmp_path / "memory"


def test_the_adapter_is_sent_at_every_step_and_never_merged(setup: Setup) -> None:
    import torch

    before = {name: p.detach().clone() for name, p in setup.model.named_parameters()}
    engine, fake = setup.start()
    engine.update(setup.model)
    groups = engine.sample(setup.rows, FOUR, SEEDS)
    setup.change()
    engine.update(setup.model)
    engine.sample(setup.rows, FOUR, SEEDS)
    assert len(setup.engines) == 1
    assert fake.options["enable_lora"]
    assert "enable_tower_connector_lora" not in fake.options
    assert "enable_sleep_mode" not in fake.options
    assert fake.options["logprobs_mode"] == "processed_logprobs"
    assert fake.options["max_lora_rank"] >= 4
    assert [call["lora"].number for call in fake.calls] == [1, 2]
    assert engine.pushes == 2
    first, second = (push["weights"] for push in fake.pushes)
    assert fake.pushes[0]["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    changed = [name for name, w in second.items() if not np.array_equal(w, first[name])]
    assert changed
    assert all("lora_B" in name for name in changed)
    for name, p in setup.model.named_parameters():
        if "lora_B" not in name:
            assert torch.equal(p, before[name])
    assert [len(group) for group in groups] == [4, 4]
    assert [answer.finished for answer in groups[0]] == [False, True, False, True]
    assert groups[0][1].ids == [21, 2]
    assert groups[0][1].logprobs == [-0.5, -1.0]


def test_the_adapter_of_the_last_push_is_not_sent_again(setup: Setup) -> None:
    engine, fake = setup.start()
    engine.update(setup.model)
    engine.sample(setup.rows, FOUR, SEEDS)
    assert engine.answer(setup.rows, 5) == [[20, 2]] * 2
    assert fake.events == ["push", "generate", "generate"]
    engine.sample_base(setup.rows, FOUR, SEEDS)
    assert fake.calls[-1]["lora"] is None


def test_files_of_earlier_pushes_are_removed_and_all_of_them_at_the_end(setup: Setup, memory: Path) -> None:
    engine, _ = setup.start()
    engine._files = AdapterFiles(memory)
    engine.update(setup.model)
    engine.update(setup.model)
    (parent,) = memory.iterdir()
    assert str(os.getpid()) in parent.name
    assert len(list(parent.iterdir())) == 2, "the engine has read neither"
    engine.answer(setup.rows, 5)
    assert [path.name for path in parent.iterdir()] == ["2"]
    engine.close()
    engine.close()
    assert not list(memory.iterdir())
    with pytest.raises(RunError, match="the vllm engine has ended"):
        engine.update(setup.model)
    assert not list(memory.iterdir())


def test_files_lie_in_memory_where_two_adapters_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=2 * GIB)
    monkeypatch.setattr(adapter_files.shutil, "disk_usage", lambda path: usage)
    assert choose_root(tmp_path, 0.9 * GIB) == tmp_path
    assert choose_root(tmp_path, 1.0 * GIB) == Path(adapter_files.tempfile.gettempdir())
    monkeypatch.setattr(adapter_files.os, "access", lambda *_: False)
    assert choose_root(tmp_path, 1) == Path(adapter_files.tempfile.gettempdir())
    monkeypatch.undo()
    assert choose_root(tmp_path / "missing", 1) == Path(adapter_files.tempfile.gettempdir())


def test_folders_of_processes_that_were_killed_are_removed(setup: Setup, tmp_path: Path) -> None:
    import socket
    import subprocess

    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    host = socket.gethostname()
    dead, elsewhere = f"ray-vlm-adapter-{host}-{process.pid}-x", f"ray-vlm-adapter-not{host}-{process.pid}-x"
    alive = f"ray-vlm-adapter-{host}-{os.getppid()}-x"
    for name in (dead, elsewhere, alive, "other"):
        (tmp_path / name).mkdir()
    AdapterFiles(tmp_path).write(setup.model)
    assert {elsewhere, alive, "other"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / dead).exists()


@pytest.mark.parametrize("error", [ValueError("LoRA rank 16 is greater\nthan 8"), KeyboardInterrupt()])
def test_a_failed_call_ends_the_engine(setup: Setup, memory: Path, error: Any) -> None:
    """vLLM's queue holds the requests of a failed call, on which the next would turn for ever."""
    engine, fake = setup.start()
    engine._files = AdapterFiles(memory)
    engine.update(setup.model)
    fake.fails = error
    expected = RunError if isinstance(error, Exception) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        engine.answer(setup.rows, 5)
    if expected is RunError:
        assert str(caught.value) == "vllm failed while answering, and was ended: LoRA rank 16 is greater than 8"
    assert fake.events[-1] == "shutdown"
    assert not list(memory.iterdir())
    with pytest.raises(RunError, match="an earlier call failed"):
        engine.answer(setup.rows, 5)


def test_an_engine_that_cannot_sleep_ends_in_words(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, level: int) -> None:
        raise ValueError("not permitted")

    monkeypatch.setattr("ray_vlm.engines.vllm.read_card", lambda device: CardMemory(80 * GIB, 40 * GIB, GIB, GIB))
    monkeypatch.setattr(FakeEngine, "sleep", fail)
    engine, fake = setup.start("cuda:0", sleep=1)
    with (
        pytest.raises(RunError, match="vllm failed while going to sleep, and was ended: not permitted"),
        engine.awake(),
    ):
        engine.answer(setup.rows, 5)
    assert fake.events[-1] == "shutdown"


def test_an_adapter_that_vllm_does_not_take_ends_the_engine(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, fake = setup.start()
    engine.update(setup.model)
    monkeypatch.setattr(FakeEngine, "add_lora", lambda self, request: False)
    with pytest.raises(RunError, match="vllm did not take the adapter of push 1"):
        engine.answer(setup.rows, 5)
    assert fake.events == ["shutdown"]


def test_an_adapter_on_the_tower_is_run_where_vllm_was_tried(
    job_file: Any, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = _set_up(job_file, engines, target=["language", "vision"])
    _, fake = setup.start()
    assert fake.options["enable_tower_connector_lora"]
    monkeypatch.setattr("ray_vlm.engines.vllm.TOWER_FAMILIES", ("qwen2_5_vl",))
    with pytest.raises(ConfigError, match=r"model.adapter adapts vision too, .* and this base is qwen3_vl"):
        setup.start()
    assert len(engines) == 1


def test_prompts_and_sampling_as_vllm_takes_them(setup: Setup) -> None:
    engine, fake = setup.start()
    engine.update(setup.model)
    engine.sample(setup.rows, Sampling(4, 16), [(1,), (2,)])
    call, builder = fake.calls[0], setup.builder
    for prompt, row in zip(call["prompts"], setup.rows, strict=True):
        ids = np.array(prompt["prompt_token_ids"])
        assert (ids == builder.image_token_id).sum() == len(row.images) == 1
        assert len(ids) == len(row.input_ids) - (row.input_ids == builder.image_token_id).sum() + 1
        assert np.array_equal(np.array(prompt["multi_modal_data"]["image"][0]), row.images[0])
    first, second = call["params"]
    assert (first.n, first.max_tokens, first.top_k, first.logprobs) == (4, 16, -1, len(first.logprob_token_ids))
    assert first.seed != second.seed
    config = setup.model.config
    banned = {builder.image_token_id, config.image_token_id, config.video_token_id}
    assert first.logit_bias == dict.fromkeys(banned, -100.0)
    assert (fake.options["max_model_len"], fake.options["limit_mm_per_prompt"]) == (300, {"image": 2, "video": 0})
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert engine.sample([], FOUR, []) == []
    assert len(fake.calls) == 1


def test_each_completion_has_its_temperature_and_seed(setup: Setup) -> None:
    engine, fake = setup.start()
    heats = Sampling(3, 16, (0.0, 0.7, 0.7), top_p=0.9, top_k=20)
    groups = engine.sample(setup.rows, heats, SEEDS)
    assert [[answer.ids for answer in group] for group in groups] == [[[20, 2]] * 3] * 2
    params = fake.calls[0]["params"]
    assert [(p.n, p.temperature, p.top_p, p.top_k) for p in params[:3]] == [(1, t, 0.9, 20) for t in (0.0, 0.7, 0.7)]
    assert len({p.seed for p in params}) == 6
    assert all(p.logprobs is None and p.logprob_token_ids is None for p in params)
    assert groups[0][0].logprobs == [], "vLLM's would be of the tokens that top-p leaves"
    assert fake.calls[0]["prompts"][0] is fake.calls[0]["prompts"][2]
    with pytest.raises(ValueError, match="2 temperatures for 3 completions"):
        engine.sample(setup.rows, Sampling(3, 16, (0.0, 0.7)), SEEDS)


def test_the_engine_has_room_for_the_ranks_of_the_adapter_that_trains(job_file: Any, engines: list[FakeEngine]) -> None:
    """They may be those of `model.adapter`, or of `lora.ranks`, and not `lora.rank`."""
    _, fake = _set_up(job_file, engines, rank=24).start()
    assert fake.options["max_lora_rank"] == 32


@pytest.mark.parametrize(("other", "count"), [("fewer", "172 tokens"), ("template", "other tokens")])
def test_another_prompt_than_that_of_training_ends_the_engine(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, other: str, count: str
) -> None:
    """As when vLLM resizes images again, or has another template, which are silent otherwise."""
    engine, fake = setup.start()
    as_it_is = FakeEngine.expanded
    changed: Any = lambda self, prompt: [0] * 172 if other == "fewer" else [*as_it_is(self, prompt)[:-1], 0]  # noqa: E731
    monkeypatch.setattr(FakeEngine, "expanded", changed)
    with pytest.raises(RunError, match=rf"vllm makes {count} of the prompt of row .*[train|from token]"):
        engine.sample(setup.rows, FOUR, SEEDS)
    assert fake.events[-1] == "shutdown"


def test_missing_completions_end_the_engine(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = setup.start()
    whole = FakeEngine.generate
    monkeypatch.setattr(FakeEngine, "generate", lambda self, *args, **options: whole(self, *args, **options)[:1])
    with pytest.raises(RunError, match="vllm answered 1 of 2 requests"):
        engine.answer(setup.rows, 5)


def test_a_prompt_longer_than_the_context_is_not_asked(setup: Setup) -> None:
    engine, fake = setup.start()
    longest = max(len(row.input_ids) for row in setup.rows)
    engine.answer(setup.rows, 300 - longest)
    with pytest.raises(RunError, match=rf"its prompt has {longest} tokens .* vllm was started for 300 tokens"):
        engine.answer(setup.rows, 301 - longest)
    more = replace(setup.rows[0], images=setup.rows[0].images * 3)
    with pytest.raises(RunError, match=r"it has 3 images, and vllm was started for 2, the most of a row"):
        engine.answer([more], 5)
    assert not engine.has_ended, "the others who ask it go on"
    assert fake.events == ["generate"]
    engine.answer(setup.rows, 5)


@pytest.mark.parametrize(
    ("asked", "device", "free", "level"),
    [
        (None, "cpu", 99, 0),
        (2, "cpu", 99, 0),
        (None, "cuda:0", 20, 1),
        (None, "cuda:0", 19.9, 2),
        (0, "cuda:0", 99, 0),
        (1, "cuda:0", 0, 1),
        (2, "cuda:0", 99, 2),
    ],
)
def test_how_deep_an_engine_sleeps(asked: int | None, device: str, free: float, level: int) -> None:
    assert plan_sleep(asked, device, 10 * GIB, free * GIB) == level


@pytest.mark.parametrize(("num_engines", "level"), [(1, 1), (10**7, 2)])
def test_the_engines_of_a_machine_share_its_memory(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, num_engines: int, level: int
) -> None:
    monkeypatch.setattr("ray_vlm.engines.vllm.read_card", lambda device: CardMemory(80 * GIB, 40 * GIB, GIB, GIB))
    engine, fake = setup.start("cuda:0", num_engines=num_engines)
    engine.update(setup.model)
    engine.answer(setup.rows, 5)
    assert fake.events == ["push", "generate", f"sleep {level}"]


@pytest.mark.parametrize(
    ("level", "wake"),
    [
        (1, ["wake None"]),
        (2, ["wake ['weights']", "reload_weights", "wake ['kv_cache']", "push"]),
    ],
)
def test_an_engine_sleeps_between_calls_and_reads_what_it_lost(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, level: int, wake: list[str]
) -> None:
    monkeypatch.setattr("ray_vlm.engines.vllm.read_card", lambda device: CardMemory(80 * GIB, 40 * GIB, GIB, GIB))
    engine, fake = setup.start("cuda:0", sleep=level)
    assert fake.options["enable_sleep_mode"]
    engine.update(setup.model)
    engine.answer(setup.rows, 5)
    assert fake.events == ["push", "generate", f"sleep {level}"]
    assert (engine.wakes, engine.last_woke) == (0, False)
    engine.answer(setup.rows, 5)
    assert fake.events[3:] == [*wake, "generate", f"sleep {level}"]
    assert (engine.wakes, engine.last_woke) == (1, True)
    fake.events.clear()
    with engine.awake():
        engine.answer(setup.rows, 5)
        engine.answer(setup.rows, 5)
        assert not engine.last_woke
    assert fake.events == [*wake, "generate", "generate", f"sleep {level}"]
    numbers = [push["lora"].number for push in fake.pushes]
    assert len(set(numbers)) == len(numbers) == engine.pushes, "vLLM keeps the adapter of a number that it knows"


def test_an_engine_takes_the_share_that_it_needs_and_is_refused_where_it_does_not_fit(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_vlm.engines.vllm.read_card", lambda device: CardMemory(80 * GIB, 40 * GIB, GIB, GIB))
    _, fake = setup.start("cuda:0")
    assert 0 < fake.options["gpu_memory_utilization"] < 0.1, "of a tiny base"
    _, fake = setup.start("cuda:0", share=0.3)
    assert fake.options["gpu_memory_utilization"] == 0.3, "as the job says"
    with pytest.raises(RunError, match=r"method.rollouts: vllm takes 48.0 GiB .* 40.0 of 80.0 GiB are free"):
        setup.start("cuda:0", share=0.6)
    assert len(setup.engines) == 2


def test_on_cpus_the_cache_has_room_for_the_completions(setup: Setup) -> None:
    _, fake = setup.start()
    assert fake.options["gpu_memory_utilization"] == 0.3
    limits = replace(LIMITS, sequences=8)
    build_training_engine(_settings(setup.job), limits, setup.model, setup.builder, ARGS)
    options = setup.engines[-1].options
    assert options["max_num_seqs"] == 8
    assert "gpu_memory_utilization" not in options
    text = setup.model.config.get_text_config()
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    assert options["kv_cache_memory_bytes"] == 8 * 384 * token


@pytest.mark.parametrize(
    ("visible", "device", "expected"), [(None, "cuda:1", "1"), ("4,6", "cuda:1", "6"), ("4,6", "cpu", "4,6")]
)
def test_an_engine_sees_the_card_of_its_worker(
    visible: str | None,
    device: str,
    expected: str,
    job_file: Any,
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
    start_engine(replace(_settings(load_job(job_file())), device=device), LIMITS, "x", None)
    assert seen == [expected]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_engines_on_cpus_give_memory_back_unless_the_user_decides() -> None:
    assert set(child_variables("cpu", {})) == {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    assert set(child_variables("cpu", {"MALLOC_TRIM_THRESHOLD_": "5"})) == {"MALLOC_MMAP_THRESHOLD_"}
    assert child_variables("cuda:1", {}) == {"CUDA_VISIBLE_DEVICES": "1"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": {"top_p": 0.9}}, "top_p and top_k leave"),
        ({"method": {"top_k": 20}}, "top_p and top_k leave"),
        ({"method": {"temperature": 2.5}}, "temperatures up to 2"),
        ({"lora": {"modules_to_save": ["embed_tokens"]}}, "adapters without whole modules"),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_the_run(job_file: Any, options: dict[str, Any], reason: str) -> None:
    method = {"name": "grpo", "num_generations": 4, "rollouts": "vllm"} | options.get("method", {})
    lora = {"rank": 4, "target": ["language"]} | options.get("lora", {})
    with pytest.raises(ConfigError, match=reason):
        load_job(job_file(method=method, lora=lora))


def test_a_missing_package_is_named(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"vllm is not installed .*Install ray_vlm\[vllm\]"):
        setup.start()


def test_a_version_that_was_not_tried_gets_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    for version in ("0.32.0", None, "0.99.1", "0.99.1"):
        warn_untried(version)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "vllm 0.99.1 has not been tried" in caplog.text
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_libraries()
        warnings.warn("TRL currently supports vLLM versions from 0.22.0 to 0.31.0.", UserWarning, stacklevel=1)
    assert not [w for w in shown if "TRL currently" in str(w.message)]


DEAD = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
LOG = """EngineCore failed to start.
Traceback (most recent call last):
  File "core.py", line 7, in run
ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.
"""


@pytest.mark.parametrize(
    ("error", "log", "words"),
    [
        (DEAD, "", "(its process ended; its own messages are above). Correct"),
        (
            DEAD,
            LOG,
            "(ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`). Lower",
        ),
        (
            ValueError("Free memory on cuda:0 (3/80 GiB)\nis less"),
            LOG,
            "(Free memory on cuda:0 (3/80 GiB) is less). Lower",
        ),
        (ValueError("no such option"), "", "(no such option). Correct what it names, or use transformers."),
    ],
)
def test_an_engine_that_does_not_start_ends_the_run_in_words(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, error: Exception, log: str, words: str
) -> None:
    import json

    def start(**_: Any) -> None:
        config = json.loads(Path(os.environ["VLLM_LOGGING_CONFIG_PATH"]).read_text())
        assert config["loggers"]["vllm"]["handlers"] == ["vllm", "errors"]
        Path(config["handlers"]["errors"]["filename"]).write_text(log)
        raise error

    monkeypatch.setattr(sys.modules["vllm"], "LLM", start)
    with pytest.raises(RunError) as caught:
        setup.start()
    message = str(caught.value)
    assert message.startswith("method.rollouts: vllm did not start on cpu (")
    assert words in message
    assert "VLLM_LOGGING_CONFIG_PATH" not in os.environ


def test_advice_names_keys_of_what_was_asked(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """`method.trl` changes nothing in an evaluation."""

    def start(**_: Any) -> None:
        raise ValueError("No available memory for the cache blocks")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", start)
    with pytest.raises(RunError, match=r"Lower evaluate\.max_new_tokens or data\.max_pixels") as caught:
        build_answering_engine(_settings(setup.job), None, setup.builder, LIMITS)
    assert "method." not in str(caught.value)


def test_a_user_s_own_way_of_logging_is_left_alone(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM refuses a configuration of its logs where these are turned off."""
    seen: list[str | None] = []
    start = sys.modules["vllm"].LLM
    monkeypatch.setattr(
        sys.modules["vllm"], "LLM", lambda **o: seen.append(os.environ.get("VLLM_LOGGING_CONFIG_PATH")) or start(**o)
    )
    monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "0")
    setup.start()
    assert seen == [None]


def test_evaluation_asks_for_one_greedy_answer_with_the_adapter_in_its_folder(setup: Setup, tmp_path: Path) -> None:
    setup.model.save_pretrained(tmp_path / "adapter")
    folder = str(tmp_path / "adapter")
    engine = build_answering_engine(_settings(setup.job), folder, setup.builder, LIMITS)
    fake = setup.engines[0]
    fake.image_token = setup.builder.image_token_id
    assert engine.answer(setup.rows, 7) == [[20, 2]] * 2
    assert engine.answer(setup.rows, 7) == [[20, 2]] * 2
    assert fake.options["max_lora_rank"] == 8
    assert fake.options["max_model_len"] == 300
    assert [push["lora"].path for push in fake.pushes] == [folder]
    assert [(p.n, p.temperature, p.max_tokens) for p in fake.calls[0]["params"]] == [(1, 0.0, 7)] * 2
    engine.close()
    assert (tmp_path / "adapter" / "adapter_config.json").is_file(), "the user's own folder stays"
    base = build_answering_engine(_settings(setup.job), None, setup.builder, LIMITS)
    setup.engines[1].image_token = setup.builder.image_token_id
    base.answer(setup.rows, 7)
    assert not setup.engines[1].options["enable_lora"]
    assert setup.engines[1].calls[0]["lora"] is None


def test_evaluation_refuses_an_adapter_that_vllm_would_load_in_part(
    job_file: Any, engines: list[FakeEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = _set_up(job_file, engines, target=["language", "vision"])
    setup.model.save_pretrained(tmp_path / "adapter")
    folder = str(tmp_path / "adapter")
    assert "qwen3_vl" in TOWER_FAMILIES
    build_answering_engine(_settings(setup.job), folder, setup.builder, LIMITS)
    assert engines[0].options["enable_tower_connector_lora"]
    monkeypatch.setattr("ray_vlm.engines.vllm.TOWER_FAMILIES", ())
    with pytest.raises(ConfigError, match=r"evaluate\.engine: .*adapter adapts vision too"):
        build_answering_engine(_settings(setup.job), folder, setup.builder, LIMITS)
    assert len(engines) == 1


@pytest.mark.parametrize(
    "option", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"lora_bias": True}]
)
def test_an_adapter_that_vllm_does_not_take_is_refused_before_the_engine_starts(
    setup: Setup, tmp_path: Path, option: dict[str, Any]
) -> None:
    import json

    setup.model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | option))
    with pytest.raises(ConfigError, match=rf"evaluate\.engine: .*adapter has {next(iter(option))}="):
        build_answering_engine(_settings(setup.job), str(tmp_path / "adapter"), setup.builder, LIMITS)
    vars(setup.model.peft_config["default"]).update(option)
    with pytest.raises(ConfigError, match=rf"method\.rollouts: model\.adapter has {next(iter(option))}="):
        setup.start()
    assert not setup.engines


def test_a_damaged_adapter_is_refused_before_the_engine_starts(setup: Setup, tmp_path: Path) -> None:
    setup.model.save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: not readable as safetensors"):
        build_answering_engine(_settings(setup.job), str(tmp_path / "adapter"), setup.builder, LIMITS)
    assert not setup.engines


@pytest.mark.parametrize(("rank", "room"), [(4, 8), (8, 8), (24, 32), (600, 600)])
def test_the_maximum_rank_is_one_that_vllm_accepts(rank: int, room: int) -> None:
    assert vllm_start.lora_options(AdapterRoom(rank))["max_lora_rank"] == room


def test_an_evaluation_asks_the_engine_that_the_job_names(
    job_file: Any, engines: list[FakeEngine], monkeypatch
) -> None:
    from ray_vlm.evaluate.actors import InferenceJob, InferenceWorker
    from ray_vlm.evaluate.generate import answer_records

    monkeypatch.setattr("ray_vlm.engines.vllm.check_prompt", lambda *_: None)
    prepared = prepare(load_job(job_file()))
    options = {"engine": "vllm", "max_new_tokens": 5}
    job = prepared.job.model_copy(update={"evaluate": prepared.job.evaluate.model_copy(update=options)})
    worker = InferenceWorker(InferenceJob(job, prepared.spec, prepared.train.records, None, ()))
    assert len(answer_records(worker, prepared.train.records[:3])) == 3
    assert answer_records(worker, prepared.train.records[:1])
    assert len(engines) == 1, "one engine for all batches"
    longest = max(len(worker.builder.prompt_row(record).input_ids) for record in prepared.train.records)
    assert engines[0].options["max_model_len"] == longest + 5
