"""Run the workers in Ray, and restart them after failures that may be transient (`train/restarts.py` decides).

Workers always resume from the newest complete checkpoint of the run (`train/attempt.py`).
"""

import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ray_vlm.cluster.connect import connect, sampler_room, tell_idle_gpus
from ray_vlm.cluster.nodes import living_nodes
from ray_vlm.cluster.preflight import ClusterDemand, SamplerRoom, build_demand, count_threads
from ray_vlm.config.cluster import Cluster
from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import Interrupted, RunError
from ray_vlm.machine import count_gpus
from ray_vlm.models.card_memory import prepare_gpu
from ray_vlm.models.out_of_memory import advise_training, is_out_of_memory
from ray_vlm.runs.console import Console, follow
from ray_vlm.runs.manifest import check_own, end_attempt, start_attempt, update_manifest
from ray_vlm.runs.monitor import current_lines, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.restarts import (
    Failure,
    RewindToCheckpoint,
    describe_failure,
    explain_out_of_memory,
    restart_backoff,
    should_restart,
)
from ray_vlm.train.samplers import SamplerCount, describe_samplers, restart_samplers, start_samplers
from ray_vlm.train.start import start_worker
from ray_vlm.train.stop import STOP_FILE, StopRequest, ask_workers
from ray_vlm.train.watchdog import take_sentence
from ray_vlm.train.worker_spec import WorkerSpec

logger = logging.getLogger(__name__)
MIN_RESTART_GAP_S = 0.5  # between the end of one attempt and the start of the next
_RESIZE_S = 20.0  # how often Ray checks for resources for more workers, if their number may change
_PATIENCE = 2.0  # timeout of collectives as a multiple of cluster.stall_minutes, so that the watchdog acts first


def launch(
    job: JobConfig,
    spec: WorkerSpec,
    paths: RunPaths,
    should_stop: Callable[[], bool] | None = None,
    at_once: int = 1,
) -> tuple[dict[str, Any], int | None]:
    """Train to the end. Return rank 0's result and the signal that stopped the run, or None.

    With `cluster.num_workers: 0` the run trains in this process. `should_stop`: a reason to stop beside signals;
    `at_once`: how many runs share the cluster. Raises the workers' own errors, or `RunError` after the last restart.
    """
    prepare_gpu(job.cluster, job.method)  # workers of a local cluster inherit this process's environment
    with StopRequest(should_stop, trained=False) as request:
        try:
            advice = advise_training(job.train, job.evaluate.batch_size)
            if job.cluster.num_workers == 0:
                result = _train_here(job.cluster, spec, paths, request, advice)
            else:
                log_every = job.train.log_every_steps
                result = _train_in_ray(build_demand(job), at_once, spec, paths, request, advice, log_every)
        except KeyboardInterrupt:
            if not request.left_early:
                raise
            raise _stopped_early(paths, request.signal or signal.SIGINT) from None
        except SystemExit:  # raised by Ray's own handler of SIGTERM, which is installed while Ray starts
            raise _stopped_early(paths, signal.SIGTERM) from None
    return result, request.signal


def _stopped_early(paths: RunPaths, number: int) -> Interrupted:
    step = _last_step(paths)
    at = f"at step {step}, while the workers started" if step else "before the first step"
    return Interrupted(f"stopped {at}; --resume goes on (run.name={paths.name}).", number)


