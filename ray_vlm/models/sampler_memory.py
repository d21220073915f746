"""The memory of a sampler's card (`method.samplers`): the base with its adapter, and the answers of a portion."""

from dataclasses import replace
from typing import TYPE_CHECKING

from ray_vlm.config.method import GrpoMethod
from ray_vlm.machine import GIB
from ray_vlm.models.card_memory import usable_gib
from ray_vlm.models.memory import CUDA_CONTEXT, FRAGMENTATION, Estimate, RowSize, group_bytes

if TYPE_CHECKING:
    from ray_vlm.models.rehearse import Rehearsal

VLLM_SHARE = 0.9  # of a card that vLLM has for itself


def estimate_sampler(rehearsal: "Rehearsal", size: RowSize) -> Estimate | None:
    """Estimate the memory of one sampler of the rehearsed job; None for a job without samplers, or of vLLM on a card of
    unknown size. `size`: of the largest row."""
    settings = rehearsal.settings
    method = settings.method
    if not isinstance(method, GrpoMethod) or not method.most_samplers:
        return None
    on_card = method.gpus_per_sampler != 0 and bool(method.gpus_per_sampler or settings.cluster.gpus_per_worker)
    if method.rollouts == "vllm":
        if settings.cluster.gpu_memory_gib is None or not on_card:
            return None
        share = float(method.trl.get("vllm_gpu_memory_utilization", VLLM_SHARE))
        return Estimate({"vLLM": share * usable_gib(settings.cluster.gpu_memory_gib) * GIB}, "sampling")
    alone = replace(settings, method=method.model_copy(update={"samplers": 0}))
    weights = rehearsal.weights()
    answers = (method.sampling_batch or 1) * group_bytes(alone, rehearsal.config, size)
    parts = {
        "weights": weights.quantised + weights.plain,
        "adapter": weights.trained,
        "sampling of answers": answers,
        "CUDA's own": CUDA_CONTEXT if on_card else 0.0,
        "fragmentation": FRAGMENTATION * answers if on_card else 0.0,
    }
    return Estimate(
        {name: value for name, value in parts.items() if value}, "sampling", group_batch=method.sampling_batch or 1
    )
