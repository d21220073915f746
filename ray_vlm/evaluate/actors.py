"""Run the model on records, batch by batch: in this process, or in Ray Data actors.

Batches are planned before they are distributed, so they are the same for any number of actors: padding and the number
of threads change the last digits of a forward.
"""

import json
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ray_vlm.cluster.connect import connect
from ray_vlm.cluster.environment import Environment, read_environment
from ray_vlm.cluster.preflight import ClusterDemand, build_demand
from ray_vlm.config.schema import JobConfig
from ray_vlm.config.task import GuiStepsTask
from ray_vlm.data.records import SftRecord
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import SampleSpec
from ray_vlm.engines.interface import Engine
from ray_vlm.engines.own import OwnEngine
from ray_vlm.errors import RayVlmError, RunError
from ray_vlm.machine import count_threads
from ray_vlm.models.card_memory import release_memory
from ray_vlm.models.load import load_trained, whole_model
from ray_vlm.models.lora import is_whole_model
from ray_vlm.models.out_of_memory import NO_ROOM, advise_inference, describe_out_of_memory, is_out_of_memory
from ray_vlm.runs.checkpoints import fetch_folder
from ray_vlm.storage import full_address

if TYPE_CHECKING:
    from ray.data import Dataset
    from transformers import PreTrainedModel

    from ray_vlm.engines.vllm_start import EngineLimits

_BLOCKS_PER_ACTOR = 64


@dataclass(frozen=True)
class InferenceJob:
    """What the processes are to run. `adapter`: address of an adapter, or of a whole model that replaces the base, None
    for the base; `batches`: positions of the records of each batch; `memory`: the earlier steps in the prompt of a GUI
    step, those of the records (`truth`) or the model's own answers (`model`), for which a batch holds whole tasks."""

    job: JobConfig
    spec: SampleSpec
    records: Sequence[SftRecord]
    adapter: str | None
    batches: tuple[tuple[int, ...], ...]
    memory: Literal["truth", "model"] = "truth"


class InferenceWorker:
    """A process's model and records. The model is loaded at first use: an error in the constructor of a Ray actor would
    reach the caller without its type."""

    def __init__(self, inference: InferenceJob):
        self.inference = inference
        self._limits: EngineLimits | None = None  # of `expect`

    @property
    def records(self) -> Sequence[SftRecord]:
        """All records of the job."""
        return self.inference.records

    @cached_property
    def builder(self) -> SampleBuilder:
        """The process's `SampleBuilder`."""
        return load_sample_builder(self.inference.spec)

    @property
    def device(self) -> str:
        """The model's device."""
        return "cuda:0" if self.inference.job.cluster.gpus_per_worker else "cpu"

    @cached_property
    def model(self) -> "PreTrainedModel":
        """The base, with the adapter where there is one, or the whole model that replaces it."""
        import torch

        job = self.inference.job
        torch.set_num_threads(count_threads(job.cluster.cpus_per_worker))
        return load_trained(job.model, job.train.precision, self.inference.adapter, self.device)

    @cached_property
    def engine(self) -> Engine:
        """What answers, as `evaluate.engine` says. It is closed with the worker, or at the end of the process."""
        engine = build_engine(self)
        self._close = weakref.finalize(self, engine.close)
        return engine

    def expect(self, records: Sequence[SftRecord]) -> None:
        """Let the engine answer these records too. One that has reserved memory for shorter prompts is closed, and the
        next use of `engine` starts another."""
        if self.inference.job.evaluate.engine in ("transformers", "samplers") or not records:
            return
        needed = prompt_limits(replace(self.inference, records=records), self.builder)
        if (known := self._limits) is not None:  # so that prompts of two kinds by turns do not replace it each time
            needed = replace(needed, tokens=max(needed.tokens, known.tokens), images=max(needed.images, known.images))
        if needed != known:
            self.close()
            self._limits = needed

    @property
    def limits(self) -> "EngineLimits":
        """The largest requests, for an engine that reserves memory by them."""
        return self._limits or prompt_limits(self.inference, self.builder)

    def close(self) -> None:
        """Close the engine, if one was started."""
        if self.__dict__.pop("engine", None) is not None:
            self._close()


def build_engine(worker: InferenceWorker) -> Engine:
    """Build the engine of `evaluate.engine`, with the adapter where there is one."""
    inference, job = worker.inference, worker.inference.job
    if job.evaluate.engine == "transformers":
        keys = ("pairs.num_samples", "evaluate.max_new_tokens")
        return OwnEngine(worker.model, worker.builder, worker.device, keys=keys)
    if job.evaluate.engine == "samplers":
        from ray_vlm.evaluate.samplers import join_samplers

        return join_samplers(job, inference.adapter, worker.builder)
    from ray_vlm.engines.vllm import build_answering_engine
    from ray_vlm.engines.vllm_start import EngineSettings

    adapter = fetch_folder(inference.adapter) if inference.adapter is not None else None
    settings = EngineSettings(job.model, job.train.precision, job.seed, worker.device)
    if adapter is not None and is_whole_model(adapter):
        settings, adapter = replace(settings, model=whole_model(job.model, adapter)), None
    if job.evaluate.engine == "server":
        from ray_vlm.engines.server import build_server_engine

        setting, url, never = "evaluate.sampler_url", job.evaluate.sampler_url, [worker.builder.image_token_id]
        assert url is not None
        return build_server_engine(setting, url, settings.model, worker.builder, worker.limits, never, adapter)
    return build_answering_engine(settings, adapter, worker.builder, worker.limits)


