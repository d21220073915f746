"""A real server of vLLM answers as this package's own loop: the same tokens, and the trainer's log-probabilities.

In float32, on vLLM's build for CPUs, in a process of its own that all tests of this module ask.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

pytest.importorskip("vllm")

from ray_vlm.config.schema import Lora, Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import SampleSpec
from ray_vlm.engines.interface import Sampling
from ray_vlm.engines.sampling import sample_groups
from ray_vlm.engines.server import ServerEngine, build_server_engine
from ray_vlm.engines.vllm_start import EngineLimits
from ray_vlm.errors import RunError
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.load import load_model
from ray_vlm.models.lora import lora_config
from tests.support.rollouts import PROMPTS, SEEDS, prompt_rows
from tests.support.scoring import largest_gap

pytestmark = pytest.mark.slow
GAP = 2e-5  # of a log-probability
START_S = 400  # for a server under load
CONTEXT = 1024
ANSWERS = Sampling(num_generations=4, max_new_tokens=24, temperature=0.7)
GREEDY = replace(ANSWERS, num_generations=1, temperature=0.0)
OPTIONS = (
    *("--dtype", "float32", "--max-model-len", str(CONTEXT), "--limit-mm-per-prompt", '{"image": 2, "video": 0}'),
    *("--enable-scale-out", "--mm-processor-kwargs", '{"do_resize": false}'),
)
LORA = ("--enable-lora", "--max-lora-rank", "8")


@contextmanager
def _serve(folder: str, log: Path, *options: str) -> Iterator[str]:
    """Run a server of the base in `folder`, and give its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", "127.0.0.1"]
    environment = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as file:
        server = subprocess.Popen(
            [*command, "--port", str(port), *OPTIONS, *options], stdout=file, stderr=file, env=os.environ | environment
        )
        try:
            deadline = time.monotonic() + START_S
            while not _answers(port):
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def _answers(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except requests.RequestException:
        return False


@pytest.fixture(scope="module")
def url(tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the tiny Qwen3-VL, as docs/methods.md says to start it."""
    log = tmp_path_factory.mktemp("server") / "log"
    with _serve(tiny_models["qwen3_vl"], log, *LORA, "--logprobs-mode", "processed_logprobs") as url:
        yield url


def _builder(folder: str, limits: tuple[int | None, int | None] = (None, None)) -> SampleBuilder:
    spec = SampleSpec(Model(name=folder, load_in_4bit=False), ChatTask(), (), *limits, kind="prompt")
    return load_sample_builder(spec)


def _engine(url: str, folder: str, builder: SampleBuilder, **options: Any) -> ServerEngine:
    model, never = Model(name=folder, load_in_4bit=False), [builder.image_token_id]
    limits = options.pop("limits", EngineLimits(CONTEXT, 2))
    return build_server_engine("method.sampler_url", url, model, builder, limits, never, **options)


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, str]) -> Any:
    """The base with an adapter whose B is not zero, as training has it."""
    return _adapted(tiny_models["qwen3_vl"], 4)


def _adapted(folder: str, rank: int) -> Any:
    from peft import get_peft_model

    base = load_model(Model(name=folder, load_in_4bit=False), precision="fp32")
    torch.manual_seed(0)
    lora = Lora(rank=rank, alpha=8, target=["language"])
    model = get_peft_model(base, lora_config(lora, FAMILIES[base.config.model_type]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.mark.parametrize("limits", [(None, None), (50_000, 65_536), (1_024, 2_048)], ids=str)
def test_answers_are_those_of_our_loop(limits: Any, url: str, tiny_models: dict[str, str], model: Any) -> None:
    folder = tiny_models["qwen3_vl"]
    builder = _builder(folder, limits)
    rows = prompt_rows(builder, PROMPTS)
    own = sample_groups(model, rows, builder, GREEDY, SEEDS, "cpu")
    with closing(_engine(url, folder, builder, trains=True)) as engine:
        engine.update(model)
        assert engine.answer(rows, GREEDY.max_new_tokens) == [group[0].ids for group in own]
        greedy = engine.sample(rows, GREEDY, SEEDS)
        assert [group[0].ids for group in greedy] == [group[0].ids for group in own]
        assert largest_gap(model, rows, greedy, builder, 1.0) < GAP
        sampled = engine.sample(rows, ANSWERS, SEEDS)
        assert len({tuple(answer.ids) for group in sampled for answer in group}) > len(rows), (
            "answers of a group differ"
        )
        assert largest_gap(model, rows, sampled, builder, 0.7) < GAP
        alone = engine.sample(rows[1:2], ANSWERS, SEEDS[1:2])
        assert [answer.ids for answer in alone[0]] == [answer.ids for answer in sampled[1]], "seeds decide, not batches"


def test_each_push_is_the_adapter_as_it_is_and_nothing_is_left(
    url: str, tiny_models: dict[str, str], model: Any
) -> None:
    folder = tiny_models["qwen3_vl"]
    builder = _builder(folder)
    rows = prompt_rows(builder, PROMPTS)
    engine = _engine(url, folder, builder, trains=True)
    with closing(engine):
        engine.update(model)
        before = engine.sample(rows, GREEDY, SEEDS)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-1.5)
        engine.update(model)
        after = engine.sample(rows, GREEDY, SEEDS)
        assert largest_gap(model, rows, after, builder, 1.0) < GAP
        assert largest_gap(model, rows, before, builder, 1.0) > 100 * GAP, "a stale adapter would show"
        served = [card["id"] for card in requests.get(f"{url}/models", timeout=10).json()["data"]]
        assert served == [folder, engine.adapter], "the adapter before has gone"
    served = [card["id"] for card in requests.get(f"{url}/models", timeout=10).json()["data"]]
    assert served == [folder]


def test_an_adapter_in_a_folder_answers_and_the_base_without_it(
    url: str, tiny_models: dict[str, str], model: Any, tmp_path: Path
) -> None:
    folder = tiny_models["qwen3_vl"]
    builder = _builder(folder)
    rows = prompt_rows(builder, PROMPTS)
    model.save_pretrained(tmp_path)
    own = sample_groups(model, rows, builder, GREEDY, SEEDS, "cpu")
    with model.disable_adapter():
        base = sample_groups(model, rows, builder, GREEDY, SEEDS, "cpu")
    assert [group[0].ids for group in own] != [group[0].ids for group in base]
    with closing(_engine(url, folder, builder, adapter=str(tmp_path))) as engine:
        assert engine.answer(rows, GREEDY.max_new_tokens) == [group[0].ids for group in own]
    with closing(_engine(url, folder, builder)) as engine:
        assert engine.answer(rows, GREEDY.max_new_tokens) == [group[0].ids for group in base]


def test_what_the_server_cannot_hold_is_refused_with_its_words(
    url: str, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    folder, other = tiny_models["qwen3_vl"], tiny_models["qwen2_5_vl"]
    builder = _builder(folder)
    with closing(_engine(url, folder, builder, trains=True)) as engine:
        with pytest.raises(RunError, match=r"rank 16 is greater than max_lora_rank.*larger --max-lora-rank"):
            engine.update(_adapted(folder, 16))
        with pytest.raises(RunError, match=r"No adapter found.*must be able to read this folder"):
            engine.load(tmp_path / "nothing")
    with pytest.raises(RunError, match="--max-model-len 2000"):
        _engine(url, folder, builder, limits=EngineLimits(2000, 2))
    stranger = _builder(other)
    with pytest.raises(RunError, match=r"its base is .*qwen3_vl, and model.name is .*qwen2_5_vl"):
        _engine(url, other, stranger)
    with (
        closing(_engine(url, other, stranger, trains=True)) as engine,
        pytest.raises(RunError, match=r"tokens of the prompt of row|is not answered: HTTP 400"),
    ):
        engine.sample(prompt_rows(stranger, PROMPTS), GREEDY, SEEDS)


def test_a_server_without_adapters_and_with_other_log_probabilities(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    folder = tiny_models["qwen3_vl"]
    builder = _builder(folder)
    rows = prompt_rows(builder, PROMPTS)
    base = load_model(Model(name=folder, load_in_4bit=False), precision="fp32").eval()
    with _serve(folder, tmp_path / "log") as url:
        with pytest.raises(RunError, match=r"loads no adapters .*Start it with --enable-lora"):
            _engine(url, folder, builder, trains=True)
        engine = _engine(url, folder, builder)
        engine._scored = True
        with closing(engine):
            hot = engine.sample(rows, replace(ANSWERS, temperature=1.0), SEEDS)
            assert largest_gap(base, rows, hot, builder, 1.0) < GAP
            with pytest.raises(RunError, match="--logprobs-mode processed_logprobs"):
                engine.sample(rows, ANSWERS, SEEDS)
