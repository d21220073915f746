"""The process that drives a run, from the attempts in its `run.json`.

A run has one driver at a time. A driver is identified by its host, process id and start time. One that was replaced
(another machine resumed the run, or deleted its folder and started another run of that name) writes nothing more.
"""

import os
import platform
from collections.abc import Mapping
from functools import cache
from typing import Any

from ray_vlm.errors import RunError
from ray_vlm.runs.schema import is_count, is_number, keep_sound_run, load_sound
from ray_vlm.runs.store import Store

_CLOCK_S = 2.0  # tolerance of a process's start time, which shifts when the machine's clock is set


def this_process() -> dict[str, Any]:
    """Return this process as it is stored in files: `host`, `pid` and `started`."""
    return dict(_describe(os.getpid()))


@cache  # so that the value does not change when the clock is set
def _describe(pid: int) -> dict[str, Any]:
    return {"host": platform.node(), "pid": pid, "started": _started(pid)}


def _started(pid: int) -> float | None:
    """Return the start time of a process, which tells it from an earlier one with the same id; None if it is gone."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def is_alive(driver: Any) -> bool:
    """Return whether a stored process is alive on this machine; False for processes of other machines."""
    if not isinstance(driver, Mapping) or driver.get("host") != platform.node() or not is_count(driver.get("pid")):
        return False
    started: Any = driver.get("started")
    now = _started(driver["pid"])
    return is_number(started) and now is not None and abs(now - started) <= _CLOCK_S


def living_driver(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the living process on this machine that drives a run, from its `run.json`, or None."""
    last = (run.get("attempts") or [{}])[-1]
    return last["driver"] if "ended" not in last and is_alive(last.get("driver")) else None


def refuse_living(driver: Any, address: str, flag: str) -> None:
    """Raise `RunError` if `driver` is another living process of this machine, which `flag` would disturb."""
    if is_alive(driver) and driver["pid"] != os.getpid():
        raise RunError(
            f"{flag}: {address} is being trained by process {driver['pid']} on {driver['host']}. Wait for it, or stop "
            "it first."
        )


def check_not_driven(store: Store, flag: str) -> None:
    """Raise `RunError` if another process on this machine trains the run, so that `flag` must not change it."""
    refuse_living(living_driver(_read(store)), store.address, flag)


def check_own(store: Store, driver: Mapping[str, Any] | None = None) -> None:
    """Raise `RunError` unless the newest attempt in `run.json` belongs to `driver` (default: this process)."""
    run = _read(store)
    drivers = [entry["driver"] for entry in run.get("attempts") or () if entry.get("driver")]
    if run and (not drivers or drivers[-1] == (driver or this_process())):
        return
    taken = f"process {drivers[-1]['pid']} on {drivers[-1]['host']} drives it now" if drivers else "it was deleted"
    raise RunError(f"{store.address} is no longer this driver's run: {taken}. Nothing more is written into it.")


def _read(store: Store) -> dict[str, Any]:
    """Return the valid part of `run.json`; empty if there is none."""
    try:
        run = load_sound(store.read("run.json") or b"{}")
    except ValueError:
        return {}
    return keep_sound_run(run, []) if isinstance(run, dict) else {}
