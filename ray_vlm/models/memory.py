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
from ray_vlm.config.train import Optimizer, Precision, Recompute, Train
from ray_vlm.machine import GIB
from ray_vlm.models.card_memory import usable_gib
from ray_vlm.models.layouts import MULTIPLE, PackedGroup, PackingOptions, is_packed_cheaper

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Allowances, not measured on a card of ours.
CUDA_CONTEXT = 0.6 * GIB  # the driver's context, loaded kernels, workspaces of cuBLAS and cuDNN
FRAGMENTATION = 0.06  # share of activations that is reserved beside them: free blocks too small for any request
# NCCL's buffers on one worker: for two workers, for each further one, and at most.
NF4_BLOCKS = 0.5  # bytes of a weight in NF4 without its scales
NF4 = NF4_BLOCKS + 1 / 64 + 4 / 64 / 256  # with double quantisation, blocks of 64 and 256
_NCCL_TWO, _NCCL_MORE, _NCCL_MOST = 0.3 * GIB, 0.1 * GIB, 1.2 * GIB
_MOMENT_BLOCK = 256  # weights that share a scale in bitsandbytes' 8-bit optimizers
_CHOICE_BYTES = 36  # of one logit while a token is chosen: scores, log-probabilities, sums of them in float64
_PREFILL_WIDTHS = 6  # hidden states of a layer that are alive at once in a prompt's forward, beside the MLP's two


@dataclass(frozen=True)
class StepSettings:
    """What a job says that decides the memory of a step, beside its rows and its base's configuration. `kernels`:
    whether norms and adapters are fused, as on GPUs."""

    method: Method
    train: Train
    cluster: Cluster
    lora: Lora | None
    load_in_4bit: bool
    kernels: bool = False

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

    `masked`: whether attention needs a mask, for padding on the left. `groups`: of a packed row, whose hidden states
    are copied back to TRL's batch, `spread` rows of so many tokens. `labelled`: tokens that the head scores; None: all.
    `copies`: image inputs that stay in memory for the whole step, as a multiple of this batch's.
    """

    rows: int
    tokens: int
    patches: tuple[int, ...] = ()
    masked: bool = False
    groups: tuple[PackedGroup, ...] = ()
    spread: tuple[int, int] | None = None
    labelled: int | None = None
    copies: float = 1.0


@dataclass(frozen=True)
class Weights:
    """Bytes of weights. `quantised`: in 4 bit; `plain`: the rest of the base; `trained`: trained ones, in float32;
    `embedded`: those of `trained` that are embeddings."""

    quantised: float
    plain: float
    trained: float
    embedded: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """`parts`: bytes by component at the peak. `when`: the phase of a step in which the peak occurs.

    `step`: bytes of a step's activations and buffers, also if the peak is in the sampling of answers. `group_batch`:
    prompts whose answers are sampled at a time; None: all of them, or none are.
    """

    parts: dict[str, float]
    when: str
    step: float = 0.0
    group_batch: int | None = None

    @property
    def peak(self) -> float:
        """Bytes of all components."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Choice:
    """What fits: rows of a micro-batch (GRPO: answers), layers that recompute their activations (`selective`: all, but
    not their products), and the estimate."""

    micro: int
    layers: Recompute
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
    is_cpu = not settings.cluster.gpus_per_worker
    if isinstance(method, SftMethod):
        tokens = [size.tokens for size in sizes]
        batch = _choose_layout([(n, ()) for n in tokens], patches, packing, (len(sizes), max(tokens)), False, is_cpu)
        return replace(batch, labelled=num_labelled if method.loss_on == "answer" else None)
    if isinstance(method, DpoMethod):
        group = 2
        longer = [size.longest_answer or math.ceil(size.answer_tokens / 2) for size in sizes]
        answers: list[tuple[int, ...]] = [(n, size.answer_tokens - n) for n, size in zip(longer, sizes, strict=True)]
    else:
        group = min(settings.train.micro_batch_size, method.num_generations)
        longer = [method.max_completion_tokens] * len(sizes)
        answers, num_labelled = [(n,) * group for n in longer], group * sum(longer)
    # In TRL's batch each answer is a row with its prompt, padded to the longest row.
    longest = max(p + a for p, a in zip(prompts, longer, strict=True))
    rows = group * len(sizes)
    # GRPO's prompts are padded on the left.
    masked = isinstance(method, GrpoMethod) and len(set(prompts)) > 1
    if not packing.share or group == 1:
        groups: list[tuple[int, tuple[int, ...]]] = [
            (p + n, ()) for p, lengths in zip(prompts, answers, strict=True) for n in lengths
        ]
        batch = _choose_layout(groups, patches * group, packing, (rows, longest), masked, is_cpu)
        return replace(batch, labelled=num_labelled)
    groups = list(zip(prompts, answers, strict=True))
    copies = 1.0  # of the image inputs; GRPO keeps those of all of a step's prompts
    if isinstance(method, GrpoMethod):
        num_answers = settings.train.global_batch_size / settings.cluster.least_workers
        copies = max(1.0, num_answers / method.num_generations / len(sizes))
    batch = _choose_layout(groups, patches, packing, (rows, longest), masked, is_cpu)
    return replace(batch, labelled=num_labelled, copies=copies)


