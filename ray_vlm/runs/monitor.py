"""The metrics of a run: one JSON line each in `metrics.jsonl`, the same numbers for trackers, and `training_log.json`.

Lines have `kind` start, train (every optimizer step), epoch, eval, checkpoint, energy (of the attempt so far), note or
progress (of a validation or of loading the base), with `attempt`, `step` (the true global step), `epoch` and
`time` (seconds since 1970). Only rank 0 writes. The file only grows: an attempt that resumes from step k begins with a
start line of step k, which supersedes lines of later steps of earlier attempts (`current_lines`).

`training_log.json` is the whole run in one file, for people and other tools: `run` (name, status, step),
`configuration`, `training_history`, `epoch_history`, `validation_history` and `best_checkpoint` (step, metrics, path).
It is replaced atomically during the run, so it can be read at any time. After a crash the next attempt, or a command
that reads the run, completes it from `metrics.jsonl`.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat

from ray_vlm.errors import RunError
from ray_vlm.runs.paths import RunPaths, finite
from ray_vlm.runs.schema import is_number, is_sound_line, keep_sound, load_sound, number_of
from ray_vlm.runs.store import making

if TYPE_CHECKING:
    from PIL.Image import Image

LINE_KEYS = ("kind", "attempt", "step", "epoch", "time")  # keys of a line that are no metrics
NOT_MEASURES = (*LINE_KEYS, "validation_s", "background_s")  # keys of a validation's line that are no measures
LOWER_IS_BETTER = ("loss",)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all complete lines of a `metrics.jsonl`; a line cut off by a crash is skipped."""
    if not path.is_file():
        return []
    return [line for text in path.read_bytes().splitlines() if (line := read_line(text)) is not None]


def whole_lines(data: bytes) -> list[Any]:
    """Return the values of all complete JSON lines; a line cut off by a crash is skipped."""
    values = []
    for text in data.splitlines():
        try:
            values.append(load_sound(text))
        except ValueError:
            continue
    return values


def read_line(text: bytes) -> dict[str, Any] | None:
    """Return one line of `metrics.jsonl`, or None for one that a crash cut off."""
    try:
        line = load_sound(text)
    except ValueError:
        return None
    return line if is_sound_line(line) else None


