"""The samplers of a GRPO run (`method.samplers`): Ray actors beside the workers, which the driver starts.

The driver owns them, so they outlive workers that are started again. Ray Train's placement group has room for its
workers alone, so each sampler has a group of its own, placed before the workers: elastic workers cannot take its card,
and a process that died finds its place reserved. Ray starts a sampler again, on another node if its node is gone; the
workers give it the weights again (`engines/actors.py`).

With a range, such as `[2, 8]`, there are as many samplers as the cluster's nodes have room for beside the workers, and
the driver looks every few seconds whether that has changed.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from ray_vlm.engines.ray_samplers import NAMESPACE
from ray_vlm.errors import RunError
from ray_vlm.train.sampler_process import Sampler
from ray_vlm.train.worker_spec import WorkerSpec

logger = logging.getLogger(__name__)
_START_S = 60.0  # for Ray to place all samplers; those that come later join later
_LOOK_S = 5.0  # between two looks at the cluster's nodes


@dataclass(frozen=True)
class SamplerCount:
    """How many samplers a run has: the fewest and the most, and with how many it starts. `resources`: CPUs and GPUs of
    each."""

    fewest: int
    most: int
    first: int
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
        except ValueError:  # one that was ended a moment ago still has the name
            remove_placement_group(group)
            raise
        actor.load.remote()  # while the workers start
        self._groups[number], self._actors[number] = group, actor

    def _end(self, number: int) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        ray.kill(self._actors.pop(number))
        remove_placement_group(self._groups.pop(number))

    def _is_placed(self, number: int) -> bool:
        from ray.util.placement_group import placement_group_table

        return placement_group_table(self._groups[number])["state"] == "CREATED"


@contextmanager
def start_samplers(
    spec: WorkerSpec, count: SamplerCount, startup_minutes: float, count_room: Callable[[], int]
) -> Iterator[WorkerSpec]:
    """Start the samplers of the job, and yield the spec with the names of the most that there may be; end them
    afterwards.

    `startup_minutes`: how long a cluster may take to start nodes. `count_room`: returns how many samplers the cluster
    has room for now; it is asked if their number is a range. Raise `RunError` if not even one can be placed."""
    if not count.most:
        yield spec
        return
    import ray

    token, over = uuid4().hex[:8], threading.Event()
    names = tuple(f"ray-vlm-sampler-{token}-{number}" for number in range(count.most))
    samplers = SamplerGroup(spec, names, count.resources)
    follower = threading.Thread(target=_follow, args=(samplers, count_room, over), name="ray-vlm-sampler-count")
    try:
        samplers.resize(count.first)
        placed = samplers.wait(max(_START_S, 60 * startup_minutes))
        if not placed:
            cpus, gpus = count.resources
            raise RunError(
                f"method.samplers={count.fewest}: Ray has not placed any sampler of {cpus:g} CPU and {gpus:g} GPU. "
                "Other runs may hold what they need: wait for these, lower method.samplers, or add nodes."
            )
        logger.info(f"{placed} of {count.first} samplers are placed")
        if count.fewest < count.most:
            follower.start()
        yield replace(spec, samplers=names)
    finally:
        over.set()
        if follower.is_alive():
            follower.join()
        if ray.is_initialized():  # not after Ctrl-C
            samplers.resize(0)


def _follow(samplers: SamplerGroup, count_room: Callable[[], int], over: threading.Event) -> None:
    """Keep as many samplers as the cluster has room for, until `over`."""
    from ray.exceptions import RayError

    while not over.wait(_LOOK_S):
        try:
            before, now = len(samplers), count_room()
            if now != before:
                logger.info(f"the cluster has changed: {now} sampler{'' if now == 1 else 's'}, after {before}")
                samplers.resize(now)
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:  # the head does not answer for now
            logger.debug(f"the number of samplers stays: {error}")


def describe_samplers(names: Sequence[str]) -> dict[str, Any]:
    """Return how other processes reach the samplers with these names, as `run.json` has it."""
    import ray

    address = ray.get_runtime_context().gcs_address
    return {"address": address, "namespace": NAMESPACE, "names": list(names)}
