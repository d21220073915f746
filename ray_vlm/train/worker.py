"""Training in one worker: load the base, attach the adapter, stream batches, train, validate, save.

`train_worker` runs in every Ray Train worker, and in the calling process for `cluster.num_workers: 0`.
"""

import itertools
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray_vlm.config.load import dump_job, load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.preprocessing import PREPROCESSING, asking_of, describe_preprocessing
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.stream import Stream
from ray_vlm.methods import METHODS
from ray_vlm.models.libraries import quiet_libraries
from ray_vlm.models.load import load_adapted
from ray_vlm.models.lora import count_trainable
from ray_vlm.models.precision import describe_emulation
from ray_vlm.runs.console import Console
from ray_vlm.runs.monitor import Monitor, read_metrics
from ray_vlm.runs.paths import RunPaths, open_run, write_json
from ray_vlm.runs.progress import send_progress
from ray_vlm.runs.trackers import KeptFiles, build_trackers
from ray_vlm.runs.training_log import TrainingLog
from ray_vlm.train.attempt import Attempt, begin_attempt, check_owner
from ray_vlm.train.clock import name_device, watch_usage
from ray_vlm.train.context import DistributedContext
from ray_vlm.train.deepspeed import gather_weights
from ray_vlm.train.energy import Meter, energy_writer
from ray_vlm.train.notice import watch_notice
from ray_vlm.train.oom_check import run_probe
from ray_vlm.train.planned_trainer import open_stream
from ray_vlm.train.progress_lines import progress_writer
from ray_vlm.train.stop import agree, watch
from ray_vlm.train.trainer import build_args, build_context, build_trainer, prepare_process, row_names
from ray_vlm.train.watchdog import watch_worker
from ray_vlm.train.worker_spec import WorkerSpec


def train_worker(task: WorkerSpec, in_ray: bool = False, stop: Callable[[], bool] | None = None) -> dict[str, Any]:
    """Train one rank to the end, from the newest complete checkpoint of the run if there is one.

    `stop` returns after every step whether to write a checkpoint and stop. Return the `result` of `run.json`: steps,
    the best checkpoint, and whether the run was stopped.
    """
    job, paths = load_resolved(task.job), open_run(task.run)
    try:
        quiet_libraries()
        context = build_context(job, in_ray)
        if isinstance(job.cluster.num_workers, list):
            job, task = settle_workers(job, task, context.world_size)
        attempt = begin_attempt(paths.store, context, task.attempt, task.driver)
        stream = open_stream(job, task, context, attempt.step * task.plan.accumulation)
        with closing(stream), send_progress(progress_writer(paths, context, attempt)):
            prepare_process(job, in_ray)
            result = _train(job, paths, task, context, attempt, stream, stop or watch(paths.store))
        if context.ray and context.rank == 0:
            paths.write_result(result)
        return result
    finally:
        paths.discard()


def settle_workers(job: JobConfig, task: WorkerSpec, world_size: int) -> tuple[JobConfig, WorkerSpec]:
    """Return the job and its task for the current number of workers; each step keeps its rows."""
    cluster = job.cluster.model_copy(update={"num_workers": world_size})
    job, plan = job.model_copy(update={"cluster": cluster}), task.plan
    micro = plan.global_batch_size // world_size if job.method.name == "grpo" else plan.micro_batch_size
    return job, replace(task, job=dump_job(job), plan=replace(plan, world_size=world_size, micro_batch_size=micro))


