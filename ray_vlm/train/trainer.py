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
from ray_vlm.methods.head import score_labelled
from ray_vlm.methods.prefix_sharing import plan_folding, share_prefixes
from ray_vlm.models import library_logging
from ray_vlm.models.backbone import ensure_backbone, recompute_first
from ray_vlm.models.families import Family
from ray_vlm.models.features import DiskFeatureCache, StepFeatureCache, keep_features, why_not_kept
from ray_vlm.models.frozen_encoder import run_frozen_tower_plainly
from ray_vlm.models.imports import import_training_libraries, keep_imports
from ray_vlm.models.lora import check_modules, freeze_parts, lora_config, train_parts
from ray_vlm.models.operations import OperationCounter
from ray_vlm.models.packing import PackingOptions
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
    library_logging.quiet_libraries()
    import_training_libraries()
    if in_ray:
        keep_imports()
    import torch
    import transformers

    torch.set_num_threads(count_threads(job.cluster.cpus_per_worker))
    transformers.set_seed(job.seed)


def load_adapted(job: JobConfig, family: Family, context: DistributedContext) -> Any:
    """Load the base with what is trained: a new adapter, the job's adapter, or all weights."""
    from peft import get_peft_model

    from ray_vlm.models.base_cache import load_resident
    from ray_vlm.models.load import load_adapter, load_model

    load = load_resident if job.tune.resident else load_model
    model = load(job.model, job.train.precision, context.device)
    if job.lora is None:
        return freeze_parts(model, job.train.freeze or (), family)
    if job.model.adapter is not None:
        return train_parts(load_adapter(model, job.model.adapter, job.model, trainable=True), job.lora, family)
    import torch

    check_modules(model, job.lora.modules_to_save or ())
    torch.manual_seed(job.seed)  # every rank and every restart starts from the same adapter
    return get_peft_model(model, lora_config(job.lora, family))


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
    ensure_backbone(model)
    if (layers := job.train.gradient_checkpointing) and layers is not True:
        recompute_first(model, layers)
    options = {"processing_class": builder.processor, "eval_dataset": example if has_eval else None}
    trainer = feed_trainer(method.trainer_class(job))(
        model=model, args=args, train_dataset=example, **options, **method.extras(job)
    )
    spare_work(trainer, job, builder, plan_folding(job, builder.family, model.config))
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


def spare_work(trainer: Any, job: JobConfig, builder: SampleBuilder, folding: PackingOptions) -> None:
    """Avoid unneeded work of the model: shared prefixes, padding, logits without a label, the backward pass of a frozen
    image encoder, and images that were encoded before."""
    trainer.operations = OperationCounter(trainer.model)
    if builder.stock is None:
        share_prefixes(trainer.model, folding, trainer.operations)
    if folding.share or folding.pack:
        score_labelled(trainer.model)
    run_frozen_tower_plainly(trainer.model)
    trainer.recent, cache = StepFeatureCache(), job.train.vision_cache
    if cache is not None:
        disk_cache = DiskFeatureCache(Path(cache).expanduser(), job.train.vision_cache_gib * 2**30, trainer.model)
        keep_features(trainer.model, trainer.recent, disk_cache)
    elif job.method.name != "sft" and job.cluster.zero_stage < 3 and not why_not_kept(trainer.model):
        keep_features(trainer.model, trainer.recent)  # under ZeRO-3 all workers must run the encoder together


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
