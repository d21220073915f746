"""Reading runs: a folder that is complete, cut off by a crash or still growing, or a `training_log.json` on its own.

Missing or damaged files in a folder are no errors here: they are listed in `Run.faults`, and the rest is read.
"""

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ray_vlm.errors import RunError
from ray_vlm.runs.keys import setting
from ray_vlm.runs.manifest import living_driver
from ray_vlm.runs.monitor import HISTORIES, best_line, current_lines, sound_lines, write_training_log
from ray_vlm.runs.paths import open_run
from ray_vlm.runs.schema import (
    is_number,
    is_sound_line,
    keep_sound,
    load_manifest,
    load_resolved,
    load_scores,
    load_sound,
    number_of,
)
from ray_vlm.storage import Store, is_remote, join, local_path, split_address, split_options

LOG = "training_log.json"
MARKS = ("run.json", "resolved.json", LOG)  # a folder with one of these is a run
_DEEPEST = 3  # depth of the search for runs under an output folder


@dataclass(frozen=True)
class Run:
    """The contents of a run folder. `job`: the resolved job; `about`: `run.json`; `lines`: all of `metrics.jsonl`;
    `evaluations`: `metrics.json` of each folder in `evaluate/`; `folders`: names of weights and checkpoints.

    `log`: for a `training_log.json` without its folder, the run's name in it; `address` is then the file's.
    """

    address: str
    job: Mapping[str, Any]
    about: Mapping[str, Any]
    lines: Sequence[dict[str, Any]]
    evaluations: Mapping[str, dict[str, Any]]
    folders: tuple[str, ...]
    faults: tuple[str, ...]
    log: str | None = None

    @property
    def name(self) -> str:
        """The name of the folder, or the name in the training log."""
        return self.log or split_address(self.address)[1]

    @property
    def folder(self) -> str:
        """The address of the run's folder, or of the training log's folder."""
        return split_address(self.address)[0] if self.log else self.address

    @cached_property
    def current(self) -> list[dict[str, Any]]:
        """The lines without those of steps that a later attempt repeated."""
        return current_lines(self.lines)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the current lines of a kind: train, eval, epoch..."""
        return [line for line in self.current if line["kind"] == kind]

    @cached_property
    def status(self) -> str:
        """The status in `run.json`; `died` instead of `running` if its process on this machine is gone; or `?`."""
        status = str(self.about.get("status", "?"))
        driver = self.attempts[-1].get("driver") if self.attempts else None
        if status != "running" or not driver or driver["host"] != platform.node():
            return status
        return status if living_driver(self.about) else "died"

    @property
    def step(self) -> int:
        """The last step that was trained."""
        return max((line["step"] for line in self.current if "step" in line), default=0)

    @property
    def num_steps(self) -> int | None:
        """The planned number of steps, or None if the run has not written it."""
        if (result := self.about.get("result")) is not None:
            return result.get("num_steps")
        return next((line["num_steps"] for line in reversed(self.lines) if is_number(line.get("num_steps"))), None)

    @property
    def metric(self) -> str:
        """The metric that selects `best/`."""
        return str(setting(self.job, "evaluate.metric") or "loss")

    @cached_property
    def best(self) -> dict[str, Any] | None:
        """The best validation line by the job's metric."""
        return best_line(self.current, self.metric)

    @property
    def started(self) -> float | None:
        """The start of the first attempt, seconds since 1970."""
        return next((a["started"] for a in self.attempts if a.get("started") is not None), None)

    @cached_property
    def wall_s(self) -> float:
        """Seconds of all attempts together. One without an end counts until the last line, or now if it runs."""
        total = 0.0
        for attempt in self.attempts:
            begun, end = attempt.get("started"), attempt.get("ended")
            if end is None:
                last = max((line["time"] for line in self.lines if is_number(line.get("time"))), default=0.0)
                end = time.time() if attempt is self.attempts[-1] and self.status == "running" else last
            total += max(0.0, end - begun) if begun is not None else 0.0
        return total

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """The attempts in `run.json`."""
        return self.about.get("attempts") or []

    def section(self, key: str) -> dict[str, Any]:
        """Return a section of `run.json` (hardware, versions); empty if it is missing."""
        value = self.about.get(key)
        return value if isinstance(value, dict) else {}

    @property
    def num_attempts(self) -> int:
        """The number of attempts, including those that Ray started by itself."""
        started = [line["attempt"] for line in self.lines if line["kind"] == "start"]
        return max([len(self.attempts), *started, *(attempt.get("attempt") or 0 for attempt in self.attempts)])


def read_run(address: str) -> Run:
    """Read the run at `address`: a folder, an object store or a `training_log.json`. Raises `RunError` without one."""
    store = Store(address)
    if is_log(store.address):
        return _read_log(store.address)
    try:
        names = store.names()
        if set(MARKS) & set(names) == {LOG}:
            return _read_log(join(store.address, LOG))
        if not set(MARKS) & set(names):
            raise RunError(
                f"{store.address}: no run here (neither {' nor '.join(MARKS)}). `ray-vlm runs list` shows them."
            )
        faults: list[str] = []
        job, about = load_resolved(store, faults), load_manifest(store, faults)
        lines = _read_lines(store, faults)
        evaluations = _read_evaluations(store, faults) if "evaluate" in names else {}
    except OSError as error:
        raise RunError(f"{store.address} cannot be read ({error}).") from None
    folders = tuple(name for name in names if name in ("best", "final") or name.startswith("checkpoint-"))
    return Run(store.address, job, about, lines, evaluations, folders, tuple(faults))


