"""Run the workers in Ray, and again after a failure that another try can mend (`train/restarts.py` says which).

Workers take a run from its newest whole checkpoint, whoever started them (`train/attempt.py`).
"""

import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ray_vlm.cluster.connect import connect, tell_idle_gpus
from ray_vlm.cluster.nodes import living_nodes
from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import Interrupted, RunError
from ray_vlm.machine import count_gpus
from ray_vlm.models.out_of_memory import advise_training, is_out_of_memory
from ray_vlm.runs.console import Console, follow
from ray_vlm.runs.drivers import check_own
from ray_vlm.runs.manifest import end_attempt, start_attempt, update_manifest
from ray_vlm.runs.monitor import current_lines, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.nonfinite import RewindToCheckpoint
from ray_vlm.train.restarts import Failure, describe_failure, explain_out_of_memory, restart_backoff, should_restart
from ray_vlm.train.stop import STOP_FILE, StopRequest, ask_workers
from ray_vlm.train.watchdog import take_sentence
from ray_vlm.train.worker import train_worker
from ray_vlm.train.worker_spec import WorkerSpec

MIN_RESTART_GAP_S = 0.5  # between the end of one try and the beginning of the next
_RESIZE_S = 20.0  # how often Ray looks for room for more workers, where their number may change
_PATIENCE = 2.0  # how much longer than the watchdog the workers' connections wait for one another


def launch(
    job: JobConfig,
    task: WorkerSpec,
    paths: RunPaths,
    asked: Callable[[], bool] | None = None,
    at_once: int = 1,
) -> tuple[dict[str, Any], int | None]:
    """Train to the end; returns what rank 0 found and the signal that stopped it, if one did.

    `cluster.num_workers: 0` runs in this process. `asked` says whether to stop, beside signals; `at_once`: how many
    runs share the cluster. Raises the workers' own errors, or `RunError` when tries are used up.
    """
    with StopRequest(asked, trained=False) as request:
        try:
            if job.cluster.num_workers == 0:
                result = _train_here(job, task, paths, request)
            else:
                result = _train_in_ray(job, task, paths, request, at_once)
        except KeyboardInterrupt:
            if not request.left_early:
                raise
            raise _stopped_early(paths, request.signal or signal.SIGINT) from None
        except SystemExit:  # what Ray's own handler of SIGTERM raises, which is in place while Ray starts
            raise _stopped_early(paths, signal.SIGTERM) from None
    return result, request.signal


def _stopped_early(paths: RunPaths, number: int) -> Interrupted:
    step = _last_step(paths)
    at = f"at step {step}, while the workers started" if step else "before the first step"
    return Interrupted(f"stopped {at}; --resume goes on (run.name={paths.name}).", number)


def _train_in_ray(
    job: JobConfig, task: WorkerSpec, paths: RunPaths, request: StopRequest, at_once: int
) -> dict[str, Any]:
    with connect(job, at_once) as layout:
        import ray

        request.listen()  # Ray has put a handler of its own in place
        count = job.cluster.least_workers
        print(f"Ray runs; starting {count} worker{'' if count == 1 else 's'}", flush=True)
        task = replace(
            task,
            train=ray.put(task.train),
            eval=ray.put(task.eval) if task.eval is not None else None,
            num_loaders=layout.num_loaders,
            cpus_per_loader=layout.cpus_per_loader,
        )
        check_own(paths.store)
        update_manifest(paths, cluster={k: v for k, v in ray.cluster_resources().items() if ":" not in k})
        paths.store.remove(STOP_FILE)
        console = _StepWatcher(request, paths, task.plan.num_steps, job.train.log_every_steps)
        with follow(paths, console):
            try:
                result = _retry(job, task, paths, request)
            except KeyboardInterrupt:  # the workers must not go on without us
                ray.shutdown()
                shutil.rmtree(_scratch(paths), ignore_errors=True)
                raise
    paths.store.remove(STOP_FILE)
    shutil.rmtree(_scratch(paths), ignore_errors=True)  # Ray's own state; a finished run needs none
    return result


class _StepWatcher(Console):
    """A console that tells the request of the first step: from then on a checkpoint is worth its time. Of a run in an
    object store lines come late, so there the worker's start counts."""

    def __init__(self, request: StopRequest, paths: RunPaths, num_steps: int, log_every_steps: int):
        super().__init__(num_steps, log_every_steps)
        self._request = request
        self._awaited = ("train",) if paths.remote is None else ("train", "start")

    def show(self, line: dict[str, Any]) -> None:
        """Print the line, and mark that there is something to keep."""
        if line["kind"] in self._awaited:
            self._request.trained = True
        super().show(line)


