"""The callbacks of a run: how they are built from the job, and in which order they act."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.preprocessing import asking_of, describe_preprocessing
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.distributed import DistributedContext
from ray_vlm.methods import load_method
from ray_vlm.methods.trainer import TrainerInputs
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.attempt import Attempt
from ray_vlm.train.build import build_validation
from ray_vlm.train.callbacks.checkpointing import CheckpointCallback
from ray_vlm.train.callbacks.energy import EnergyCallback, Meter
from ray_vlm.train.callbacks.gradient_norms import GradientNormsCallback
from ray_vlm.train.callbacks.metrics import MetricsCallback, StepTimer, Usage
from ray_vlm.train.callbacks.nonfinite import NonfiniteCallback, read_bad_steps
from ray_vlm.train.callbacks.preemption import PreemptionCallback, watch_notice
from ray_vlm.train.callbacks.validation import ValidationCallback
from ray_vlm.train.run_context import Progress, RunContext, WeightsWriter
from ray_vlm.train.run_log import open_monitor
from ray_vlm.train.validators import AsyncValidator, SyncValidator, Validator
from ray_vlm.train.worker_spec import WorkerSpec


@dataclass(frozen=True)
class RunCallbacks:
    """The callbacks of a run, in the order in which they act at every event. `energy`: None unless it is measured."""

    norms: GradientNormsCallback
    nonfinite: NonfiniteCallback
    preemption: PreemptionCallback
    metrics: MetricsCallback
    validation: ValidationCallback
    energy: EnergyCallback | None
    checkpoints: CheckpointCallback

    def close(self) -> None:
        """Stop what runs beside the trainer."""
        if self.energy is not None:
            self.energy.close()

    def in_order(self) -> Sequence[TrainerCallback]:
        """Return them for the trainer: what is measured comes before what is written of it.

        `metrics` sets the epoch of the trainer's state at the end of a step, so what reads the epoch comes after it.
        """
        every = (self.norms, self.nonfinite, self.preemption, self.metrics, self.validation, self.energy)
        return [callback for callback in (*every, self.checkpoints) if callback is not None]


def build_run_context(
    job: JobConfig,
    spec: WorkerSpec,
    paths: RunPaths,
    attempt: Attempt,
    context: DistributedContext,
    model: PreTrainedModel,
    builder: SampleBuilder,
) -> RunContext:
    """Return this rank's view of its run, with the monitor opened."""
    preprocessing = describe_preprocessing(builder, asking_of(job))
    zero3 = job.cluster.zero_stage == 3
    weights = WeightsWriter(model, builder.processor, job.lora is not None, zero3, context.rank, preprocessing)
    log_every = job.train.log_every_steps
    monitor = open_monitor(paths, spec.job, job.track, attempt, context, spec.plan.num_steps, log_every)
    return RunContext(paths, attempt, spec.plan, context, weights, Progress.load(attempt, paths.uri("best")), monitor)


def build_callbacks(
    job: JobConfig,
    spec: WorkerSpec,
    run: RunContext,
    inputs: TrainerInputs,
    model: PreTrainedModel,
    about: Mapping[str, Any],
    should_stop: Callable[[], bool],
) -> RunCallbacks:
    """Build the callbacks of a run. `about`: what a checkpoint stores of it, of `describe_run`."""
    context, metric, deepspeed = run.distributed, job.evaluate.metric, job.cluster.deepspeed is not None
    timer, usage = StepTimer(), Usage(inputs.batches, inputs.clock, inputs.operations, context)
    has_images = job.task.name != "chat"
    norms = GradientNormsCallback(model, inputs.builder.family, context, always_images=has_images, deepspeed=deepspeed)
    bad_steps = context.broadcast(read_bad_steps(run.paths) if context.rank == 0 else [])
    nonfinite = NonfiniteCallback(
        run, job.train.nonfinite, norms, inputs.loss_scale, inputs.row_id, bad_steps, checks_loss=deepspeed
    )
    notice = watch_notice() if context.ray else None
    preemption = PreemptionCallback(should_stop, notice, run.plan.num_steps, context)
    logged, log_every = load_method(job.method.name).logged, job.train.log_every_steps
    watches_loss = job.method.name != "grpo"
    metrics = MetricsCallback(run, logged, timer, usage, norms, nonfinite, preemption, log_every, watches_loss)
    if job.evaluate.asynchronous:
        resources = (job.cluster.cpus_per_worker, job.cluster.gpus_per_worker)
        validator: Validator = AsyncValidator(spec, resources, run)
    else:
        validator = SyncValidator(build_validation(job, spec, inputs.builder, context), run)
    patience = job.train.early_stopping_patience
    validation = ValidationCallback(run, validator, metric, patience, timer, inputs.clock.tick)
    energy = None
    if job.track.energy and job.track.country:
        energy = EnergyCallback(run, Meter(job.track.country, context.device))
    checkpoints = CheckpointCallback(run, job.checkpoint, metric, about, inputs.batches, timer)
    return RunCallbacks(norms, nonfinite, preemption, metrics, validation, energy, checkpoints)
