"""The callbacks of a run: how they are built from the job, and in which order they act."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.preprocessing import asking_of, describe_preprocessing
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.distributed import DistributedContext
from ray_vlm.methods import load_method
from ray_vlm.methods.trainer import TrainerInputs
from ray_vlm.runs.monitor import Monitor
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.attempt import Attempt
from ray_vlm.train.build import build_validation, fetch_records
from ray_vlm.train.callbacks.checkpointing import CheckpointCallback, Progress, WeightsWriter
from ray_vlm.train.callbacks.energy import EnergyCallback, Meter
from ray_vlm.train.callbacks.gradient_norms import GradientNorms
from ray_vlm.train.callbacks.metrics import MetricsCallback, StepTimer, Usage
from ray_vlm.train.callbacks.nonfinite import NonfiniteCallback, read_bad_steps
from ray_vlm.train.callbacks.preemption import PreemptionCallback, watch_notice
from ray_vlm.train.callbacks.validation import ValidationCallback
from ray_vlm.train.validators import AsyncValidator, SyncValidator, Validator
from ray_vlm.train.worker_spec import WorkerSpec


@dataclass(frozen=True)
class RunCallbacks:
    """The callbacks of a run, in the order in which they act at every event. `energy`: None unless it is measured."""

    norms: GradientNorms
    nonfinite: NonfiniteCallback
    preemption: PreemptionCallback
    metrics: MetricsCallback
    validation: ValidationCallback
    energy: EnergyCallback | None
    checkpoints: CheckpointCallback

    def in_order(self) -> Sequence[TrainerCallback]:
        """Return them for the trainer: what is measured comes before what is written of it."""
        every = (self.norms, self.nonfinite, self.preemption, self.metrics, self.validation, self.energy)
        return [callback for callback in (*every, self.checkpoints) if callback is not None]


@dataclass(frozen=True)
class RunRecorder:
    """What the callbacks write to: the run's folder, the lines of its metrics (on rank 0), and weights.

    `progress`: what a checkpoint stores of the run; `about`: of `describe_run`.
    """

    paths: RunPaths
    monitor: Monitor | None
    weights: WeightsWriter
    progress: Progress
    about: Mapping[str, Any]


def build_recorder(
    job: JobConfig,
    paths: RunPaths,
    monitor: Monitor | None,
    model: PreTrainedModel,
    builder: SampleBuilder,
    attempt: Attempt,
    about: Mapping[str, Any],
    rank: int,
) -> RunRecorder:
    """Return what the callbacks of this rank write to."""
    preprocessing = describe_preprocessing(builder, asking_of(job))
    partitioned = job.cluster.zero_stage == 3
    weights = WeightsWriter(model, builder.processor, job.lora is not None, partitioned, rank, preprocessing)
    return RunRecorder(paths, monitor, weights, Progress.load(attempt), about)


def build_callbacks(  # recipe
    job: JobConfig,
    spec: WorkerSpec,
    context: DistributedContext,
    attempt: Attempt,
    inputs: TrainerInputs,
    model: PreTrainedModel,
    recorder: RunRecorder,
    should_stop: Callable[[], bool],
    closes: ExitStack,
) -> RunCallbacks:
    """Build the callbacks of a run. What has to be closed goes onto `closes`."""
    plan, paths, monitor, weights = spec.plan, recorder.paths, recorder.monitor, recorder.weights
    family, metric, deepspeed = inputs.builder.family, job.evaluate.metric, job.cluster.deepspeed is not None
    timer, usage = StepTimer(), Usage(inputs.batches, inputs.clock, inputs.operations, context)
    norms = GradientNorms(model, family, context, always_images=job.task.name != "chat", deepspeed=deepspeed)
    nonfinite = NonfiniteCallback(
        job.train.nonfinite,
        norms,
        inputs.loss_scale,
        context,
        paths,
        plan,
        monitor,
        row_id=lambda row: str(fetch_records(spec.train)[row].id),
        resumed_at=attempt.step,
        bad_steps=context.broadcast(read_bad_steps(paths) if context.rank == 0 else []),
        checks_loss=deepspeed,
    )
    preemption = PreemptionCallback(should_stop, watch_notice() if context.ray else None, plan.num_steps, context)
    metrics = MetricsCallback(
        load_method(job.method.name).logged,
        plan,
        recorder.progress,
        monitor,
        timer,
        usage,
        norms,
        nonfinite,
        preemption,
        job.train.log_every_steps,
        watches_loss=job.method.name != "grpo",
    )
    validation = ValidationCallback(
        _build_validator(job, spec, inputs.builder, context, recorder),
        metric,
        job.train.early_stopping_patience,
        plan.steps_per_epoch,
        attempt,
        paths,
        weights,
        recorder.progress,
        monitor,
        timer,
        context,
        inputs.clock.tick,
    )
    energy = None
    if job.track.energy and job.track.country:
        energy = EnergyCallback(Meter(job.track.country, context.device), monitor, context)
        closes.callback(energy.close)
    checkpoints = CheckpointCallback(
        paths.store,
        job.checkpoint,
        metric,
        attempt,
        recorder.about,
        weights,
        recorder.progress,
        inputs.batches,
        monitor,
        context,
    )
    return RunCallbacks(norms, nonfinite, preemption, metrics, validation, energy, checkpoints)


def _build_validator(
    job: JobConfig, spec: WorkerSpec, builder: SampleBuilder, context: DistributedContext, recorder: RunRecorder
) -> Validator:
    if job.evaluate.asynchronous:
        resources = (job.cluster.cpus_per_worker, job.cluster.gpus_per_worker)
        return AsyncValidator(spec, resources, recorder.paths, recorder.weights, context)
    validation = build_validation(job, spec, builder, context)
    return SyncValidator(validation, recorder.weights, recorder.paths.store, context)
