"""Answers by a server: what it is asked, how adapters reach it, and what is refused, with a server in this process."""

import math
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_vlm.config.schema import Lora, Model
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.engines import server_client
from ray_vlm.engines.interface import Sampling
from ray_vlm.engines.server import ServerEngine, build_server_engine
from ray_vlm.engines.server_client import Reply, choose_pause, is_local
from ray_vlm.engines.server_protocol import Demand, list_problems
from ray_vlm.engines.vllm_start import EngineLimits
from ray_vlm.errors import ConfigError, ModelError, RunError
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.lora import lora_config
from tests.support.rollouts import SEEDS, fresh_model, prompt_builder, prompt_rows
from tests.support.sampling_server import SamplingServer, serve

SAMPLING = Sampling(num_generations=3, max_new_tokens=8, temperature=0.5)


@pytest.fixture(scope="module")
def folder(tiny_models: dict[str, str]) -> str:
    """The folder of the base."""
    return tiny_models["qwen3_vl"]


@pytest.fixture(scope="module")
def builder(folder: str) -> SampleBuilder:
    return prompt_builder(folder)


@pytest.fixture
def server(folder: str, builder: SampleBuilder) -> Iterator[SamplingServer]:
    with serve(SamplingServer(folder, folder, builder.image_token_id)) as server:
        yield server


def _engine(server: SamplingServer, builder: SampleBuilder, **options: Any) -> ServerEngine:
    model, never = Model(name=builder.spec.model.name, load_in_4bit=False), [builder.image_token_id, 11]
    limits = options.pop("limits", EngineLimits(300, 2))
    return build_server_engine("method.sampler_url", server.url, model, builder, limits, never, **options)


def _adapted(folder: str, target: list[Any], rank: int = 4) -> Any:
    from peft import get_peft_model

    base = fresh_model(folder)
    return get_peft_model(base, lora_config(Lora(rank=rank, target=target), FAMILIES[base.config.model_type]))


def test_prompts_and_sampling_as_the_server_takes_them(server: SamplingServer, builder: SampleBuilder) -> None:
    rows = prompt_rows(builder)
    with closing(_engine(server, builder, trains=True)) as engine:
        groups = engine.sample(rows, SAMPLING, SEEDS)
    assert [len(group) for group in groups] == [3] * len(rows)
    assert [answer.finished for answer in groups[0]] == [False, True, False]
    # -0.5, of what the ban on two tokens of -3 leaves
    assert groups[0][0].logprobs == pytest.approx([-0.5 - math.log1p(2 * math.exp(-3))] * 2)
    by_prompt = {tuple(request["token_ids"]): request for request in server.requests}
    assert len(by_prompt) == len(rows), "one request for the answers to a prompt"
    for row in rows:
        ids = row.input_ids.tolist()
        short = tuple(t for i, t in enumerate(ids) if t != builder.image_token_id or ids[i - 1] != t)
        request = by_prompt[short]
        assert len(request.get("content_parts", ())) == len(row.images)
        params = request["sampling_params"]
        assert (params["n"], params["max_tokens"], params["temperature"], params["top_k"]) == (3, 8, 0.5, -1)
        assert params["logit_bias"] == {str(builder.image_token_id): -100.0, "11": -100.0}
    assert len({request["sampling_params"]["seed"] for request in server.requests}) == len(rows)
    sent = {image.tobytes() for image in server.images}
    assert sent == {image.tobytes() for row in rows for image in row.images}, "pixels to the bit"


def test_log_probabilities_before_the_bias_are_taken_as_they_are(
    server: SamplingServer, builder: SampleBuilder
) -> None:
    server.processed = False
    rows = prompt_rows(builder)[:1]
    with closing(_engine(server, builder, trains=True)) as engine:
        assert engine.sample(rows, Sampling(1, 8, 1.0), SEEDS[:1])[0][0].logprobs == [-0.5, -0.5]
        with pytest.raises(RunError, match=r"samples at 0\.5\. Start it with --logprobs-mode processed_logprobs"):
            engine.sample(rows, SAMPLING, SEEDS[:1])
    with closing(_engine(server, builder)) as engine:  # pairs use no log-probabilities
        assert engine.sample(rows, SAMPLING, SEEDS[:1])[0][0].logprobs == []


