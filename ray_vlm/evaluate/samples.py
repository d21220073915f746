"""Several scored answers to each record: sampled in this process, or by Ray Data actors.

Batches are the same in both, since padding and numbers of threads change the last digits of a forward.
"""

import json
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ray_vlm.cluster.connect import connect
from ray_vlm.cluster.environment import Environment, read_environment
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.records import SftRecord
from ray_vlm.data.rows import Preparer, load_preparer
from ray_vlm.data.spec import RowSpec
from ray_vlm.errors import ConfigError, RayVlmError, RunError
from ray_vlm.methods.groups import score_answers
from ray_vlm.methods.rewards import Rewards, load_rewards, total
from ray_vlm.methods.rollout import Completion, Sampling, sample_groups
from ray_vlm.models.load import load_adapter, load_model

_BLOCKS_PER_WORKER = 64


@dataclass(frozen=True)
class Sample:
    """An answer and its reward. `whole`: False for one that was cut off at `evaluate.max_new_tokens`."""

    text: str
    reward: float
    whole: bool = True


@dataclass(frozen=True)
class Work:
    """What is to be done. `records`: those of the part, or a Ray object reference to them; `adapter`: its address."""

    job: JobConfig
    spec: RowSpec
    records: Any
    adapter: str | None

    @property
    def num_prompts(self) -> int:
        """Prompts that are sampled at a time."""
        return max(1, self.job.evaluate.batch_size // self.job.pairs.num_samples)


def load_scoring(job: JobConfig, labels: Sequence[str]) -> Rewards:
    """What scores the answers. Raises `ConfigError` for what cannot."""
    try:
        return load_rewards(job.task.name, job.pairs.rewards, job.method.box_quality, labels=labels)
    except ConfigError as error:
        raise ConfigError([text.replace("method.rewards", "pairs.rewards") for text in error.problems]) from None


class Sampler:
    """Holds the model, and turns numbers of batches into answers. Loads nothing before the first.

    An error in a Ray actor's constructor would arrive without its type, so nothing is loaded there.
    """

    def __init__(self, work: Work, environment: Environment | None = None):
        if environment is not None:
            environment.apply()
        self.work = work

    @cached_property
    def records(self) -> Sequence[SftRecord]:
        """The records of the part."""
        if isinstance(self.work.records, tuple):
            return self.work.records
        import ray

        return ray.get(self.work.records)

    @cached_property
    def preparer(self) -> Preparer:
        """The process's `Preparer`."""
        return load_preparer(self.work.spec)

    @cached_property
    def rewards(self) -> Rewards:
        """The job's rewards; users' functions are imported in this process."""
        return load_scoring(self.work.job, self.work.spec.labels)

    @property
    def device(self) -> str:
        """Where the model is."""
        return "cuda:0" if self.work.job.cluster.gpus_per_worker else "cpu"

    @cached_property
    def model(self) -> Any:
        """The base, with the adapter where there is one."""
        import torch

        job = self.work.job
        torch.set_num_threads(max(1, int(job.cluster.cpus_per_worker)))
        model = load_model(job.model, job.train.bf16, self.device)
        return model if self.work.adapter is None else load_adapter(model, self.work.adapter, job.model)

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, list]]:
        """What Ray Data calls: each batch as one row."""
        for number in batch["id"]:
            yield {
                "number": [int(number)],
                "found": [json.dumps([[astuple(answer) for answer in of_row] for of_row in self.sample(int(number))])],
            }

    def sample(self, number: int) -> list[list[Sample]]:
        """The answers to each record of batch `number`, in their order."""
        options, size = self.work.job.pairs, self.work.num_prompts
        records = self.records[number * size : (number + 1) * size]
        seeds = [(self.work.job.seed, number * size + i) for i in range(len(records))]
        longest = self.work.job.evaluate.max_new_tokens
        heat: float | tuple[float, ...]
        if isinstance(options.temperature, list):
            first, last = options.temperature
            heat = tuple(np.linspace(first, last, options.num_samples).tolist())
        else:
            heat = options.temperature
        sampling = Sampling(options.num_samples, longest, heat, options.top_p)
        rows = [self.preparer.prompt_row(record) for record in records]
        groups = sample_groups(self.model, rows, self.preparer, sampling, seeds, self.device)
        texts = [[self.preparer.text(answer.ids) for answer in group] for group in groups]
        scores = iter(self._score(records, texts, groups))
        return [
            [Sample(text, next(scores), answer.finished) for text, answer in zip(of_row, group, strict=True)]
            for of_row, group in zip(texts, groups, strict=True)
        ]

    def _score(
        self, records: Sequence[SftRecord], texts: Sequence[list[str]], groups: Sequence[list[Completion]]
    ) -> list[float]:
        """The reward of every answer, group by group."""
        turns = [[{"role": role, "content": text} for role, text in self.preparer.turns(r)] for r in records]
        repeats = self.work.job.pairs.num_samples
        scores = score_answers(
            self.rewards,
            [record for record in records for _ in range(repeats)],
            [text for of_row in texts for text in of_row],
            [answer.ids for group in groups for answer in group],
            [prompt for prompt in turns for _ in range(repeats)],
            self.preparer,
        )
        return [total(self.rewards, parts) for parts in scores]


def sample_local(work: Work) -> Generator[list[list[Sample]]]:
    """The answers to every record, batch by batch in order, from this process."""
    sampler = Sampler(work)
    for number in range(math.ceil(len(work.records) / work.num_prompts)):
        yield sampler.sample(number)


def sample_ray(work: Work) -> Generator[list[list[Sample]]]:
    """The same from `cluster.num_workers` Ray Data actors. Raises what an actor refused, or `RunError`."""
    with connect(work.job):
        import ray
        from ray.exceptions import RayError, RayTaskError

        total_batches = math.ceil(len(work.records) / work.num_prompts)
        expected = 0
        try:
            for row in _dataset(replace(work, records=ray.put(work.records)), total_batches).iter_rows():
                if row["number"] != expected:
                    raise RunError(f"batch {row['number']} arrived where {expected} was due. Please report this.")
                expected += 1
                yield [[Sample(*answer) for answer in of_row] for of_row in json.loads(row["found"])]
        except RayTaskError as error:
            if isinstance(error.cause, RayVlmError):
                raise error.cause from None
            raise RunError(f"a worker failed: {type(error.cause).__name__}: {error.cause}") from error
        except RayError as error:
            raise RunError(f"a worker died: {str(error).strip()[-1000:]}") from error


def _dataset(work: Work, num_batches: int) -> Any:
    """The Ray Data pipeline: numbers of batches, through the actors, in order."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    cluster = work.job.cluster
    blocks = min(num_batches, _BLOCKS_PER_WORKER * cluster.num_workers)
    return ray.data.range(num_batches, override_num_blocks=blocks).map_batches(
        Sampler,
        fn_constructor_args=(work, read_environment()),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=cluster.num_workers),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker or None,
    )