def _choose_layout(
    groups: Sequence[tuple[int, Sequence[int]]],
    patches: tuple[int, ...],
    packing: PackingOptions,
    padded: tuple[int, int],
    masked: bool,
    is_cpu: bool,
) -> Batch:
    """Return the batch as `LayoutPlanner` lays it out.

    `groups`: tokens of the prefix and of each branch. `padded`: rows and tokens of TRL's batch; `masked`: whether these
    need a mask."""
    packed, start = [], 0
    for prefix, branches in groups:
        packed.append(PackedGroup(start, prefix, tuple(n for n in branches if n)))
        start = packed[-1].end
    wanted = packing.share or packing.pack
    if not wanted or not is_packed_cheaper(packed, *padded, masked, packing.hidden, is_cpu):
        return Batch(*padded, patches, masked=masked)
    if not is_cpu and (padding := -start % MULTIPLE):
        packed.append(PackedGroup(start, padding))
    return Batch(1, packed[-1].end, patches, groups=tuple(packed), spread=padded)


def moment_bytes(optimizer: Optimizer, weights: Weights) -> float:
    """Return the bytes of the optimizer's moments on the GPU, without ZeRO.

    bitsandbytes has two numbers of 8 bits for each weight and two float32 scales for a block of 256 weights;
    transformers keeps the moments of embeddings in float32. Paged moments can leave the GPU, their scales cannot.
    """
    if optimizer == "adamw":
        return 2 * weights.trained
    num_weights = (weights.trained - weights.embedded) / 4
    scales = 2 * 4 / _MOMENT_BLOCK * num_weights
    return scales if optimizer == "paged_adamw_8bit" else 2 * num_weights + scales + 2 * weights.embedded


def shared_out(
    cluster: Cluster, precision: Precision, weights: Weights, largest: float, optimizer: Optimizer = "adamw"
) -> dict[str, float]:
    """Return the bytes of model and optimizer states on one worker: all of them under DDP, under ZeRO a slice of what
    its stage partitions.

    `largest`: bytes of the largest module, which ZeRO-3 gathers to run it. Under DeepSpeed trained weights are in the
    base's dtype, and the optimizer has a float32 copy (its `runtime/zero/stage_1_and_2.py` and `stage3.py`).
    """
    workers, zero_stage, trained = cluster.least_workers, cluster.zero_stage, weights.trained
    if not zero_stage:
        parts = {"base in 4 bit": weights.quantised, "base, not quantised": weights.plain}
        moments = moment_bytes(optimizer, weights)
        parts |= {"what learns, float32": trained, "Adam's two moments": moments, "gradients": trained}
        return parts | ({"buckets of gradients for the other workers": trained} if workers > 1 else {})
    weight_slices = workers if zero_stage == 3 else 1
    in_base_dtype = trained if precision == "fp32" else trained / 2
    offloaded = "offload" in (cluster.deepspeed or "")
    # bitsandbytes keeps the scales of 4-bit blocks beside the parameter, where ZeRO-3 does not partition them.
    scales = weights.quantised * (1 - NF4_BLOCKS / NF4) if zero_stage == 3 else 0.0
    slices = {
        "base in 4 bit": weights.quantised - scales,
        "base, not quantised": weights.plain,
        "what learns": in_base_dtype,
    }
    parts = {} if zero_stage == 3 and offloaded else {name: value / weight_slices for name, value in slices.items()}
    if scales:
        parts["scales of the base in 4 bit"] = scales
    if zero_stage == 3:
        parts["weights put together to run"] = min(sum(slices.values()), max(GATHERED * 2, largest))
    parts["gradients"] = in_base_dtype / (workers if zero_stage > 1 else 1)
    parts["buckets for the other workers"] = min(2 * BUCKET * 4, 2 * trained)
    if not offloaded:
        parts["Adam's two moments, float32 copy"] = 3 * trained / workers
    return parts


