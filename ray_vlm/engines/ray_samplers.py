"""The samplers of a run as Ray actors, which workers and other processes reach by their names."""

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from threading import Thread
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
        if (actor := self._actors[sampler]) is not None:  # which another thread may drop
            self._call(sampler, actor, reply, method, args)
        elif method == "ping":  # Ray may wait for its head for a minute, so the caller does not wait for this
            Thread(target=self._find_and_call, args=(sampler, reply, method, args), daemon=True).start()
        else:
            reply.set_exception(SamplerLost("it is not started", ended=True))
        return reply

    def _find_and_call(self, sampler: int, reply: "Future[Any]", method: str, args: Sequence[object]) -> None:
        try:
            actor = self._actors[sampler] = self._look_up(sampler)
            if actor is None:
                raise SamplerLost("it is not started", ended=True)
            self._call(sampler, actor, reply, method, args)
        except SamplerLost as error:
            reply.set_exception(error)
        except Exception as error:  # a thread of its own: without a reply the sampler would never be asked again
            reply.set_exception(SamplerLost(f"{type(error).__name__}: {error}"))

    def _call(self, sampler: int, actor: object, reply: "Future[Any]", method: str, args: Sequence[object]) -> None:
        done = getattr(actor, method).remote(*args).future()
        done.add_done_callback(partial(self._pass_on, sampler, reply))

    def _look_up(self, sampler: int) -> object | None:
        """Return the actor with a sampler's name; None if there is none, or the cluster's head does not answer."""
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get_actor(self._names[sampler], self._namespace)
        except (ValueError, RayError, ConnectionError, TimeoutError):
            return None

    def share(self, value: object) -> object:
        import ray

        return ray.put(value)

    def restart(self, sampler: int) -> None:
        import ray

        if not self._guest and (actor := self._actors[sampler]) is not None:
            ray.kill(actor, no_restart=False)

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
            ended = isinstance(error, ActorDiedError)  # an actor that is started later has the same name
            if ended:
                self._actors[sampler] = None
            reply.set_exception(SamplerLost(type(error).__name__, ended))
        except RayVlmError as error:
            reply.set_exception(error)
