"""The samplers of a GRPO run (`method.samplers`): Ray actors beside the workers, which the driver starts.

The driver owns them, so they outlive workers that are started again. Ray Train's placement group has room for its
workers alone, so each sampler has a group of its own, placed before the workers: elastic workers cannot take its card,
and a process that died finds its place reserved. Ray starts a sampler again, on another node if its node is gone; the
workers give it the weights again (`engines/actors.py`).

With a range, such as `[2, 8]`, the run begins with the fewest. Once the workers train, the driver looks every few
seconds how many the cluster's nodes have room for. It starts further ones only where their place is free, and ends
further ones that have lost theirs, so that none waits for the card of a worker that is started again.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from ray_vlm.cluster.preflight import SamplerRoom
from ray_vlm.engines.ray_samplers import NAMESPACE, RaySamplers
from ray_vlm.errors import RunError
from ray_vlm.train.sampler_process import Sampler
from ray_vlm.train.worker_spec import WorkerSpec

logger = logging.getLogger(__name__)
_START_S = 60.0  # for Ray to place all samplers; those that come later join later
_LOOK_S = 5.0  # between two looks at the cluster's nodes
_RETRY_S = 60.0  # after a further sampler has found no place; twice as long after each further time


@dataclass(frozen=True)
class SamplerCount:
    """How many samplers a run has: the fewest and the most. `resources`: CPUs and GPUs of each."""

    fewest: int
    most: int
    resources: tuple[float, float]


class SamplerGroup:
    """The samplers of a run by number, each with a name and a placement group of its own."""

    def __init__(self, spec: WorkerSpec, names: Sequence[str], resources: tuple[float, float]):
        import ray

        cpus, gpus = resources
        self._spec, self._names, self._resources = spec, names, resources
        self._bundle = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
        self._remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=0)(Sampler)
        self._groups: dict[int, Any] = {}  # placement groups
        self._actors: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def resize(self, count: int) -> None:
        """Start samplers, or end some, until there are `count`. Those without a place end first, as their node is
        gone."""
        for number in [n for n in range(len(self._names)) if n not in self._groups][: max(0, count - len(self))]:
            self._start(number)
        for number in sorted(self._groups, key=lambda n: (self._is_placed(n), -n))[: max(0, len(self) - count)]:
            self._end(number)

    def drop_unplaced(self, least: int) -> int:
        """End samplers without a place as long as there are more than `least`, and return how many."""
        unplaced = [number for number in self._groups if not self._is_placed(number)]
        dropped = unplaced[: max(0, len(self) - least)]
        for number in dropped:
            self._end(number)
        return len(dropped)

    def close(self) -> None:
        """End all samplers, also where Ray refuses one of them."""
        for number in list(self._groups):
            with suppress(*_refusals()):
                self._end(number)

    def wait(self, timeout_s: float) -> int:
        """Wait until all have a place, and return how many have one."""
        import ray

        places = [group.ready() for group in self._groups.values()]
        placed, _ = ray.wait(places, num_returns=len(places), timeout=timeout_s)
        return len(placed)

    def _start(self, number: int) -> None:
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = placement_group([self._bundle])
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        options = {"name": self._names[number], "namespace": NAMESPACE, "scheduling_strategy": strategy}
        try:
            actor: Any = self._remote.options(**options).remote(self._spec, number, self._resources)
        except BaseException:  # for example ValueError: one that was ended a moment ago still has the name
            remove_placement_group(group)
            raise
        self._groups[number], self._actors[number] = group, actor
        actor.load.remote()  # while the workers start

    def _end(self, number: int) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        ray.kill(self._actors[number])
        remove_placement_group(self._groups[number])
        del self._actors[number], self._groups[number]

    def _is_placed(self, number: int) -> bool:
        from ray.util.placement_group import placement_group_table

        return placement_group_table(self._groups[number])["state"] == "CREATED"


@contextmanager
def start_samplers(
    spec: WorkerSpec, count: SamplerCount, startup_minutes: float, look: Callable[[], SamplerRoom | None]
) -> Iterator[WorkerSpec]:
    """Start the samplers of the job, and yield the spec with the names of the most that there may be; end them
    afterwards.

    `startup_minutes`: how long a cluster may take to start nodes. `look`: returns the room for samplers, None while the
    workers do not train; it is asked if their number is a range. Raise `RunError` if not even one can be placed."""
    if not count.most:
        yield spec
        return
    import ray

    token, over = uuid4().hex[:8], threading.Event()
    names = tuple(f"ray-vlm-sampler-{token}-{number}" for number in range(count.most))
    samplers = SamplerGroup(spec, names, count.resources)
    follower = threading.Thread(
        target=_follow, args=(samplers, count.fewest, look, over), name="ray-vlm-sampler-count", daemon=True
    )
    try:
        samplers.resize(count.fewest)
        placed = samplers.wait(max(_START_S, 60 * startup_minutes))
        if not placed:
            cpus, gpus = count.resources
            raise RunError(
                f"method.samplers: Ray has placed none of {count.fewest} samplers of {cpus:g} CPU and {gpus:g} GPU. "
                "Other runs may hold what they need: wait for these, lower method.samplers, or add nodes."
            )
        logger.info(f"{placed} of {count.fewest} samplers are placed")
        if count.fewest < count.most:
            follower.start()
        yield replace(spec, samplers=names)
    finally:
        over.set()
        if follower.is_alive():
            follower.join(_LOOK_S)
        if ray.is_initialized():
            samplers.close()


def _follow(samplers: SamplerGroup, fewest: int, look: Callable[[], SamplerRoom | None], over: threading.Event) -> None:
    """Keep as many samplers as the cluster has room for, until `over`."""
    last, retry_at, retry_s, free_before = fewest, 0.0, _RETRY_S, 0
    while not over.wait(_LOOK_S):
        try:
            if samplers.drop_unplaced(fewest):  # what is free may lie on several nodes
                retry_at, retry_s = time.monotonic() + retry_s, 2 * retry_s
            if (now := len(samplers)) != last:
                logger.info(f"{now} sampler{'' if now == 1 else 's'}, {last} before: the cluster has changed")
                last, retry_s = now, _RETRY_S
            room = look()
            if room is not None and not over.is_set():
                # Free at two looks: for a moment, what workers leave that Ray starts again is free too.
                more = min(room.free, free_before) if time.monotonic() >= retry_at else 0
                samplers.resize(max(fewest, min(room.in_all, now + more)))
            free_before = room.free if room is not None else 0
        except _refusals() as error:  # for example while the head does not answer
            logger.debug(f"the number of samplers stays: {error}")


def restart_samplers(names: Sequence[str]) -> None:
    """End the process of each sampler, which Ray starts again: one that hangs would hold up the next attempt too."""
    with suppress(*_refusals()):
        samplers = RaySamplers(names, NAMESPACE)
        for number in range(samplers.count):
            samplers.restart(number)


def _refusals() -> tuple[type[Exception], ...]:
    """Return the errors that Ray's calls raise, for example while the cluster's head does not answer."""
    from ray.exceptions import RayError

    return RayError, ConnectionError, RuntimeError, ValueError


def describe_samplers(names: Sequence[str]) -> dict[str, Any]:
    """Return how other processes reach the samplers with these names, as `run.json` has it."""
    import ray

    address = ray.get_runtime_context().gcs_address
    return {"address": address, "namespace": NAMESPACE, "names": list(names)}
