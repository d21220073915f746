"""The memory of a job, before it starts: the heaviest batch of its plan, whether it fits on the GPU, and for
`train.memory: auto` a micro-batch size and gradient checkpointing that fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_vlm.config.method import GrpoMethod, Method
from ray_vlm.config.schema import JobConfig
from ray_vlm.config.train import Train
from ray_vlm.data.index import Index
from ray_vlm.data.plan import Plan
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.errors import ConfigError
from ray_vlm.machine import GIB
from ray_vlm.models.families import Family
from ray_vlm.models.load import load_config
from ray_vlm.models.memory import Choice, Estimate, RowSize, StepSettings, micro_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ray_vlm.models.rehearse import Rehearsal

_LOOKED_AT = 50_000  # micro-batches of a plan that are compared; more would delay the start


@dataclass(frozen=True)
class Probe:
    """The batch to run before the first step: `rows` of the training data, `tokens` of the longest one, and the bytes
    `predicted` for it beyond the loaded model, with gradients."""

    rows: tuple[int, ...]
    tokens: int
    predicted: float


def row_size(index: Index, row: int, builder: SampleBuilder) -> RowSize:
    """Return the token counts of one row for the memory estimate."""
    image, prompt, answer = (int(of[row]) for of in (index.image_tokens, index.prompt_tokens, index.answer_tokens))
    answers = index.records.sample(builder, row).completions
    return RowSize(image, prompt, answer, max(map(len, answers), default=0))


def build_rehearsal(job: JobConfig, family: Family, config: "PreTrainedConfig | None" = None) -> "Rehearsal":
    """Build the fake model of a job. `config`: of its base, if it is known already."""
    from ray_vlm.models.rehearse import Rehearsal  # imports torch

    settings = StepSettings(job.method, job.train, job.cluster, job.lora, job.model.load_in_4bit)
    return Rehearsal(config or load_config(job.model), family, settings)


def heaviest_rows(method: Method, train: Train, plan: Plan, index: Index) -> tuple[int, ...]:
    """Return the rows of the micro-batch, over all workers, with the most tokens after padding (GRPO: its prompts)."""
    unit = len(micro_sizes(method, train, RowSize(0, 0, 0)))
    tokens, best = index.tokens, -1
    rows: tuple[int, ...] = ()
    for number in range(min(plan.num_steps * plan.accumulation, _LOOKED_AT)):
        for rank in range(plan.world_size):
            batch = list(plan.micro_batch(number, rank).rows)
            if isinstance(method, GrpoMethod):  # only so many prompts of the step are in one micro-batch
                batch = sorted(batch, key=lambda row: -tokens[row])[:unit]
            if batch and (weight := len(batch) * int(tokens[batch].max())) > best:
                best, rows = weight, tuple(batch)
    return rows


def estimate_memory(rehearsal: "Rehearsal", index: Index, rows: Sequence[int], builder: SampleBuilder) -> Estimate:
    """Estimate the memory of one worker for a batch of these rows."""
    from ray_vlm.models.rehearse import estimate

    return estimate(rehearsal, [row_size(index, row, builder) for row in rows])


def plan_probe(job: JobConfig, plan: Plan, index: Index, builder: SampleBuilder) -> Probe | None:
    """Return the heaviest batch of the plan, or None if the job does not probe.

    Raise `ConfigError` if weights and optimizer state alone do not fit on the GPU.
    """
    wanted = job.train.probe if job.train.probe is not None else job.cluster.gpus_per_worker > 0
    if not wanted or job.cluster.zero_stage == 3:
        return None
    rows = heaviest_rows(job.method, job.train, plan, index)
    predicted = estimate_memory(build_rehearsal(job, builder.family), index, rows, builder)
    above = predicted.parts.get("activations and buffers", 0.0) + predicted.parts["gradients"]
    stays, card = predicted.peak - above, job.cluster.gpu_memory_gib
    if card is not None and stays > card * GIB:
        raise ConfigError(
            f"cluster.gpu_memory_gib={card:g}: weights and optimizer take {stays / GIB:.1f} GiB without any batch. Use "
            "model.load_in_4bit, a smaller base, cluster.deepspeed=zero3, or a larger card."
        )
    return Probe(rows, int(index.tokens[list(rows)].max()), above)


def choose_micro_batch(rehearsal: "Rehearsal", index: Index, builder: SampleBuilder) -> tuple[Train, str]:
    """Return the `train` section of the rehearsed job with `memory: auto` resolved, and a sentence on the choice.

    Raise `ConfigError` if not even the smallest batch fits.
    """
    from ray_vlm.models.rehearse import choose

    settings, size = rehearsal.settings, row_size(index, int(np.argmax(index.tokens)), builder)
    card, sizes = settings.cluster.gpu_memory_gib, micro_batch_sizes(settings)
    assert card is not None
    choice = choose(rehearsal, size, sizes, card * GIB)
    if choice is None:
        raise ConfigError(
            f"train.memory=auto: not even {sizes[0]} at a time, with every layer recomputed, fits into "
            f"cluster.gpu_memory_gib={card:g}; the heaviest row has {size.tokens:,} tokens. Lower data.max_pixels, use "
            "model.load_in_4bit or cluster.deepspeed, or a larger card."
        )
    layers = True if choice.layers == rehearsal.num_layers else choice.layers or False
    chosen = {"micro_batch_size": choice.micro, "gradient_checkpointing": layers, "memory": None}
    return settings.train.model_copy(update=chosen), describe_choice(choice, rehearsal.num_layers, card)


def describe_choice(choice: Choice, num_layers: int, card: float) -> str:
    """Return a sentence on the choice."""
    return (
        f"train.memory=auto: micro_batch_size {choice.micro}, {choice.layers} of {num_layers} layers recompute; about "
        f"{choice.estimate.peak / GIB:.1f} of {card:g} GiB"
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
