"""What happens on a device, top to bottom: load the base, attach the adapter, stream batches, train, validate, save.

`train_worker` runs in every Ray Train worker, and unchanged in the calling process for `cluster.num_workers: 0`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_vlm.config.load import load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.plan import Plan, plan_sample
from ray_vlm.data.rows import Preparer, RowSpec, describe_preprocessing, load_preparer
from ray_vlm.data.stream import Feed, stream_local, stream_ray
from ray_vlm.methods import METHODS
from ray_vlm.models.families import Family
from ray_vlm.models.lora import count_trainable, lora_config
from ray_vlm.models.quiet import quiet_libraries
from ray_vlm.runs.console import Console
from ray_vlm.runs.monitor import Monitor
from ray_vlm.runs.paths import RunPaths, write_folder, write_json


@dataclass(frozen=True)
class WorkerTask:
    """All that a worker needs. `train` and `eval` are tuples of records, or Ray references to them."""

    job: dict[str, Any]
    run_dir: str
    spec: RowSpec
    plan: Plan
    train: Any
    eval: Any
    num_loaders: int = 1
    cpus_per_loader: float = 1.0
    attempt: int = 1


@dataclass(frozen=True)
class Place:
    """Where this process stands. `ray`: inside a Ray Train worker."""

    rank: int
    world_size: int
    device: str
    ray: bool


def train_worker(task: WorkerTask, in_ray: bool = False) -> dict[str, Any]:
    """Train one rank to the end. Returns what the driver writes into `run.json`: steps and the best checkpoint."""
    job, paths = load_resolved(task.job), RunPaths(Path(task.run_dir))
    place = _prepare_process(job, in_ray)
    preparer = load_preparer(task.spec)
    model = _load(job, preparer.family, place)
    trainer = _build_trainer(job, task, model, preparer, place)
    monitor = _build_monitor(job, paths, task, place)
    callback = _build_callback(job, paths, monitor, trainer, task, place)
    trainer.add_callback(callback)
    try:
        if monitor is not None:
            monitor.start(count_trainable(trainer.model, preparer.family))
        trainer.train()
        if place.rank == 0:
            write_folder(paths.final, callback.save)
    finally:
        trainer.planned_batches.close()
        if monitor is not None:
            monitor.close()
    result = {"steps": trainer.state.global_step, "best": callback.progress.best}
    if place.ray and place.rank == 0:
        paths.write_result(result)
    return result


def _prepare_process(job: JobConfig, in_ray: bool) -> Place:
    """Threads, seeds and quiet libraries; where we are. Nothing here or later calls home unless the job asks."""
    quiet_libraries()
    import torch
    import transformers

    torch.set_num_threads(max(1, int(job.cluster.cpus_per_worker)))
    transformers.set_seed(job.seed)
    if not in_ray:
        return Place(0, 1, "cuda:0" if job.cluster.gpus_per_worker else "cpu", ray=False)
    import ray.train.torch

    context = ray.train.get_context()
    device = str(ray.train.torch.get_device())
    return Place(context.get_world_rank(), context.get_world_size(), device, ray=True)


def _load(job: JobConfig, family: Family, place: Place) -> Any:
    """The base with what will be trained on top: a new adapter, a given one, or all weights."""
    from peft import get_peft_model

    from ray_vlm.models.load import load_adapter, load_model

    model = load_model(job.model, job.train.bf16, place.device)
    if job.lora is None:
        return model
    if job.model.adapter is not None:
        return load_adapter(model, job.model.adapter, job.model, trainable=True)
    import torch

    torch.manual_seed(job.seed)  # every rank and every restart starts from the same adapter
    return get_peft_model(model, lora_config(job.lora, family))


def _build_trainer(job: JobConfig, task: WorkerTask, model: Any, preparer: Preparer, place: Place) -> Any:
    """TRL's trainer for the method, fed by our stream."""
    import datasets

    from ray_vlm.train.feed import PlannedBatches, feed_trainer, shared_options

    method = METHODS[job.method.name]
    example = datasets.Dataset.from_list([method.EXAMPLE_ROW])
    has_eval = task.eval is not None
    args = method.build_args(job, shared_options(job, task.plan, task.run_dir, has_eval))
    args._n_gpu = min(
        args.n_gpu, 1
    )  # with more than one card in sight the Trainer would use them all, and scale the loss
    trainer = feed_trainer(method.trainer_class())(
        model=model,
        args=args,
        processing_class=preparer.processor,
        train_dataset=example,
        eval_dataset=example if has_eval else None,
        data_collator=list,
    )
    trainer.remove_callback(_printer())
    plan = task.plan
    feed = Feed(task.train, task.spec, plan, place.rank, 0, plan.num_steps * plan.accumulation)
    stream = stream_ray(feed, task.num_loaders, task.cpus_per_loader) if place.ray else stream_local(feed)
    trainer.planned_batches = PlannedBatches(stream, plan, preparer, place.device)
    if has_eval:
        trainer.validate = _validation(job, task, preparer, place)
    return trainer


def _printer() -> type:
    from transformers import PrinterCallback

    return PrinterCallback


def _validation(job: JobConfig, task: WorkerTask, preparer: Preparer, place: Place) -> Any:
    """The function that measures the eval rows: loss always, task metrics where the job's metric needs generating."""
    from ray_vlm.evaluate.validate import validate

    records = _fetch(task.eval)
    chosen = [records[i] for i in plan_sample(len(records), job.evaluate.num_samples)]
    mine = chosen[place.rank :: place.world_size]
    generate = job.evaluate.metric != "loss"

    def run(trainer: Any) -> dict[str, float]:
        return validate(trainer.model, mine, preparer, job.evaluate, place.device, place.world_size, generate)

    return run


def _fetch(records: Any) -> tuple:
    """The records behind a Ray reference, or the records themselves."""
    if isinstance(records, tuple):
        return records
    import ray

    return ray.get(records)


def _build_callback(job: JobConfig, paths: RunPaths, monitor: Any, trainer: Any, task: WorkerTask, place: Place) -> Any:
    from ray_vlm.train.report import RunCallback

    preprocessing = describe_preprocessing(load_preparer(task.spec))

    def save(folder: Path) -> None:
        trainer.model.save_pretrained(folder)
        if job.lora is None:
            trainer.processing_class.save_pretrained(folder)
        describe(folder)

    def describe(folder: Path) -> None:
        write_json(folder / "preprocessing.json", preprocessing)

    def tell(metrics: dict[str, Any]) -> None:
        if place.ray:
            import ray.train

            ray.train.report({k: v if isinstance(v, int) else float(v) for k, v in metrics.items()})

    return RunCallback(job, paths, monitor, save, describe, tell)


def _build_monitor(job: JobConfig, paths: RunPaths, task: WorkerTask, place: Place) -> Monitor | None:
    """Rank 0's monitor. In this process it prints as well; under Ray the driver follows the file and prints."""
    if place.rank != 0:
        return None
    wandb = None
    if job.track.wandb:
        names = {"project": job.track.wandb_project, "name": paths.root.name, "dir": str(paths.root)}
        wandb = names | {"config": task.job}
    show = None if place.ray else Console(task.plan.num_steps, job.train.log_every_steps).show
    return Monitor(paths.metrics, task.attempt, wandb, show)