def _train_in_ray(
    demand: ClusterDemand,
    at_once: int,
    spec: WorkerSpec,
    paths: RunPaths,
    request: StopRequest,
    advice: str,
    log_every_steps: int,
) -> dict[str, Any]:
    """Train in Ray's workers. `advice`: what to change if a GPU runs out of memory."""
    with connect(demand, at_once) as layout:
        import ray

        request.listen()  # Ray has installed its own handler
        count = demand.cluster.least_workers
        logger.info(f"Ray is running; starting {count} worker{'' if count == 1 else 's'}")
        threads = count_threads(demand, layout, spec.image_pixels)
        kind = "threads" if threads else "loaders"
        logger.debug(f"{layout.num_loaders} {kind} of {layout.cpus_per_loader:g} CPUs for each worker read images")
        spec = replace(spec, num_loaders=layout.num_loaders, cpus_per_loader=layout.cpus_per_loader, threads=threads)
        check_own(paths.store)
        update_manifest(paths, cluster={k: v for k, v in ray.cluster_resources().items() if ":" not in k})
        paths.store.remove(STOP_FILE)
        console = _StepWatcher(request, paths, spec.plan.num_steps, log_every_steps)
        minutes = demand.cluster.startup_minutes
        samplers = SamplerCount(demand.num_samplers, demand.most_samplers, demand.sampler)
        planned = replace(demand, num_loaders=layout.num_loaders)

        def look() -> SamplerRoom | None:
            return sampler_room(planned, at_once) if request.trained else None

        try:
            with follow(paths, console), start_samplers(spec, samplers, minutes, look) as spec:
                if spec.samplers:
                    update_manifest(paths, samplers=describe_samplers(spec.samplers))
                result = _retry(demand.cluster, spec, paths, request, advice)
        except KeyboardInterrupt:  # the workers must not outlive the driver
            ray.shutdown()
            shutil.rmtree(_scratch(paths), ignore_errors=True)
            raise
    paths.store.remove(STOP_FILE)
    shutil.rmtree(_scratch(paths), ignore_errors=True)  # Ray's own state, not needed any more
    return result


class _StepWatcher(Console):
    """A console that marks in the `StopRequest` that a step was trained, so that a signal asks for a checkpoint.

    The lines of a run in an object store arrive late, so there the start of the workers is enough."""

    def __init__(self, request: StopRequest, paths: RunPaths, num_steps: int, log_every_steps: int):
        super().__init__(num_steps, log_every_steps)
        self._request = request
        self._awaited = ("train",) if paths.remote is None else ("train", "start")

    def show(self, line: dict[str, Any]) -> None:
        """Log the line, and mark that there is progress to save."""
        if line["kind"] in self._awaited:
            self._request.trained = True
        super().show(line)


