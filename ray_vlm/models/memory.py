"""Will it fit? Memory of one worker, by component, before anything is downloaded or launched.

Weights and what learns are counted from the model's shapes. What a step makes beside them is not a formula: the step is
rehearsed with fake tensors (`models/rehearse.py`) on the heaviest rows. What CUDA takes for itself is an allowance.
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

CUDA_CONTEXT = 0.6 * GIB  # of the driver, kernels and cuBLAS' workspace
FRAGMENTATION = 0.06  # of what a step makes; blocks that nothing fits into


@dataclass(frozen=True)
class RowSize:
    """Tokens of one row: of its images, of its prompt without them, of its answers together, and of the longer one of a
    pair (0: half of both)."""

    image_tokens: int
    prompt_tokens: int
    answer_tokens: int
    longest_answer: int = 0

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.image_tokens + self.prompt_tokens + self.answer_tokens


@dataclass(frozen=True)
class Estimate:
    """`parts`: bytes by component, at the moment of the peak. `when`: the phase of a step that it falls into."""

    parts: dict[str, float]
    when: str

    @property
    def peak(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


def micro_sizes(job: JobConfig, size: RowSize, micro: int | None = None) -> list[RowSize]:
    """The row `size` as often as a micro-batch has rows, or prompts where it has a group's answers. `micro`: in place
    of `train.micro_batch_size`."""
    budget = job.train.tokens_per_micro_batch
    rows = micro or (max(1, budget // max(1, size.tokens)) if budget else job.train.micro_batch_size)
    return [size] * (max(1, rows // job.method.num_generations) if job.method.name == "grpo" else rows)


def plan_batch(job: JobConfig, sizes: Sequence[RowSize], merge: int, folding: PackingOptions) -> Batch:
    """A micro-batch of these rows (GRPO: prompts), as it goes through the model. `merge`: patches along a side of a
    visual token. `folding`: what is done to rows that begin alike, and to short ones."""
    patches = tuple(size.image_tokens * merge**2 for size in sizes if size.image_tokens)
    prompts = [size.image_tokens + size.prompt_tokens for size in sizes]
    method, answered = job.method, sum(size.answer_tokens for size in sizes)
    compact = bool(job.cluster.gpus_per_worker) or folding.share or folding.pack
    if method.name == "sft":
        found = _packed([size.tokens for size in sizes], patches, folding)
        return replace(found, labelled=answered if compact and method.loss_on == "answer" else None)
    if method.name == "dpo":
        group, both = 2, [size.answer_tokens for size in sizes]
        longer = [size.longest_answer or math.ceil(size.answer_tokens / 2) for size in sizes]
    else:
        group = min(job.train.micro_batch_size, method.num_generations)
        both = [group * method.max_completion_tokens] * len(sizes)
        longer, answered = [method.max_completion_tokens] * len(sizes), sum(both)
    longest = max(p + a for p, a in zip(prompts, longer, strict=True))
    rows, labelled = group * len(sizes), answered if compact else None
    if not folding.share or group == 1:
        return Batch(rows, longest, patches * group, masked=rows > 1, labelled=labelled)
    trees = [p + a for p, a in zip(prompts, both, strict=True)]
    copies = 1.0  # of the images among the inputs; GRPO keeps those of all of a step's prompts
    if method.name == "grpo":
        answers = job.train.global_batch_size / job.cluster.least_workers
        copies = max(1.0, answers / method.num_generations / len(sizes))
    return replace(_packed(trees, patches, folding, (rows, longest)), labelled=labelled, copies=copies)


def _packed(
    sizes: Sequence[int], patches: tuple[int, ...], folding: PackingOptions, layout: tuple[int, int] | None = None
) -> Batch:
    """Rows of these lengths, packed or not; `layout`: rows and tokens as TRL has them, if others than these."""
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
    """Memory of one worker with a micro-batch of these rows. `layers`: how many of the first recompute their
    activations; None: as the job says. `at_once`: the job with another micro-batch."""
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
    """Bytes on one worker's card of what stays: whole under DDP, under ZeRO a slice of what its stage shares out.

    `largest`: bytes of the largest module, which ZeRO-3 puts together whole to run it. Under DeepSpeed what learns is
    in the base's dtype, and the optimizer has a float32 copy (its `runtime/zero/stage_1_and_2.py` and `stage3.py`).
    """
    cluster, workers = job.cluster, job.cluster.least_workers
    stage, whole = cluster.zero_stage, weights.trained
    if not stage:
        parts = {"base in 4 bit": weights.quantised, "base, not quantised": weights.plain}
        parts |= {"what learns, float32": whole, "Adam's two moments": 2 * whole, "gradients": whole}
        return parts | ({"buckets of gradients for the other workers": whole} if workers > 1 else {})
    held, learns = (workers if stage == 3 else 1), whole / 2 if job.train.precision != "fp32" else whole
    away = "offload" in (cluster.deepspeed or "")
    slices = {"base in 4 bit": weights.quantised, "base, not quantised": weights.plain, "what learns": learns}
    parts = {} if stage == 3 and away else {name: value / held for name, value in slices.items()}
    if stage == 3:
        parts["weights put together to run"] = min(sum(slices.values()), max(GATHERED * 2, largest))
    parts["gradients"] = learns / (workers if stage > 1 else 1)
    parts["buckets for the other workers"] = min(2 * BUCKET * 4, 2 * whole)
    if not away:
        parts["Adam's two moments, float32 copy"] = 3 * whole / workers
    return parts


def _samples(job: JobConfig) -> bool:
    return job.method.name == "grpo" and job.method.rollouts != "vllm"


def rollout_bytes(job: JobConfig, config: Any, size: RowSize) -> float:
    """The KV cache of all answers that one worker samples at once."""
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sequences = job.train.global_batch_size / job.cluster.least_workers
    length = size.image_tokens + size.prompt_tokens + job.method.max_completion_tokens
    each = 2 * text.num_hidden_layers * text.num_key_value_heads * head * (4 if job.train.precision == "fp32" else 2)
    return float(each * sequences * length)


@dataclass(frozen=True)
class Choice:
    """What fits: rows of a micro-batch (GRPO: answers), layers that recompute their activations, and what it takes."""

    micro: int
    layers: int
    found: Estimate


def choose(
    rehearsal: Rehearsal, size: RowSize, micros: Sequence[int], merge: int, folding: PackingOptions, room: float
) -> Choice | None:
    """The fewest layers that recompute with which the smallest of `micros` (ascending) fits into `room` bytes, and then
    the largest that fits with it; None where nothing fits."""

    def take(micro: int, layers: int) -> Estimate:
        job = rehearsal.job
        group = micro_sizes(job, size, micro)
        at_once = job.model_copy(update={"train": job.train.model_copy(update={"micro_batch_size": micro})})
        return estimate(rehearsal, group, merge, folding, layers, at_once)

    least, most = take(micros[0], rehearsal.num_layers), take(micros[0], 0)
    layers, found = 0, most
    if most.peak > room:
        if least.peak > room:
            return None
        each = (most.peak - least.peak) / rehearsal.num_layers  # memory falls evenly with the layers
        layers = min(rehearsal.num_layers, math.ceil((most.peak - room) / each))
        found = take(micros[0], layers)
        while found.peak > room:
            layers += 1
            found = take(micros[0], layers)
    micro = micros[0]
    if len(micros) > 1:
        more = take(micros[1], layers)
        each = (more.peak - found.peak) / (micros[1] - micros[0])
        for larger in [m for m in reversed(micros) if found.peak + each * (m - micros[0]) <= room and m > micros[0]]:
            if (there := take(larger, layers)).peak <= room:
                return Choice(larger, layers, there)
    return Choice(micro, layers, found)


def describe(found: Estimate, cards: Sequence[float]) -> list[str]:
    """The table, and a verdict for each size of card (GiB)."""
    width = max(len(name) for name in found.parts)
    lines = [f"  {name:<{width}}  {_tell(value)}" for name, value in found.parts.items()]
    lines.append(f"  {'peak':<{width}}  {_tell(found.peak)}, in the {found.when}")
    for card in cards:
        left = card * GIB - found.peak
        fits = f"fits, {_tell(left)} left" if left >= 0 else f"does NOT fit, {_tell(-left)} too much"
        lines.append(f"  card of {card:g} GiB: {fits}")
    return lines


def _tell(value: float) -> str:
    return f"{value / GIB:.2f} GiB" if value >= 0.1 * GIB else f"{value / 2**20:.1f} MiB"


def merge_of(config: Any) -> int:
    """Patches along a side of a visual token."""
    vision = config.vision_config
    merge = getattr(vision, "spatial_merge_size", None)
    if merge is not None:
        return int(merge)
    ratio = getattr(vision, "pixel_shuffle_ratio", None) or getattr(config, "downsample_ratio", None) or 1.0
    return round(1 / ratio)