def test_each_temperature_of_a_group_is_asked_for(server: SamplingServer, builder: SampleBuilder) -> None:
    rows = prompt_rows(builder)[:2]
    with closing(_engine(server, builder)) as engine:
        groups = engine.sample(rows, Sampling(3, 8, (0.0, 0.7, 1.4)), SEEDS[:2])
    assert [len(group) for group in groups] == [3, 3]
    heats = sorted(request["sampling_params"]["temperature"] for request in server.requests)
    assert heats == [0.0, 0.0, 0.7, 0.7, 1.4, 1.4]
    assert len({request["sampling_params"]["seed"] for request in server.requests}) == 6


def test_each_push_has_a_new_name_and_the_one_before_goes(server: SamplingServer, builder: SampleBuilder) -> None:
    import torch

    model = _adapted(builder.spec.model.name, ["language"])
    row = prompt_rows(builder)[1:2]
    engine = _engine(server, builder, trains=True)
    engine.update(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    engine.answer(row, 8)
    engine.update(model)
    engine.answer(row, 8)
    first, second = server.loaded
    assert first["name"] != second["name"]
    changed = [name for name, w in second["weights"].items() if not np.array_equal(w, first["weights"][name])]
    assert changed
    assert all("lora_B" in name for name in changed)
    assert list(server.adapters) == [second["name"]]
    assert [request["model"] for request in server.requests] == [first["name"], second["name"]]
    assert (Path(first["path"]).exists(), Path(second["path"]).exists()) == (False, True)
    engine.close()
    assert not server.adapters
    assert not Path(second["path"]).parent.exists()


def test_an_adapter_in_a_folder_stays_in_it(server: SamplingServer, builder: SampleBuilder, tmp_path: Path) -> None:
    _adapted(builder.spec.model.name, ["language"]).save_pretrained(tmp_path)
    rows = prompt_rows(builder)
    with closing(_engine(server, builder, adapter=str(tmp_path))) as engine:
        assert [ids[-1] for ids in engine.answer(rows, 8)] == [2] * len(rows)
        assert [entry["path"] for entry in server.loaded] == [str(tmp_path)]
        params = server.requests[0]["sampling_params"]
        assert (params["temperature"], params["n"], "logprobs" in params) == (0.0, 1, False)
    assert not server.adapters
    assert (tmp_path / "adapter_config.json").is_file()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="not readable as safetensors"):
        _engine(server, builder, adapter=str(tmp_path))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"vllm": False}, r"not a server of vLLM"),
        ({"scale_out": False}, r"Start it with --enable-scale-out"),
        ({"lora_routes": False}, r"loads no adapters .*Start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA"),
        ({"enable_lora": False}, r"LoRA is not enabled.*Start it with --enable-lora"),
        ({"max_model_len": 200}, r"context is 200 tokens, .* take 300\. Start it with --max-model-len 300"),
        ({"key": "secret"}, r"HTTP 401.*Set OPENAI_API_KEY"),
    ],
)
def test_a_server_that_does_not_suit_is_refused(
    setting: dict[str, Any], reason: str, server: SamplingServer, builder: SampleBuilder
) -> None:
    for name, value in setting.items():
        setattr(server, name, value)
    with pytest.raises(RunError, match=reason) as error:
        _engine(server, builder, trains=True)
    assert len(error.value.problems) == 1


def test_all_problems_come_at_once(server: SamplingServer, builder: SampleBuilder) -> None:
    server.scale_out, server.lora_routes, server.max_model_len, server.base, server.root = False, False, 9, "x", "y/x"
    with pytest.raises(RunError) as error:
        _engine(server, builder, adapter=None, trains=True)
    assert len(error.value.problems) == 3
    with pytest.raises(RunError) as error:
        _engine(server, builder)
    assert [problem for problem in error.value.problems if "its base is y/x" in problem]


def test_another_name_of_the_base_is_a_warning_where_a_proof_follows(
    server: SamplingServer, builder: SampleBuilder, lines: list[str]
) -> None:
    server.root = "/elsewhere/copy"
    _engine(server, builder, trains=True).close()
    assert not lines, "the name that it is served by is the job's"
    server.base = "copy"
    _engine(server, builder, trains=True).close()
    assert any("its base is /elsewhere/copy" in line for line in lines)
    with pytest.raises(RunError, match="add --served-model-name"):
        _engine(server, builder)
    server.root = f"/mnt/hub/models--org--{Path(builder.spec.model.name).name}/snapshots/0123"
    _engine(server, builder).close()


