"""Answers by vLLM, if the package is installed: GRPO's rollouts, validation, evaluation and pairs. Tried with vLLM's
build for CPUs; not measured on a GPU.

vLLM runs in processes of its own. In training the *adapter* is sent at every step, as a new LoRA request: it is never
merged into 4-bit weights, which would lose what a step has learned (TRL issues 3466, 4973). It is sent as files:
vLLM 0.32's `LoRARequest` names a folder, and its `from_lora_tensors` has no caller that takes tensors from outside.
vLLM loads the base by itself, in 4 bit if the trainer does. TRL corrects for differences between the two models'
log-probabilities (importance sampling), and the gap is logged.

A call that fails ends the engine. vLLM leaves the requests of a failed step in its queue: an engine in this process
would turn on them for ever in the next call, and one in a process of its own has ended. A call that hangs is seen by
the watchdog (`cluster.stall_minutes`).
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.engines.adapter_files import AdapterFiles
from ray_vlm.engines.interface import Completion, Engine, Pixels, Sampling
from ray_vlm.engines.vllm_requests import (
    check_prompt,
    check_rows,
    completion_of,
    prompt_of,
    sampling_params,
)
from ray_vlm.engines.vllm_start import AdapterRoom, EngineLimits, EngineSettings, plan_sleep, start_engine
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.models.backbone import base_of
from ray_vlm.models.card_memory import read_card, release_memory
from ray_vlm.models.engine_memory import MOST_SEQUENCES, describe_lack, plan_engine, plan_share
from ray_vlm.models.load import load_config, resolve_name
from ray_vlm.models.lora import adapter_part, check_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.nn import Module
    from transformers import TrainingArguments
    from trl import GRPOConfig
    from vllm import LLM
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)
_CPU_SEQUENCES = 32  # completions at a time for which an evaluation on CPUs has a cache; more wait
# Families whose adapters on tower and connector vLLM runs with equal numbers, as tests/vllm has it.
TOWER_FAMILIES = ("qwen3_vl", "qwen2_5_vl")


class VllmEngine(Engine):
    """A vLLM engine, with an adapter that is pushed or that lies in a folder.

    `pushes`: adapters that the engine has loaded. `wakes`: how often it was woken; `last_woke`: whether the last call
    had to wake it."""

    def __init__(
        self,
        settings: EngineSettings,
        limits: EngineLimits,
        builder: SampleBuilder,
        never: Sequence[int],
        key: str,
        room: AdapterRoom | None = None,
        adapter: Path | None = None,
        sleep: int = 0,
        **options: Any,
    ):
        """Start the engine.

        `never`: tokens that are not sampled. `key`: the setting that asks for vLLM. `room`: None for no adapters.
        `adapter`: a folder, for an engine to which none is pushed. `sleep`: the level of `plan_sleep`. `options`:
        further ones of vLLM. Raise `ConfigError` without vLLM, and `RunError` if the engine does not start."""
        self._settings, self._limits, self._builder, self._never = settings, limits, builder, tuple(never)
        self._folder, self._files, self._loaded = adapter, AdapterFiles(), False
        self._level, self._asleep, self._held = sleep, False, 0
        self.pushes, self.wakes, self.last_woke = 0, 0, False
        if sleep:
            options["enable_sleep_mode"] = True
        # The trainer's way of computing them: after the temperature.
        options["logprobs_mode"] = "processed_logprobs"
        self._engine: LLM | None = start_engine(settings, limits, key, room, **options)

    def update(self, model: "Module") -> None:
        """Answer with the adapter `default` of `model` as it is now. It is sent with the next call."""
        self._open()
        with self._ends_on_failure("writing the adapter"):
            self._folder, self._loaded = self._files.write(cast("PeftModel", model)), False

    def sample(
        self,
        rows: Sequence[Sample],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        pixels: Pixels | None = None,
    ) -> list[list[Completion]]:
        """Sample completions with the adapter. `pixels` is not used: vLLM processes the images itself.

        With `top_p` or `top_k` they have no log-probabilities: vLLM's are of the tokens that these leave. Raise
        `RunError` if the engine fails, which ends it, if a prompt is too long for it, or if it makes another prompt of
        a row than training does."""
        return self._ask(rows, sampling, seeds, with_adapter=True)

    def sample_base(
        self, rows: Sequence[Sample], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """Sample as `sample` does, without the adapter."""
        return self._ask(rows, sampling, seeds, with_adapter=False)

    def answer(self, rows: Sequence[Sample], max_new_tokens: int) -> list[list[int]]:
        """Return the tokens of a greedy answer to each row."""
        greedy = Sampling(1, max_new_tokens, 0.0)
        groups = self._ask(rows, greedy, [(self._settings.seed,)] * len(rows), with_adapter=True)
        return [group[0].ids for group in groups]

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Do not sleep between the calls of this context, as for the batches of a validation."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if self._engine is not None:
                with self._ends_on_failure("going to sleep"):
                    self._sleep()

    @property
    def has_ended(self) -> bool:
        return self._engine is None

    def close(self) -> None:
        """End vLLM's processes and remove the adapter's files."""
        engine, self._engine = self._engine, None
        self._files.close()
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()

    def _ask(
        self, rows: Sequence[Sample], sampling: Sampling, seeds: Sequence[Sequence[int]], with_adapter: bool
    ) -> list[list[Completion]]:
        engine = self._open()
        check_rows(rows, sampling.max_new_tokens, self._limits)
        if not rows:
            return []
        requests = [sampling_params(sampling, seed, self._never) for _, seed in zip(rows, seeds, strict=True)]
        owners = [i for i, params in enumerate(requests) for _ in params]
        inputs = [prompt_of(row, self._builder) for row in rows]
        flat = [one for params in requests for one in params]
        with self._ends_on_failure("answering"):
            self._wake()
            adapter = self._push() if with_adapter else None
            prompts = [inputs[i] for i in owners]
            outputs = engine.generate(prompts, flat, lora_request=adapter, use_tqdm=False)
            if [len(output.outputs) for output in outputs] != [params.n for params in flat]:
                raise RunError(f"vllm answered {len(outputs)} of {len(flat)} requests, or with too few completions")
            for i, output in zip(owners, outputs, strict=True):
                check_prompt(rows[i], output.prompt_token_ids or (), self._builder.stock is None)
            self._sleep()
        groups: list[list[Completion]] = [[] for _ in rows]
        for i, params, output in zip(owners, flat, outputs, strict=True):
            groups[i] += [completion_of(answer, params, self._never) for answer in output.outputs]
        return groups

    def _open(self) -> "LLM":
        if self._engine is None:
            raise RunError("the vllm engine has ended: it was closed, or an earlier call failed. Start a new one.")
        return self._engine

    @contextmanager
    def _ends_on_failure(self, phase: str) -> Iterator[None]:
        """Close the engine after any failure, as vLLM's queue may hold requests of it. Raise `RunError` with the
        reason."""
        try:
            yield
        except RunError:
            self.close()
            raise
        except Exception as error:  # vLLM, its processes and the libraries under it raise many types
            self.close()
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RunError(f"vllm failed while {phase}, and was ended: {reason}") from error
        except BaseException:  # Ctrl-C amid a call leaves requests as well
            self.close()
            raise

    def _wake(self) -> None:
        """Wake the engine if it sleeps, and read the weights again if its sleep has dropped them."""
        engine = self._open()
        self.last_woke = self._asleep
        if not self._asleep:
            return
        release_memory()  # what torch holds of the GPU without using it
        if self._level == 1:
            engine.wake_up()
        else:
            engine.wake_up(tags=["weights"])
            engine.collective_rpc("reload_weights")
            engine.wake_up(tags=["kv_cache"])
            self._loaded = False  # vLLM drops adapters when it reads weights
        self._asleep = False
        self.wakes += 1

    def _sleep(self) -> None:
        if self._level and not self._held and not self._asleep:
            self._open().sleep(level=self._level)
            self._asleep = True

    def _push(self) -> "LoRARequest | None":
        """Return the request that names the adapter; load the adapter first if it is new."""
        if self._folder is None:
            return None
        from vllm.lora.request import LoRARequest

        # vLLM keeps adapters, image features and prefixes by number and name: every push needs new ones.
        self.pushes += not self._loaded
        request = LoRARequest(f"push_{self.pushes}", self.pushes, str(self._folder))
        if not self._loaded:
            if not self._open().llm_engine.add_lora(request):
                raise RunError(f"vllm did not take the adapter of push {self.pushes}")
            self._loaded = True
            self._files.keep_only(self._folder)
        return request


def build_training_engine(
    settings: EngineSettings,
    limits: EngineLimits,
    model: "Module",
    builder: SampleBuilder,
    args: "TrainingArguments",
    sleep: int | None = None,
    share: float | None = None,
    num_engines: int = 1,
) -> VllmEngine:
    """Start the engine of a job that trains (`method.rollouts: vllm`).

    `model`: the one that trains, whose adapter the engine makes room for. `args`: TRL's `GRPOConfig`. `sleep`:
    `method.sampler_sleep`. `share`: of the card's memory, as the job says it; None: planned. `num_engines`: that
    start on this machine, and share its memory. Raise `ConfigError` without vLLM or for an adapter that it would load
    in part, and `RunError` if the engine does not start."""
    import psutil

    key = "method.rollouts"
    check_options(cast("PeftModel", model).peft_config["default"].to_dict(), f"{key}: model.adapter")
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    room = AdapterRoom(largest_rank(model), check_parts(names, builder, f"{key}: model.adapter"))
    kinds = (getattr(base_of(model).config, name, None) for name in ("image_token_id", "video_token_id"))
    never = [token for token in kinds if token is not None]
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    level = plan_sleep(sleep, settings.device, weights, psutil.virtual_memory().available / num_engines)
    sequences = limits.sequences or MOST_SEQUENCES
    config = base_of(model).config
    planned = plan_engine(config, settings.precision, weights, limits.tokens, sequences, bool(level))
    release_memory()
    card = read_card(settings.device)
    if card is not None:
        share = share if share is not None else plan_share(planned, card)
        if lack := describe_lack(share * card.total, planned, card):
            raise RunError(f"{key}: {lack}")
        memory: dict[str, Any] = {"gpu_memory_utilization": share}
    elif limits.sequences is not None:
        memory = {"kv_cache_memory_bytes": int(planned.cache)}
    else:
        memory = {"gpu_memory_utilization": cast("GRPOConfig", args).vllm_gpu_memory_utilization}
    return VllmEngine(settings, limits, builder, never, key, room, sleep=level, **memory)


def build_answering_engine(
    settings: EngineSettings, adapter: str | None, builder: SampleBuilder, limits: EngineLimits
) -> VllmEngine:
    """Start the engine of an evaluation (`evaluate.engine: vllm`). `adapter`: a folder; None: the base alone.

    Raise `ConfigError` without vLLM or for an adapter that it would load in part, `ModelError` for a damaged one, and
    `RunError` if the engine does not start."""
    key, room, folder = "evaluate.engine", None, Path(adapter) if adapter is not None else None
    options: dict[str, Any] = {}
    if folder is not None:
        from safetensors import safe_open

        check_adapter(str(folder), resolve_name(settings.model.name), settings.model.name)
        with safe_open(folder / "adapter_model.safetensors", "np") as file:
            tower = check_parts(file.keys(), builder, f"{key}: {folder}")
        adapter_config = json.loads((folder / "adapter_config.json").read_text())
        check_options(adapter_config, f"{key}: {folder}")
        room = AdapterRoom(max(adapter_config["r"], *(adapter_config.get("rank_pattern") or {}).values(), 1), tower)
    if settings.device == "cpu":  # vLLM would take most of the computer's memory
        sequences = limits.sequences or _CPU_SEQUENCES
        config = load_config(settings.model)
        planned = plan_engine(config, settings.precision, 0.0, limits.tokens, sequences, sleeps=False)
        options["kv_cache_memory_bytes"] = int(planned.cache)
    return VllmEngine(settings, limits, builder, [builder.image_token_id], key, room, folder, **options)


def largest_rank(model: "Module") -> int:
    """Return the largest rank among the layers of a model's adapter."""
    return max(p.shape[0] for name, p in model.named_parameters() if "lora_A.default" in name)


