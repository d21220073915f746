"""The memory of a vLLM engine that shares a worker's GPU, by component. Pure arithmetic; allowances, not measured on a
card."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_vlm.config.method import GrpoMethod
from ray_vlm.config.train import Precision
from ray_vlm.machine import GIB
from ray_vlm.models.card_memory import CardMemory, usable_gib
from ray_vlm.models.memory import RowSize, StepSettings, Weights, count_groups, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MOST_SEQUENCES = 256  # sequences that vLLM runs at a time unless it is asked for another number
_OWN = 1.5 * GIB  # the context of CUDA in its process, loaded kernels, workspaces, CUDA graphs
_ASLEEP = 1.0 * GIB  # what stays on the card of an engine that sleeps
_STEP_TOKENS = 8192  # prompt tokens that vLLM runs at a time
_PREFILL_WIDTHS = 6  # hidden states of a layer that are alive at once, beside the MLP's two
_BLOCK = 128  # tokens by which the cache of a sequence grows, at most


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of an engine: the base's `weights`, the keys and values (`cache`) of all sequences, and its `own`:
    activations, CUDA graphs and context. `asleep`: what stays while it sleeps; all of it for one that does not."""

    weights: float
    cache: float
    own: float
    asleep: float

    @property
    def total(self) -> float:
        """Bytes of an engine that is awake."""
        return self.weights + self.cache + self.own

    def describe(self) -> str:
        """Return the components in words."""
        parts = (("weights", self.weights), ("cache", self.cache), ("its own", self.own))
        return ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts)


def plan_engine(
    config: "PreTrainedConfig", precision: Precision, weights: float, tokens: int, sequences: int, sleeps: bool
) -> EngineMemory:
    """Return the memory of an engine for `sequences` completions at a time of up to `tokens` each, with the prompt.

    `weights`: bytes of the base. `sleeps`: whether it sleeps between samplings."""
    text = config.get_text_config()
    widths = _PREFILL_WIDTHS * text.hidden_size + 2 * getattr(text, "intermediate_size", 0)
    sequences = min(sequences, MOST_SEQUENCES)
    cache = float(token_bytes(config, precision)) * sequences * math.ceil(tokens / _BLOCK) * _BLOCK
    own = _OWN + _STEP_TOKENS * widths * (4 if precision == "fp32" else 2) + 4.0 * sequences * text.vocab_size
    return EngineMemory(weights, cache, own, _ASLEEP if sleeps else weights + cache + own)


def engine_of(
    settings: StepSettings, config: "PreTrainedConfig", weights: Weights, size: RowSize
) -> EngineMemory | None:
    """Return the memory of a job's engine on a worker's GPU; None where the worker starts none, or has no GPU.

    `size`: the longest prompt. A `vllm_gpu_memory_utilization` of the job is taken as it is, of a card whose size is
    known."""
    method, cluster = settings.method, settings.cluster
    if not isinstance(method, GrpoMethod) or method.worker_engine != "vllm" or not cluster.gpus_per_worker:
        return None
    tokens = size.image_tokens + size.prompt_tokens + method.max_completion_tokens
    sequences, base = count_groups(settings) * method.num_generations, weights.quantised + weights.plain
    planned = plan_engine(config, settings.train.precision, base, tokens, sequences, method.sampler_sleep != 0)
    share = method.trl.get("vllm_gpu_memory_utilization")
    if share is None or cluster.gpu_memory_gib is None:
        return planned
    asked = float(share) * usable_gib(cluster.gpu_memory_gib) * GIB
    asleep = asked if method.sampler_sleep == 0 else planned.asleep
    return EngineMemory(base, max(0.0, asked - base - planned.own), planned.own, asleep)


def plan_share(engine: EngineMemory, card: CardMemory) -> float:
    """Return the share of the card's memory that the engine needs, in hundredths, rounded up."""
    return math.ceil(100 * engine.total / card.total) / 100


def describe_lack(needed: float, engine: EngineMemory, card: CardMemory) -> str | None:
    """Return why an engine that takes `needed` bytes does not fit beside the trainer, whose model is loaded; None if it
    fits."""
    free = card.available - card.allocated
    if needed <= free:
        return None
    return (
        f"vllm takes {needed / GIB:.1f} GiB of the GPU (planned: {engine.describe()}), and beside the trainer "
        f"{max(0.0, free) / GIB:.1f} of {card.total / GIB:.1f} GiB are free. Lower train.global_batch_size, "
        "method.max_completion_tokens or data.max_pixels, use model.load_in_4bit, or rollouts=transformers, which "
        "needs no second copy of the base."
    )
