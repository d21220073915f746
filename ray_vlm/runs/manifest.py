"""The manifest of a run, `run.json`: status, versions, hardware, attempts and their drivers; claiming a run's folder.

A run has one driver at a time: the process that drives it, identified by its host, process id and start time. One that
was replaced (another machine resumed the run, or deleted its folder and started another run of that name) writes
nothing more. Ray may restart workers by itself, if it has resources for more of them or has lost some: such attempts
are not in `run.json`, only in the start lines of `metrics.jsonl`.
"""

import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from ray_vlm import __version__
from ray_vlm.errors import RunError
from ray_vlm.machine import count_cpus, installed_version
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.runs.paths import RunPaths, open_run, write_json
from ray_vlm.runs.schema import check_whole, is_process, load_manifest
from ray_vlm.runs.text import plural
from ray_vlm.storage import Store, join

_PACKAGES = (
    *("ray", "torch", "transformers", "trl", "peft", "bitsandbytes"),
    *("accelerate", "torchvision", "datasets", "deepspeed"),
)
CLAIMED = ".claimed"  # reserves a name in an object store until the run's first files are written
_KEPT = (
    *("job.yaml", "resolved.json", "run.json", "metrics.jsonl", "training_log.json"),
    *("bad_rows.jsonl", "bad_steps.jsonl"),
)
_CLOCK_S = 2.0  # tolerance of a process's start time, which shifts when the machine's clock is set


def claim_run(output_dir: str, name: str | None, stem: str, overwrite: bool = False) -> RunPaths:
    """Create the run's folder and return its paths. Without `name` it is called `stem` with the next free number.

    Raises `RunError` if the folder already holds a run; with `overwrite` that run is deleted.
    """
    try:
        base = Store(output_dir)
        if base.local is None:
            return _claim_remote(base, name, stem, overwrite)
        base.local.mkdir(parents=True, exist_ok=True)
        if name is None:
            return RunPaths(_next_free(base.local, stem))
        root = base.local / name
        check_free(output_dir, name, overwrite)
        if root.exists():
            shutil.rmtree(root)
        root.mkdir()  # of two simultaneous launches one fails here
    except FileExistsError:
        raise RunError(f"run.name={name!r}: another launch has just taken {root}. Give another run.name.") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise cannot_write(output_dir, error) from None
    return RunPaths(root)


def _claim_remote(base: Store, name: str | None, stem: str, overwrite: bool) -> RunPaths:
    name = name or f"{stem}-{_newest(base.names(), stem) + 1:03d}"
    check_free(base.address, name, overwrite)
    base.remove(name)
    paths = open_run(join(base.address, name))
    paths.store.write(CLAIMED, b"")
    return paths


def _next_free(base: Path, stem: str) -> Path:
    number = _newest(os.listdir(base), stem) + 1
    while True:  # of two simultaneous launches mkdir succeeds in one
        root = base / f"{stem}-{number:03d}"
        try:
            root.mkdir()
            return root
        except FileExistsError:
            number += 1


def _newest(names: Iterable[str], stem: str) -> int:
    """Return the highest number of a run of `stem`, 0 without one."""
    numbers = (re.fullmatch(rf"{re.escape(stem)}-(\d+)", name) for name in names)
    return max((int(match[1]) for match in numbers if match), default=0)


def check_free(output_dir: str, name: str, overwrite: bool) -> None:
    """Raise `RunError` unless run `name` may be written: it does not exist, or `overwrite` is set and no other process
    trains it. Changes nothing."""
    store = Store(join(output_dir, name))
    if store.local is not None and (store.local.is_symlink() or (store.local.exists() and not store.local.is_dir())):
        raise RunError(f"run.name={name!r}: {store.local} is a link or a file. Give another run.name.")
    try:
        names = store.names()
        if names and not overwrite:
            raise RunError(
                f"run.name={name!r}: {store.address} is already in use. Go on with it by --resume, give another "
                "run.name, or start with --overwrite to delete what is there."
            )
        if names and "run.json" not in names:
            raise RunError(
                f"--overwrite: {store.address} is not a run folder (run.json is missing), so it is not deleted."
            )
        if names:
            check_not_driven(store, "--overwrite")
    except OSError as error:
        raise cannot_write(output_dir, error) from None


def cannot_write(output_dir: str, error: Exception) -> RunError:
    """Return the error for an output folder that cannot be written to."""
    return RunError(f"run.output_dir={output_dir!r} cannot be written to ({error}). Give another folder.")