def _train(
    job: JobConfig,
    paths: RunPaths,
    task: WorkerSpec,
    context: DistributedContext,
    attempt: Attempt,
    stream: Stream,
    stop: Callable[[], bool],
) -> dict[str, Any]:
    from ray_vlm.train.checkpoint import base_fingerprint, check_fits, describe_run
    from ray_vlm.train.reference import find_reference
    from ray_vlm.train.report import publish_weights

    builder = load_sample_builder(task.spec)
    args = build_args(job, task, attempt)
    model = load_adapted(job.model, job.lora, job.train, builder.family, context.device, job.seed, job.tune.resident)
    about = describe_run(context.broadcast(base_fingerprint(model)), task.rows, job, builder)
    check_fits(attempt, about, task.plan.num_steps, context.world_size)
    trainer = build_trainer(job, task, args, model, builder, context, attempt.step * task.plan.accumulation, stream)
    monitor = _build_monitor(job, paths, task, context, attempt)
    callback = _build_callback(job, paths, monitor, trainer, task, context, attempt)
    callback.stop_asked, callback.tick = stop, trainer.clock.tick
    if context.ray:
        callback.notice = watch_notice()
    meter = Meter(job.track.country, context.device) if job.track.energy and job.track.country else None
    write_energy = energy_writer(meter, monitor, context, trainer)
    _connect(job, trainer, callback, context, attempt, about, write_energy)
    try:
        if job.method.precompute_ref_log_probs:
            trainer.reference = find_reference(job, task, trainer, context, about["base"], monitor)
        if monitor is not None:
            if (emulated := describe_emulation(job.train.precision, context.device)) is not None:
                monitor.note(attempt.step, emulated)
            for text in attempt.notes:
                monitor.note(attempt.step, text)
            counts = count_trainable(trainer.model, builder.family)
            about = {"num_steps": task.plan.num_steps, "num_workers": context.world_size}
            monitor.start(attempt.step, counts, device=name_device(context.device), **about)
        if task.probe is not None:
            took = run_probe(trainer, job, task.probe, context)
            if monitor is not None:
                monitor.note(attempt.step, took)
        callback.recall(attempt.step if attempt.checkpoint else -1, context)
        if attempt.step < task.plan.num_steps:
            with watch_worker(job, paths.store, context, attempt, trainer, task.plan, row_names(trainer)):
                trainer.train(resume_from_checkpoint=str(attempt.folder) if attempt.folder else None)
        else:  # an earlier attempt died between its last checkpoint and `final/`
            trainer._load_from_checkpoint(str(attempt.folder))
        if not callback.stopped:
            callback.settle(trainer.control)
        if not callback.stopped:
            callback.gather()
        if context.rank == 0 and not callback.stopped:
            check_owner(paths.store, attempt)
            publish_weights(paths, paths.final, callback.save, max(attempt.step, trainer.state.global_step))
        write_energy()
    finally:
        _close(paths, attempt, trainer, monitor, meter)
    steps = max(attempt.step, trainer.state.global_step)
    return {"steps": steps, "num_steps": task.plan.num_steps, **_summarise(callback, trainer)}


def _summarise(callback: Any, trainer: Any) -> dict[str, Any]:
    """Return the result of the run except its steps."""
    summary = {"best": callback.progress.best, "stopped": callback.stopped, "leaving": callback.leaving}
    if lost := callback.count_lost():
        records = trainer.fetch_records()
        summary["lost_rows"] = [(str(records[gone].id), str(records[other].id)) for gone, other in lost]
    return summary


def _connect(
    job: JobConfig,
    trainer: Any,
    callback: Any,
    context: DistributedContext,
    attempt: Attempt,
    about: dict[str, Any],
    write_energy: Callable[[], None],
) -> None:
    """Connect the callback and the checkpoint writer to the trainer."""
    from ray_vlm.train.checkpoint import CheckpointWriter

    store = callback.paths.store
    writer = CheckpointWriter(store, context, attempt, (job.checkpoint.keep, job.checkpoint.keep_best), about)

    earlier = list(callback.progress.lost)

    def count_lost() -> list[Sequence[int]]:
        callback.progress.lost = [*earlier, *itertools.chain(*context.all_gather(trainer.planned_batches.lost))]
        return callback.progress.lost

    def write_checkpoint() -> None:
        started = time.monotonic()
        callback.gather()
        callback.count_lost()
        writer.write(trainer, callback.save, *callback.reached())
        callback.checkpoint_s = time.monotonic() - started
        write_energy()

    callback.agree = lambda *flags: agree(flags, context.world_size, context.device)
    callback.check_owner = lambda: check_owner(store, attempt)
    callback.count_lost = count_lost
    trainer.write_checkpoint = write_checkpoint
    if job.evaluate.asynchronous:
        trainer.validate = callback.hand_over
    trainer.add_callback(callback)


