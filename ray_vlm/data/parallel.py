"""Run a function over many items: in this process, in processes of this machine, or as Ray tasks on all nodes of a
cluster. Results come in any order; the first error ends everything and is raised here.

`multiprocessing` is not used: it imports the caller's script again in each process, which starts a script without a
`__main__` guard once more. Ray Data is not used: it wants all items before the first starts.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from typing import IO, Any, Generic, TypeVar

from ray_vlm.cluster.environment import Environment, read_environment
from ray_vlm.cluster.preflight import ClusterDemand
from ray_vlm.errors import RayVlmError, RunError
from ray_vlm.machine import count_cpus

_T = TypeVar("_T")
_R = TypeVar("_R")
FEW = 1  # so few items are done in this process: another takes a second or more to start
_SERVE = "from ray_vlm.data.parallel import serve; serve()"
OWN_CLUSTER = "local"  # the address with which Ray starts a new local cluster
_AHEAD = 2  # items that are given out for each CPU, one of which waits for it


@dataclass(frozen=True)
class Spread:
    """Where work is done: `processes` of this machine, or the cluster of `demand`, if the job joins one."""

    processes: int = 1
    demand: ClusterDemand | None = None

    def run(self, work: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
        """Yield `work(item)` of each item. `work` and its results are pickled unless there are only a few items."""
        waiting = iter(items)
        first = list(islice(waiting, FEW + 1))
        if len(first) <= FEW or (self.processes <= 1 and self.demand is None):
            yield from map(work, chain(first, waiting))
            return
        if self.demand is not None:
            runs: Any = _run_on_cluster(work, chain(first, waiting), self.demand)
        else:
            runs = _run_in_processes(work, chain(first, waiting), self.processes)
        with closing(runs) as results:
            yield from results


def plan_spread(demand: ClusterDemand) -> Spread:
    """Return where a job's index is built: on the cluster that it joins, or by the CPUs of this machine. A process
    inside Ray, such as a trial of a sweep, works alone: the cluster's CPUs are taken by those that wait for it."""
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized() and ray.get_runtime_context().worker.mode != ray.SCRIPT_MODE:
            return Spread()
    address = demand.cluster.address or os.environ.get("RAY_ADDRESS")
    joins = demand.cluster.num_workers != 0 and address not in (None, "", OWN_CLUSTER)
    return Spread(count_cpus(), demand if joins else None)


class _Process(Generic[_T, _R]):
    """A process that applies `work` to what is sent to it. It ends with its input."""

    def __init__(self, work: Callable[[_T], _R]):
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the driver alone, which then ends this process
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._first: tuple[object, ...] = ((list(sys.path), read_environment()), work)  # sent before the first item

    def apply(self, item: _T) -> _R:
        """Return the result, or raise the error of `work`."""
        try:
            for message in (*self._first, item):
                pickle.dump(message, self._input, 5)
            self._input.flush()
            self._first = ()
            good, result = pickle.load(self._output)  # noqa: S301 (from a process that this one has started)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._process.wait()
            reason = f"signal {-code}, for example for want of memory" if code < 0 else f"exit code {code}"
            raise RunError(
                f"a process that builds the index has ended ({reason}). Start again: what is done is kept."
            ) from None
        if not good:
            raise result
        return result

    def end(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
        for stream in (self._input, self._output):
            stream.close()


def _run_in_processes(work: Callable[[_T], _R], items: Iterator[_T], count: int) -> Iterator[_R]:
    """Yield results in the order in which they are ready. A process starts when there is an item for it."""
    processes, idle = list[_Process[_T, _R]](), list[_Process[_T, _R]]()

    def apply(item: _T) -> _R:  # by one thread for each process
        try:
            process = idle.pop()
        except IndexError:
            process = _Process(work)
            processes.append(process)
        result = process.apply(item)
        idle.append(process)
        return result

    pool, pending = ThreadPoolExecutor(count, "ray-vlm-index"), set[Future[_R]]()
    try:
        while True:
            pending |= {pool.submit(apply, item) for item in islice(items, _AHEAD * count - len(pending))}
            if not pending:
                return
            ready, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in ready:
                yield future.result()
    finally:
        for process in processes:
            process.end()  # its thread then ends too
        pool.shutdown(cancel_futures=True)
        for process in processes:  # with one that was just starting
            process.end()


def serve() -> None:
    """Apply the function that the standard input names to what follows it, until the input ends."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the results
    path, environment = pickle.load(source)  # noqa: S301 (from the process that started this one, as below)
    sys.path[:] = path
    environment.apply()
    work = pickle.load(source)  # noqa: S301
    while (item := _receive(source)) is not None:
        try:
            reply = (True, work(item))
        except (RayVlmError, OSError) as error:  # raised by the driver; any other ends this process with a traceback
            reply = (False, error)
        pickle.dump(reply, sink, 5)
        sink.flush()


def _receive(source: IO[bytes]) -> Any:
    try:
        return pickle.load(source)  # noqa: S301
    except EOFError:
        return None


def _apply(work: Callable[[_T], _R], item: _T, environment: Environment) -> _R:
    environment.apply()
    return work(item)


def _run_on_cluster(work: Callable[[_T], _R], items: Iterator[_T], demand: ClusterDemand) -> Iterator[_R]:
    """Yield the results of Ray tasks of one CPU each, on all nodes. No GPU is asked for."""
    from ray_vlm.cluster.connect import start_ray

    with start_ray(demand):
        import ray
        from ray.exceptions import RayError, RayTaskError

        task: Any = ray.remote(_apply)
        task = task.options(num_cpus=1, scheduling_strategy="SPREAD")
        shared, environment = ray.put(work), read_environment()
        pending: list[Any] = []
        limit = _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
        try:
            while True:
                pending += [task.remote(shared, item, environment) for item in islice(items, limit - len(pending))]
                if not pending:
                    return
                ready, pending = ray.wait(pending, num_returns=1)
                for reference in ready:
                    yield ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, RayVlmError):
                raise error.cause from None
            raise RunError(
                f"a task that builds the index failed: {type(error.cause).__name__}: {error.cause}"
            ) from error
        except RayError as error:
            raise RunError(f"a task that builds the index died: {str(error).strip()[-1000:]}") from error
        finally:
            for reference in pending:
                ray.cancel(reference)
