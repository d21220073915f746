"""When a run is tried again: pure policy on what went wrong so far (`train/launch.py` carries it out).

Ray Train could restart the workers itself, but not when its controller dies or while a process group starts, it would
try again what this package refused on purpose, and it keeps no account. So restarts are counted here, in one budget.
"""

from dataclasses import dataclass

from ray_vlm.errors import RayVlmError, RunError
from ray_vlm.models.out_of_memory import NO_ROOM, describe_out_of_memory, is_out_of_memory
from ray_vlm.train.nonfinite import RewindToCheckpoint

_PAUSE_S = 2.0  # between the beginnings of two tries
# What gloo and NCCL say where the process or the machine at the other end is gone.
_CUT = ("closed by peer", "reset by peer", "remote process exited", "unhandled system error", "Timed out waiting")


@dataclass(frozen=True)
class Failure:
    """Why a try ended. `own`: raised by this package on purpose; `raised`: by code in a worker, not by its death."""

    text: str
    own: RayVlmError | None = None
    raised: bool = False
    step: int = 0


def should_restart(failures: list[Failure], max_failures: int) -> bool:
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


def restart_backoff(failures: list[Failure]) -> float:
    """Seconds that lie at least between the beginnings of two tries: doubled for each failure that came before a new
    step was reached. A try that lived longer is followed by the next one at once."""
    return _PAUSE_S * 2 ** min(count_stuck(failures) - 1, 5)


def describe_failure(error: Exception, step: int, advice: str = "") -> Failure:
    """What `TorchTrainer.fit` raised, in our words. `step`: the last one that was trained. `advice`: what
    to change where a card had no room: that is refused as our own errors are, whatever the other workers say."""
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
    if len(raised) < len(workers):  # who died is the cause; what the others raised only follows
        dead = sorted(set(workers) - set(raised))
        return Failure(f"worker {', '.join(map(str, dead))} died", own, step=step)
    rank, first = min(raised.items())
    if isinstance(first, RuntimeError) and any(mark in str(first) for mark in _CUT):
        text = str(first).strip().splitlines()[0].split(". ")[0].rsplit("] ")[-1][:200]
        return Failure(f"worker {rank} lost its connection to another ({text})", own, step=step)
    return Failure(f"worker {rank}: {type(first).__name__}: {first}", own, raised=True, step=step)


def explain_out_of_memory(error: BaseException, who: str, step: int, advice: str) -> RunError:
    """Our error for a card without room."""
    return RunError(f"{who} {NO_ROOM} after step {step}: {describe_out_of_memory(error)}. {advice}")


def _is_death(error: BaseException) -> bool:
    from ray.exceptions import RayActorError

    return isinstance(error, RayActorError) or type(error).__name__ == "WorkerHealthCheckFailedError"