def _close(paths: RunPaths, attempt: Attempt, trainer: Any, monitor: Monitor | None, meter: Meter | None) -> None:
    try:
        trainer.planned_batches.close()
        if meter is not None:
            meter.close()
    finally:
        if monitor is not None:
            monitor.close()
        if paths.remote is not None and attempt.folder is not None:
            shutil.rmtree(attempt.folder, ignore_errors=True)


def _build_callback(
    job: JobConfig,
    paths: RunPaths,
    monitor: Any,
    trainer: Any,
    task: WorkerSpec,
    context: DistributedContext,
    attempt: Attempt,
) -> Any:
    from ray_vlm.evaluate.draw import draw_predictions
    from ray_vlm.runs.monitor import as_python_numbers
    from ray_vlm.train.async_validator import AsyncValidator
    from ray_vlm.train.gradients import watch_gradients
    from ray_vlm.train.loss_scale import watch_overflow
    from ray_vlm.train.nonfinite import read_bad_steps, watch_steps
    from ray_vlm.train.report import Progress, RunCallback

    preprocessing = describe_preprocessing(load_sample_builder(task.spec), asking_of(job))

    gathered: dict[str, Any] = {}  # under ZeRO-3: the complete weights that `gather` collects for `save`

    def gather() -> None:
        if job.cluster.zero_stage == 3:
            gathered["state_dict"] = gather_weights(trainer.model, job.lora is not None, context.rank)

    def save(folder: Path) -> None:
        only = (
            {} if job.lora is None else {"selected_adapters": ["default"]}
        )  # TRL may have another adapter for the reference
        only |= gathered
        trainer.model.save_pretrained(folder, **only)
        if job.lora is None:
            trainer.processing_class.save_pretrained(folder)
        write_json(folder / PREPROCESSING, preprocessing)

    def tell(metrics: dict[str, Any]) -> None:
        if context.ray:
            import ray.train

            ray.train.report(as_python_numbers(metrics))

    callback = RunCallback(job, paths, task.plan, monitor, save, tell)
    callback.gather = gather
    listed = context.broadcast(read_bad_steps(paths) if context.rank == 0 else None)
    callback.check_finite = watch_steps(
        job, paths, task.plan, monitor, row_names(trainer), (attempt.step, listed), watch_overflow(trainer, context)
    )
    callback.logged = METHODS[job.method.name].logged
    callback.gradients = watch_gradients(job, load_sample_builder(task.spec).family, trainer.model, context)
    callback.samples = lambda: draw_predictions(getattr(trainer, "shown", ()))
    callback.usage = watch_usage(trainer.planned_batches, trainer.operations, context)
    if job.evaluate.asynchronous:
        callback.background = AsyncValidator(task, job, paths, context)
    if attempt.checkpoint is not None:
        callback.progress = Progress(**attempt.checkpoint.about["progress"])
    return callback


def _build_monitor(
    job: JobConfig,
    paths: RunPaths,
    task: WorkerSpec,
    context: DistributedContext,
    attempt: Attempt,
) -> Monitor | None:
    """Return rank 0's monitor, None on other ranks. Without Ray it also prints; under Ray the driver does."""
    if context.rank != 0:
        return None
    track = job.track
    wandb: dict[str, Any] = {}
    if track.wandb:
        wandb = {"project": track.wandb_project, "entity": track.wandb_entity}
        wandb |= {"group": track.wandb_group, "tags": list(track.wandb_tags) or None}
    trackers = build_trackers(paths, task.job, attempt.step, wandb, track.tensorboard)
    show = None if context.ray else Console(task.plan.num_steps, job.train.log_every_steps).show
    paths.refresh(paths.metrics)  # an object store cannot append: the whole file is written again
    log = TrainingLog(paths, task.job, read_metrics(paths.metrics), lambda: check_owner(paths.store, attempt))
    files = KeptFiles(paths)

    def publish() -> None:
        paths.publish(paths.metrics)
        files.publish(everything=monitor.closed)

    monitor = Monitor(paths.metrics, attempt.number, trackers, show, publish, log.add)
    for tracker in trackers:
        for text in tracker.notes:
            monitor.note(attempt.step, text)
    return monitor
