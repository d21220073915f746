"""The start of a worker, before the training libraries are imported, which takes seconds.

Meanwhile the loaders of the batches start already.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from ray_vlm.config.load import load_resolved
from ray_vlm.data.stream import StartedStream, Stream, StreamSpec, stream_local, stream_ray
from ray_vlm.distributed import DistributedContext, build_context
from ray_vlm.logs import PACKAGE, TERMINAL
from ray_vlm.methods import load_method
from ray_vlm.models.card_memory import prepare_gpu, release_memory
from ray_vlm.models.libraries import frozen, hidden, prepare_process, quiet_libraries, training_imports
from ray_vlm.runs.log_file import log_to_file
from ray_vlm.runs.paths import open_run
from ray_vlm.train.attempt import begin_attempt
from ray_vlm.train.run_log import to_metrics
from ray_vlm.train.stop import watch
from ray_vlm.train.worker_spec import WorkerSpec, settle_workers


def start_worker(
    spec: WorkerSpec, in_ray: bool = False, should_stop: Callable[[], bool] | None = None
) -> dict[str, Any]:
    """Train one rank to the end, from the newest complete checkpoint of the run if there is one.

    It runs in every Ray Train worker (`in_ray`), and in the calling process for `cluster.num_workers: 0`.
    `should_stop` returns after every step whether to write a checkpoint and stop; None: whether the driver asked for
    it. Return the `result` of `run.json`: steps, the best checkpoint, and whether the run was stopped.
    """
    job, paths = load_resolved(spec.job), open_run(spec.run)
    try:
        quiet_libraries()
        prepare_gpu(job.cluster, job.method)
        context = build_context(job.cluster.gpus_per_worker > 0, in_ray)
        with ExitStack() as closes:
            if in_ray:
                PACKAGE.removeHandler(TERMINAL)  # the driver prints
                closes.enter_context(log_to_file(paths, f"rank-{context.rank}"))
            if context.rank == 0:
                paths.refresh(paths.metrics)  # an object store cannot append: the whole file is written again
            with to_metrics(paths, context.rank, spec.attempt, 0):
                if isinstance(job.cluster.num_workers, list):
                    job, spec = settle_workers(job, spec, context.world_size)
                attempt = begin_attempt(paths.store, context, spec.attempt, spec.driver)
            closes.enter_context(to_metrics(paths, context.rank, attempt.number, attempt.step))
            first = attempt.step * spec.plan.accumulation
            stream = open_stream(spec, job.data.on_bad_row == "quarantine", context, first)
            closes.callback(close_stream, stream)
            with training_imports():
                prepare_process(job.seed, job.cluster.cpus_per_worker, in_ray)
                from ray_vlm.train.worker import train_worker

                load_method(job.method.name)
                closes.enter_context(frozen())
            if not job.cluster.deepspeed:
                closes.enter_context(hidden("deepspeed"))  # Accelerate imports it to learn that a model is none of its
            should_stop = should_stop or watch(paths.store, context.rank)
            result = train_worker(job, spec, paths, context, attempt, stream, should_stop)
            if context.ray and context.rank == 0:
                paths.write_result(result)
        release_memory()  # of the trainer, for the next trial in this process
        return result
    finally:
        paths.discard()


def open_stream(spec: WorkerSpec, replaces_bad_rows: bool, context: DistributedContext, first: int) -> Stream:
    """Return this rank's rows from micro-batch `first` to the end of the plan. Loaders that are processes start
    at once."""
    last = spec.plan.num_steps * spec.plan.accumulation
    stream = StreamSpec(
        spec.train, spec.sample_spec, spec.plan, context.rank, first, last, spec.row_bytes, replaces_bad_rows
    )
    if not context.ray or spec.threads or first >= last:
        return stream_local(stream, max(1, spec.threads))
    import ray.data  # noqa: F401  (here, not in the stream's thread, beside which libraries are hidden)

    return StartedStream(stream_ray(stream, spec.num_loaders, spec.cpus_per_loader, spec.environment))


def close_stream(stream: Stream) -> None:
    """End the stream. One whose next rows are still being made in the feed's thread, which has waited for them
    (`PlannedBatches.close`), cannot be closed, and ends with its process."""
    with suppress(ValueError):  # "generator already executing"
        stream.close()
