"""Answers by vLLM, if the package and a GPU are available: GRPO's rollouts in the trainer's process, and evaluation.
Untested on hardware.

In training the *adapter* is sent at every step, as a new LoRA request: it is never merged into 4-bit weights, which
would lose what a step has learned (TRL issues 3466, 4973). vLLM loads the base by itself, in 4 bit if the trainer does.
TRL corrects for differences between the two models' log-probabilities (truncated importance sampling), and the gap is
logged.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ray_vlm.config.schema import Lora, Model
from ray_vlm.config.train import Precision
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.errors import ConfigError
from ray_vlm.methods.rollout import Completion, Sampling
from ray_vlm.models.families import part_of
from ray_vlm.models.load import resolve_name
from ray_vlm.models.lora import check_adapter
from ray_vlm.models.precision import DTYPES

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainingArguments
    from trl import GRPOConfig
    from vllm import LLM
    from vllm.outputs import CompletionOutput

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM accepts as `max_lora_rank`


@dataclass(frozen=True)
class EngineSettings:
    """The base that an engine loads, the dtype of its arithmetic, and the seed of its random numbers."""

    model: Model
    precision: Precision
    seed: int


def start_engine(settings: EngineSettings, key: str, max_lora_rank: int | None, **options: Any) -> "LLM":
    """Start a `vllm.LLM` with the base, in 4 bit if the job says so. Raise `ConfigError` without vLLM.

    `key`: the setting that asks for vLLM; `max_lora_rank`: None for no adapters; `options`: further ones of vLLM."""
    try:
        from vllm import LLM
    except ImportError as error:
        raise ConfigError(f"{key}: vllm is not installed ({error}). Install it, or use transformers.") from None
    fitting = [rank for rank in _RANKS if rank >= (max_lora_rank or 0)]
    lora = {} if max_lora_rank is None else {"max_loras": 1, "max_lora_rank": (fitting or [max_lora_rank])[0]}
    return LLM(
        model=resolve_name(settings.model.name),
        revision=settings.model.revision,
        quantization="bitsandbytes" if settings.model.load_in_4bit else None,
        dtype=DTYPES[settings.precision],
        enable_lora=max_lora_rank is not None,
        seed=settings.seed,
        trust_remote_code=False,
        **lora,
        **options,
    )


def build_sampler(
    settings: EngineSettings, lora: Lora | None, args: "TrainingArguments"
) -> Callable[..., list[list[Completion]]]:
    """Return a function like `rollout.sample_groups`. `args`: TRL's `GRPOConfig`, whose `vllm_*` options set memory and
    lengths. Raise `ConfigError` if vLLM is not installed."""
    assert lora is not None
    config = cast("GRPOConfig", args)
    engine = start_engine(
        settings,
        "method.rollouts",
        lora.rank,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        max_model_len=config.vllm_max_model_length,
        logprobs_mode="processed_logprobs",  # as the trainer computes them: after the temperature
    )
    pushed = 0

    def sample(
        model: "PeftModel",
        rows: Sequence[Sample],
        builder: SampleBuilder,
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        *_: object,
        **__: object,
    ) -> list[list[Completion]]:
        nonlocal pushed
        if not pushed:
            names = [name for name, _ in model.named_parameters() if "lora_" in name]
            _check_parts(names, builder, "method.rollouts: model.adapter")
        pushed += 1  # vLLM caches adapters by number: every push needs a new one
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, selected_adapters=["default"])
            return generate(engine, Path(folder), pushed, rows, builder, sampling, seeds)

    return sample


def _check_parts(names: Iterable[str], builder: SampleBuilder, who: str) -> None:
    """Raise `ConfigError` if an adapter has weights that vLLM ignores. `who`: the adapter, for the message."""
    if others := {part_of(builder.family, name) for name in names} - {"language"}:
        raise ConfigError(
            f"{who} adapts {', '.join(sorted(others))} too, and vllm takes adapters on the language model only. Use "
            "transformers, or an adapter that was trained with lora.target=[language]."
        )


def build_answerer(
    settings: EngineSettings, adapter: str | None, builder: SampleBuilder, longest: int, max_new_tokens: int
) -> Callable[[Sequence[Sample]], list[str]]:
    """Return a function that answers rows greedily (`evaluate.engine: vllm`). Raise `ModelError` for a damaged adapter.

    `adapter`: a folder; None: the base alone. `longest`: tokens of the longest prompt, by which vLLM reserves less
    memory than for the model's whole context."""
    rank, folder = None, Path(adapter) if adapter is not None else None
    if folder is not None:
        from safetensors import safe_open

        check_adapter(str(folder), resolve_name(settings.model.name), settings.model.name)
        with safe_open(folder / "adapter_model.safetensors", "np") as file:
            _check_parts(file.keys(), builder, f"evaluate.engine: {folder}")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
    engine = start_engine(settings, "evaluate.engine", rank, max_model_len=longest + max_new_tokens)
    greedy = Sampling(1, max_new_tokens, 0.0, 1.0, 0)

    def answer(rows: Sequence[Sample]) -> list[str]:
        groups = generate(engine, folder, 1, rows, builder, greedy, [(settings.seed,)] * len(rows))
        return [builder.text(group[0].ids) for group in groups]

    return answer


def generate(
    engine: "LLM",
    adapter: Path | None,
    number: int,
    rows: Sequence[Sample],
    builder: SampleBuilder,
    sampling: Sampling,
    seeds: Sequence[Sequence[int]],
) -> list[list[Completion]]:
    """Sample `num_generations` completions of each row, with the adapter in the folder `adapter` if there is one."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = [
        SamplingParams(
            n=sampling.num_generations,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            logprobs=0,  # of the sampled token alone
            seed=int(np.random.SeedSequence(list(seed)).generate_state(1)[0]),  # one number
        )
        for seed in seeds
    ]
    request = LoRARequest(f"step_{number}", number, str(adapter)) if adapter is not None else None
    outputs = engine.generate([prompt_of(row, builder) for row in rows], params, lora_request=request, use_tqdm=False)
    return [[_completion(answer) for answer in output.outputs] for output in outputs]


def prompt_of(row: Sample, builder: SampleBuilder) -> dict[str, Any]:
    """Convert a row to vLLM's input: token ids with one image token for each image, which vLLM expands, and resized
    images."""
    from PIL import Image

    token, ids = builder.image_token_id, row.input_ids.tolist()
    prompt_ids = [t for i, t in enumerate(ids) if t != token or i == 0 or ids[i - 1] != token]
    prompt: dict[str, Any] = {"prompt_token_ids": prompt_ids}
    if row.images:
        prompt["multi_modal_data"] = {"image": [Image.fromarray(image) for image in row.images]}
    return prompt


def _completion(answer: "CompletionOutput") -> Completion:
    logprobs = [of_token[token].logprob for token, of_token in zip(answer.token_ids, answer.logprobs, strict=True)]
    return Completion(list(answer.token_ids), logprobs, answer.finish_reason == "stop")