def cuda_parts(settings: StepSettings) -> dict[str, float]:
    """Return the bytes on a worker's GPU that torch's allocator does not have: CUDA's and NCCL's. Empty on CPUs."""
    cluster = settings.cluster
    if not cluster.gpus_per_worker:
        return {}
    parts = {"CUDA's own": CUDA_CONTEXT}
    if (workers := cluster.least_workers) > 1:
        parts["NCCL's buffers"] = min(_NCCL_MOST, _NCCL_TWO + _NCCL_MORE * (workers - 2))
    return parts


def token_bytes(config: "PreTrainedConfig", precision: Precision) -> int:
    """Return the bytes of the keys and values of one token in all layers."""
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    value_bytes = 4 if precision == "fp32" else 2
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head * value_bytes  # 2: keys and values


def group_bytes(settings: StepSettings, config: "PreTrainedConfig", size: RowSize) -> float:
    """Return the bytes that sampling all answers to one prompt takes at its peak; 0 where this process samples none.

    These are the answers' keys and values, of the prompt too, what choosing a token takes, and the prompt's forward.
    """
    method, precision = settings.method, settings.train.precision
    if not isinstance(method, GrpoMethod) or method.worker_engine != "transformers":
        return 0.0
    text, prompt = config.get_text_config(), size.image_tokens + size.prompt_tokens
    sequence = token_bytes(config, precision) * (prompt + method.max_completion_tokens)
    widths = _PREFILL_WIDTHS * text.hidden_size + 2 * getattr(text, "intermediate_size", 0)
    prefill = prompt * widths * (4 if precision == "fp32" else 2)
    return float(method.num_generations * (sequence + text.vocab_size * _CHOICE_BYTES) + prefill)


def fit_groups(room: float, each: float, groups: int) -> int:
    """Return how many of a step's `groups` are sampled at a time if a group takes `each` bytes: at least 1, even if it
    does not fit into `room`. Portions are evened out: of 8 groups of which 5 would fit, 4 are sampled at a time."""
    fitting = max(1, min(groups, int(room // each))) if each else groups
    return math.ceil(groups / math.ceil(groups / fitting))


def count_groups(settings: StepSettings) -> int:
    """Return the prompts of one worker's step."""
    assert isinstance(settings.method, GrpoMethod)
    answers = settings.train.global_batch_size / settings.cluster.least_workers
    return max(1, round(answers / settings.method.num_generations))


def describe(planned: Estimate, cards: Sequence[float]) -> list[str]:
    """Return the table of components, and for each size of GPU (GiB) whether it fits."""
    width = max(len(name) for name in planned.parts)
    lines = [f"  {name:<{width}}  {_format_size(value)}" for name, value in planned.parts.items()]
    portion = f", {describe_portion(planned.group_batch)}" if planned.group_batch else ""
    lines.append(f"  {'peak':<{width}}  {_format_size(planned.peak)}, in the {planned.when}{portion}")
    for card in cards:
        usable = usable_gib(card)
        left = usable * GIB - planned.peak
        fits = f"fits, {_format_size(left)} left" if left >= 0 else f"does NOT fit, {_format_size(-left)} too much"
        for_torch = f" ({usable:g} for torch)" if usable != card else ""
        lines.append(f"  card of {card:g} GiB{for_torch}: {fits}")
    return lines


def describe_portion(groups: int) -> str:
    """Say how many prompts' answers are sampled at a time."""
    return f"the answers to {groups} prompt{'' if groups == 1 else 's'} sampled at a time"


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
