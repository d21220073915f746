"""What happens on a device, top to bottom: load the base, attach the adapter, stream batches, train, validate, save.

`train_worker` runs in every Ray Train worker, and unchanged in the calling process for `cluster.num_workers: 0`.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_vlm.cluster.environment import Environment
from ray_vlm.config.load import load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.plan import Plan, plan_sample
from ray_vlm.data.preprocessing import describe_preprocessing
from ray_vlm.data.rows import Preparer, load_preparer
from ray_vlm.data.spec import Row, RowSpec
from ray_vlm.data.stream import Feed, stream_local, stream_ray
from ray_vlm.methods import METHODS
from ray_vlm.methods.forward import share_prefixes
from ray_vlm.models.families import Family
from ray_vlm.models.lora import count_trainable, lora_config, train_parts
from ray_vlm.models.quiet import quiet_libraries
from ray_vlm.runs.console import Console
from ray_vlm.runs.monitor import Monitor
from ray_vlm.runs.paths import RunPaths, open_run, write_json
from ray_vlm.runs.track import TensorBoardTracker, WandbTracker
from ray_vlm.train.attempt import Attempt, Place, begin_attempt, check_owner
from ray_vlm.train.clock import name_device, watch_usage
from ray_vlm.train.stop import agree, watch


@dataclass(frozen=True)
class WorkerTask:
    """All that a worker needs. `train` and `eval` are tuples of records, or Ray references to them.

    `run`: where the run is kept. `attempt`: its number, as the driver counts. `rows`: fingerprint of `train`.
    """

    job: dict[str, Any]
    run: str
    spec: RowSpec
    plan: Plan
    train: Any
    eval: Any
    num_loaders: int = 1
    cpus_per_loader: float = 1.0
    attempt: int = 1
    rows: str = ""
    environment: Environment = field(default_factory=Environment)


def train_worker(task: WorkerTask, in_ray: bool = False, stop: Callable[[], bool] | None = None) -> dict[str, Any]:
    """Train one rank to the end, from the newest whole checkpoint of the run if there is one.

    `stop` is asked after every step whether to write a checkpoint and leave. Returns what the driver writes into
    `run.json`: steps, the best checkpoint, and whether it was stopped.
    """
    job, paths = load_resolved(task.job), open_run(task.run)
    try:
        place = _prepare_process(job, in_ray)
        attempt = begin_attempt(paths.store, place, task.attempt)
        result = _train(job, paths, task, place, attempt, stop or watch(paths.store))
        if place.ray and place.rank == 0:
            paths.write_result(result)
        return result
    finally:
        paths.discard()


def _train(
    job: JobConfig, paths: RunPaths, task: WorkerTask, place: Place, attempt: Attempt, stop: Callable[[], bool]
) -> dict[str, Any]:
    from ray_vlm.train.checkpoint import CheckpointWriter, base_fingerprint, check_fits
    from ray_vlm.train.reference import find_reference
    from ray_vlm.train.report import publish_weights

    preparer = load_preparer(task.spec)
    model = _load(job, preparer.family, place)
    about = {"base": base_fingerprint(model), "rows": task.rows, "model": job.model.name}
    check_fits(attempt, about, task.plan.num_steps)
    trainer = _build_trainer(job, task, model, preparer, place, attempt)
    monitor = _build_monitor(job, paths, task, place, attempt)
    callback = _build_callback(job, paths, monitor, trainer, task, place, attempt)
    callback.stop_wanted = lambda: agree(stop(), place.world_size, place.device)
    trainer.add_callback(callback)
    keep = (job.checkpoint.keep, job.checkpoint.keep_best)
    writer = CheckpointWriter(paths.store, place, attempt, keep, about)

    def write_checkpoint() -> None:
        started = time.monotonic()
        writer.write(trainer, callback.save, *callback.reached())
        callback.checkpoint_s = time.monotonic() - started

    trainer.write_checkpoint = write_checkpoint
    try:
        if job.method.precompute_ref_log_probs:
            trainer.reference = find_reference(job, task, trainer, place, about["base"], monitor)
        if monitor is not None:
            for text in attempt.notes:
                monitor.note(attempt.step, text)
            monitor.start(attempt.step, count_trainable(trainer.model, preparer.family), name_device(place.device))
        if attempt.step < task.plan.num_steps:
            trainer.train(resume_from_checkpoint=str(attempt.folder) if attempt.folder else None)
        else:  # it died between its last checkpoint and `final/`
            trainer._load_from_checkpoint(str(attempt.folder))
        if place.rank == 0 and not callback.stopped:
            check_owner(paths.store, attempt)
            publish_weights(paths, paths.final, callback.save, max(attempt.step, trainer.state.global_step))
    finally:
        try:
            trainer.planned_batches.close()
        finally:
            if monitor is not None:
                monitor.close()
            if paths.remote is not None and attempt.folder is not None:
                shutil.rmtree(attempt.folder, ignore_errors=True)
    steps = max(attempt.step, trainer.state.global_step)
    return {
        "steps": steps,
        "num_steps": task.plan.num_steps,
        "best": callback.progress.best,
        "stopped": callback.stopped,
    }


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
    if device != "cpu":
        torch.cuda.set_device(device)  # what ranks tell one another goes through the current card
    return Place(context.get_world_rank(), context.get_world_size(), device, ray=True)


def _load(job: JobConfig, family: Family, place: Place) -> Any:
    """The base with what will be trained on top: a new adapter, a given one, or all weights."""
    from peft import get_peft_model

    from ray_vlm.models.load import load_adapter, load_model

    model = load_model(job.model, job.train.bf16, place.device)
    if job.lora is None:
        return model
    if job.model.adapter is not None:
        return train_parts(load_adapter(model, job.model.adapter, job.model, trainable=True), job.lora, family)
    import torch

    torch.manual_seed(job.seed)  # every rank and every restart starts from the same adapter
    return get_peft_model(model, lora_config(job.lora, family))


def _build_trainer(
    job: JobConfig, task: WorkerTask, model: Any, preparer: Preparer, place: Place, attempt: Attempt
) -> Any:
    """TRL's trainer for the method, fed by our stream."""
    import datasets

    from ray_vlm.train.feed import PlannedBatches, feed_trainer, shared_options

    method = METHODS[job.method.name]
    example = datasets.Dataset.from_list([method.EXAMPLE_ROW])
    has_eval = task.eval is not None
    args = method.build_args(job, shared_options(job, task.plan, has_eval))
    args.eval_on_start = has_eval and job.evaluate.at_start and attempt.step == 0
    args._n_gpu = min(args.n_gpu, 1)  # the Trainer would use every card in sight, and scale the loss
    options = {"processing_class": preparer.processor, "eval_dataset": example if has_eval else None}
    trainer = feed_trainer(method.trainer_class(job))(
        model=model, args=args, train_dataset=example, **options, **method.extras(job)
    )
    if job.method.name != "sft" and job.method.share_prefixes and (job.lora is None or job.lora.dropout == 0):
        share_prefixes(trainer.model)
    trainer.remove_callback(_printer())
    trainer.preparer, trainer.fetch_records = preparer, lambda: _fetch(task.train)
    plan = task.plan
    first, last = attempt.step * plan.accumulation, plan.num_steps * plan.accumulation
    feed = Feed(task.train, task.spec, plan, place.rank, first, last)
    if place.ray:
        stream = stream_ray(feed, task.num_loaders, task.cpus_per_loader, task.environment)
    else:
        stream = stream_local(feed)

    def build(rows: list[Row]) -> Any:
        return method.collate(rows, preparer, place.device)

    steps = args.gradient_accumulation_steps
    trainer.planned_batches = PlannedBatches(stream, plan, build, steps, first, trainer.clock)
    if has_eval:
        trainer.validate = _validation(job, task, preparer, place)
    return trainer


