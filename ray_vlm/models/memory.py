"""The memory of one worker, by component, before anything is downloaded or launched.

Weights and optimizer states are counted from the model's shapes. Activations do not follow a formula: a step is
rehearsed with fake tensors (`models/rehearse.py`, which has `estimate`) on the heaviest rows. CUDA's own memory is an
allowance. This module has the parts that need no model: what a batch is, and how states are shared out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ray_vlm.config.cluster import BUCKET, GATHERED, Cluster
from ray_vlm.config.method import DpoMethod, GrpoMethod, Method, SftMethod
from ray_vlm.config.schema import Lora
from ray_vlm.config.train import Precision, Train
from ray_vlm.machine import GIB
from ray_vlm.models.prefix_sharing import PackingOptions, plan_packs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CUDA_CONTEXT = 0.6 * GIB  # the driver, kernels and cuBLAS' workspace
FRAGMENTATION = 0.06  # share of activations: free blocks that are too small for any request


@dataclass(frozen=True)
class StepSettings:
    """What a job says that decides the memory of a step, beside its rows and its base's configuration."""

    method: Method
    train: Train
    cluster: Cluster
    lora: Lora | None
    load_in_4bit: bool

    def with_rows(self, count: int) -> "StepSettings":
        """Return the settings with micro-batches of this many rows (GRPO: answers)."""
        rows = {"micro_batch_size": count, "tokens_per_micro_batch": None}
        return replace(self, train=self.train.model_copy(update=rows))


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
class Batch:
    """The input of one forward: `rows` of `tokens` each, and `patches` of each image before merging.

    `masked`: whether attention needs a mask, for padding or for branches. `spread`: rows and tokens of TRL's batch, to
    which hidden states are copied back if rows were shared or packed. `labelled`: tokens that the head scores; None:
    all. `copies`: image inputs that stay in memory for the whole step, as a multiple of this batch's.
    """

    rows: int
    tokens: int
    patches: tuple[int, ...] = ()
    masked: bool = False
    spread: tuple[int, int] | None = None
    labelled: int | None = None
    copies: float = 1.0


@dataclass(frozen=True)
class Weights:
    """Bytes of weights. `quantised`: in 4 bit; `plain`: the rest of the base; `trained`: trained ones, in float32."""

    quantised: float
    plain: float
    trained: float


