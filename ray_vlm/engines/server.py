"""Answers by vLLM's server that somebody else has started (`vllm serve BASE --enable-lora ...`).

The server holds the base. An adapter goes to it as a folder that it reads, under a new name at every push; the one
before is removed. Prompts go as token ids and images (`server_protocol.py`), so that template and pixels are those of
training. Tried with vLLM 0.32 and its build for CPUs.
"""

import logging
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, cast

from ray_vlm.config.schema import Model
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.engines.adapter_files import AdapterFiles
from ray_vlm.engines.interface import Completion, Engine, Pixels, Sampling
from ray_vlm.engines.server_client import ANSWER_S, CONNECTIONS, Reply, ServerClient, is_local
from ray_vlm.engines.server_protocol import (
    GENERATE,
    LOAD,
    MODELS,
    PROBE_ADAPTER,
    UNLOAD,
    Demand,
    build_params,
    build_probe,
    build_prompt,
    is_processed,
    list_problems,
    read_completions,
    read_prompt,
    served_base,
)
from ray_vlm.engines.vllm_start import EngineLimits
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.models.load import resolve_name
from ray_vlm.models.lora import adapter_part, check_adapter
from ray_vlm.storage import is_remote

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.nn import Module

logger = logging.getLogger(__name__)
_FIRST_PATIENCE_S = 20.0  # for a server that does not answer at the start, and is probably not there
_FIRST_ANSWER_S = 120.0  # for an answer at the start, of a server that may be busy
_LAST_ANSWER_S = 10.0  # for an answer at the end, which nobody waits for


def build_server_engine(
    setting: str,
    url: str,
    model: Model,
    builder: SampleBuilder,
    limits: EngineLimits,
    never: Sequence[int],
    adapter: str | None = None,
    trains: bool = False,
    run_folder: str | None = None,
) -> "ServerEngine":
    """Connect to a server, and load the adapter in the folder `adapter` if there is one.

    `setting`: the key that holds `url`, for messages. `limits`: of the largest request. `never`: tokens that are not
    sampled. `trains`: adapters will be pushed (`update`), whose log-probabilities are used; they go through
    `run_folder`, which the server's host must see too, unless that is this host. Raise `RunError` with all problems at
    once if the server does not suit the job, and `ModelError` for a damaged adapter."""
    resolved = resolve_name(model.name)
    if adapter is not None:
        check_adapter(adapter, resolved, model.name)
        _check_parts(_weight_names(Path(adapter)), builder, f"{setting}: {adapter}")
    demand = Demand(setting, model.name, resolved, limits.tokens, trains or adapter is not None, trains)
    client = ServerClient(url)
    with ExitStack() as on_failure:
        on_failure.callback(client.close)
        base, processed = _check_server(client, demand, never)
        files = _adapter_files(setting, url, run_folder) if trains else None
        engine = ServerEngine(client, base, builder, never, files, processed, scored=trains)
        if adapter is not None:
            engine.load(Path(adapter).resolve())
        on_failure.pop_all()
    return engine


def _check_server(client: ServerClient, demand: Demand, never: Sequence[int]) -> tuple[str, bool]:
    """Return the name of the server's base and whether its log-probabilities are after temperature and bias."""
    waits = (_FIRST_PATIENCE_S, _FIRST_ANSWER_S)
    models = client.send("GET", MODELS, None, *waits)
    probe = client.send("POST", GENERATE, build_probe(never[0] if never else 0), *waits)
    load = client.send("POST", LOAD, PROBE_ADAPTER, *waits) if demand.adapters else None
    problems, notes = list_problems(demand, models, probe, load)
    if problems:
        raise RunError([f"{demand.setting}={client.url}: {problem}." for problem in problems])
    for note in notes:
        logger.warning(f"{demand.setting}={client.url}: {note}")
    card = served_base(models)
    assert card is not None
    return card["id"], is_processed(probe)


def _adapter_files(setting: str, url: str, run_folder: str | None) -> AdapterFiles:
    """Return what writes adapters where the server reads them."""
    if is_local(url):
        return AdapterFiles()
    if run_folder is None or is_remote(run_folder):
        raise RunError(
            f"{setting}={url}: the server is on another host, and adapters go to it through the run's folder "
            f"({run_folder}), which is none that both can see. Set run.output_dir to a shared file system."
        )
    return AdapterFiles(root=Path(run_folder).resolve() / ".sampler")