def _train_here(job: JobConfig, task: WorkerSpec, paths: RunPaths, request: StopRequest) -> dict[str, Any]:
    """In this process; again only where the run rewinds."""
    if job.cluster.gpus_per_worker == 0:
        tell_idle_gpus(count_gpus())

    def stop() -> bool:  # asked after every step
        request.trained = True
        return request.wanted

    failures: list[Failure] = []
    while True:
        try:
            return train_worker(task, stop=stop)
        except RewindToCheckpoint as error:
            failures.append(Failure(str(error), raised=True, step=_last_step(paths)))
            if not should_restart(failures, job.cluster.max_failures):
                raise
            task = replace(task, attempt=_next_attempt(paths, "failed", str(error)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            advice = advise_training(job.train, job.evaluate.batch_size)
            raise explain_out_of_memory(error, "this process", _last_step(paths), advice) from error


def _retry(job: JobConfig, task: WorkerSpec, paths: RunPaths, request: StopRequest) -> dict[str, Any]:
    """The workers' result, after as many tries as it takes. Leaving a machine that is taken away is no failure."""
    failures: list[Failure] = []
    while True:
        request.trained = False
        nodes, began = living_nodes(), time.monotonic()
        try:
            _fit(job, task, paths, request)
            result = paths.take_result()
            if result.get("leaving") is None or request.wanted:
                return result
            status, text = "preempted", result["leaving"]
        except Exception as error:  # the edge to Ray: written down, then tried again or raised
            with suppress(OSError):
                paths.refresh(paths.metrics)
            failures.append(failure := _explain(job, task, paths, error, nodes))
            if request.wanted or not should_restart(failures, job.cluster.max_failures):
                if failure.own is not None:
                    raise failure.own from error
                tries = f" after {len(failures)} tries" if len(failures) > 1 else ""
                raise RunError(f"training failed{tries}: {failure.text}") from error
            status, text = "failed", failure.text
        print(f"{text.splitlines()[0][:500]}; going on from the last checkpoint", flush=True)
        if status == "failed":
            time.sleep(max(MIN_RESTART_GAP_S, restart_backoff(failures) - (time.monotonic() - began)))
        task = replace(task, attempt=_next_attempt(paths, status, text))


def _next_attempt(paths: RunPaths, status: str, text: str) -> int:
    """Close the attempt in `run.json` and begin another; 0, and the workers count on by themselves, where the store is
    the trouble. Raises `RunError` where another driver has the run now."""
    with suppress(OSError):
        check_own(paths.store)
        end_attempt(paths, status, text[-2000:])
        return start_attempt(paths)
    return 0


def _explain(job: JobConfig, task: WorkerSpec, paths: RunPaths, error: Exception, nodes: set[str]) -> Failure:
    """Why a try ended: what the workers said before they ended themselves, or what Ray says of them. `nodes`: those
    that lived when it began."""
    step = _last_step(paths)
    if said := take_sentence(paths.store, task.attempt):
        return Failure(said, RunError(said) if job.cluster.on_stall == "stop" else None, raised=True, step=step)
    failure = describe_failure(error, step, advise_training(job.train, job.evaluate.batch_size))
    gone = ", ".join(sorted(nodes - living_nodes()))
    return replace(failure, text=f"node {gone} is gone: {failure.text}") if gone else failure


def _last_step(paths: RunPaths) -> int:
    return max(
        (line["step"] for line in current_lines(read_metrics(paths.metrics)) if line["kind"] == "train"), default=0
    )


def _fit(job: JobConfig, task: WorkerSpec, paths: RunPaths, request: StopRequest) -> None:
    """One `TorchTrainer.fit`, under a name that no earlier one used: a torn snapshot of Ray's blocks only its own name.

    It runs in a thread, where Ray Train leaves SIGINT alone: its handler would end this process with exit code 0.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers = job.cluster.num_workers
    each = {"CPU": job.cluster.cpus_per_worker, "GPU": job.cluster.gpus_per_worker}
    trainer = TorchTrainer(
        run_ray_worker,
        train_loop_config={"task": task},
        scaling_config=ScalingConfig(
            num_workers=workers if isinstance(workers, int) else (workers[0], workers[1]),  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=_RESIZE_S,  # type: ignore[call-arg]
            use_gpu=job.cluster.gpus_per_worker > 0,
            resources_per_worker={name: amount for name, amount in each.items() if amount},
        ),
        run_config=RunConfig(
            name=f"{paths.name}-attempt-{task.attempt}",
            storage_path=_scratch(paths),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=job.cluster.max_failures),  # type: ignore[call-arg]
        ),
        torch_config=TorchConfig(timeout_s=int(_PATIENCE * 60 * job.cluster.stall_minutes) + 60),
    )
    raised: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # the edge between the threads: raised again in the one that waits
            raised.append(error)

    thread = threading.Thread(target=run, name="ray-vlm-fit", daemon=True)
    thread.start()
    told = False
    while thread.is_alive():
        thread.join(0.2)
        if request.wanted and not told:
            with suppress(OSError):  # tried again until the store takes it
                check_own(paths.store)
                ask_workers(paths.store)
                told = True
    if raised:
        raise raised[0]


def _scratch(paths: RunPaths) -> str:
    """Where Ray Train keeps its own marks. It is given no checkpoint, so nothing there is ever needed again."""
    return str(paths.root / ".ray")


def run_ray_worker(config: dict[str, Any]) -> None:
    """What Ray Train calls on every worker, at the start and whenever it restarts them."""
    config["task"].environment.apply()
    train_worker(config["task"], in_ray=True)
