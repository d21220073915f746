"""A worker's trainer in a process beside the workers, which validates or samples with their weights."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_vlm.config.load import load_resolved
from ray_vlm.config.method import GrpoMethod
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import Sample
from ray_vlm.distributed import DistributedContext, build_context
from ray_vlm.train.worker_spec import WorkerSpec

if TYPE_CHECKING:
    from ray_vlm.methods.trainer import PlannedTrainer


@dataclass(frozen=True)
class Beside:
    """What a process beside the workers has: the job as it is for this process, the trainer, and what both need."""

    job: JobConfig
    trainer: "PlannedTrainer"
    builder: SampleBuilder
    context: DistributedContext


def job_beside(spec: WorkerSpec, resources: tuple[float, float]) -> JobConfig:
    """Return the job for a single process with these CPUs and GPUs, which samples by itself if it samples."""
    job = load_resolved(spec.job)
    method = job.method
    if isinstance(method, GrpoMethod):
        alone = {"samplers": 0, "max_staleness": 0, "cpus_per_sampler": None, "gpus_per_sampler": None}
        method = method.model_copy(update=alone)
    cpus, gpus = resources
    sizes = {"num_workers": 1, "deepspeed": None, "cpus_per_worker": cpus, "gpus_per_worker": gpus}
    return job.model_copy(update={"method": method, "cluster": job.cluster.model_copy(update=sizes)})


def load_beside(spec: WorkerSpec, resources: tuple[float, float]) -> Beside:
    """Build the trainer of a worker for a process with these CPUs and GPUs, with the package's own loop as its engine:
    the same model with the same forwards as the workers have."""
    spec.environment.apply()
    from ray_vlm.methods import load_method
    from ray_vlm.models.card_memory import prepare_gpu
    from ray_vlm.models.libraries import prepare_process, quiet_libraries
    from ray_vlm.train.build import build_args, build_inputs, load_base

    job = job_beside(spec, resources)
    if isinstance(job.method, GrpoMethod):  # a second vLLM engine does not pay for a few greedy answers
        method = job.method.model_copy(update={"rollouts": "transformers"})
        job = job.model_copy(update={"method": method})
    quiet_libraries()
    prepare_gpu(job.cluster, job.method)
    prepare_process(job.seed, job.cluster.cpus_per_worker, in_ray=False)
    context = build_context(job.cluster.gpus_per_worker > 0, in_ray=False)
    builder = load_sample_builder(spec.sample_spec)
    args = build_args(job, spec)
    model = load_base(job, builder, context)
    no_rows: Generator[list[Sample]] = (batch for batch in list[list[Sample]]())
    inputs = build_inputs(job, spec, model, args, builder, context, no_rows)
    return Beside(job, load_method(job.method.name)(model, args, inputs), builder, context)
