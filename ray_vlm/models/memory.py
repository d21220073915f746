"""Estimate the memory of one worker, by component, before anything is downloaded or launched.

Weights and optimizer states are counted from the model's shapes. Activations do not follow a formula: a step is
rehearsed with fake tensors (`models/rehearse.py`) on the heaviest rows. CUDA's own memory is an allowance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_vlm.config.cluster import BUCKET, GATHERED
from ray_vlm.config.schema import JobConfig
from ray_vlm.machine import GIB
from ray_vlm.models.packing import PackingOptions, plan_packs
from ray_vlm.models.rehearse import Batch, Rehearsal, Weights

CUDA_CONTEXT = 0.6 * GIB  # the driver, kernels and cuBLAS' workspace
FRAGMENTATION = 0.06  # share of activations: free blocks that are too small for any request


@dataclass(frozen=True)
class RowSize:
    """Tokens of one row: of its images, of its prompt without images, of all its answers, and of the longer answer of a
    pair (0: half of both)."""

    image_tokens: int
    prompt_tokens: int
    answer_tokens: int
    longest_answer: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the whole row."""
        return self.image_tokens + self.prompt_tokens + self.answer_tokens


@dataclass(frozen=True)
class Estimate:
    """`parts`: bytes by component at the peak. `when`: the phase of a step in which the peak occurs."""

    parts: dict[str, float]
    when: str

    @property
    def peak(self) -> float:
        """Bytes of all components."""
        return sum(self.parts.values())


