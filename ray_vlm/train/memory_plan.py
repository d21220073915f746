"""What a job takes of a card, before it starts: the heaviest batch of its plan, whether that fits, and for
`train.memory: auto` the micro-batch and the checkpointing that do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.index import Index
from ray_vlm.data.plan import Plan
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.errors import ConfigError
from ray_vlm.machine import GIB
from ray_vlm.methods.prefix_sharing import plan_folding
from ray_vlm.models.load import load_config
from ray_vlm.models.memory import Choice, Estimate, RowSize, choose, estimate, merge_of, micro_sizes

_LOOKED_AT = 50_000  # micro-batches of a plan that are compared; more would hold the start up


@dataclass(frozen=True)
class Probe:
    """The batch to run before the first step: `rows` of the training data, the tokens of the longest, and the bytes
    that it is predicted to take above the loaded model, with gradients."""

    rows: tuple[int, ...]
    tokens: int
    predicted: float


def row_size(index: Index, row: int, builder: SampleBuilder) -> RowSize:
    """Tokens of one row, as the planner of memory takes them."""
    image, prompt, answer = (int(of[row]) for of in (index.image_tokens, index.prompt_tokens, index.answer_tokens))
    answers = builder.row(index.records[row]).completions
    return RowSize(image, prompt, answer, max(map(len, answers), default=0))


def heaviest_rows(job: JobConfig, plan: Plan, index: Index) -> tuple[int, ...]:
    """Rows of the micro-batch of the plan that is padded to the most tokens (GRPO: its prompts), of any worker."""
    unit = len(micro_sizes(job, RowSize(0, 0, 0)))
    tokens, best = index.tokens, -1
    rows: tuple[int, ...] = ()
    for number in range(min(plan.num_steps * plan.accumulation, _LOOKED_AT)):
        for rank in range(plan.world_size):
            mine = list(plan.micro_batch(number, rank).rows)
            if job.method.name == "grpo":  # what is left of a step's prompts when it is cut into micro-batches
                mine = sorted(mine, key=lambda row: -tokens[row])[:unit]
            if mine and (weight := len(mine) * int(tokens[mine].max())) > best:
                best, rows = weight, tuple(mine)
    return rows


def predict(job: JobConfig, index: Index, rows: Sequence[int], builder: SampleBuilder) -> Estimate:
    """Memory of one worker when these rows go through it."""
    rehearsal, merge = _rehearse(job, builder)
    sizes = [row_size(index, row, builder) for row in rows]
    return estimate(rehearsal, sizes, merge, plan_folding(job, builder.family, rehearsal.config))


def plan_probe(job: JobConfig, plan: Plan, index: Index, builder: SampleBuilder) -> Probe | None:
    """The heaviest batch of the plan, where the job wants it to run first. Raises `ConfigError` for a card that is
    smaller than what stays on it."""
    wanted = job.train.probe if job.train.probe is not None else job.cluster.gpus_per_worker > 0
    if not wanted or job.cluster.zero_stage == 3:
        return None
    rows = heaviest_rows(job, plan, index)
    found = predict(job, index, rows, builder)
    above = found.parts.get("activations and buffers", 0.0) + found.parts["gradients"]
    stays, card = found.peak - above, job.cluster.gpu_memory_gib
    if card is not None and stays > card * GIB:
        raise ConfigError(
            f"cluster.gpu_memory_gib={card:g}: what stays on a card takes {stays / GIB:.1f} GiB without any batch. Use "
            "model.load_in_4bit, a smaller base, cluster.deepspeed=zero3, or a larger card."
        )
    return Probe(rows, int(index.tokens[list(rows)].max()), above)


def fit(job: JobConfig, index: Index, builder: SampleBuilder) -> tuple[JobConfig, str]:
    """The job with `train.memory: auto` resolved, and a sentence on what was chosen. Raises `ConfigError` where not
    even the smallest batch fits."""
    card = job.cluster.gpu_memory_gib
    assert card is not None
    size = row_size(index, int(np.argmax(index.tokens)), builder)
    rehearsal, merge = _rehearse(job, builder)
    found = choose(rehearsal, size, micros(job), merge, plan_folding(job, builder.family, rehearsal.config), card * GIB)
    if found is None:
        raise ConfigError(
            f"train.memory=auto: not even {micros(job)[0]} at a time, with every layer recomputed, fits into "
            f"cluster.gpu_memory_gib={card:g}; the heaviest row has {size.tokens:,} tokens. Lower data.max_pixels, use "
            "model.load_in_4bit or cluster.deepspeed, or a larger card."
        )
    layers: Any = True if found.layers == rehearsal.num_layers else found.layers or False
    chosen = {"micro_batch_size": found.micro, "gradient_checkpointing": layers, "memory": None}
    fitted = job.model_copy(update={"train": job.train.model_copy(update=chosen)})
    return fitted, describe_choice(found, rehearsal.num_layers, card)


def describe_choice(found: Choice, num_layers: int, card: float) -> str:
    """What was chosen, in a sentence."""
    return (
        f"train.memory=auto: micro_batch_size {found.micro}, {found.layers} of {num_layers} layers recompute; about "
        f"{found.found.peak / GIB:.1f} of {card:g} GiB"
    )


def micros(job: JobConfig) -> list[int]:
    """Micro-batches that the job may have, ascending: divisors of a worker's rows in a step; of GRPO's answers those
    that hold whole groups, or divide one."""
    mine = -(-job.train.global_batch_size // job.cluster.least_workers)
    group = job.method.num_generations if job.method.name == "grpo" else 1
    found = [n for n in range(1, mine + 1) if mine % n == 0 and (n % group == 0 or group % n == 0)]
    return found or [1]


def _rehearse(job: JobConfig, builder: SampleBuilder) -> tuple[Any, int]:
    from ray_vlm.models.rehearse import Rehearsal

    config = load_config(job.model)
    return Rehearsal(config, job, builder.family), merge_of(config)
