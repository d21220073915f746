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
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat

from ray_vlm.runs.keys import setting
from ray_vlm.runs.paths import RunPaths, finite
from ray_vlm.runs.schema import is_number, is_sound_line, load_sound
from ray_vlm.storage import making, replacing

if TYPE_CHECKING:
    from PIL.Image import Image

LINE_KEYS = ("kind", "attempt", "step", "epoch", "time")  # keys of a line that are no metrics
NOT_MEASURES = (*LINE_KEYS, "validation_s", "background_s")  # keys of a validation's line that are no measures
LOWER_IS_BETTER = ("loss",)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all complete lines of a `metrics.jsonl`; a line cut off by a crash is skipped."""
    if not path.is_file():
        return []
    return sound_lines(path.read_bytes())


def sound_lines(data: bytes) -> list[dict[str, Any]]:
    """Return all complete and valid lines in the bytes of a `metrics.jsonl`."""
    return [line for line in whole_lines(data) if is_sound_line(line)]


def read_line(text: bytes) -> dict[str, Any] | None:
    """Return one line of `metrics.jsonl`, or None for one that a crash cut off."""
    return next(iter(sound_lines(text)), None)


def whole_lines(data: bytes) -> list[Any]:
    """Return the values of all complete JSON lines; a line cut off by a crash is skipped."""
    texts = data.splitlines()
    try:  # parsing all lines at once takes a third of the time
        return load_sound(b"[" + b",".join(texts) + b"]")
    except ValueError:
        return [value for text in texts for value in _whole_line(text)]


def _whole_line(text: bytes) -> list[Any]:
    try:
        return [load_sound(text)]
    except ValueError:
        return []


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
            self._best = self._best_validation()
        self._best = best or self._best
        if line["kind"] == "start" or self._is_due(line["kind"] in ("eval", "checkpoint", "epoch")):
            with suppress(OSError):  # of a full disk: the next checkpoint raises it, the driver writes the log again
                self._check()
                self.write()

    def finish(self, status: str, best: Mapping[str, Any] | None = None) -> None:
        """Write the log of a run that has ended. `best`: as in `add`."""
        self._about["status"] = status
        self._best = best or self._best_validation()
        self.write()

    def write(self) -> None:
        """Replace the file, with one entry a line."""
        started = self._clock()
        path = self._paths.training_log
        with making(path), replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(f'{{\n "run": {json.dumps(finite(self._about | {"written": time.time()}))},\n')
            file.write(f' "configuration": {json.dumps(finite(self._configuration), indent=1)}')
            for kind, history in HISTORIES.items():
                file.write(f',\n "{history}": [')
                file.writelines(f"{',' if i else ''}\n  {text}" for i, (_, text) in enumerate(self._texts[kind]))
                file.write("\n ]")
            file.write(f',\n "best_checkpoint": {json.dumps(finite(self._best))}\n}}\n')
        self._written = self._clock()
        self._took = self._written - started
        self._spent += self._took

    def _best_validation(self) -> dict[str, Any] | None:
        """Return the best validation in the form of `best_checkpoint`, or None."""
        validations = [json.loads(text) | {"kind": "eval"} for _, text in self._texts["eval"]]
        line = best_line(validations, str(setting(self._configuration, "evaluate.metric") or "loss"))
        if line is None:
            return None
        metrics = {key: value for key, value in line.items() if key not in LINE_KEYS}
        return {"step": line["step"], "metrics": metrics, "path": self._paths.uri("best")}

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
            entry = {key: value for key, value in line.items() if key != "kind"}
            self._texts[kind].append((step, json.dumps(finite(entry))))
            self._about["step"] = max(step, self._about["step"])


def write_training_log(paths: RunPaths, status: str, best: Mapping[str, Any] | None = None) -> None:
    """Write the `training_log.json` of a run that has ended from its `metrics.jsonl`.

    `best`: the best checkpoint from the workers; None: the best validation.
    """
    log = TrainingLog(paths, json.loads(paths.resolved.read_text()), read_metrics(paths.metrics))
    log.finish(status, best)
    paths.publish(paths.training_log)
