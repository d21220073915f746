"""Run the workers in Ray, and again after a failure that another try can mend. Policy first, then what carries it out.

Ray Train could restart the workers itself, but not when its controller dies or while a process group starts, it would
try again what this package refused on purpose, and it keeps no account. So restarts are counted here, in one budget;
workers take it from the newest whole checkpoint whoever started them (`train/attempt.py`).
"""

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ray_vlm.cluster.connect import connect
from ray_vlm.cluster.nodes import living_nodes
from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import RayVlmError, RunError
from ray_vlm.runs.console import Console, follow
from ray_vlm.runs.manifest import end_attempt, start_attempt, update_manifest
from ray_vlm.runs.monitor import current_lines, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.finite import Rewind
from ray_vlm.train.stop import STOP_FILE, StopRequest, ask_workers
from ray_vlm.train.watchdog import take_sentence
from ray_vlm.train.worker import WorkerTask, train_worker

_PAUSE_S = 2.0  # between the beginnings of two tries
_BREATH_S = 0.5  # between the end of one and the beginning of the next
_RESIZE_S = 20.0  # how often Ray looks for room for more workers, where their number may change
# What gloo and NCCL say where the process or the machine at the other end is gone.
_CUT = ("closed by peer", "reset by peer", "remote process exited", "unhandled system error", "Timed out waiting")
_PATIENCE = 2.0  # how much longer than the watchdog the workers' connections wait for one another


@dataclass(frozen=True)
class Failure:
    """Why a try ended. `own`: raised by this package on purpose; `raised`: by code in a worker, not by its death."""

    text: str
    own: RayVlmError | None = None
    raised: bool = False
    step: int = 0


def plan_retry(failures: list[Failure], max_failures: int) -> bool:
    """Whether to try again after the last of `failures`.

    Not when this package refused on purpose, nor when the same error came twice at the same step: it would come again.
    Errors count over the whole run; deaths only in a row, so that machines may come and go for weeks.
    """
    last = failures[-1]
    raised = sum(failure.raised for failure in failures)
    if last.own is not None or max(raised, count_stuck(failures)) > max_failures:
        return False
    before = failures[-2] if len(failures) > 1 else None
    return not (before and last.raised and (before.text, before.step) == (last.text, last.step))


def count_stuck(failures: list[Failure]) -> int:
    """Failures since the run last came further than ever before; the first that did is one of them."""
    furthest = max(failure.step for failure in failures)
    return len(failures) - next(i for i, failure in enumerate(failures) if failure.step == furthest)


def plan_pause(failures: list[Failure]) -> float:
    """Seconds that lie at least between the beginnings of two tries: doubled for each failure that came before a new
    step was reached. A try that lived longer is followed by the next one at once."""
    return _PAUSE_S * 2 ** min(count_stuck(failures) - 1, 5)


def describe_failure(error: Exception, step: int) -> Failure:
    """What `TorchTrainer.fit` raised, in our words. `step`: the last one that was trained."""
    workers = {rank: getattr(e, "_base_exc", e) for rank, e in getattr(error, "worker_failures", {}).items()}
    refused = (e for _, e in sorted(workers.items()) if isinstance(e, RayVlmError) and not isinstance(e, Rewind))
    own = next(refused, None)
    if own is None and isinstance(error, RayVlmError):
        own = error
    if not workers:
        return Failure(f"{type(error).__name__}: {str(error).strip()[-1000:]}", own, step=step)
    raised = {rank: e for rank, e in workers.items() if not _is_death(e)}
    if len(raised) < len(workers):  # who died is the cause; what the others raised only follows
        dead = sorted(set(workers) - set(raised))
        return Failure(f"worker {', '.join(map(str, dead))} died", own, step=step)
    rank, first = min(raised.items())
    if isinstance(first, RuntimeError) and any(mark in str(first) for mark in _CUT):
        text = str(first).strip().splitlines()[0].split(". ")[0].rsplit("] ")[-1][:200]
        return Failure(f"worker {rank} lost its connection to another ({text})", own, step=step)
    return Failure(f"worker {rank}: {type(first).__name__}: {first}", own, raised=True, step=step)


def _is_death(error: BaseException) -> bool:
    from ray.exceptions import RayActorError

    return isinstance(error, RayActorError) or type(error).__name__ == "WorkerHealthCheckFailedError"


