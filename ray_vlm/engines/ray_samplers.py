"""The samplers of a run as Ray actors, which workers and other processes reach by their names."""

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from ray_vlm.engines.actors import SamplerFailed, SamplerLost
from ray_vlm.errors import RayVlmError

NAMESPACE = "ray_vlm"  # of the names


class RaySamplers:
    """The samplers of a run as Ray actors with these names in `namespace`, of which some may not be started yet. Ray
    starts each again when it dies. `guest`: never end one."""

    def __init__(self, names: Sequence[str], namespace: str, guest: bool = False):
        self.count, self._guest = len(names), guest
        self._names, self._namespace = names, namespace
        self._actors: list[Any] = [self._look_up(number) for number in range(self.count)]

    @property
    def are_gone(self) -> bool:
        """Whether there are no actors with these names."""
        return not any(self._actors)

    def ask(self, sampler: int, method: str, *args: object) -> "Future[Any]":
        reply: Future[Any] = Future()
        actor = self._actors[sampler] = self._actors[sampler] or self._look_up(sampler)
        if actor is None:
            reply.set_exception(SamplerLost("it is not started"))
            return reply
        done = getattr(actor, method).remote(*args).future()
        done.add_done_callback(partial(self._pass_on, sampler, reply))
        return reply

    def _look_up(self, sampler: int) -> object | None:
        import ray

        try:
            return ray.get_actor(self._names[sampler], self._namespace)
        except ValueError:  # no actor has the name
            return None

    def share(self, value: object) -> object:
        import ray

        return ray.put(value)

    def restart(self, sampler: int) -> None:
        import ray

        if not self._guest and self._actors[sampler] is not None:
            ray.kill(self._actors[sampler], no_restart=False)

    def _pass_on(self, sampler: int, reply: "Future[Any]", done: "Future[Any]") -> None:
        """Set in `reply` what Ray's future of a sampler returned or raised."""
        from ray.exceptions import ActorDiedError, RayError, RayTaskError

        try:
            reply.set_result(done.result())
        except RayTaskError as error:
            cause = error.cause
            own = cause if isinstance(cause, RayVlmError) else SamplerFailed(f"{type(cause).__name__}: {cause}")
            reply.set_exception(own)
        except RayError as error:
            if isinstance(error, ActorDiedError):  # for good: an actor that is started later has the same name
                self._actors[sampler] = None
            reply.set_exception(SamplerLost(type(error).__name__))
        except RayVlmError as error:
            reply.set_exception(error)
