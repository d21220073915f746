"""Which process drives a run, by what its `run.json` says of each attempt.

A run has one driver at a time. One that was overtaken (another machine resumed the run, or deleted its folder and began
another of that name) is told apart by its host, its process number and the time at which that process started, and
writes nothing into what is not its own.
"""

import os
import platform
from collections.abc import Mapping
from functools import cache
from typing import Any

from ray_vlm.errors import RunError
from ray_vlm.runs.schema import is_count, is_number, keep_sound_run, load_sound
from ray_vlm.runs.store import Store

_CLOCK_S = 2.0  # by so much a process's start may seem to move when the machine's clock is set


def this_process() -> dict[str, Any]:
    """This process as files name it: `host`, `pid`, and when it `started`."""
    return dict(_describe(os.getpid()))


@cache  # so that it stays itself when the clock is set
def _describe(pid: int) -> dict[str, Any]:
    return {"host": platform.node(), "pid": pid, "started": _started(pid)}


def _started(pid: int) -> float | None:
    """When the process with this number started, so that a number used again is not mistaken for the old process."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def is_alive(driver: Any) -> bool:
    """Whether a process that a file names lives on this machine; of other machines nothing is known."""
    if not isinstance(driver, Mapping) or driver.get("host") != platform.node() or not is_count(driver.get("pid")):
        return False
    told: Any = driver.get("started")
    now = _started(driver["pid"])
    return is_number(told) and now is not None and abs(now - told) <= _CLOCK_S


def living_driver(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The process on this machine that drives a run, by what its `run.json` says, or None."""
    last = (run.get("attempts") or [{}])[-1]
    return last["driver"] if "ended" not in last and is_alive(last.get("driver")) else None


def refuse_living(driver: Any, address: str, flag: str) -> None:
    """Raise `RunError` where `driver` is another living process of this machine, which `flag` would disturb."""
    if is_alive(driver) and driver["pid"] != os.getpid():
        raise RunError(
            f"{flag}: {address} is being trained by process {driver['pid']} on {driver['host']}. Wait for it, or stop "
            "it first."
        )


def check_not_driven(store: Store, flag: str) -> None:
    """Raise `RunError` where another process on this machine trains the run, so `flag` must leave it alone."""
    refuse_living(living_driver(_read(store)), store.address, flag)


def check_own(store: Store, driver: Mapping[str, Any] | None = None) -> None:
    """Raise `RunError` unless the newest attempt in `run.json`, where the run is kept, is one of `driver`'s (default:
    this process's)."""
    run = _read(store)
    drivers = [entry["driver"] for entry in run.get("attempts") or () if entry.get("driver")]
    if run and (not drivers or drivers[-1] == (driver or this_process())):
        return
    taken = f"process {drivers[-1]['pid']} on {drivers[-1]['host']} drives it now" if drivers else "it was deleted"
    raise RunError(f"{store.address} is no longer this driver's run: {taken}. Nothing more is written into it.")


def _read(store: Store) -> dict[str, Any]:
    """What `run.json` says, as far as it can be trusted; empty where there is none."""
    try:
        run = load_sound(store.read("run.json") or b"{}")
    except ValueError:
        return {}
    return keep_sound_run(run, []) if isinstance(run, dict) else {}