def launch(
    job: JobConfig, task: WorkerTask, paths: RunPaths, asked: Callable[[], bool] | None = None, at_once: int = 1
) -> tuple[dict[str, Any], int | None]:
    """Train to the end; returns what rank 0 found and the signal that stopped it, if one did.

    `cluster.num_workers: 0` runs in this process. `asked` says whether to stop, beside signals; `at_once`: how many
    runs share the cluster. Raises the workers' own errors, or `RunError` when tries are used up.
    """
    if job.cluster.num_workers == 0:
        with StopRequest(asked) as request:
            return _train_here(job, task, paths, request), request.signal
    with connect(job, at_once) as layout:
        import ray

        count = job.cluster.least_workers
        print(f"Ray runs; starting {count} worker{'' if count == 1 else 's'}", flush=True)
        task = replace(
            task,
            train=ray.put(task.train),
            eval=ray.put(task.eval) if task.eval is not None else None,
            num_loaders=layout.num_loaders,
            cpus_per_loader=layout.cpus_per_loader,
        )
        update_manifest(paths, cluster={k: v for k, v in ray.cluster_resources().items() if ":" not in k})
        paths.store.remove(STOP_FILE)
        console = Console(task.plan.num_steps, job.train.log_every_steps)
        with StopRequest(asked) as request, follow(paths, console):
            try:
                result = _retry(job, task, paths, request)
            except KeyboardInterrupt:  # the second one: the workers must not go on without us
                ray.shutdown()
                raise
    paths.store.remove(STOP_FILE)
    shutil.rmtree(_scratch(paths), ignore_errors=True)  # Ray's own state; a finished run needs none
    return result, request.signal


def _train_here(job: JobConfig, task: WorkerTask, paths: RunPaths, request: StopRequest) -> dict[str, Any]:
    """In this process; again only where the run rewinds."""
    failures: list[Failure] = []
    while True:
        try:
            return train_worker(task, stop=lambda: request.wanted)
        except Rewind as error:
            failures.append(Failure(str(error), raised=True, step=_last_step(paths)))
            if not plan_retry(failures, job.cluster.max_failures):
                raise
            task = replace(task, attempt=_next_attempt(paths, "failed", str(error)))


def _retry(job: JobConfig, task: WorkerTask, paths: RunPaths, request: StopRequest) -> dict[str, Any]:
    """The workers' result, after as many tries as it takes. Leaving a machine that is taken away is no failure."""
    failures: list[Failure] = []
    while True:
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
            if request.wanted or not plan_retry(failures, job.cluster.max_failures):
                if failure.own is not None:
                    raise failure.own from error
                tries = f" after {len(failures)} tries" if len(failures) > 1 else ""
                raise RunError(f"training failed{tries}: {failure.text}") from error
            status, text = "failed", failure.text
        print(f"{text.splitlines()[0][:500]}; going on from the last checkpoint", flush=True)
        if status == "failed":
            time.sleep(max(_BREATH_S, plan_pause(failures) - (time.monotonic() - began)))
        task = replace(task, attempt=_next_attempt(paths, status, text))


def _next_attempt(paths: RunPaths, status: str, text: str) -> int:
    """Close the attempt in `run.json` and begin another; 0, and the workers count on by themselves, where the store is
    the trouble."""
    with suppress(OSError):
        end_attempt(paths, status, text[-2000:])
        return start_attempt(paths)
    return 0


def _explain(job: JobConfig, task: WorkerTask, paths: RunPaths, error: Exception, nodes: set[str]) -> Failure:
    """Why a try ended: what the workers said before they ended themselves, or what Ray says of them. `nodes`: those
    that lived when it began."""
    step = _last_step(paths)
    if said := take_sentence(paths.store, task.attempt):
        return Failure(said, RunError(said) if job.cluster.on_stall == "stop" else None, raised=True, step=step)
    failure = describe_failure(error, step)
    gone = ", ".join(sorted(nodes - living_nodes()))
    return replace(failure, text=f"node {gone} is gone: {failure.text}") if gone else failure


def _last_step(paths: RunPaths) -> int:
    return max(
        (line["step"] for line in current_lines(read_metrics(paths.metrics)) if line["kind"] == "train"), default=0
    )


def _fit(job: JobConfig, task: WorkerTask, paths: RunPaths, request: StopRequest) -> None:
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
