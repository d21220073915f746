"""Run the model on records, batch by batch: in this process, or in Ray Data actors.

Batches are planned before they are distributed, so they are the same for any number of actors: padding and the number
of threads change the last digits of a forward.
"""

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ray_vlm.cluster.connect import connect
from ray_vlm.cluster.environment import Environment, read_environment
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.records import SftRecord
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import Sample, SampleSpec
from ray_vlm.errors import RayVlmError, RunError
from ray_vlm.machine import count_threads
from ray_vlm.models.load import load_trained, whole_model
from ray_vlm.models.lora import is_whole_model
from ray_vlm.models.out_of_memory import NO_ROOM, advise_inference, describe_out_of_memory, is_out_of_memory
from ray_vlm.runs.checkpoints import fetch_folder

_BLOCKS_PER_ACTOR = 64


@dataclass(frozen=True)
class InferenceJob:
    """The work of all actors. `records`: all records, or a Ray object reference to them; `adapter`: address of an
    adapter, or of a whole model that replaces the base, None for the base; `batches`: positions of the records of each
    batch; `memory`: the earlier steps in the prompt of a GUI step, those of the records (`truth`) or the model's own
    answers (`model`), for which a batch holds whole tasks."""

    job: JobConfig
    spec: SampleSpec
    records: Any
    adapter: str | None
    batches: tuple[tuple[int, ...], ...]
    memory: Literal["truth", "model"] = "truth"


class InferenceWorker:
    """A process's model and records. Both are loaded at first use: an error in the constructor of a Ray actor would
    reach the caller without its type."""

    def __init__(self, work: InferenceJob):
        self.work = work

    @cached_property
    def records(self) -> Sequence[SftRecord]:
        """All records of the job."""
        if isinstance(self.work.records, tuple):
            return self.work.records
        import ray

        return ray.get(self.work.records)

    @cached_property
    def builder(self) -> SampleBuilder:
        """The process's `SampleBuilder`."""
        return load_sample_builder(self.work.spec)

    @property
    def device(self) -> str:
        """The model's device."""
        return "cuda:0" if self.work.job.cluster.gpus_per_worker else "cpu"

    @cached_property
    def model(self) -> Any:
        """The base, with the adapter where there is one, or the whole model that replaces it."""
        import torch

        job = self.work.job
        torch.set_num_threads(count_threads(job.cluster.cpus_per_worker))
        return load_trained(job.model, job.train.precision, self.work.adapter, self.device)

    @cached_property
    def answer(self) -> Callable[[Sequence[Sample]], list[str]]:
        """vLLM's greedy answers, with the adapter where there is one."""
        from ray_vlm.methods.vllm import EngineSettings, build_answerer

        work, memory = self.work, 0
        adapter, job = fetch_folder(work.adapter) if work.adapter is not None else None, work.job
        settings = EngineSettings(job.model, job.train.precision, job.seed)
        if adapter is not None and is_whole_model(adapter):
            settings, adapter = replace(settings, model=whole_model(job.model, adapter)), None
        longest = max(sum(self.builder.token_counts(record)[:2]) for record in self.records)
        if work.memory == "model":  # tokens that the answers to earlier steps may add to the prompt
            memory = work.spec.task.long_memory_tokens + work.spec.task.short_memory * job.evaluate.max_new_tokens
        return build_answerer(settings, adapter, self.builder, longest + memory, job.evaluate.max_new_tokens)


Do = Callable[
    [InferenceWorker, Sequence[SftRecord], Sequence[int]], Any
]  # model, a batch and its positions -> plain data


def do_batches(work: InferenceJob, do: Do, numbers: Sequence[int], num_actors: int) -> Iterator[tuple[int, Any]]:
    """Yield `(number, do(...))` of each batch in `numbers`, in their order; 0 actors runs in this process.

    `do` is a module-level function, and its result is passed as JSON. Raise the `RayVlmError` of an actor, or
    `RunError` where one failed otherwise.
    """
    if not numbers:
        return
    with closing(_local(work, do, numbers) if num_actors == 0 else _ray(work, do, numbers, num_actors)) as results:
        yield from results


def _local(work: InferenceJob, do: Do, numbers: Sequence[int]) -> Generator[tuple[int, Any]]:
    loaded = InferenceWorker(work)
    for number in numbers:
        yield number, json.loads(json.dumps(_do(loaded, do, number)))


def _do(loaded: InferenceWorker, do: Do, number: int) -> Any:
    positions = loaded.work.batches[number]
    try:
        return do(loaded, [loaded.records[i] for i in positions], positions)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        advice = advise_inference(loaded.work.job.evaluate.batch_size)
        raise RunError(f"{NO_ROOM} at batch {number}: {describe_out_of_memory(error)}. {advice}") from error


class _Actor:
    """The callable that Ray Data creates in each process and calls with numbers of batches."""

    def __init__(self, work: InferenceJob, do: Do, environment: Environment):
        environment.apply()
        self.loaded, self.do = InferenceWorker(work), do

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, list]]:
        for number in batch["item"]:
            yield {"number": [int(number)], "result": [json.dumps(_do(self.loaded, self.do, int(number)))]}


def _ray(work: InferenceJob, do: Do, numbers: Sequence[int], num_actors: int) -> Generator[tuple[int, Any]]:
    with connect(with_workers(work.job, num_actors)):
        import ray
        from ray.exceptions import RayError, RayTaskError

        expected = iter(numbers)
        try:
            dataset = _dataset(replace(work, records=ray.put(work.records)), do, numbers, num_actors)
            for row in dataset.iter_rows():
                if row["number"] != (due := next(expected)):
                    raise RunError(f"batch {row['number']} arrived where {due} was due. Please report this.")
                yield row["number"], json.loads(row["result"])
        except RayTaskError as error:
            if isinstance(error.cause, RayVlmError):
                raise error.cause from None
            raise RunError(f"a worker failed: {type(error.cause).__name__}: {error.cause}") from error
        except RayError as error:
            raise RunError(f"a worker died: {str(error).strip()[-1000:]}") from error


def with_workers(job: JobConfig, count: int) -> JobConfig:
    """Return the job with that many workers and no validation process: the resources that the cluster must have."""
    alone = job.evaluate.model_copy(update={"asynchronous": False})
    return job.model_copy(update={"cluster": job.cluster.model_copy(update={"num_workers": count}), "evaluate": alone})


def _dataset(work: InferenceJob, do: Do, numbers: Sequence[int], num_actors: int) -> Any:
    """Build the Ray Data pipeline: numbers of batches go through the actors and come back in order."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    cluster = work.job.cluster
    blocks = min(len(numbers), _BLOCKS_PER_ACTOR * num_actors)
    return ray.data.from_items(list(numbers), override_num_blocks=blocks).map_batches(
        _Actor,
        fn_constructor_args=(work, do, read_environment()),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker or None,
    )