def find_run(output_dir: str, name: str | None, stem: str) -> RunPaths | None:
    """Return the run to resume, or None: the one called `name`, or the newest one of `stem`.

    Raises `RunError` if there is something other than a run, or if it cannot be read.
    """
    paths = None
    try:
        if name is None:
            number = _newest(Store(output_dir).names(), stem)
            name = f"{stem}-{number:03d}" if number else None
        if name is None or not (store := Store(join(output_dir, name))).names():
            return None
        check_whole(store)
        paths = open_run(store.address)
        paths.refresh(*(paths.root / file for file in _KEPT))
        return paths
    except OSError as error:
        if paths is not None:
            paths.discard()
        raise RunError(
            f"run.output_dir={output_dir!r} cannot be read ({error}). Fix the cause and try again."
        ) from None


def start_manifest(paths: RunPaths, job: dict[str, Any], job_text: str, command: list[str], rows_version: int) -> None:
    """Write `job.yaml`, `resolved.json` and `run.json` before anything starts.

    `rows_version`: of the fingerprint of the training rows, by which a resumed run compares them.
    """
    paths.job.write_text(job_text, encoding="utf-8")
    write_json(paths.resolved, job)
    packages = {name: installed_version(name) or "not installed" for name in _PACKAGES}
    write_json(
        paths.run,
        {
            "status": "running",
            "id": f"{paths.name}-{uuid.uuid4().hex[:8]}",  # unique among runs of that name; the id in W&B too
            "command": command,
            "versions": {"ray-vlm": __version__, "python": platform.python_version(), **packages},
            "git_commit": _git_commit(),
            "hardware": _hardware(),
            "rows_version": rows_version,
            "attempts": [],
            "result": None,
        },
    )
    paths.publish(paths.job, paths.resolved)
    start_attempt(paths)
    paths.store.remove(CLAIMED)


def _git_commit() -> str | None:
    """Return the commit of the source, with `+changes` if the tree differs; None outside a checkout."""
    import subprocess

    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "") or None


def _hardware() -> dict[str, Any]:
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"machine": platform.machine(), "cpus": count_cpus(), "memory_gib": round(pages / 2**30, 1)}


def start_attempt(paths: RunPaths) -> int:
    """Add an attempt of this process to `run.json` and return its number."""
    run = json.loads(paths.run.read_text())
    number = last_attempt(paths) + 1
    attempt = {"attempt": number, "started": time.time(), "driver": this_process()}
    _write(paths, run | {"status": "running", "attempts": [*run["attempts"], attempt]})
    return number


def last_attempt(paths: RunPaths) -> int:
    """Return the highest number of an attempt, including those that Ray started by itself (in `metrics.jsonl`)."""
    listed = [a["attempt"] for a in json.loads(paths.run.read_text())["attempts"]]
    return max([0, *listed, *(line["attempt"] for line in read_metrics(paths.metrics) if line["kind"] == "start")])


def end_attempt(paths: RunPaths, status: str, error: str = "") -> None:
    """Close the last attempt: `finished`, `failed`, `preempted` or `interrupted`."""
    run = json.loads(paths.run.read_text())
    last = run["attempts"][-1]
    # A later call, such as a sweep's for a trial that it ended, keeps the first end time.
    last |= {"ended": last.get("ended") or time.time(), "status": status} | ({"error": error} if error else {})
    run["attempts"] = complete(run["attempts"], read_metrics(paths.metrics))
    _write(paths, run)


def finish_manifest(paths: RunPaths, status: str, result: dict[str, Any] | None = None, error: str = "") -> None:
    """Close the last attempt and set the run's status: `finished`, `failed` or `interrupted`."""
    end_attempt(paths, status, error)
    update_manifest(paths, status=status, result=result)


def update_manifest(paths: RunPaths, **changes: object) -> None:
    """Change top-level fields of `run.json`."""
    _write(paths, json.loads(paths.run.read_text()) | changes)


def _write(paths: RunPaths, run: dict[str, Any]) -> None:
    write_json(paths.run, run)
    paths.publish(paths.run)


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


def is_alive(driver: object) -> TypeGuard[dict[str, Any]]:
    """Return whether a stored process is alive on this machine; False for processes of other machines."""
    if not is_process(driver) or driver["host"] != platform.node():
        return False
    started = _started(driver["pid"])
    return started is not None and abs(started - driver["started"]) <= _CLOCK_S