def _printer() -> type:
    from transformers import PrinterCallback

    return PrinterCallback


def _validation(job: JobConfig, task: WorkerTask, preparer: Preparer, place: Place) -> Any:
    """The function that measures the eval rows, as the method and the job's metric need it."""
    from ray_vlm.evaluate.validate import VALIDATE

    records = _fetch(task.eval)
    chosen = [records[i] for i in plan_sample(len(records), job.evaluate.num_samples)]
    mine = chosen[place.rank :: place.world_size]

    def run(trainer: Any) -> dict[str, float]:
        return VALIDATE[job.method.name](trainer, mine, preparer, job, place.device, place.world_size)

    return run


_FETCHED: dict[Any, tuple] = {}  # by Ray reference: reading them again and again would take as long as a step


def _fetch(records: Any) -> tuple:
    """The records behind a Ray reference, or the records themselves."""
    if isinstance(records, tuple):
        return records
    if records not in _FETCHED:
        import ray

        _FETCHED[records] = ray.get(records)
    return _FETCHED[records]


def _build_callback(
    job: JobConfig, paths: RunPaths, monitor: Any, trainer: Any, task: WorkerTask, place: Place, attempt: Attempt
) -> Any:
    from ray_vlm.evaluate.drawn import draw_predictions
    from ray_vlm.train.gradients import watch_gradients
    from ray_vlm.train.report import Progress, RunCallback, plain

    preprocessing = describe_preprocessing(load_preparer(task.spec))

    def save(folder: Path) -> None:
        only = {} if job.lora is None else {"selected_adapters": ["default"]}  # TRL may keep one for reference
        trainer.model.save_pretrained(folder, **only)
        if job.lora is None:
            trainer.processing_class.save_pretrained(folder)
        write_json(folder / "preprocessing.json", preprocessing)

    def tell(metrics: dict[str, Any]) -> None:
        if place.ray:
            import ray.train

            ray.train.report(plain(metrics))

    callback = RunCallback(job, paths, task.plan, monitor, save, tell)
    callback.logged = METHODS[job.method.name].logged
    callback.gradients = watch_gradients(job, load_preparer(task.spec).family)
    callback.samples = lambda: draw_predictions(getattr(trainer, "shown", ()))
    callback.usage = watch_usage(trainer.planned_batches, place)
    callback.check_owner = lambda: check_owner(paths.store, attempt)
    if attempt.checkpoint is not None:
        callback.progress = Progress(**attempt.checkpoint.about["progress"])
    return callback


def _build_monitor(job: JobConfig, paths: RunPaths, task: WorkerTask, place: Place, attempt: Attempt) -> Monitor | None:
    """Rank 0's monitor. In this process it prints as well; under Ray the driver follows the file and prints."""
    if place.rank != 0:
        return None
    trackers: list[Any] = []
    if job.track.wandb:
        run = json.loads(paths.store.read("run.json") or b"{}")
        names = {"project": job.track.wandb_project, "name": paths.name, "dir": str(paths.root), "id": run["id"]}
        trackers.append(WandbTracker(names | {"config": task.job}))
    if job.track.tensorboard:
        trackers.append(TensorBoardTracker(paths.root / "tensorboard", attempt.step))
    show = None if place.ray else Console(task.plan.num_steps, job.train.log_every_steps).show
    paths.refresh(paths.metrics)  # an object store cannot append: what is there is written again, with more

    def publish() -> None:
        paths.publish(paths.metrics, *(paths.root / "tensorboard").glob("*"))

    return Monitor(paths.metrics, attempt.number, trackers, show, publish)
