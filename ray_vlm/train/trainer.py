"""Build a worker's trainer: the base with its adapter, TRL's trainer for the method, the stream and the validation.
Used by the workers and by the actor for asynchronous validation.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.plan import plan_sample
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.data.stream import Stream
from ray_vlm.machine import count_threads
from ray_vlm.methods import METHODS
from ray_vlm.models.frozen_encoder import StepFeatureCache
from ray_vlm.models.libraries import import_training_libraries, keep_imports, quiet_libraries
from ray_vlm.models.prefix_sharing import plan_packing
from ray_vlm.models.surgery import ForwardOptions, change_forward, prepare_forward
from ray_vlm.train.attempt import Attempt
from ray_vlm.train.context import DistributedContext
from ray_vlm.train.worker_spec import WorkerSpec


def build_context(job: JobConfig, in_ray: bool) -> DistributedContext:
    """Return the rank and the device of this process."""
    if not in_ray:
        return DistributedContext(0, 1, "cuda:0" if job.cluster.gpus_per_worker else "cpu", ray=False)
    import ray.train.torch
    import torch

    worker = ray.train.get_context()
    device = str(ray.train.torch.get_device())
    if device != "cpu":
        torch.cuda.set_device(device)  # NCCL sends objects through the current GPU
    return DistributedContext(worker.get_world_rank(), worker.get_world_size(), device, ray=True)


def prepare_process(job: JobConfig, in_ray: bool) -> None:
    """Import the libraries without their messages, and set threads and seeds."""
    quiet_libraries()
    import_training_libraries()
    if in_ray:
        keep_imports()
    import torch
    import transformers

    torch.set_num_threads(count_threads(job.cluster.cpus_per_worker))
    transformers.set_seed(job.seed)


def build_args(job: JobConfig, task: WorkerSpec, attempt: Attempt) -> Any:
    """Return TRL's options for the method. Build them before loading the base: ZeRO-3 partitions it by them."""
    from ray_vlm.train.planned_trainer import shared_options

    has_eval = task.eval is not None
    args = METHODS[job.method.name].build_args(job, shared_options(job, task.plan, has_eval))
    args.eval_on_start = has_eval and job.evaluate.at_start and attempt.step == 0
    args._n_gpu = min(args.n_gpu, 1)  # the Trainer would use every visible GPU and scale the loss
    return args


def build_trainer(
    job: JobConfig,
    task: WorkerSpec,
    args: Any,
    model: Any,
    builder: SampleBuilder,
    context: DistributedContext,
    first: int,
    stream: Stream,
) -> Any:
    """Build TRL's trainer for the method. `args`: of `build_args`; `first`: the first micro-batch of `stream`."""
    import datasets

    from ray_vlm.train.planned_trainer import PlannedBatches, feed_trainer

    method = METHODS[job.method.name]
    example = datasets.Dataset.from_list([method.EXAMPLE_ROW])
    has_eval = task.eval is not None
    changes = _plan_forward(job, builder, model)
    prepare_forward(model, changes)
    options = {"processing_class": builder.processor, "eval_dataset": example if has_eval else None}
    trainer = feed_trainer(method.trainer_class(job))(
        model=model, args=args, train_dataset=example, **options, **method.extras(job)
    )
    trainer.recent = StepFeatureCache()
    trainer.operations = change_forward(trainer.model, changes, trainer.recent)
    trainer.skips_nonfinite = job.train.nonfinite != "stop"
    trainer.rates = (builder.family, job.train.learning_rates or {})
    trainer.remove_callback(_printer())
    trainer.builder, trainer.fetch_records = builder, lambda: fetch_records(task.train)

    def build(rows: list[Sample]) -> Any:
        return method.collate(rows, builder, context.device)

    steps = args.gradient_accumulation_steps
    trainer.planned_batches = PlannedBatches(stream, task.plan, build, steps, first, trainer.clock, context.rank)
    if has_eval:
        trainer.validate = _validation(job, task, builder, context)
    return trainer


def _plan_forward(job: JobConfig, builder: SampleBuilder, model: Any) -> ForwardOptions:
    """Return what the job wants of its model's forward."""
    train, dropout = job.train, job.lora.dropout if job.lora is not None else 0.0
    return ForwardOptions(
        recompute=train.gradient_checkpointing,
        packing=plan_packing(job.method, dropout, train.packing, builder.family, model.config),
        own_processor=builder.stock is not None,
        vision_cache=Path(train.vision_cache).expanduser() if train.vision_cache is not None else None,
        vision_cache_bytes=train.vision_cache_gib * 2**30,
        cache_step_features=job.method.name != "sft" and job.cluster.zero_stage < 3,
    )


def _printer() -> type:
    from transformers import PrinterCallback

    return PrinterCallback


def _validation(job: JobConfig, task: WorkerSpec, builder: SampleBuilder, context: DistributedContext) -> Any:
    """Return the method's validation of this rank's share of the eval rows."""
    from ray_vlm.evaluate.validate import VALIDATE

    records = fetch_records(task.eval)
    chosen = [records[i] for i in plan_sample(len(records), job.evaluate.num_samples)]
    shard = chosen[context.rank :: context.world_size]

    def run(trainer: Any) -> dict[str, float]:
        return VALIDATE[job.method.name](trainer, shard, builder, job, context.device, context.world_size)

    return run


_FETCHED: dict[Any, tuple] = {}  # by Ray reference, because reading them takes about as long as a step


def fetch_records(records: Any) -> tuple:
    """Return the records behind a Ray reference, or `records` if it is a tuple already."""
    if isinstance(records, tuple):
        return records
    if records not in _FETCHED:
        import ray

        _FETCHED[records] = ray.get(records)
    return _FETCHED[records]


def row_names(trainer: Any) -> Callable[[int], str]:
    """Return a function that gives the id of a training row by its position."""
    records = trainer.fetch_records()
    return lambda row: str(records[row].id)
