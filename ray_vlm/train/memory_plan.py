"""The memory of a job, before it starts: the heaviest batch of its plan, whether it fits on the GPU, and for
`train.memory: auto` a micro-batch size and gradient checkpointing that fit.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_vlm.config.cluster import Cluster
from ray_vlm.config.method import GrpoMethod, Method
from ray_vlm.config.schema import JobConfig
from ray_vlm.config.train import Train
from ray_vlm.data.index import Index
from ray_vlm.data.plan import Plan
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.errors import ConfigError
from ray_vlm.machine import GIB
from ray_vlm.models.card_memory import TARGET, prepare_gpu, read_card, usable_gib
from ray_vlm.models.engine_memory import engine_of
from ray_vlm.models.families import Family
from ray_vlm.models.load import load_config
from ray_vlm.models.memory import (
    CUDA_CONTEXT,
    FRAGMENTATION,
    Choice,
    Estimate,
    RowSize,
    StepSettings,
    Weights,
    count_groups,
    describe_portion,
    fit_groups,
    group_bytes,
    micro_sizes,
    moment_bytes,
)

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedConfig, PreTrainedModel

    from ray_vlm.models.rehearse import Rehearsal

logger = logging.getLogger(__name__)
_LOOKED_AT = 50_000  # steps of a plan, and micro-batches, that are compared; more would delay the start


@dataclass(frozen=True)
class Probe:
    """The batch to run before the first step: `rows` of the training data, `tokens` of the longest one, the bytes
    `predicted` for it beyond the loaded model, with gradients, and those that a worker needs in all (`peak`)."""

    rows: tuple[int, ...]
    tokens: int
    predicted: float
    peak: float = 0.0


def row_size(index: Index, row: int, builder: SampleBuilder) -> RowSize:
    """Return the token counts of one row for the memory estimate."""
    image, prompt, answer = (int(of[row]) for of in (index.image_tokens, index.prompt_tokens, index.answer_tokens))
    answers = index.records.sample(builder, row).completions
    return RowSize(image, prompt, answer, max(map(len, answers), default=0))


def build_rehearsal(job: JobConfig, family: Family, config: "PreTrainedConfig | None" = None) -> "Rehearsal":
    """Build the fake model of a job. `config`: of its base, if it is known already."""
    from ray_vlm.models.rehearse import Rehearsal  # imports torch

    kernels = job.model.kernels == "auto" and job.cluster.gpus_per_worker > 0
    settings = StepSettings(job.method, job.train, job.cluster, job.lora, job.model.load_in_4bit, kernels)
    return Rehearsal(config or load_config(job.model), family, settings)


def heaviest_rows(method: Method, train: Train, plan: Plan, tokens: np.ndarray) -> tuple[int, ...]:
    """Return the rows of the micro-batch, over all workers, with the most tokens after padding (GRPO: its prompts).
    `tokens`: `int [rows]`, of each row.

    Steps with the longest rows come first, until no other step can have a heavier micro-batch."""
    unit = len(micro_sizes(method, train, RowSize(0, 0, 0)))  # rows of a micro-batch; GRPO: of the prompts of a step
    best, compared = 0, 0
    rows: tuple[int, ...] = ()
    longest = np.array([tokens[plan.step_rows(step)].max() for step in range(min(plan.num_steps, _LOOKED_AT))])
    most = unit if isinstance(method, GrpoMethod) else plan.micro_batch_size
    bounds = most * longest if plan.tokens is None else np.maximum(plan.max_tokens_per_micro_batch, longest)
    for step in np.argsort(-longest, kind="stable").tolist():
        if bounds[step] <= best or compared > _LOOKED_AT:
            break
        batches = [list(batch.rows) for rank in range(plan.world_size) for batch in plan.rank_step(step, rank)]
        for batch in batches:
            if isinstance(method, GrpoMethod):
                batch = sorted(batch, key=lambda row: -tokens[row])[:unit]
            if (weight := len(batch) * int(tokens[batch].max())) > best:
                best, rows = weight, tuple(batch)
        compared += len(batches)
    return rows


def estimate_memory(
    rehearsal: "Rehearsal", index: Index, rows: Sequence[int], builder: SampleBuilder, room: float | None = None
) -> Estimate:
    """Estimate the memory of one worker for a batch of these rows. `room`: see `estimate`."""
    from ray_vlm.models.rehearse import estimate

    return estimate(rehearsal, [row_size(index, row, builder) for row in rows], room=room)


def count_trained(model: "Module") -> Weights:
    """Return the bytes of the weights that an optimizer has moments of."""
    from torch.nn import Embedding

    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    sizes = {id(p): 4.0 * p.numel() for p in model.parameters() if p.requires_grad}
    return Weights(0.0, 0.0, sum(sizes.values()), sum(size for key, size in sizes.items() if key in embeddings))


def fit_rollout(settings: StepSettings, model: "PreTrainedModel", prompt_tokens: int, device: str) -> int | None:
    """Return how many prompts' answers are sampled at a time, as many as this worker's GPU has room for beside `model`,
    its gradients and its optimizer; None: those of all prompts of a step, or nothing is sampled on a GPU here.

    `prompt_tokens`: of the longest prompt."""
    card, each = read_card(device), group_bytes(settings, model.config, RowSize(0, prompt_tokens, 0))
    if card is None or not each:
        return None
    weights = count_trained(model)
    states = weights.trained + moment_bytes(settings.train.optimizer, weights)  # gradients, and the optimizer's
    room = TARGET * card.room(settings.cluster.gpu_memory_gib) - card.allocated - states
    groups = count_groups(settings)
    portion = fit_groups(room / (1 + FRAGMENTATION), each, groups)
    if portion == groups:
        return None
    others = f"; {words}" if (words := card.describe_others()) else ""
    logger.info(f"{describe_portion(portion)}, of {groups} in a step: {max(0.0, room) / GIB:.1f} GiB are left{others}")
    return portion


def fit_to_card(train: Train, cluster: Cluster, probe: Probe, device: str) -> Train:
    """Return the `train` section for this worker's GPU as it is: if the plan does not fit into what others leave of the
    card, every layer recomputes its activations, which changes no number. A line says so."""
    card = read_card(device)
    if card is None or probe.peak - CUDA_CONTEXT <= (room := card.room(cluster.gpu_memory_gib)):
        return train
    words = card.describe_others() or f"{room / GIB:.1f} GiB of the GPU are planned with"
    if train.gradient_checkpointing is True:
        tried = "every layer recomputes its activations already, so the heaviest batch is tried as it is"
    else:
        tried = "every layer recomputes its activations, then the heaviest batch is tried"
    logger.warning(f"{words}, and the job takes {probe.peak / GIB:.1f}. Tried next: {tried}")
    return train.model_copy(update={"gradient_checkpointing": True})


def plan_probe(job: JobConfig, plan: Plan, index: Index, builder: SampleBuilder) -> Probe | None:
    """Return the heaviest batch of the plan, or None if the job does not probe. Its `peak` counts the answers of one
    prompt at a time, the least that a step of GRPO can do with.

    Raise `ConfigError` if weights and optimizer state alone do not fit on the GPU.
    """
    wanted = job.train.probe if job.train.probe is not None else job.cluster.gpus_per_worker > 0
    if not wanted or job.cluster.zero_stage == 3:
        return None
    rows = heaviest_rows(job.method, job.train, plan, index.tokens)
    predicted = estimate_memory(build_rehearsal(job, builder.family), index, rows, builder, room=0.0)
    varies = ("activations and buffers", "sampling of answers", "fragmentation", "gradients")
    stays = sum(value for name, value in predicted.parts.items() if name not in varies)
    card = job.cluster.gpu_memory_gib
    if card is not None and stays > usable_gib(card) * GIB:
        raise ConfigError(
            f"cluster.gpu_memory_gib={card:g}: weights and optimizer take {stays / GIB:.1f} GiB without any batch. Use "
            "model.load_in_4bit, a smaller base, cluster.deepspeed=zero3, or a larger card."
        )
    above = predicted.step + predicted.parts.get("gradients", 0.0)
    return Probe(rows, int(index.tokens[list(rows)].max()), above, predicted.peak)


def plan_room(method: Method, cluster: Cluster) -> float:
    """Return the bytes of a worker's GPU to plan with: `cluster.gpu_memory_gib` as torch has it, and in a job that
    trains in this process no more than this card has and others leave of it."""
    usable = usable_gib(cluster.gpu_memory_gib) * GIB if cluster.gpu_memory_gib is not None else math.inf
    if cluster.num_workers or not cluster.gpus_per_worker:
        return usable
    import torch

    prepare_gpu(cluster, method)  # to ask the card is to use CUDA
    card = read_card("cuda:0") if torch.cuda.is_available() else None
    return usable if card is None else card.room(cluster.gpu_memory_gib)


def choose_micro_batch(rehearsal: "Rehearsal", index: Index, builder: SampleBuilder) -> tuple[Train, str]:
    """Return the `train` section of the rehearsed job with `memory: auto` resolved, and a sentence on the choice.

    Raise `ConfigError` if not even the smallest batch fits.
    """
    from ray_vlm.models.rehearse import choose

    settings, size = rehearsal.settings, row_size(index, int(np.argmax(index.tokens)), builder)
    room, sizes = plan_room(settings.method, settings.cluster), micro_batch_sizes(settings)
    choice = choose(rehearsal, size, sizes, TARGET * room)
    if choice is None:
        sampled = group_bytes(settings, rehearsal.config, size)
        cache = f"; the answers to its prompt take {sampled / GIB:.1f} GiB while they are sampled" if sampled else ""
        lower = ", method.num_generations or method.max_completion_tokens" if sampled else ""
        if (engine := engine_of(settings, rehearsal.config, rehearsal.weights(), size)) is not None:
            cache = f"; vllm takes {engine.total / GIB:.1f} GiB of it while it samples ({engine.describe()})"
            lower = ", train.global_batch_size or method.max_completion_tokens"
        raise ConfigError(
            f"train.memory=auto: not even {sizes[0]} at a time, with every layer recomputed, fits into "
            f"{TARGET:.0%} of {room / GIB:.4g} GiB (cluster.gpu_memory_gib={settings.cluster.gpu_memory_gib:g}); the "
            f"heaviest row has {size.tokens:,} tokens{cache}. Lower data.max_pixels{lower}, use model.load_in_4bit or "
            "cluster.deepspeed, or a larger card."
        )
    layers = True if choice.layers == rehearsal.num_layers else choice.layers or False  # 0 is no number of layers
    chosen = {"micro_batch_size": choice.micro, "gradient_checkpointing": layers, "memory": None}
    return settings.train.model_copy(update=chosen), describe_choice(choice, rehearsal.num_layers, room)


def describe_choice(choice: Choice, num_layers: int, room: float) -> str:
    """Return a sentence on the choice. `room`: bytes of the card."""
    recompute = f"{choice.layers} of {num_layers} layers recompute"
    if choice.layers == "selective":
        recompute = "all layers recompute what is no product (selective)"
    portion = choice.estimate.group_batch
    at_a_time = f", {describe_portion(portion)}" if portion else ""
    return (
        f"train.memory=auto: micro_batch_size {choice.micro}, {recompute}{at_a_time}; about "
        f"{choice.estimate.peak / GIB:.1f} of {TARGET * room / GIB:.1f} GiB, {TARGET:.0%} of {room / GIB:.4g}"
    )


def micro_batch_sizes(settings: StepSettings) -> list[int]:
    """Return the possible micro-batch sizes, ascending: the divisors of a worker's rows per step.

    GRPO counts answers: only sizes that are multiples or divisors of a group.
    """
    rows_per_worker = -(-settings.train.global_batch_size // settings.cluster.least_workers)
    group = settings.method.num_generations if isinstance(settings.method, GrpoMethod) else 1
    sizes = [
        n for n in range(1, rows_per_worker + 1) if rows_per_worker % n == 0 and (n % group == 0 or group % n == 0)
    ]
    return sizes or [1]