def micro_sizes(job: JobConfig, size: RowSize, micro: int | None = None) -> list[RowSize]:
    """Return the row `size` once for each row of a micro-batch (GRPO: for each prompt). `micro` replaces
    `train.micro_batch_size`."""
    budget = job.train.tokens_per_micro_batch
    rows = micro or (max(1, budget // max(1, size.tokens)) if budget else job.train.micro_batch_size)
    return [size] * (max(1, rows // job.method.num_generations) if job.method.name == "grpo" else rows)


def plan_batch(job: JobConfig, sizes: Sequence[RowSize], merge: int, folding: PackingOptions) -> Batch:
    """Return the micro-batch of these rows (GRPO: prompts) as the model sees it.

    `merge`: patches along a side of a visual token. `folding`: how rows share prefixes and are packed."""
    patches = tuple(size.image_tokens * merge**2 for size in sizes if size.image_tokens)
    prompts = [size.image_tokens + size.prompt_tokens for size in sizes]
    method, num_labelled = job.method, sum(size.answer_tokens for size in sizes)
    compact = bool(job.cluster.gpus_per_worker) or folding.share or folding.pack
    if method.name == "sft":
        batch = _packed([size.tokens for size in sizes], patches, folding)
        return replace(batch, labelled=num_labelled if compact and method.loss_on == "answer" else None)
    if method.name == "dpo":
        group, answer_tokens = 2, [size.answer_tokens for size in sizes]
        longer = [size.longest_answer or math.ceil(size.answer_tokens / 2) for size in sizes]
    else:
        group = min(job.train.micro_batch_size, method.num_generations)
        answer_tokens = [group * method.max_completion_tokens] * len(sizes)
        longer, num_labelled = [method.max_completion_tokens] * len(sizes), sum(answer_tokens)
    longest = max(p + a for p, a in zip(prompts, longer, strict=True))
    rows, labelled = group * len(sizes), num_labelled if compact else None
    if not folding.share or group == 1:
        return Batch(rows, longest, patches * group, masked=rows > 1, labelled=labelled)
    trees = [p + a for p, a in zip(prompts, answer_tokens, strict=True)]
    copies = 1.0  # of the image inputs; GRPO keeps those of all of a step's prompts
    if method.name == "grpo":
        answers = job.train.global_batch_size / job.cluster.least_workers
        copies = max(1.0, answers / method.num_generations / len(sizes))
    return replace(_packed(trees, patches, folding, (rows, longest)), labelled=labelled, copies=copies)


def _packed(
    sizes: Sequence[int], patches: tuple[int, ...], folding: PackingOptions, layout: tuple[int, int] | None = None
) -> Batch:
    """Return the batch of rows of these lengths. `layout`: rows and tokens of TRL's batch, if it differs."""
    packs = plan_packs(sizes, folding.hidden) if folding.pack else [[number] for number in range(len(sizes))]
    if layout is None and len(packs) < len(sizes):
        layout = (len(sizes), max(sizes))
    width = max(sum(sizes[number] for number in pack) for pack in packs)
    return Batch(len(packs), width, patches, masked=len(sizes) > 1 or layout is not None, spread=layout)


def estimate(
    rehearsal: Rehearsal,
    sizes: Sequence[RowSize],
    merge: int,
    folding: PackingOptions,
    layers: int | None = None,
    at_once: JobConfig | None = None,
) -> Estimate:
    """Estimate the memory of one worker for a micro-batch of these rows.

    `layers`: how many of the first layers recompute their activations; None: as the job says. `at_once`: the job with
    another micro-batch size."""
    job, weights = at_once or rehearsal.job, rehearsal.weights()
    live = rehearsal.run(plan_batch(job, sizes, merge, folding), layers)
    parts = shared_out(job, weights, rehearsal.largest)
    step = max(0.0, live.peak - weights.trained)
    when = max((name for name in live.peaks if name), key=lambda name: live.peaks[name])
    cache = rollout_bytes(job, rehearsal.config, max(sizes, key=lambda s: s.tokens)) if _samples(job) else 0.0
    if cache > step:
        parts["keys and values of sampled answers"], when = cache, "sampling"
    else:
        parts["activations and buffers"] = step
    if job.cluster.gpus_per_worker:
        parts["CUDA's own"] = CUDA_CONTEXT
        parts["fragmentation"] = FRAGMENTATION * max(step, cache)
    return Estimate({name: value for name, value in parts.items() if value}, when)


def shared_out(job: JobConfig, weights: Weights, largest: float) -> dict[str, float]:
    """Return the bytes of model and optimizer states on one worker: all of them under DDP, under ZeRO a slice of what
    its stage partitions.

    `largest`: bytes of the largest module, which ZeRO-3 gathers to run it. Under DeepSpeed trained weights are in the
    base's dtype, and the optimizer has a float32 copy (its `runtime/zero/stage_1_and_2.py` and `stage3.py`).
    """
    cluster, workers = job.cluster, job.cluster.least_workers
    zero_stage, trained = cluster.zero_stage, weights.trained
    if not zero_stage:
        parts = {"base in 4 bit": weights.quantised, "base, not quantised": weights.plain}
        parts |= {"what learns, float32": trained, "Adam's two moments": 2 * trained, "gradients": trained}
        return parts | ({"buckets of gradients for the other workers": trained} if workers > 1 else {})
    weight_slices = workers if zero_stage == 3 else 1
    in_base_dtype = trained if job.train.precision == "fp32" else trained / 2
    offloaded = "offload" in (cluster.deepspeed or "")
    slices = {"base in 4 bit": weights.quantised, "base, not quantised": weights.plain, "what learns": in_base_dtype}
    parts = {} if zero_stage == 3 and offloaded else {name: value / weight_slices for name, value in slices.items()}
    if zero_stage == 3:
        parts["weights put together to run"] = min(sum(slices.values()), max(GATHERED * 2, largest))
    parts["gradients"] = in_base_dtype / (workers if zero_stage > 1 else 1)
    parts["buckets for the other workers"] = min(2 * BUCKET * 4, 2 * trained)
    if not offloaded:
        parts["Adam's two moments, float32 copy"] = 3 * trained / workers
    return parts


def _samples(job: JobConfig) -> bool:
    return job.method.name == "grpo" and job.method.rollouts != "vllm"


def rollout_bytes(job: JobConfig, config: Any, size: RowSize) -> float:
    """Return the bytes of the KV cache of all answers that one worker samples at once."""
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sequences = job.train.global_batch_size / job.cluster.least_workers
    length = size.image_tokens + size.prompt_tokens + job.method.max_completion_tokens
    value_bytes = 4 if job.train.precision == "fp32" else 2
    token_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * head * value_bytes  # 2: keys and values
    return float(token_bytes * sequences * length)


@dataclass(frozen=True)
class Choice:
    """What fits: rows of a micro-batch (GRPO: answers), layers that recompute their activations, and the estimate."""

    micro: int
    layers: int
    estimate: Estimate


def choose(
    rehearsal: Rehearsal, size: RowSize, micros: Sequence[int], merge: int, folding: PackingOptions, room: float
) -> Choice | None:
    """Choose the fewest recomputing layers with which the smallest of `micros` (ascending) fits into `room` bytes, then
    the largest of `micros` that fits with these layers. Return None if nothing fits."""

    def estimate_at(micro: int, layers: int) -> Estimate:
        job = rehearsal.job
        group = micro_sizes(job, size, micro)
        at_once = job.model_copy(update={"train": job.train.model_copy(update={"micro_batch_size": micro})})
        return estimate(rehearsal, group, merge, folding, layers, at_once)

    smallest, fastest = estimate_at(micros[0], rehearsal.num_layers), estimate_at(micros[0], 0)
    layers, estimated = 0, fastest
    if fastest.peak > room:
        if smallest.peak > room:
            return None
        per_layer = (fastest.peak - smallest.peak) / rehearsal.num_layers  # memory falls evenly with the layers
        layers = min(rehearsal.num_layers, math.ceil((fastest.peak - room) / per_layer))
        estimated = estimate_at(micros[0], layers)
        while estimated.peak > room:
            layers += 1
            estimated = estimate_at(micros[0], layers)
    micro = micros[0]
    if len(micros) > 1:
        more = estimate_at(micros[1], layers)
        per_row = (more.peak - estimated.peak) / (micros[1] - micros[0])  # memory grows evenly with the rows
        likely = [m for m in reversed(micros[1:]) if estimated.peak + per_row * (m - micros[0]) <= room]
        for larger in likely:
            if (larger_estimate := estimate_at(larger, layers)).peak <= room:
                return Choice(larger, layers, larger_estimate)
    return Choice(micro, layers, estimated)


def describe(planned: Estimate, cards: Sequence[float]) -> list[str]:
    """Return the table of components, and for each size of GPU (GiB) whether it fits."""
    width = max(len(name) for name in planned.parts)
    lines = [f"  {name:<{width}}  {_format_size(value)}" for name, value in planned.parts.items()]
    lines.append(f"  {'peak':<{width}}  {_format_size(planned.peak)}, in the {planned.when}")
    for card in cards:
        left = card * GIB - planned.peak
        fits = f"fits, {_format_size(left)} left" if left >= 0 else f"does NOT fit, {_format_size(-left)} too much"
        lines.append(f"  card of {card:g} GiB: {fits}")
    return lines


def _format_size(value: float) -> str:
    return f"{value / GIB:.2f} GiB" if value >= 0.1 * GIB else f"{value / 2**20:.1f} MiB"


def merge_of(config: Any) -> int:
    """Return the patches along a side of a visual token."""
    vision = config.vision_config
    merge = getattr(vision, "spatial_merge_size", None)
    if merge is not None:
        return int(merge)
    ratio = getattr(vision, "pixel_shuffle_ratio", None) or getattr(config, "downsample_ratio", None) or 1.0
    return round(1 / ratio)