class ServerEngine(Engine):
    """Asks a server. `build_server_engine` makes one.

    `base`: the name under which the server has the base. `files`: writes adapters for the server; None where none are
    pushed. `processed`: the server's log-probabilities are after temperature and bias. `scored`: completions have
    log-probabilities; otherwise theirs are empty."""

    def __init__(
        self,
        client: ServerClient,
        base: str,
        builder: SampleBuilder,
        never: Sequence[int],
        files: AdapterFiles | None,
        processed: bool,
        scored: bool,
    ):
        self._client, self._base, self._builder = client, base, builder
        self._never, self._files, self._processed, self._scored = list(never), files, processed, scored
        self._prefix, self._pushed = f"ray_vlm-{uuid.uuid4().hex[:8]}", 0
        self.adapter: str | None = None  # the name of the adapter that the server has

    def update(self, model: "Module") -> None:
        """Push the adapter of a PEFT model, and remove the one before from the server. Raise `RunError` if the server
        does not take it."""
        assert self._files is not None
        if self.adapter is None:
            names = [name for name, _ in model.named_parameters() if "lora_" in name]
            _check_parts(names, self._builder, "method.rollouts: the adapter")
        folder = self._files.write(cast("PeftModel", model))
        self.load(folder)
        self._files.keep_only(folder)

    def load(self, folder: Path) -> None:
        """Answer with the adapter in a folder from now on."""
        before = self.adapter
        self._pushed += 1
        name = f"{self._prefix}-{self._pushed}"  # the server keeps what it has computed for a name
        self._client.stop_waiting(False)
        reply = self._client.send("POST", LOAD, {"lora_name": name, "lora_path": str(folder)})
        if reply.status != 200 and "already been loaded" not in reply.message:  # it was, if the request was sent twice
            raise RunError(f"{self._client.url}: the server does not load the adapter in {folder}: {_explain(reply)}")
        self.adapter = name
        if before is not None:
            self._unload(before)

    def _unload(self, name: str, answer_s: float = ANSWER_S) -> None:
        reply = self._client.send("POST", UNLOAD, {"lora_name": name}, answer_s=answer_s)
        if reply.status not in (200, 404):
            logger.warning(f"{self._client.url}: the server does not unload {name}: {reply.message}")

    def sample(
        self,
        rows: Sequence[Sample],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        pixels: Pixels | None = None,
    ) -> list[list[Completion]]:
        """Sample as `Engine` says; `pixels` are not used. `top_p` and `top_k` change the log-probabilities.

        Raise `RunError` if the server stops answering, makes another prompt of a row than training does, returns fewer
        completions than asked twice, or has log-probabilities of another temperature."""
        heats = _split_heats(sampling)
        if self._scored and not self._processed and any(heat not in (0, 1) for heat, _ in heats):
            raise RunError(
                f"{self._client.url}: its log-probabilities are those of temperature 1, and the job samples at "
                f"{sampling.temperature}. Start it with --logprobs-mode processed_logprobs, or use temperature 1."
            )

        def one(row: Sample, seed: Sequence[int]) -> list[Completion]:
            prompt, answers = build_prompt(row, self._builder), []
            for number, (heat, count) in enumerate(heats):
                part = [*seed, number] if len(heats) > 1 else seed
                params = build_params(sampling, heat, count, part, self._never, self._scored)
                answers += self._complete(row, prompt | {"sampling_params": params}, heat, count)
            return answers

        return self._for_each(one, rows, seeds)

    def sample_base(
        self, rows: Sequence[Sample], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """Sample as `sample` does, from the base by its name."""
        adapter, self.adapter = self.adapter, None
        try:
            return self.sample(rows, sampling, seeds)
        finally:
            self.adapter = adapter

    def answer(self, rows: Sequence[Sample], max_new_tokens: int) -> list[list[int]]:
        """Answer as `Engine` says. Raise `RunError` as `sample` does."""
        greedy = Sampling(1, max_new_tokens, 0.0)
        params = build_params(greedy, 0.0, 1, (0,), self._never, scored=False)

        def one(row: Sample, _: Sequence[int]) -> list[Completion]:
            request = build_prompt(row, self._builder) | {"sampling_params": params}
            return self._complete(row, request, 0.0, 1)

        return [answers[0].ids for answers in self._for_each(one, rows, [()] * len(rows))]

    def _for_each(
        self,
        one: Callable[[Sample, Sequence[int]], list[Completion]],
        rows: Sequence[Sample],
        seeds: Sequence[Sequence[int]],
    ) -> list[list[Completion]]:
        """Return the answers to each row, asked at the same time. The first error ends all requests."""
        todo = deque(enumerate(zip(rows, seeds, strict=True)))
        done: SimpleQueue[tuple[int, list[Completion] | BaseException]] = SimpleQueue()

        def work() -> None:
            with suppress(IndexError):
                while True:
                    number, (row, seed) = todo.popleft()
                    try:
                        done.put((number, one(row, seed)))
                    except BaseException as error:  # raised below, in the thread that asks
                        done.put((number, error))

        self._client.stop_waiting(False)
        for _ in range(min(len(rows), CONNECTIONS)):
            # Not an executor's: Python would wait at its end for a request that the server never answers.
            Thread(target=work, name="sampler", daemon=True).start()
        answers: dict[int, list[Completion]] = {}
        try:
            while len(answers) < len(rows):
                number, answer = done.get()
                if isinstance(answer, BaseException):
                    raise answer
                answers[number] = answer
        finally:
            todo.clear()
            self._client.stop_waiting(True)
        return [answers[number] for number in range(len(rows))]

    def _complete(self, row: Sample, request: dict, heat: float, count: int) -> list[Completion]:
        """Return `count` completions, asked for once more if there are fewer."""
        request["model"] = self.adapter or self._base
        scored = "logprobs" in request["sampling_params"]
        for _ in range(2):
            reply = self._client.send("POST", GENERATE, request)
            if reply.status != 200:
                raise RunError(f"{self._client.url}: row {row.number} is not answered: {_explain(reply)}")
            self._check_prompt(row, reply)
            try:
                answers = read_completions(reply, self._never, heat, scored, self._processed)
            except (LookupError, TypeError, ValueError) as error:
                raise RunError(
                    f"{self._client.url}: its answer to row {row.number} has not the form of vLLM 0.32's, which was "
                    f"tried ({type(error).__name__}: {error}). Serve the base with that version."
                ) from error
            if len(answers) == count:
                return answers
        raise RunError(
            f"{self._client.url}: {len(answers)} of {count} completions of row {row.number} arrive, asked for twice. "
            "Look into the server's log; it may be short of memory."
        )

    def _check_prompt(self, row: Sample, reply: Reply) -> None:
        ids, expected = read_prompt(reply), row.input_ids.tolist()
        if ids != expected:
            raise RunError(
                f"{self._client.url}: the server makes {len(ids or ())} tokens of the prompt of row {row.number}, and "
                f"training {len(expected)}, or others: it has another base, or it resizes images again. Start it with "
                "the base of the job and --mm-processor-kwargs '{\"do_resize\": false}'."
            )

    def close(self) -> None:
        """Remove the adapter from the server, and the folder through which it went."""
        if self.adapter is not None:
            with suppress(RunError):  # a server that has gone holds no adapter
                self._client.stop_waiting(True)
                self._unload(self.adapter, _LAST_ANSWER_S)
            self.adapter = None
        self._client.close()
        if self._files is not None:
            self._files.close()


def _split_heats(sampling: Sampling) -> list[tuple[float, int]]:
    """Return each temperature of a group and how many completions it has."""
    if isinstance(sampling.temperature, tuple):
        return [(heat, 1) for heat in sampling.temperature]
    return [(sampling.temperature, sampling.num_generations)]


def _explain(reply: Reply) -> str:
    """Return the server's words for an error, with the fix where it is known."""
    for words, fix in (
        ("max_lora_rank", "Start the server with a larger --max-lora-rank"),
        ("No adapter found", "The server must be able to read this folder: run it on the same file system and user"),
        ("does not exist", "It was probably started again: continue the run with --resume, which loads the adapter"),
        ("may be provided in one prompt", "Start the server with a larger --limit-mm-per-prompt"),
    ):
        if words in reply.message:
            return f"{reply.message.rstrip('.')}. {fix}."
    return f"{reply.message.rstrip('.')}. The server's log says more."


def _check_parts(names: Iterable[str], builder: SampleBuilder, who: str) -> None:
    """Raise `ConfigError` if an adapter has weights that the server ignores."""
    if others := {adapter_part(builder.family, name) for name in names} - {"language"}:
        raise ConfigError(
            f"{who} adapts {', '.join(sorted(others))} too, and a server takes adapters on the language model only. "
            "Use transformers, or an adapter that was trained with lora.target=[language]."
        )


def _weight_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        return list(file.keys())