def living_driver(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the living process on this machine that drives a run, from its `run.json`, or None."""
    last = (run.get("attempts") or [{}])[-1]
    return last["driver"] if "ended" not in last and is_alive(last.get("driver")) else None


def refuse_living(driver: object, address: str, flag: str) -> None:
    """Raise `RunError` if `driver` is another living process of this machine, which `flag` would disturb."""
    if is_alive(driver) and driver["pid"] != os.getpid():
        raise RunError(
            f"{flag}: {address} is being trained by process {driver['pid']} on {driver['host']}. Wait for it, or stop "
            "it first."
        )


def check_not_driven(store: Store, flag: str) -> None:
    """Raise `RunError` if another process on this machine trains the run, so that `flag` must not change it."""
    refuse_living(living_driver(load_manifest(store, [])), store.address, flag)


def check_own(store: Store, driver: Mapping[str, Any] | None = None) -> None:
    """Raise `RunError` unless the newest attempt in `run.json` belongs to `driver` (default: this process)."""
    run = load_manifest(store, [])
    drivers = [entry["driver"] for entry in run.get("attempts") or () if entry.get("driver")]
    if run and (not drivers or drivers[-1] == (driver or this_process())):
        return
    taken = f"process {drivers[-1]['pid']} on {drivers[-1]['host']} drives it now" if drivers else "it was deleted"
    raise RunError(f"{store.address} is no longer this driver's run: {taken}. Nothing more is written into it.")


def complete(listed: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the attempts of `run.json` (`listed`) and those that Ray started by itself, with `from_step`, `to_step`,
    `workers` and `lost_steps` (steps that the next attempt repeated). `lines`: all of `metrics.jsonl`."""
    known = {entry["attempt"]: dict(entry) for entry in listed}
    starts = {line["attempt"]: line for line in lines if line["kind"] == "start"}
    last = max([*known, *starts], default=0)
    for number, line in starts.items():
        if number not in known:
            before = known.get(max((n for n in known if n < number), default=-1), {})
            taken = {key: before.pop(key) for key in ("status", "ended", "error") if key in before}
            known[number] = {"attempt": number, "started": line["time"], "status": "running"} | taken
            before |= {"status": "resized", "ended": line["time"]}
    for number, entry in known.items():
        if number < last and entry.get("status", "running") == "running":
            entry["status"] = "died"  # it was killed before it could write a status
        if number in starts:
            steps = [line["step"] for line in lines if line["attempt"] == number and line["kind"] == "train"]
            entry["from_step"] = starts[number]["step"]
            entry["to_step"] = max(steps, default=entry["from_step"])
            if workers := starts[number].get("num_workers"):
                entry["workers"] = workers
            if number < last:
                following = min((n for n in starts if n > number), default=None)
                then = entry["to_step"] if following is None else starts[following]["step"]
                entry["lost_steps"] = max(0, entry["to_step"] - then)
    return [known[number] for number in sorted(known)]


def tell_attempts(attempts: Sequence[Mapping[str, Any]]) -> str | None:
    """Return a sentence on why each attempt ended, or None for a run with one attempt."""
    if len(attempts) < 2:
        return None
    clauses = []
    for i, (entry, following) in enumerate(pairwise(attempts)):
        at = f" at step {entry['to_step']}" if "to_step" in entry else " before its first step"
        again = entry.get("lost_steps", 0)
        clause = f"{_cause(entry, following)}{at}"
        clause += _extension(attempts[i + 1 :]) if entry.get("status") == "finished" else ""
        clauses.append(clause + (f" ({plural(again, 'step')} done again)" if again else ""))
    lost = sum(entry.get("lost_steps", 0) for entry in attempts)
    steps = max((entry.get("to_step", 0) for entry in attempts), default=0)
    repeated = f" {lost} of {plural(steps, 'step')} done twice." if lost else ""
    return f"{len(attempts)} attempts: {'; '.join(clauses)}.{repeated}"


def _extension(later: Sequence[Mapping[str, Any]]) -> str:
    """Return how far a finished run was extended, without the step if no later attempt has finished."""
    end = next((entry for entry in later if entry.get("status") == "finished" and "to_step" in entry), None)
    return " and was extended" + (f" to step {end['to_step']}" if end else "")


def _cause(entry: Mapping[str, Any], following: Mapping[str, Any]) -> str:
    status = entry.get("status", "running")
    if status == "resized":
        return f"went on with {plural(following.get('workers', '?'), 'worker')}"
    if status == "interrupted":
        return "stopped by a signal"
    if status in ("running", "died"):
        return "ended without a message"
    return (str(entry.get("error") or "").strip().splitlines() or [status])[0].rstrip(".")[:200]
