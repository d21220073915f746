"""When a run is restarted: a pure policy on the failures so far (`train/launch.py` carries it out).

Ray Train could restart the workers itself, but not if its controller dies or while a process group starts; it would
also retry errors that this package raises on purpose. So restarts are counted here, in one budget.
"""

from dataclasses import dataclass

from ray_vlm.errors import RayVlmError, RunError
from ray_vlm.models.out_of_memory import NO_ROOM, describe_out_of_memory, is_out_of_memory

_PAUSE_S = 2.0  # between the starts of two attempts
# Parts of the errors of gloo and NCCL if the process or the machine at the other end is gone.
_CUT = ("closed by peer", "reset by peer", "remote process exited", "unhandled system error", "Timed out waiting")


class RewindToCheckpoint(RunError):
    """Raised to continue from the last checkpoint without the rows from there to the step that failed."""


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended. `own`: an error that this package raised on purpose; `raised`: whether a worker raised an
    error, rather than died; `stalled`: whether the watchdog ended it."""

    text: str
    own: RayVlmError | None = None
    raised: bool = False
    step: int = 0
    stalled: bool = False


def should_restart(failures: list[Failure], max_failures: int) -> bool:
    """Return whether to restart after the last of `failures`.

    Not after an error that this package raised on purpose, nor after the same error twice at the same step, which would
    repeat. Errors count over the whole run, deaths of workers only since the last progress, so that a run survives
    any number of preemptions.
    """
    last = failures[-1]
    raised = sum(failure.raised for failure in failures)
    if last.own is not None or max(raised, count_stuck(failures)) > max_failures:
        return False
    before = failures[-2] if len(failures) > 1 else None
    return not (before and last.raised and (before.text, before.step) == (last.text, last.step))


def count_stuck(failures: list[Failure]) -> int:
    """Return the number of failures since the run last reached a new step, including the failure at that step."""
    furthest = max(failure.step for failure in failures)
    return len(failures) - next(i for i, failure in enumerate(failures) if failure.step == furthest)


def restart_backoff(failures: list[Failure]) -> float:
    """Return the minimum seconds between the starts of two attempts, doubled for each failure without a new step.

    An attempt that lasted longer is followed by the next one at once.
    """
    return _PAUSE_S * 2 ** min(count_stuck(failures) - 1, 5)


def describe_failure(error: Exception, step: int, advice: str = "") -> Failure:
    """Return the failure for an error of `TorchTrainer.fit`.

    `step`: the last trained step. `advice`: what to change if a GPU ran out of memory, which is never retried, whatever
    the other workers raised.
    """
    workers = {rank: getattr(e, "_base_exc", e) for rank, e in getattr(error, "worker_failures", {}).items()}
    refused = (
        e for _, e in sorted(workers.items()) if isinstance(e, RayVlmError) and not isinstance(e, RewindToCheckpoint)
    )
    own = next(refused, None)
    if own is None and isinstance(error, RayVlmError):
        own = error
    short = next(((rank, e) for rank, e in sorted(workers.items()) if is_out_of_memory(e)), None)
    if own is None and short is not None:
        own = explain_out_of_memory(short[1], f"worker {short[0]}", step, advice)
        return Failure(str(own), own, raised=True, step=step)
    if not workers:
        return Failure(f"{type(error).__name__}: {str(error).strip()[-1000:]}", own, step=step)
    raised = {rank: e for rank, e in workers.items() if not _is_death(e)}
    if len(raised) < len(workers):  # a death is the cause; errors of the other workers follow from it
        dead = sorted(set(workers) - set(raised))
        return Failure(f"worker {', '.join(map(str, dead))} died", own, step=step)
    rank, first = min(raised.items())
    if isinstance(first, RuntimeError) and any(mark in str(first) for mark in _CUT):
        text = str(first).strip().splitlines()[0].split(". ")[0].rsplit("] ")[-1][:200]
        return Failure(f"worker {rank} lost its connection to another ({text})", own, step=step)
    return Failure(f"worker {rank}: {type(first).__name__}: {first}", own, raised=True, step=step)


def explain_out_of_memory(error: BaseException, who: str, step: int, advice: str) -> RunError:
    """Return the error for a GPU without enough memory."""
    return RunError(f"{who} {NO_ROOM} after step {step}: {describe_out_of_memory(error)}. {advice}")


def _is_death(error: BaseException) -> bool:
    from ray.exceptions import RayActorError

    return isinstance(error, RayActorError) or type(error).__name__ == "WorkerHealthCheckFailedError"
