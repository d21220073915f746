"""Sample and score several answers to each record, batch by batch."""

from collections.abc import Generator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.records import SftRecord
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import ConfigError
from ray_vlm.evaluate.actors import InferenceJob, InferenceWorker, do_batches
from ray_vlm.methods.groups import score_answers
from ray_vlm.methods.rewards import Rewards, load_rewards, total
from ray_vlm.methods.rollout import Completion, Sampling, sample_groups


@dataclass(frozen=True)
class Sample:
    """An answer and its reward. `whole`: False for one that was cut off at `evaluate.max_new_tokens`."""

    text: str
    reward: float
    whole: bool = True


def load_scoring(job: JobConfig, labels: Sequence[str]) -> Rewards:
    """Load the rewards that score the answers. Raise `ConfigError` for one that does not apply."""
    try:
        return load_rewards(job.task.name, job.pairs.rewards, job.method.box_quality, labels=labels)
    except ConfigError as error:
        raise ConfigError([text.replace("method.rewards", "pairs.rewards") for text in error.problems]) from None


def sample_answers(
    job: JobConfig, spec: SampleSpec, records: Sequence[SftRecord], adapter: str | None, num_actors: int
) -> Generator[list[list[Sample]]]:
    """Yield the answers to every record, batch by batch in order; `evaluate.batch_size` answers are sampled at a
    time."""
    batches = plan_prompts(job, len(records))
    work = InferenceJob(job, spec, tuple(records), adapter, batches)
    for _, groups in do_batches(work, _sample, range(len(batches)), num_actors):
        yield [[Sample(*answer) for answer in group] for group in groups]


def plan_prompts(job: JobConfig, num_records: int) -> tuple[tuple[int, ...], ...]:
    """Return the positions of the records of each batch."""
    size = max(1, job.evaluate.batch_size // job.pairs.num_samples)
    return tuple(tuple(range(i, min(i + size, num_records))) for i in range(0, num_records, size))


def _sample(loaded: InferenceWorker, records: Sequence[SftRecord], positions: Sequence[int]) -> Any:
    """Sample and score the answers to a batch; return plain data."""
    job, builder = loaded.work.job, loaded.builder
    seeds = [(job.seed, i) for i in positions]
    rows = [builder.prompt_row(record) for record in records]
    groups = sample_groups(loaded.model, rows, builder, _sampling(job), seeds, loaded.device)
    texts = [[builder.text(answer.ids) for answer in group] for group in groups]
    scores = iter(_score(loaded, records, texts, groups))
    return [
        [astuple(Sample(text, next(scores), answer.finished)) for text, answer in zip(group_texts, group, strict=True)]
        for group_texts, group in zip(texts, groups, strict=True)
    ]


def _sampling(job: JobConfig) -> Sampling:
    options = job.pairs
    temperature: float | tuple[float, ...]
    if isinstance(options.temperature, list):
        first, last = options.temperature
        temperature = tuple(np.linspace(first, last, options.num_samples).tolist())
    else:
        temperature = options.temperature
    return Sampling(options.num_samples, job.evaluate.max_new_tokens, temperature, options.top_p)


def _score(
    loaded: InferenceWorker,
    records: Sequence[SftRecord],
    texts: Sequence[list[str]],
    groups: Sequence[list[Completion]],
) -> list[float]:
    """Return the reward of every answer, group by group."""
    builder, repeats = loaded.builder, loaded.work.job.pairs.num_samples
    rewards = load_scoring(loaded.work.job, loaded.work.spec.labels)
    turns = [[{"role": role, "content": text} for role, text in builder.turns(r)] for r in records]
    scores = score_answers(
        rewards,
        [record for record in records for _ in range(repeats)],
        [text for group_texts in texts for text in group_texts],
        [answer.ids for group in groups for answer in group],
        [prompt for prompt in turns for _ in range(repeats)],
        builder,
    )
    return [total(rewards, parts) for parts in scores]
