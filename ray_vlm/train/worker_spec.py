"""The plain data that the driver sends to a training process."""

from dataclasses import dataclass, field, replace
from typing import Any

from ray_vlm.cluster.environment import Environment
from ray_vlm.config.load import dump_job
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.plan import Plan
from ray_vlm.data.rows import Rows
from ray_vlm.data.spec import SampleSpec
from ray_vlm.train.memory_plan import Probe


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs. `train` and `eval` are the rows of the index.

    `run`: address of the run. `attempt`: its number, as the driver counts. `driver`: the process that drives the run.
    `rows`: fingerprint of `train`. `row_bytes`: mean size of a row's pixels as the model sees them. `image_pixels`:
    mean pixels of an image. `threads`: loaders that are threads of the worker; 0: Ray Data's processes are. `probe`:
    the batch to run before the first step. `prompt_tokens` and `eval_prompt_tokens`: of the longest prompt with its
    images. `prompt_images`: the most images of a prompt, for an engine that reserves memory by them. `samplers`: names
    of the actors that sample for the workers.
    """

    job: dict[str, Any]
    run: str
    sample_spec: SampleSpec
    plan: Plan
    train: Rows
    eval: Rows | None
    num_loaders: int = 1
    cpus_per_loader: float = 1.0
    threads: int = 0
    attempt: int = 1
    driver: dict[str, Any] | None = None
    rows: str = ""
    row_bytes: float = 4 * 2**20
    image_pixels: float = 2**20
    probe: Probe | None = None
    prompt_tokens: int = 0
    eval_prompt_tokens: int = 0
    prompt_images: int = 1
    samplers: tuple[str, ...] = ()
    environment: Environment = field(default_factory=Environment)


def settle_workers(job: JobConfig, spec: WorkerSpec, world_size: int) -> tuple[JobConfig, WorkerSpec]:
    """Return the job and its spec for the current number of workers; each step keeps its rows."""
    cluster = job.cluster.model_copy(update={"num_workers": world_size})
    job, plan = job.model_copy(update={"cluster": cluster}), spec.plan
    micro = plan.global_batch_size // world_size if job.method.name == "grpo" else plan.micro_batch_size
    return job, replace(spec, job=dump_job(job), plan=replace(plan, world_size=world_size, micro_batch_size=micro))
