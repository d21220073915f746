"""Answers by vLLM, if the package is installed: GRPO's rollouts, and evaluation. Tried with vLLM's build for CPUs; not
measured on a GPU.

vLLM runs in processes of its own. In training the *adapter* is sent at every step, as a new LoRA request: it is never
merged into 4-bit weights, which would lose what a step has learned (TRL issues 3466, 4973). vLLM loads the base by
itself, in 4 bit if the trainer does. TRL corrects for differences between the two models' log-probabilities (importance
sampling), and the gap is logged.
"""

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ray_vlm.config.schema import Model
from ray_vlm.config.train import Precision
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.engines.interface import Completion, Sampling
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.models.backbone import base_of
from ray_vlm.models.families import part_of
from ray_vlm.models.load import resolve_name
from ray_vlm.models.lora import check_adapter
from ray_vlm.models.precision import DTYPES

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.nn import Module
    from transformers import TrainingArguments
    from trl import GRPOConfig
    from vllm import LLM
    from vllm.outputs import CompletionOutput

logger = logging.getLogger(__name__)
_NEVER = -100.0  # added to the logits of tokens that are not sampled, the lowest value that vLLM takes
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM accepts as `max_lora_rank`


@dataclass(frozen=True)
class EngineSettings:
    """The base that an engine loads, the dtype of its arithmetic, the seed of its random numbers, and its device, `cpu`
    or `cuda:N`."""

    model: Model
    precision: Precision
    seed: int
    device: str = "cpu"


@dataclass(frozen=True)
class EngineLimits:
    """The largest requests that an engine gets, by which it reserves memory: tokens of a prompt and its answer, and
    images of a prompt."""

    tokens: int
    images: int


def start_engine(
    settings: EngineSettings, limits: EngineLimits, key: str, max_lora_rank: int | None, **options: Any
) -> "LLM":
    """Start a `vllm.LLM` with the base, in 4 bit if the job says so. Raise `ConfigError` without vLLM.

    `key`: the setting that asks for vLLM; `max_lora_rank`: None for no adapters; `options`: further ones of vLLM."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing in this package calls home
    try:
        from vllm import LLM
    except ImportError as error:
        raise ConfigError(f"{key}: vllm is not installed ({error}). Install it, or use transformers.") from None
    fitting = [rank for rank in _RANKS if rank >= (max_lora_rank or 0)]
    lora = {} if max_lora_rank is None else {"max_loras": 1, "max_lora_rank": (fitting or [max_lora_rank])[0]}
    started = time.monotonic()
    with _only_card(settings.device):
        engine = LLM(
            model=resolve_name(settings.model.name),
            revision=settings.model.revision,
            quantization="bitsandbytes" if settings.model.load_in_4bit else None,
            dtype=DTYPES[settings.precision],
            max_model_len=limits.tokens,
            limit_mm_per_prompt={"image": limits.images, "video": 0},
            enable_lora=max_lora_rank is not None,
            seed=settings.seed,
            trust_remote_code=False,
            **lora,
            **options,
        )
    logger.info(f"vllm started in {time.monotonic() - started:.0f} s")
    return engine


@contextmanager
def _only_card(device: str) -> Iterator[None]:
    """Let processes that are started meanwhile see only the GPU `cuda:N`. vLLM takes the first that it sees, and Ray
    Train shows each worker all GPUs of its node."""
    if not device.startswith("cuda"):
        yield
        return
    number, visible = int(device.partition(":")[2] or 0), os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
    try:
        yield
    finally:
        if visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def build_sampler(
    settings: EngineSettings, limits: EngineLimits, model: "Module", args: "TrainingArguments"
) -> Callable[..., list[list[Completion]]]:
    """Return a function like `sample_groups`. `model`: the one that trains, whose adapter's ranks the engine makes room
    for. `args`: TRL's `GRPOConfig`, whose `vllm_*` options set memory. Raise `ConfigError` if vLLM is not installed."""
    config = cast("GRPOConfig", args)
    engine = start_engine(
        settings,
        limits,
        "method.rollouts",
        largest_rank(model),
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        logprobs_mode="processed_logprobs",  # as the trainer computes them: after the temperature
    )
    kinds = (getattr(base_of(model).config, name, None) for name in ("image_token_id", "video_token_id"))
    never, pushed = [token for token in kinds if token is not None], 0

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
            return generate(engine, Path(folder), pushed, rows, builder, sampling, seeds, never)

    return sample


def largest_rank(model: "Module") -> int:
    """Return the largest rank among the layers of a model's adapter."""
    ranks = [p.shape[0] for name, p in model.named_parameters() if "lora_A.default" in name]
    return max(ranks)


