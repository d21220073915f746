"""One trial: an ordinary run in the sweep's folder, started in a process of Ray Tune, which gets every validation.

Tune's own state is never read again: a resumed sweep reads its run folders. A trial that had ended reports its
validations again and trains nothing, so that the search and the scheduler have the same information as before.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import yaml

from ray_vlm.cluster.environment import Environment
from ray_vlm.config.load import load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.parts import Parts
from ray_vlm.errors import Interrupted, RunError
from ray_vlm.models.out_of_memory import NO_ROOM
from ray_vlm.runs.keys import split_key
from ray_vlm.runs.monitor import current_lines, sound_lines
from ray_vlm.runs.read import is_number, read_run
from ray_vlm.storage import Store, join, split_address
from ray_vlm.tune.space import Space, resolve
from ray_vlm.tune.trials import TRIALS, score_of_trial, trial_address

PRUNED = "pruned"  # status of a run that the scheduler ended
WORST = -1e30  # score of a metric that is not finite; infinity would break the percentiles of Tune's schedulers
_POLL_S = {True: 0.3, False: 5.0}  # seconds between reads of metrics.jsonl, by: is it on a disk (or in an object store)


@dataclass(frozen=True)
class Sweep:
    """Data that every trial gets. `job`: resolved; `address`: the sweep's folder; `parts`: the rows, read once for all
    trials, None where trials differ in them; `draws`: values by number where they were drawn beforehand; `began`: the
    time when this call of the sweep started."""

    job: Mapping[str, Any]
    space: Space
    address: str
    metric: str
    at_once: int = 1
    parts: Parts | None = None
    draws: tuple[Mapping[str, Any], ...] = ()
    environment: Environment = field(default_factory=Environment)
    began: float = field(default_factory=time.time)


def name_trial(number: int) -> str:
    """Return a trial's name, which is also that of its run folder."""
    return f"{number:03d}"


def build_trial_job(sweep: Sweep, number: int, drawn: Mapping[str, Any]) -> tuple[JobConfig, dict[str, Any]]:
    """Build the job of a trial and return it with its values of the space. Empty `drawn`: the job's own values."""
    values = resolve(sweep.space, drawn, sweep.job) if drawn else {}
    job = json.loads(json.dumps(dict(sweep.job)))
    for key, value in values.items():
        *sections, last = split_key(key) or ()
        mapping = job
        for section in sections:
            if mapping.get(section) is None:
                mapping[section] = {}  # the first class of `data.oversample`
            mapping = mapping[section]
        mapping[last] = value
    if job["tune"]["resident"]:
        job["cluster"]["num_workers"] = 0  # the resident process, which keeps the base loaded, trains
    elif isinstance(workers := job["cluster"]["num_workers"], list):
        job["cluster"]["num_workers"] = min(workers)  # an elastic job takes its fewest: trials share the cluster
    if job["track"]["wandb"] and not job["track"]["wandb_group"]:
        job["track"]["wandb_group"] = split_address(sweep.address)[1][-128:]
    job["run"] = job["run"] | {"output_dir": join(sweep.address, TRIALS), "name": name_trial(number)}
    return load_resolved(job), values


def run_trial(config: dict[str, Any], sweep: Sweep) -> None:
    """Run one trial; Ray Tune calls this. Raise what the run raises: Tune then starts it again from its checkpoint."""
    sweep.environment.apply()
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "600"  # before Tune reuses a process, its trial must have ended
    from ray_vlm.config.load import dump_job
    from ray_vlm.train.driver import TrialContext, train

    number = config["number"]
    drawn = sweep.draws[number] if sweep.draws else {k: v for k, v in config.items() if k != "number"}
    job, values = build_trial_job(sweep, number, drawn)
    address = trial_address(sweep.address, name_trial(number))
    with tell_tune(address, sweep.metric) as reported:
        if not _was_pruned(address):
            if refused := _had_no_room(address, sweep.began):
                raise RunError(refused)
            text = f"# trial {name_trial(number)}: {json.dumps(values)}\n"
            text += yaml.safe_dump(dump_job(job), sort_keys=False, allow_unicode=True)
            try:
                train(job, text, resume=True, trial=TrialContext(sweep.parts, reported.ended.is_set, sweep.at_once))
            except Interrupted:
                if not reported.ended.is_set():
                    raise
    if reported.ended.is_set():
        sys.exit(0)  # Tune has ended the trial and expects no result


def _had_no_room(address: str, began: float) -> str | None:
    """Return the error of an attempt in this call of the sweep that ran out of GPU memory, None without one. Tune would
    retry the trial, and the same settings would fail again; a resumed sweep may have other GPUs and does retry it."""
    with suppress(RunError):
        last = (read_run(address).attempts or [{}])[-1]
        if NO_ROOM in str(last.get("error", "")) and last.get("ended", 0.0) >= began:
            return str(last["error"])
    return None


def _was_pruned(address: str) -> bool:
    with suppress(RunError):
        return read_run(address).status == PRUNED
    return False


@dataclass
class Reported:
    """The state of the reports to Tune: the last step that was reported, and whether Tune has ended the trial."""

    step: int = -1
    ended: threading.Event = field(default_factory=threading.Event)


@contextmanager
def tell_tune(address: str, metric: str) -> Iterator[Reported]:
    """Report every validation of the run to Tune when it is written, the last one only when the run is over: Tune would
    otherwise end a trial that is still writing its weights."""
    store, reported, over = Store(address), Reported(), threading.Event()

    def follow() -> None:
        seen = -1  # bytes of metrics.jsonl
        while not reported.ended.is_set():
            last, data = over.wait(_POLL_S[store.local is not None]), _read(store)
            if len(data) != seen or last:
                seen = len(data)
                _report(data, reported, metric, over=last)
            if last:
                return

    thread = threading.Thread(target=follow, name="ray-vlm-tell-tune", daemon=True)
    thread.start()
    try:
        yield reported
    finally:
        over.set()
        thread.join()


def _read(store: Store) -> bytes:
    try:
        return store.read("metrics.jsonl") or b""
    except OSError:
        return b""


def _report(data: bytes, reported: Reported, metric: str, over: bool) -> None:
    """Report the validations since the last call; that of the last step only once the run is `over`."""
    from ray import tune

    lines = sound_lines(data)
    end = max((line.get("num_steps") or 0 for line in lines if line["kind"] == "start"), default=0)
    for line in current_lines(lines):
        if line["kind"] != "eval" or line["step"] <= reported.step or (line["step"] >= end and not over):
            continue
        numbers = {k: float(v) for k, v in line.items() if is_number(v)}
        score = score_of_trial(line, metric)
        reported.step = line["step"]
        try:
            tune.report(numbers | {"step": line["step"], "score": WORST if score is None else score})
        except SystemExit:  # Tune raises it to end a trial
            reported.ended.set()
            return