def _train_here(
    cluster: Cluster, spec: WorkerSpec, paths: RunPaths, request: StopRequest, advice: str
) -> dict[str, Any]:
    """Train in this process, again only after `RewindToCheckpoint`."""
    if cluster.gpus_per_worker == 0:
        tell_idle_gpus(count_gpus())

    def should_stop() -> bool:  # called after every step
        request.trained = True
        return request.wanted

    failures: list[Failure] = []
    while True:
        try:
            return start_worker(spec, should_stop=should_stop)
        except RewindToCheckpoint as error:
            failures.append(Failure(str(error), raised=True, step=_last_step(paths)))
            if not should_restart(failures, cluster.max_failures):
                raise
            logger.info(f"{error}; resuming from the last checkpoint")
            spec = replace(spec, attempt=_next_attempt(paths, "failed", str(error)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise explain_out_of_memory(error, "this process", _last_step(paths), advice) from error


def _retry(cluster: Cluster, spec: WorkerSpec, paths: RunPaths, request: StopRequest, advice: str) -> dict[str, Any]:
    """Return the workers' result, restarting them as often as allowed. A preemption does not count as a failure."""
    failures: list[Failure] = []
    while True:
        request.trained = False
        nodes, began = living_nodes(), time.monotonic()
        try:
            _fit(cluster, spec, paths, request)
            result = paths.take_result()
            if result.get("leaving") is None or request.wanted:
                return result
            status, text = "preempted", result["leaving"]
        except Exception as error:  # recorded, then restarted or raised
            request.trained = False  # the workers are gone, and what is free now is theirs
            with suppress(OSError):
                paths.refresh(paths.metrics)
            stops = cluster.on_stall == "stop"
            failures.append(failure := _explain(spec.attempt, paths, error, nodes, advice, stops))
            if failure.stalled:
                restart_samplers(spec.samplers)
            if request.wanted or not should_restart(failures, cluster.max_failures):
                if failure.own is not None:
                    raise failure.own from error
                tries = f" after {len(failures)} tries" if len(failures) > 1 else ""
                raise RunError(f"training failed{tries}: {failure.text}") from error
            status, text = "failed", failure.text
        logger.info(f"{text.splitlines()[0][:500]}; resuming from the last checkpoint")
        if status == "failed":
            time.sleep(max(MIN_RESTART_GAP_S, restart_backoff(failures) - (time.monotonic() - began)))
        spec = replace(spec, attempt=_next_attempt(paths, status, text))


def _next_attempt(paths: RunPaths, status: str, text: str) -> int:
    """Close the attempt in `run.json`, start another and return its number.

    Return 0 if the storage fails; the workers then count on from the last attempt that they know. Raises `RunError` if
    another driver has taken over the run.
    """
    with suppress(OSError):
        check_own(paths.store)
        end_attempt(paths, status, text[-2000:])
        return start_attempt(paths)
    return 0


def _explain(
    attempt: int, paths: RunPaths, error: Exception, nodes: set[str], advice: str, stops_on_stall: bool
) -> Failure:
    """Return why an attempt ended: the watchdog's message if there is one, else from Ray's error.

    `nodes`: the nodes that were alive at its start.
    """
    step = _last_step(paths)
    if sentence := take_sentence(paths.store, attempt):
        own = RunError(sentence) if stops_on_stall else None
        return Failure(sentence, own, raised=True, step=step, stalled=True)
    failure = describe_failure(error, step, advice)
    gone = ", ".join(sorted(nodes - living_nodes()))
    return replace(failure, text=f"node {gone} is gone: {failure.text}") if gone else failure


def _last_step(paths: RunPaths) -> int:
    return max(
        (line["step"] for line in current_lines(read_metrics(paths.metrics)) if line["kind"] == "train"), default=0
    )


def _fit(cluster: Cluster, spec: WorkerSpec, paths: RunPaths, request: StopRequest) -> None:
    """Run one `TorchTrainer.fit` under a new name, because a damaged snapshot of Ray blocks its name for ever.

    It runs in a thread, because in the main thread Ray Train installs a SIGINT handler that exits with code 0.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers = cluster.num_workers
    cpus = cluster.cpus_per_worker + spec.threads * spec.cpus_per_loader
    each = {"CPU": cpus, "GPU": cluster.gpus_per_worker}
    trainer = TorchTrainer(
        run_ray_worker,
        train_loop_config={"spec": spec},
        scaling_config=ScalingConfig(
            num_workers=workers if isinstance(workers, int) else (workers[0], workers[1]),  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=_RESIZE_S,  # type: ignore[call-arg]
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={name: amount for name, amount in each.items() if amount},
        ),
        run_config=RunConfig(
            name=f"{paths.name}-attempt-{spec.attempt}",
            storage_path=_scratch(paths),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=cluster.max_failures),  # type: ignore[call-arg]
        ),
        torch_config=TorchConfig(timeout_s=int(_PATIENCE * 60 * cluster.stall_minutes) + 60),
    )
    raised: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # raised again in the thread that waits
            raised.append(error)

    thread = threading.Thread(target=run, name="ray-vlm-fit", daemon=True)
    thread.start()
    stop_sent = False
    while thread.is_alive():
        thread.join(0.2)
        if request.wanted and not stop_sent:
            with suppress(OSError):  # tried again until it succeeds
                check_own(paths.store)
                ask_workers(paths.store)
                stop_sent = True
    if raised:
        raise raised[0]


def _scratch(paths: RunPaths) -> str:
    """Return the folder for Ray Train's own state. Ray gets no checkpoints, so nothing there is needed later."""
    return str(paths.root / ".ray")


def run_ray_worker(config: dict[str, Any]) -> None:
    """Train on one worker; Ray Train calls this at the start and after each of its own restarts."""
    config["spec"].environment.apply()
    start_worker(config["spec"], in_ray=True)