def check_options(config: Mapping[str, Any], who: str) -> None:
    """Raise `ConfigError` if an adapter with this configuration of PEFT is one that vLLM does not take. `who`: the
    adapter, for the message."""
    unfit = [name for name in ("modules_to_save", "use_dora", "lora_bias") if config.get(name)]
    if config.get("bias", "none") != "none":
        unfit.append("bias")
    if unfit:
        options = ", ".join(f"{name}={config[name]}" for name in unfit)
        raise ConfigError(
            f"{who} has {options}, and vllm takes low-rank weights alone. Use transformers, or an adapter that was "
            "trained without."
        )


def check_parts(names: Iterable[str], builder: SampleBuilder, who: str) -> bool:
    """Return whether an adapter has weights outside of the language model. Raise `ConfigError` if it has and vLLM was
    not shown to run them with equal numbers for this family. `who`: the adapter, for the message."""
    others = {adapter_part(builder.family, name) for name in names} - {"language"}
    if others and builder.family.model_type not in TOWER_FAMILIES:
        raise ConfigError(
            f"{who} adapts {', '.join(sorted(others))} too, which was tried with vllm for "
            f"{' and '.join(TOWER_FAMILIES)} only, and this base is {builder.family.model_type}. Use transformers, or "
            "an adapter that was trained with lora.target=[language]."
        )
    return bool(others)