def test_the_key_goes_with_requests_and_into_no_message(
    server: SamplingServer, builder: SampleBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "sesame-1"
    monkeypatch.setenv("OPENAI_API_KEY", "sesame-1")
    _engine(server, builder).close()
    monkeypatch.setenv("OPENAI_API_KEY", "sesame-2")
    with pytest.raises(RunError) as error:
        _engine(server, builder)
    assert "sesame" not in str(error.value)


def test_another_prompt_than_that_of_training_ends_the_run(server: SamplingServer, builder: SampleBuilder) -> None:
    server.extra_tokens = 1
    with closing(_engine(server, builder)) as engine:
        assert engine.answer(prompt_rows(builder)[1:2], 8), "a prompt without images is as it was"
        with pytest.raises(RunError, match=r"makes \d+ tokens of the prompt .*--mm-processor-kwargs"):
            engine.answer(prompt_rows(builder), 8)


def test_fewer_completions_are_asked_for_again_once(server: SamplingServer, builder: SampleBuilder) -> None:
    row = prompt_rows(builder)[:1]
    with closing(_engine(server, builder)) as engine:
        server.short = 1
        assert len(engine.sample(row, SAMPLING, SEEDS[:1])[0]) == 3
        server.short = 2
        with pytest.raises(RunError, match=r"2 of 3 completions of row .* arrive, asked for twice"):
            engine.sample(row, SAMPLING, SEEDS[:1])


def test_a_rank_above_the_servers_is_passed_on_with_the_fix(server: SamplingServer, builder: SampleBuilder) -> None:
    with (
        closing(_engine(server, builder, trains=True)) as engine,
        pytest.raises(RunError, match=r"rank 32 is greater than max_lora_rank 16\. Start .* larger --max-lora-rank"),
    ):
        engine.update(_adapted(builder.spec.model.name, ["language"], 32))


def test_an_adapter_that_the_server_would_load_in_part_is_refused(
    server: SamplingServer, builder: SampleBuilder
) -> None:
    with (
        closing(_engine(server, builder, trains=True)) as engine,
        pytest.raises(ConfigError, match="adapts vision too"),
    ):
        engine.update(_adapted(builder.spec.model.name, ["language", "vision"]))
    assert not server.loaded


def test_a_server_that_is_away_for_a_while_is_waited_for(
    server: SamplingServer, builder: SampleBuilder, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    attempts: list[int] = []
    monkeypatch.setattr(server_client, "choose_pause", lambda attempt, *_: attempts.append(attempt) or 0.001)
    with closing(_engine(server, builder)) as engine:
        server.away = 3
        assert engine.answer(prompt_rows(builder)[1:2], 8)
    assert attempts == [0, 1, 2]
    assert len([line for line in lines if "waiting up to 300 s for the server" in line]) == 1


def test_a_server_that_does_not_come_back_ends_the_run(
    builder: SampleBuilder, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = SamplingServer(folder, folder, 0, url=f"http://127.0.0.1:{free.getsockname()[1]}/v1")
    monkeypatch.setattr(server_client, "choose_pause", lambda *_: None)
    with pytest.raises(RunError, match=rf"{dead.url}: the server does not answer /v1/models \(.*refused"):
        _engine(dead, builder)


def test_a_server_that_was_started_again_has_lost_the_adapter(server: SamplingServer, builder: SampleBuilder) -> None:
    with closing(_engine(server, builder, trains=True)) as engine:
        engine.update(_adapted(builder.spec.model.name, ["language"]))
        server.adapters.clear()
        with pytest.raises(RunError, match=r"does not exist\. It was probably started again"):
            engine.answer(prompt_rows(builder), 8)


def test_adapters_for_another_host_go_through_the_run_folder(
    server: SamplingServer, builder: SampleBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_vlm.engines.server.is_local", lambda url: False)
    for folder in (None, "s3://bucket/run"):
        with pytest.raises(RunError, match=r"none that both can see\. Set run.output_dir to a shared file system"):
            _engine(server, builder, trains=True, run_folder=folder)
    with closing(_engine(server, builder, trains=True, run_folder=str(tmp_path))) as engine:
        engine.update(_adapted(builder.spec.model.name, ["language"]))
        assert Path(server.loaded[0]["path"]).is_relative_to(tmp_path / ".sampler")
    assert not (tmp_path / ".sampler").exists()


def test_folders_of_adapters_that_a_killed_run_left_are_known_by_their_names(
    server: SamplingServer, builder: SampleBuilder
) -> None:
    """As `remove_stale` reads them; and PEFT need not ask the hub about embeddings."""
    with closing(_engine(server, builder, trains=True)) as engine:
        engine.update(_adapted(builder.spec.model.name, ["language"]))
        name = Path(server.loaded[0]["path"]).parent.name
        assert name.startswith(f"ray-vlm-adapter-{socket.gethostname()}-{os.getpid()}-")


def test_an_answer_of_another_form_ends_the_run_in_words(
    server: SamplingServer, builder: SampleBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = SamplingServer._choice

    def bare(self: SamplingServer, number: int, params: dict[str, Any]) -> dict[str, Any]:
        return choice(self, number, params) | ({"logprobs": None} if params["max_tokens"] > 1 else {})

    monkeypatch.setattr(SamplingServer, "_choice", bare)
    with (
        closing(_engine(server, builder, trains=True)) as engine,
        pytest.raises(RunError, match=r"row -?\d+ has not the form of vLLM 0\.32's"),
    ):
        engine.sample(prompt_rows(builder)[:1], SAMPLING, SEEDS[:1])


def test_a_failed_start_closes_its_connections(
    server: SamplingServer, builder: SampleBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr("ray_vlm.engines.server.ServerClient.close", lambda self: closed.append(self.url))
    _adapted(builder.spec.model.name, ["language"], 32).save_pretrained(tmp_path)
    with pytest.raises(RunError, match="larger --max-lora-rank"):
        _engine(server, builder, adapter=str(tmp_path))
    assert closed == [server.url]


def test_a_server_that_hangs_is_not_waited_for_at_the_start_nor_at_the_end(
    server: SamplingServer, builder: SampleBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[str, float] = {}
    answer = server_client.ServerClient._try

    def watch(self: Any, method: str, path: str, body: Any, answer_s: float) -> Any:
        limits[path] = answer_s
        return answer(self, method, path, body, answer_s)

    monkeypatch.setattr(server_client.ServerClient, "_try", watch)
    with closing(_engine(server, builder, trains=True)) as engine:
        assert set(limits.values()) == {120.0}
        engine.update(_adapted(builder.spec.model.name, ["language"]))
        engine.answer(prompt_rows(builder)[1:2], 8)
        assert limits["/inference/v1/generate"] == 900.0
    assert limits["/v1/unload_lora_adapter"] == 10.0


@pytest.mark.parametrize(
    ("served", "asked", "same"),
    [
        ("/runs/a/final", "/runs/b/final", False),
        ("/mnt/runs/a/final", "/runs/a/final/", True),
        ("/models/Qwen3-VL", "org/qwen3-vl", True),
        ("/hub/models--org--qwen3-vl/snapshots/01", "org/qwen3-vl", True),
    ],
)
def test_whole_models_of_two_runs_are_two_bases(served: str, asked: str, same: bool) -> None:
    card = {"id": served, "root": served, "max_model_len": 9}
    probe = Reply(200, {"prompt_token_ids": [0], "choices": [{"token_ids": [1], "logprobs": {"content": []}}]}, "")
    demand = Demand("evaluate.sampler_url", asked, asked, 9, adapters=False, proved=False)
    problems, _ = list_problems(demand, Reply(200, {"data": [card]}, ""), probe, None)
    assert ["its base is" in problem for problem in problems] == ([] if same else [True])


def test_retries_are_bounded_and_their_pauses_grow() -> None:
    pauses, waited = [], 0.0
    while (pause := choose_pause(len(pauses), waited, 60.0)) is not None:
        pauses.append(pause)
        waited += pause
    assert pauses == [1, 2, 4, 8, 15, 15, 15]
    assert choose_pause(0, 900.0, 60.0) == 1, "a request that takes long by itself is sent again once"


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.1:8000", True),
        ("http://[::1]:8000", True),
        (f"http://{socket.gethostname()}:1/v1", True),
        ("http://10.1.2.3:8000/v1", False),
        ("https://sampler.example/v1", False),
    ],
)
def test_addresses_of_this_machine_are_known(url: str, local: bool) -> None:
    assert is_local(url) == local
