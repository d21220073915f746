"""One trial: an ordinary run in the sweep's folder, driven from a process of Ray Tune's, which hears every validation.

Nothing of Tune's is ever read back: a sweep that goes on asks its run folders. A trial that was over tells its
validations once more and trains nothing, so that the search and the scheduler know what they knew.
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
from ray_vlm.data.splits import Parts
from ray_vlm.errors import Interrupted, RunError
from ray_vlm.models.out_of_memory import NO_ROOM
from ray_vlm.runs.keys import split_key
from ray_vlm.runs.monitor import current_lines, read_line
from ray_vlm.runs.read import is_number, read_run
from ray_vlm.runs.store import Store, join
from ray_vlm.tune.plan import score_of_trial
from ray_vlm.tune.space import Space, resolve
from ray_vlm.tune.trials import TRIALS

PRUNED = "pruned"  # status of a run that the scheduler ended
WORST = -1e30  # what Tune hears of a metric without a number; infinity would spoil its percentiles
_POLL_S = {True: 0.3, False: 5.0}  # a disk; an object store


@dataclass(frozen=True)
class Sweep:
    """What every trial knows. `job`: resolved; `address`: the sweep's folder; `parts`: rows that were read once for
    all, None where trials differ in them; `draws`: values by number where they were drawn beforehand; `began`: when
    this call of the sweep began."""

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
    """A trial's name, which is that of its run folder."""
    return f"{number:03d}"


def build_trial_job(sweep: Sweep, number: int, drawn: Mapping[str, Any]) -> tuple[JobConfig, dict[str, Any]]:
    """The job of a trial, and the values that the space gave it. `drawn` without the space's keys: the job's own."""
    values = resolve(sweep.space, drawn, sweep.job) if drawn else {}
    job = json.loads(json.dumps(dict(sweep.job)))
    for key, value in values.items():
        *sections, last = split_key(key) or ()
        place = job
        for section in sections:
            if place.get(section) is None:
                place[section] = {}  # the first class of `data.oversample`
            place = place[section]
        place[last] = value
    if job["tune"]["resident"]:
        job["cluster"]["num_workers"] = 0  # in the process that has the base
    elif isinstance(workers := job["cluster"]["num_workers"], list):
        job["cluster"]["num_workers"] = min(workers)  # trials share the cluster: none takes what others need
    if job["track"]["wandb"] and not job["track"]["wandb_group"]:
        job["track"]["wandb_group"] = sweep.address.partition("?")[0].rstrip("/").rpartition("/")[2][-128:]
    job["run"] = job["run"] | {"output_dir": join(sweep.address, TRIALS), "name": name_trial(number)}
    return load_resolved(job), values


def run_trial(config: dict[str, Any], sweep: Sweep) -> None:
    """What Ray Tune calls. Raises what the run raises, so that Tune starts it again, from its checkpoint."""
    sweep.environment.apply()
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "600"  # a process that is kept must see its trial end
    from ray_vlm.config.load import dump_job
    from ray_vlm.train.driver import TrialContext, train

    number = config["number"]
    drawn = sweep.draws[number] if sweep.draws else {k: v for k, v in config.items() if k != "number"}
    job, values = build_trial_job(sweep, number, drawn)
    with tell_tune(job, sweep) as told:
        if not _was_pruned(job):
            if refused := _had_no_room(job, sweep.began):
                raise RunError(refused)
            text = f"# trial {name_trial(number)}: {json.dumps(values)}\n"
            text += yaml.safe_dump(dump_job(job), sort_keys=False, allow_unicode=True)
            try:
                train(job, text, resume=True, hosted=TrialContext(sweep.parts, told.ended.is_set, sweep.at_once))
            except Interrupted:
                if not told.ended.is_set():
                    raise
    if told.ended.is_set():
        sys.exit(0)  # Tune expects no more of it


def _had_no_room(job: JobConfig, began: float) -> str | None:
    """What the trial ended with since the sweep began, where a card had no room: Tune tries it again, and the same
    settings would end alike. A sweep that is resumed does train it again, since its cluster may be another one."""
    with suppress(RunError):
        last = (read_run(join(job.run.output_dir, str(job.run.name))).attempts or [{}])[-1]
        if NO_ROOM in str(last.get("error", "")) and last.get("ended", 0.0) >= began:
            return str(last["error"])
    return None


def _was_pruned(job: JobConfig) -> bool:
    with suppress(RunError):
        return read_run(join(job.run.output_dir, str(job.run.name))).status == PRUNED
    return False


@dataclass
class Told:
    """What Tune has heard: the last step, and whether it wants no more."""

    step: int = -1
    ended: threading.Event = field(default_factory=threading.Event)


@contextmanager
def tell_tune(job: JobConfig, sweep: Sweep) -> Iterator[Told]:
    """Report every validation of the run to Tune as it is written, the last one when the run is over: Tune would
    otherwise end a trial that is writing its weights."""
    store = Store(join(job.run.output_dir, str(job.run.name)))
    told, over = Told(), threading.Event()

    def follow() -> None:
        seen = -1
        while not told.ended.is_set():
            last, data = over.wait(_POLL_S[store.local is not None]), _read(store)
            if len(data) != seen or last:
                seen = len(data)
                _report(data, told, sweep.metric, whole=last)
            if last:
                return

    thread = threading.Thread(target=follow, name="ray-vlm-tell-tune", daemon=True)
    thread.start()
    try:
        yield told
    finally:
        over.set()
        thread.join()


def _read(store: Store) -> bytes:
    try:
        return store.read("metrics.jsonl") or b""
    except OSError:
        return b""


def _report(data: bytes, told: Told, metric: str, whole: bool) -> None:
    from ray import tune

    lines = [line for text in data.splitlines() if (line := read_line(text)) is not None]
    end = max((line.get("num_steps") or 0 for line in lines if line["kind"] == "start"), default=0)
    for line in current_lines(lines):
        if line["kind"] != "eval" or line["step"] <= told.step or (line["step"] >= end and not whole):
            continue
        numbers = {k: float(v) for k, v in line.items() if is_number(v)}
        score = score_of_trial(line, metric)
        told.step = line["step"]
        try:
            tune.report(numbers | {"step": line["step"], "score": WORST if score is None else score})
        except SystemExit:  # how Tune tells that the trial is to end
            told.ended.set()
            return
