"""Training in one worker, from top to bottom: load, build, train, publish.

All ranks run the same lines; rank 0 also writes the run's files. `train/start.py` has begun the attempt and opened the
stream of batches before.
"""

import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.rows import Rows
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.stream import Stream
from ray_vlm.distributed import DistributedContext
from ray_vlm.methods import load_method
from ray_vlm.models.card_memory import release_memory
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train import build
from ray_vlm.train.attempt import Attempt, check_owner
from ray_vlm.train.callbacks.checkpointing import base_fingerprint, check_fits, describe_run
from ray_vlm.train.memory_plan import fit_to_card
from ray_vlm.train.oom_check import run_heaviest_batch
from ray_vlm.train.path_check import compare_with_plain
from ray_vlm.train.run_callbacks import RunCallbacks, build_callbacks, build_run_context
from ray_vlm.train.run_context import Progress, publish_weights
from ray_vlm.train.run_log import write_start
from ray_vlm.train.watchdog import watch_worker
from ray_vlm.train.worker_spec import WorkerSpec

logger = logging.getLogger(__name__)


def train_worker(  # recipe
    job: JobConfig,
    spec: WorkerSpec,
    paths: RunPaths,
    context: DistributedContext,
    attempt: Attempt,
    stream: Stream,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Train one rank to the end and return the `result` of `run.json`.

    `attempt`: with the checkpoint to resume from. `stream`: this rank's rows from there on. `should_stop` returns after
    every step whether to write a checkpoint and stop.
    """
    plan = spec.plan
    if spec.probe is not None:
        train = fit_to_card(job.train, job.cluster, spec.probe, context.device)
        job = job.model_copy(update={"train": train})

    with ExitStack() as closes:  # closed in the opposite order
        if paths.remote is not None and attempt.folder is not None:
            closes.callback(shutil.rmtree, attempt.folder, ignore_errors=True)

        # The model: the base with what is trained. A checkpoint must be of this base and of these rows.
        builder, has_eval = load_sample_builder(spec.sample_spec), spec.eval is not None
        args = build.build_args(job, spec, has_eval and job.evaluate.at_start and attempt.step == 0)
        model = build.load_base(job, builder, context)
        base = context.broadcast(base_fingerprint(model))
        formats = [source.format for source in (job.data.train, *job.data.mix) if source is not None]
        about = describe_run(base, spec.rows, job.model.name, job.cluster.deepspeed, formats, builder)
        check_fits(attempt, about, plan.num_steps, context.world_size)

        # What the run writes, and the batches and options that the trainer is built from.
        run = build_run_context(job, spec, paths, attempt, context, model, builder)
        if run.monitor is not None:
            closes.callback(run.monitor.close)
        inputs = build.build_inputs(job, spec, model, args, builder, context, stream, attempt.step * plan.accumulation)
        closes.callback(inputs.batches.close)
        if inputs.engine is not None:
            closes.callback(inputs.engine.close)

        # What happens beside the steps.
        callbacks = build_callbacks(job, spec, run, inputs, model, about, should_stop)
        closes.callback(callbacks.close)
        inputs = replace(
            inputs,
            callbacks=callbacks.in_order(),
            validate=callbacks.validation.run if has_eval else None,
            write_checkpoint=callbacks.checkpoints.write,
            reference=build.build_reference(job, base, spec.rows, context, spec.threads),
        )

        # TRL's trainer of the method. Before its first step, what could fail late is tried.
        trainer = load_method(job.method.name)(model, args, inputs)
        trainer.prepare_training()
        if run.monitor is not None:
            write_start(run.monitor, attempt, job.train.precision, model, builder.family, context, plan.num_steps)
        if spec.probe is not None:
            compared = compare_with_plain(trainer, spec.probe.rows, job.train.precision, context)
            if compared is not None:
                logger.info(compared)
            logger.info(run_heaviest_batch(trainer, spec.probe, job.train.precision, job.train.optimizer))
            release_memory()
        callbacks.validation.resume(attempt.checkpoint.step if attempt.checkpoint is not None else None)

        # The steps.
        if attempt.step < plan.num_steps:
            limit_s = 60 * job.cluster.stall_minutes
            with watch_worker(trainer, plan, paths.store, attempt, context, limit_s):
                trainer.train(resume_from_checkpoint=str(attempt.folder) if attempt.folder else None)
        else:  # an earlier attempt died between its last checkpoint and `final/`
            assert attempt.folder is not None
            trainer.load_weights(attempt.folder)

        # The end: the last validation, then `final/`. A run that was stopped has written a checkpoint instead.
        if not callbacks.preemption.stopped:
            callbacks.validation.wait(trainer.control)
        steps = max(attempt.step, trainer.state.global_step)
        if not callbacks.preemption.stopped:
            run.weights.gather()
            if context.rank == 0:
                check_owner(paths.store, attempt)
                publish_weights(paths, paths.final, run.weights.save, steps)
        if callbacks.energy is not None:
            callbacks.energy.write(trainer.state)
        run.publish()  # the ranks meet once more below, and one that has died would keep the last lines back
        return {
            "steps": steps,
            "num_steps": plan.num_steps,
            **_summarise(callbacks, run.progress, spec.train),
        }


def _summarise(callbacks: RunCallbacks, progress: Progress, rows: Rows) -> dict[str, Any]:
    """Return the result of the run except its steps."""
    stop = callbacks.preemption
    summary: dict[str, Any] = {"best": progress.best, "stopped": stop.stopped, "leaving": stop.leaving}
    if lost := callbacks.checkpoints.gather_lost_rows():
        summary["lost_rows"] = [(str(rows[gone].id), str(rows[other].id)) for gone, other in lost]
    return summary