@dataclass(frozen=True)
class Estimate:
    """`parts`: bytes by component at the peak. `when`: the phase of a step in which the peak occurs."""

    parts: dict[str, float]
    when: str

    @property
    def peak(self) -> float:
        """Bytes of all components."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Choice:
    """What fits: rows of a micro-batch (GRPO: answers), layers that recompute their activations, and the estimate."""

    micro: int
    layers: int
    estimate: Estimate


def micro_sizes(method: Method, train: Train, size: RowSize) -> list[RowSize]:
    """Return the row `size` once for each row of a micro-batch (GRPO: for each prompt)."""
    budget = train.tokens_per_micro_batch
    rows = max(1, budget // max(1, size.tokens)) if budget else train.micro_batch_size
    return [size] * (max(1, rows // method.num_generations) if isinstance(method, GrpoMethod) else rows)


def plan_batch(settings: StepSettings, sizes: Sequence[RowSize], merge: int, packing: PackingOptions) -> Batch:
    """Return the micro-batch of these rows (GRPO: prompts) as the model sees it.

    `merge`: patches along a side of a visual token. `packing`: how rows share prefixes and are packed."""
    patches = tuple(size.image_tokens * merge**2 for size in sizes if size.image_tokens)
    prompts = [size.image_tokens + size.prompt_tokens for size in sizes]
    method, num_labelled = settings.method, sum(size.answer_tokens for size in sizes)
    # The head scores labelled tokens alone: TRL's on GPUs, and elsewhere where `surgery` lets it.
    compact = bool(settings.cluster.gpus_per_worker) or packing.share or packing.pack
    if isinstance(method, SftMethod):
        batch = _packed([size.tokens for size in sizes], patches, packing)
        return replace(batch, labelled=num_labelled if compact and method.loss_on == "answer" else None)
    if isinstance(method, DpoMethod):
        group, answer_tokens = 2, [size.answer_tokens for size in sizes]
        longer = [size.longest_answer or math.ceil(size.answer_tokens / 2) for size in sizes]
    else:
        group = min(settings.train.micro_batch_size, method.num_generations)
        answer_tokens = [group * method.max_completion_tokens] * len(sizes)
        longer, num_labelled = [method.max_completion_tokens] * len(sizes), sum(answer_tokens)
    # In TRL's batch each answer is a row with its prompt, padded to the longest row.
    longest = max(p + a for p, a in zip(prompts, longer, strict=True))
    rows, labelled = group * len(sizes), num_labelled if compact else None
    if not packing.share or group == 1:
        return Batch(rows, longest, patches * group, masked=rows > 1, labelled=labelled)
    trees = [p + a for p, a in zip(prompts, answer_tokens, strict=True)]
    copies = 1.0  # of the image inputs; GRPO keeps those of all of a step's prompts
    if isinstance(method, GrpoMethod):
        answers = settings.train.global_batch_size / settings.cluster.least_workers
        copies = max(1.0, answers / method.num_generations / len(sizes))
    return replace(_packed(trees, patches, packing, (rows, longest)), labelled=labelled, copies=copies)


def _packed(
    sizes: Sequence[int], patches: tuple[int, ...], packing: PackingOptions, layout: tuple[int, int] | None = None
) -> Batch:
    """Return the batch of rows of these lengths. `layout`: rows and tokens of TRL's batch, if it differs."""
    packs = plan_packs(sizes, packing.hidden) if packing.pack else [[number] for number in range(len(sizes))]
    if layout is None and len(packs) < len(sizes):
        layout = (len(sizes), max(sizes))
    width = max(sum(sizes[number] for number in pack) for pack in packs)
    return Batch(len(packs), width, patches, masked=len(sizes) > 1 or layout is not None, spread=layout)


def shared_out(cluster: Cluster, precision: Precision, weights: Weights, largest: float) -> dict[str, float]:
    """Return the bytes of model and optimizer states on one worker: all of them under DDP, under ZeRO a slice of what
    its stage partitions.

    `largest`: bytes of the largest module, which ZeRO-3 gathers to run it. Under DeepSpeed trained weights are in the
    base's dtype, and the optimizer has a float32 copy (its `runtime/zero/stage_1_and_2.py` and `stage3.py`).
    """
    workers, zero_stage, trained = cluster.least_workers, cluster.zero_stage, weights.trained
    if not zero_stage:
        parts = {"base in 4 bit": weights.quantised, "base, not quantised": weights.plain}
        parts |= {"what learns, float32": trained, "Adam's two moments": 2 * trained, "gradients": trained}
        return parts | ({"buckets of gradients for the other workers": trained} if workers > 1 else {})
    weight_slices = workers if zero_stage == 3 else 1
    in_base_dtype = trained if precision == "fp32" else trained / 2
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


def rollout_bytes(settings: StepSettings, config: "PreTrainedConfig", size: RowSize) -> float:
    """Return the bytes of the KV cache of all answers that one worker samples at once; 0 where this process samples
    none."""
    method, train = settings.method, settings.train
    if not isinstance(method, GrpoMethod) or method.rollouts == "vllm":
        return 0.0
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sequences = train.global_batch_size / settings.cluster.least_workers
    length = size.image_tokens + size.prompt_tokens + method.max_completion_tokens
    value_bytes = 4 if train.precision == "fp32" else 2
    token_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * head * value_bytes  # 2: keys and values
    return float(token_bytes * sequences * length)


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


def merge_of(config: "PreTrainedConfig") -> int:
    """Return the patches along a side of a visual token."""
    vision = config.vision_config
    merge = getattr(vision, "spatial_merge_size", None)
    if merge is not None:
        return int(merge)
    ratio = getattr(vision, "pixel_shuffle_ratio", None) or getattr(config, "downsample_ratio", None) or 1.0
    return round(1 / ratio)