def open_adapter(job: JobConfig, adapter: str | None, weights: str | None, num_actors: int) -> str | None:
    """Return the address by which the job's processes open an adapter: this process by its local copy `weights`, others
    and samplers of its run by its own address."""
    if adapter is None or (num_actors == 0 and job.evaluate.engine != "samplers"):
        return weights
    return full_address(adapter)


def prompt_limits(inference: InferenceJob, builder: SampleBuilder) -> "EngineLimits":
    """Return the largest requests of the job's records to an engine that reserves memory by them."""
    from ray_vlm.engines.vllm_start import EngineLimits

    job, memory_tokens = inference.job, 0
    longest = max(sum(builder.token_counts(record)[:2]) for record in inference.records)
    if inference.memory == "model":  # tokens that the answers to earlier steps may add to the prompt
        task = inference.spec.task
        assert isinstance(task, GuiStepsTask)
        memory_tokens = task.long_memory_tokens + task.short_memory * job.evaluate.max_new_tokens
    images = max([1, *(len(record.images) for record in inference.records)])
    return EngineLimits(longest + memory_tokens + job.evaluate.max_new_tokens, images)


# A module-level function: the worker, the records of a batch and their positions -> data that JSON holds.
BatchFunction = Callable[[InferenceWorker, Sequence[SftRecord], Sequence[int]], object]


def run_batches(
    inference: InferenceJob, function: BatchFunction, numbers: Sequence[int], num_actors: int
) -> Iterator[tuple[int, Any]]:
    """Yield `(number, function(...))` of each batch in `numbers`, in their order; 0 actors runs in this process.

    The result of `function` is passed as JSON. Raise the `RayVlmError` of an actor, or `RunError` where one failed
    otherwise.
    """
    if not numbers:
        return
    run = _run_on_ray(inference, function, numbers, num_actors) if num_actors else _run(inference, function, numbers)
    with closing(run) as results:
        yield from results


def _run(inference: InferenceJob, function: BatchFunction, numbers: Sequence[int]) -> Generator[tuple[int, Any]]:
    worker = InferenceWorker(inference)
    with closing(worker):
        for number in numbers:
            yield number, json.loads(_run_batch(worker, function, number))
    del worker
    release_memory()  # for the next model in this process


def _run_batch(worker: InferenceWorker, function: BatchFunction, number: int) -> str:
    """Return the result of a batch as JSON."""
    positions = worker.inference.batches[number]
    try:
        return json.dumps(function(worker, [worker.records[i] for i in positions], positions))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        advice = advise_inference(worker.inference.job.evaluate.batch_size)
        raise RunError(f"{NO_ROOM} at batch {number}: {describe_out_of_memory(error)}. {advice}") from error


class _Actor:
    """The callable that Ray Data creates in each process and calls with numbers of batches."""

    def __init__(self, inference: InferenceJob, function: BatchFunction, environment: Environment):
        environment.apply()
        self.worker, self.function = InferenceWorker(inference), function

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, list]]:
        for number in batch["item"]:
            yield {"number": [int(number)], "result": [_run_batch(self.worker, self.function, int(number))]}


def _run_on_ray(
    inference: InferenceJob, function: BatchFunction, numbers: Sequence[int], num_actors: int
) -> Generator[tuple[int, Any]]:
    with connect(build_actor_demand(inference.job, num_actors)):
        from ray.exceptions import RayError, RayTaskError

        expected = iter(numbers)
        try:
            for row in _build_dataset(inference, function, numbers, num_actors).iter_rows():
                if row["number"] != (due := next(expected)):
                    raise RunError(f"batch {row['number']} arrived where {due} was due. Please report this.")
                yield row["number"], json.loads(row["result"])
        except RayTaskError as error:
            if isinstance(error.cause, RayVlmError):
                raise error.cause from None
            raise RunError(f"a worker failed: {type(error.cause).__name__}: {error.cause}") from error
        except RayError as error:
            raise RunError(f"a worker died: {str(error).strip()[-1000:]}") from error


def build_actor_demand(job: JobConfig, count: int) -> ClusterDemand:
    """Return what that many actors demand of a cluster: as many workers, and no validation process."""
    cluster = job.cluster.model_copy(update={"num_workers": count})
    return replace(build_demand(job), cluster=cluster, num_validators=0, num_samplers=0, most_samplers=0)


def _build_dataset(
    inference: InferenceJob, function: BatchFunction, numbers: Sequence[int], num_actors: int
) -> "Dataset":
    """Build the Ray Data pipeline: numbers of batches go through the actors and come back in order."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    cluster = inference.job.cluster
    blocks = min(len(numbers), _BLOCKS_PER_ACTOR * num_actors)
    return ray.data.from_items(list(numbers), override_num_blocks=blocks).map_batches(
        _Actor,
        fn_constructor_args=(inference, function, read_environment()),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker or None,
    )