def current_lines(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines without those of steps that a later attempt repeated."""
    current: list[dict[str, Any]] = []
    newest = 0
    for line in lines:
        if line["attempt"] < newest:  # of an older attempt's worker that is alive, such as after a network failure
            continue
        newest = line["attempt"]
        if line["kind"] == "start":
            current = [old for old in current if old["step"] <= line["step"] or old["kind"] == "start"]
        current.append(line)
    return current


def rank_validation(numbers: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """Return the sort key of a validation, higher is better: the job's metric, then the loss. None if the metric is not
    finite. Of two equal ones the caller takes the later one, which was trained on more rows."""
    value, loss = (numbers.get(name) for name in (metric, "loss"))
    if value is None or not is_number(value):
        return None
    by_loss = -float(loss) if loss is not None and is_number(loss) else -math.inf
    return (-float(value) if metric in LOWER_IS_BETTER else float(value)), by_loss


def best_line(lines: Iterable[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """Return the best validation line by `metric` (`rank_validation`), the latest one among equals."""
    evals = [line for line in lines if line["kind"] == "eval"]
    ranked = [(rank, i) for i, line in enumerate(evals) if (rank := rank_validation(line, metric))]
    return evals[max(ranked)[1]] if ranked else None


class Tracker(Protocol):
    """A service that gets the numbers and sample images of a run, such as those of `runs/trackers.py`."""

    def log(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Log one line's numbers."""

    def pictures(self, images: "Sequence[tuple[str, Image]]", step: int) -> None:
        """Log sample images of a validation, each with its caption."""

    def finish(self) -> None:
        """Send the remaining data and end."""


class Monitor:
    """Appends to `metrics.jsonl`; call `close` at the end.

    `show` is called with each line, `record` with each line and `best`, the best checkpoint so far, and `publish` when
    the file should be copied to an object store.
    """

    def __init__(
        self,
        path: Path,
        attempt: int,
        trackers: Sequence[Tracker] = (),
        show: Callable[[dict[str, Any]], None] | None = None,
        publish: Callable[[], None] | None = None,
        record: Callable[[dict[str, Any], Mapping[str, Any] | None], None] | None = None,
    ):
        torn = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        if torn:  # an earlier attempt died inside a line
            self._file.write("\n")
        self._attempt = attempt
        self._show = show
        self._publish = publish or (lambda: None)
        self._record = record
        self._trackers = trackers
        self.closed = False

    def start(self, step: int, trainable: dict[str, dict[str, int]], **about: object) -> None:
        """Write the first line of an attempt: the step that it resumes from, the trainable weights by part of the
        model, and `about`: the name of rank 0's `device`, the total `num_steps`, and `num_workers`."""
        self._put(self._line("start", step) | {"trainable": trainable} | about)
        self.publish()

    def text(self, kind: str, step: int, text: str) -> None:
        """Write a message for the user (`note`), or on the progress of long work (`progress`)."""
        self._put(self._line(kind, step) | {"text": text})

    def _line(self, kind: str, step: int) -> dict[str, Any]:
        return {"kind": kind, "attempt": self._attempt, "step": step, "time": time.time()}

    def write(
        self,
        kind: str,
        step: int,
        epoch: float,
        values: dict[str, float],
        best: Mapping[str, Any] | None = None,
    ) -> None:
        """Write one line of numbers. Values become plain floats; NaN and infinity become null.

        `best`: step, metrics and path of the best checkpoint so far.
        """
        numbers = {k: _plain(v) for k, v in values.items()}
        line = self._line(kind, step) | {"epoch": round(epoch, 4)}
        self._put(line | numbers, best)
        for tracker in self._trackers:
            tracker.log(kind, line | values, step)

    def pictures(self, step: int, draw: "Callable[[], Sequence[tuple[str, Image]]]") -> None:
        """Send sample images to the trackers, if there are any. `draw` returns captions and images."""
        if self._trackers and (images := draw()):
            for tracker in self._trackers:
                tracker.pictures(images, step)

    def _put(self, line: dict[str, Any], best: Mapping[str, Any] | None = None) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._record is not None:
            self._record(line, best)
        if self._show is not None:
            self._show(line)

    def publish(self) -> None:
        """Copy the file to the object store, if any; after a failure the next call copies everything."""
        with suppress(OSError):
            self._publish()

    def close(self) -> None:
        """Close the file and the trackers, and publish both."""
        self._file.close()
        self.publish()
        for tracker in self._trackers:
            tracker.finish()
        self.closed = True
        if self._trackers:
            self.publish()


def _plain(value: SupportsFloat) -> float | int | None:
    number = value if isinstance(value, int) and not isinstance(value, bool) else float(value)
    return number if math.isfinite(number) else None


def as_python_numbers(metrics: dict[str, Any]) -> dict[str, int | float | str]:
    """Return the numbers as Python types: Ray fails on numbers of numpy or torch in a report."""
    return {k: v if type(v) in (int, str, bool) else float(v) for k, v in metrics.items()}


HISTORIES = {"train": "training_history", "epoch": "epoch_history", "eval": "validation_history"}
_EVERY_S = 10.0  # between two writes without a validation or checkpoint
_STEP_S = 0.0005  # mean time of a step that writing may take, for long logs
_QUICK_S = 0.25  # a log that takes at most this long is written at every validation and checkpoint


class TrainingLog:
    """The `training_log.json` of a running run, on rank 0. `lines`: the current contents of `metrics.jsonl`.

    Every line is stored as encoded text, so that writing the log is fast. `check` is called before each write and
    raises if another attempt has taken over the run; `clock`: returns seconds.
    """

    def __init__(
        self,
        paths: RunPaths,
        configuration: Mapping[str, Any],
        lines: Iterable[dict[str, Any]] = (),
        check: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._paths, self._configuration = paths, configuration
        self._check, self._clock = check, clock
        self._about: dict[str, Any] = {"name": paths.name, "status": "running", "step": 0}
        self._texts: dict[str, list[tuple[int, str]]] = {kind: [] for kind in HISTORIES}
        self._best: Mapping[str, Any] | None = None
        self._written = -_EVERY_S
        self._steps = 0  # trained in this attempt
        self._spent = self._took = 0.0  # seconds of all writes, and of the last one
        for line in current_lines(lines):
            self._take(line)

    def add(self, line: dict[str, Any], best: Mapping[str, Any] | None = None) -> None:
        """Add a line of `metrics.jsonl`, and write the log if that is due.

        `best`: the best checkpoint; None: the best validation so far.
        """
        self._take(line)
        self._steps += line["kind"] == "train"
        if line["kind"] == "start":
            known = [json.loads(text) | {"kind": "eval"} for _, text in self._texts["eval"]]
            self._best = _find_best(known, self._configuration, self._paths.uri("best"))
        self._best = best or self._best
        if line["kind"] == "start" or self._is_due(line["kind"] in ("eval", "checkpoint", "epoch")):
            with suppress(OSError):  # of a full disk: the next checkpoint raises it, the driver writes the log again
                self._check()
                self.write()

    def write(self) -> None:
        """Replace the file."""
        started = self._clock()
        about = self._about | {"written": time.time()}
        texts = {kind: [text for _, text in known] for kind, known in self._texts.items()}
        write_log(self._paths.training_log, about, self._configuration, texts, self._best)
        self._written = self._clock()
        self._took = self._written - started
        self._spent += self._took

    def _is_due(self, important: bool) -> bool:
        if important and self._took <= _QUICK_S:
            return True
        return self._clock() - self._written >= _EVERY_S and self._spent <= _STEP_S * self._steps

    def _take(self, line: dict[str, Any]) -> None:
        kind, step = line["kind"], line["step"]
        if kind == "start":  # later steps of earlier attempts are repeated
            self._texts = {k: [(s, text) for s, text in known if s <= step] for k, known in self._texts.items()}
            self._about |= {"step": step} | ({"num_steps": line["num_steps"]} if "num_steps" in line else {})
        elif kind in HISTORIES:
            self._texts[kind].append((step, encode_line(line)))
            self._about["step"] = max(step, self._about["step"])


def encode_line(line: Mapping[str, Any]) -> str:
    """Encode a line of `metrics.jsonl` as an entry of its history."""
    return json.dumps(finite({key: value for key, value in line.items() if key != "kind"}))


def write_log(
    path: Path,
    about: Mapping[str, Any],
    configuration: Mapping[str, Any],
    texts: Mapping[str, Sequence[str]],
    best: Mapping[str, Any] | None,
) -> None:
    """Write a `training_log.json` atomically, one entry a line. `texts`: encoded entries by kind of line."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with making(path), open(temporary, "w", encoding="utf-8") as file:
            file.write(f'{{\n "run": {json.dumps(finite(about))},\n')
            file.write(f' "configuration": {json.dumps(finite(configuration), indent=1)}')
            for kind, history in HISTORIES.items():
                file.write(f',\n "{history}": [')
                file.writelines(f"{',' if i else ''}\n  {text}" for i, text in enumerate(texts.get(kind, ())))
                file.write("\n ]")
            file.write(f',\n "best_checkpoint": {json.dumps(finite(best))}\n}}\n')
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_training_log(paths: RunPaths, status: str, best: Mapping[str, Any] | None = None) -> None:
    """Write the `training_log.json` of a run that has ended from its `metrics.jsonl`.

    Repeated steps count once, from the later attempt. `best`: the best checkpoint from the workers; None: the best
    validation.
    """
    lines = current_lines(read_metrics(paths.metrics))
    configuration = json.loads(paths.resolved.read_text())
    texts = {kind: [encode_line(line) for line in lines if line["kind"] == kind] for kind in HISTORIES}
    planned = [line["num_steps"] for line in lines if line["kind"] == "start" and "num_steps" in line]
    about = {"name": paths.name, "status": status, "step": max((line["step"] for line in lines), default=0)}
    about |= {"num_steps": planned[-1]} if planned else {}
    best = best or _find_best(lines, configuration, paths.uri("best"))
    write_log(paths.training_log, about | {"written": time.time()}, configuration, texts, best)
    paths.publish(paths.training_log)


def _find_best(lines: Iterable[dict[str, Any]], configuration: object, path: str) -> dict[str, Any] | None:
    """Return the best validation in the form of `best_checkpoint`, or None. `path`: of `best/`."""
    evaluate = configuration.get("evaluate") if isinstance(configuration, Mapping) else None
    metric = evaluate.get("metric") if isinstance(evaluate, Mapping) else None
    if (line := best_line(lines, str(metric or "loss"))) is None:
        return None
    metrics = {key: value for key, value in line.items() if key not in LINE_KEYS}
    return {"step": line["step"], "metrics": metrics, "path": path}


@dataclass(frozen=True)
class LogContent:
    """The contents of a `training_log.json`: `run`, the job, and the entries as lines of `metrics.jsonl`."""

    about: dict[str, Any]
    configuration: dict[str, Any]
    lines: list[dict[str, Any]]
    faults: tuple[str, ...] = ()


def parse_log(data: bytes, name: str) -> LogContent:
    """Parse the valid parts of a training log's bytes. Raises `RunError` if they are no training log.

    `name`: of the file in errors and faults.
    """
    try:
        log = load_sound(data)
    except ValueError as error:
        raise RunError(
            f"{name} is cut off or altered ({error}). Give the run's folder, if it is still there."
        ) from None
    if not isinstance(log, dict) or not {"configuration", HISTORIES["train"]} <= set(log):
        raise RunError(f"{name} is no training log: `configuration` and `{HISTORIES['train']}` are missing in it.")
    faults: list[str] = []
    configuration, about = log["configuration"], log.get("run")
    if not isinstance(configuration, dict):
        faults.append(f"{name}: its configuration is no object")
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
    lines.sort(key=lambda line: (line["attempt"], line["step"]))
    job = keep_sound("resolved.json", configuration if isinstance(configuration, dict) else {}, name, faults)
    return LogContent(about if isinstance(about, dict) else {}, job, lines, tuple(faults))


def describe_attempts(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the attempts of the lines in the form of `run.json`, each from its first line to its last."""
    attempts: dict[int, dict[str, Any]] = {}
    for line in lines:
        if is_number(line.get("time")):
            begun = line["time"] - (number_of(line, "step_s") if line["kind"] == "train" else 0.0)
            known = attempts.setdefault(line["attempt"], {"attempt": line["attempt"], "started": begun})
            known |= {"started": min(begun, known["started"]), "ended": max(line["time"], known.get("ended", 0.0))}
    return [attempts[number] for number in sorted(attempts)]