def is_log(address: str) -> bool:
    """Return whether `address` is a file, which can only be a `training_log.json`, and not a run's folder."""
    if is_remote(address):
        return split_options(address)[0].endswith(".json")
    return Path(local_path(address)).is_file()


def _read_log(address: str) -> Run:
    """Read a `training_log.json`, its entries as lines of `metrics.jsonl`. Raises `RunError` for any other file."""
    folder, file = split_address(address)
    try:
        data = Store(folder).read(file)
        if data is None:
            raise RunError(f"{address}: no such file.")
        log = load_sound(data)
    except OSError as error:
        raise RunError(f"{address} cannot be read ({error}).") from None
    except ValueError as error:
        raise RunError(
            f"{address} is cut off or altered ({error}). Give the run's folder, if it is still there."
        ) from None
    if not isinstance(log, dict) or not {"configuration", HISTORIES["train"]} <= set(log):
        raise RunError(f"{address} is no training log: `configuration` and `{HISTORIES['train']}` are missing in it.")
    faults: list[str] = []
    header, job = (log[key] if isinstance(log.get(key), dict) else {} for key in ("run", "configuration"))
    if job is not log["configuration"]:
        faults.append(f"{address}: its configuration is no object")
    keep_sound("resolved.json", job, address, faults)
    lines = _log_lines(log, faults)
    about: dict[str, Any] = {"status": str(header.get("status", "?")), "attempts": _attempts(lines)}
    if is_number(num_steps := header.get("num_steps")):
        about["result"] = {"num_steps": num_steps}
    stem = file.removesuffix(".json")
    outer = split_address(folder)[1] if file == LOG else stem
    names = (header.get("name"), setting(job, "run.name"), outer, stem)
    name = next(name for name in names if isinstance(name, str) and name)
    return Run(address, job, about, lines, {}, (), tuple(faults), name)


def _log_lines(log: Mapping[str, Any], faults: list[str]) -> list[dict[str, Any]]:
    lines = []
    for kind, history in HISTORIES.items():
        listed = log.get(history) or []
        listed = listed if isinstance(listed, list) else [listed]
        entries = [{"kind": kind} | entry for entry in listed if isinstance(entry, dict)]
        sound = [line for line in entries if is_sound_line(line)]
        if len(sound) < len(listed):
            faults.append(f"{len(listed) - len(sound)} of {len(listed)} entries of its {history} are altered")
        lines += sound
    # The sort is stable, so lines of one step stay in the order of `HISTORIES`.
    return sorted(lines, key=lambda line: (line["attempt"], line["step"]))


def _attempts(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the attempts of the lines in the form of `run.json`, each from its first line to its last."""
    attempts: dict[int, dict[str, Any]] = {}
    for line in lines:
        if is_number(line.get("time")):
            begun = line["time"] - (number_of(line, "step_s") if line["kind"] == "train" else 0.0)
            known = attempts.setdefault(line["attempt"], {"attempt": line["attempt"], "started": begun})
            known |= {"started": min(begun, known["started"]), "ended": max(line["time"], known.get("ended", 0.0))}
    return list(attempts.values())


def complete_log(run: Run) -> None:
    """Complete the `training_log.json` of a run whose driver was killed, unless that was done before."""
    if run.log is not None or run.status != "died" or not run.job:
        return
    with suppress(OSError, RunError):  # of a read-only folder: the run is shown anyway
        if LOG in Store(run.address).names() and _read_log(join(run.address, LOG)).status == run.status:
            return
        paths = open_run(run.address)
        try:
            paths.refresh(paths.metrics, paths.resolved)
            write_training_log(paths, run.status)
        finally:
            paths.discard()


def _read_lines(store: Store, faults: list[str]) -> list[dict[str, Any]]:
    data = store.read("metrics.jsonl")
    if data is None:
        faults.append("metrics.jsonl is missing")
        return []
    lines, written = sound_lines(data), len(data.splitlines())
    if len(lines) < written:
        faults.append(f"{written - len(lines)} of {written} lines of metrics.jsonl are cut off or altered")
    return lines


def _read_evaluations(store: Store, faults: list[str]) -> dict[str, dict[str, Any]]:
    evaluations = {}
    for name in sorted(store.files("evaluate")):
        folder, _, file = name.rpartition("/")
        if file == "metrics.json" and folder and "/" not in folder:
            value = load_scores(store, f"evaluate/{name}", faults)
            if isinstance(value.get("overall"), dict):
                evaluations[folder] = value
    return evaluations


def find_runs(output_dir: str) -> list[str]:
    """Return the sorted addresses of all runs under a folder or an object store."""
    store = Store(output_dir)
    try:
        if store.local is not None:
            return sorted(map(str, _runs_in(store.local, _DEEPEST)))
        marked = {n.rpartition("/")[0] for n in store.files() if n.rpartition("/")[2] in MARKS}
    except OSError as error:
        raise RunError(f"{store.address} cannot be read ({error}).") from None
    return sorted(join(store.address, name) if name else store.address for name in marked)


def _runs_in(folder: Path, deepest: int) -> list[Path]:
    if not folder.is_dir():
        return []
    if any((folder / mark).is_file() for mark in MARKS):
        return [folder]
    inside = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()] if deepest else []
    return [run for path in inside for run in _runs_in(path, deepest - 1)]