def _check_parts(names: Iterable[str], builder: SampleBuilder, who: str) -> None:
    """Raise `ConfigError` if an adapter has weights that vLLM ignores. `who`: the adapter, for the message."""
    if others := {part_of(builder.family, name) for name in names} - {"language"}:
        raise ConfigError(
            f"{who} adapts {', '.join(sorted(others))} too, and vllm takes adapters on the language model only. Use "
            "transformers, or an adapter that was trained with lora.target=[language]."
        )


def build_answerer(
    settings: EngineSettings, adapter: str | None, builder: SampleBuilder, limits: EngineLimits, max_new_tokens: int
) -> Callable[[Sequence[Sample]], list[str]]:
    """Return a function that answers rows greedily (`evaluate.engine: vllm`). Raise `ModelError` for a damaged adapter.

    `adapter`: a folder; None: the base alone."""
    rank, folder = None, Path(adapter) if adapter is not None else None
    if folder is not None:
        from safetensors import safe_open

        check_adapter(str(folder), resolve_name(settings.model.name), settings.model.name)
        with safe_open(folder / "adapter_model.safetensors", "np") as file:
            _check_parts(file.keys(), builder, f"evaluate.engine: {folder}")
        adapter_config = json.loads((folder / "adapter_config.json").read_text())
        rank = max(adapter_config["r"], *(adapter_config.get("rank_pattern") or {}).values(), 1)
    engine = start_engine(settings, limits, "evaluate.engine", rank)
    greedy = Sampling(1, max_new_tokens, 0.0, 1.0, 0)

    def answer(rows: Sequence[Sample]) -> list[str]:
        seeds, never = [(settings.seed,)] * len(rows), [builder.image_token_id]
        groups = generate(engine, folder, 1, rows, builder, greedy, seeds, never)
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
    never: Sequence[int],
) -> list[list[Completion]]:
    """Sample `num_generations` completions of each row, with the adapter in the folder `adapter` if there is one, and
    without the tokens `never`.

    Raise `RunError` if vLLM makes another prompt of a row than training does."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = [
        SamplingParams(
            n=sampling.num_generations,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            logprobs=len(never),  # of these, beside the sampled token
            # The trainer would look for the pixels of each image token.
            logit_bias=dict.fromkeys(never, _NEVER),
            logprob_token_ids=list(never),
            seed=int(np.random.SeedSequence(list(seed)).generate_state(1)[0]),  # one number
        )
        for seed in seeds
    ]
    request = LoRARequest(f"step_{number}", number, str(adapter)) if adapter is not None else None
    outputs = engine.generate([prompt_of(row, builder) for row in rows], params, lora_request=request, use_tqdm=False)
    for row, output in zip(rows, outputs, strict=True):
        if len(output.prompt_token_ids) != len(row.input_ids):
            raise RunError(
                f"vllm makes {len(output.prompt_token_ids)} tokens of the prompt of row {row.number}, and training "
                f"{len(row.input_ids)}: it resizes images in another way, or its template is another. Use transformers "
                "for method.rollouts and evaluate.engine, and please report this."
            )
    assert isinstance(sampling.temperature, float | int)  # only pairs are sampled at several, by the package's loop
    bias = _NEVER / (sampling.temperature or 1.0)  # vLLM adds it before it divides by the temperature
    return [[_completion(answer, never, bias) for answer in output.outputs] for output in outputs]


def prompt_of(row: Sample, builder: SampleBuilder) -> dict[str, Any]:
    """Convert a row to vLLM's input: token ids with one image token for each image, which vLLM expands, and resized
    images."""
    from PIL import Image

    token, ids = builder.image_token_id, row.input_ids.tolist()
    prompt_ids = [t for i, t in enumerate(ids) if t != token or i == 0 or ids[i - 1] != token]
    prompt: dict[str, Any] = {"prompt_token_ids": prompt_ids}
    if row.images:
        prompt["multi_modal_data"] = {"image": [Image.fromarray(image) for image in row.images]}
        if builder.stock is None:
            # They have the size that training uses, which may be outside the limits of the base's own processor.
            prompt["mm_processor_kwargs"] = {"do_resize": False}
    return prompt


def _completion(answer: "CompletionOutput", never: Sequence[int], bias: float) -> Completion:
    """Return an answer with log-probabilities over the whole vocabulary. vLLM's are over what the `bias` of the tokens
    `never` leaves: with r, the sum of their probabilities without it, all others are larger by a factor of 1 + r."""
    logprobs = []
    for token, of_token in zip(answer.token_ids, answer.logprobs, strict=True):
        banned = sum(math.exp(of_token[other].logprob - bias) for other in never)
        logprobs.append(of_token[token].logprob - math.log1p(banned))
    return Completion(list(answer.token_ids), logprobs, answer.finish_reason == "stop")
