"""The metrics of a run: one JSON line each in `metrics.jsonl`, and the same numbers for trackers.

Lines have `kind` start, train (every optimizer step), epoch, eval, checkpoint, energy (of the attempt so far), note or
progress (of a validation or of loading the base), with `attempt`, `step` (the true global step), `epoch` and
`time` (seconds since 1970). Only rank 0 writes. The file only grows: an attempt that resumes from step k begins with a
start line of step k, which supersedes lines of later steps of earlier attempts (`current_lines`).
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_vlm.runs.schema import is_number, is_sound_line, load_sound

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
        if (
            line["attempt"] < newest
        ):  # a worker of an older attempt that is still alive, such as after a network failure
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


class Monitor:
    """Appends to `metrics.jsonl`; call `close` at the end.

    `trackers`: see `runs/trackers.py`. `show` is called with each line, `record` with each line and `best`, the best
    checkpoint so far, and `publish` when the file should be copied to an object store.
    """

    def __init__(
        self,
        path: Path,
        attempt: int,
        trackers: Sequence[Any] = (),
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
        self.best: Mapping[str, Any] | None = None  # step, metrics and path of the best checkpoint so far

    def start(self, step: int, trainable: dict[str, dict[str, int]], **about: Any) -> None:
        """Write the first line of an attempt: the step that it resumes from, the trainable weights by part of the
        model, and `about`: the name of rank 0's `device`, the total `num_steps`, and `num_workers`."""
        self._put(self._line("start", step) | {"trainable": trainable} | about)
        self.publish()

    def note(self, step: int, text: str) -> None:
        """Write a message for the user."""
        self._put(self._line("note", step) | {"text": text})

    def progress(self, step: int, text: str) -> None:
        """Write a line on the progress of long work."""
        self._put(self._line("progress", step) | {"text": text})

    def _line(self, kind: str, step: int) -> dict[str, Any]:
        return {"kind": kind, "attempt": self._attempt, "step": step, "time": time.time()}

    def write(self, kind: str, step: int, epoch: float, values: dict[str, float]) -> None:
        """Write one line of numbers. Values become plain floats; NaN and infinity become null."""
        numbers = {k: _plain(v) for k, v in values.items()}
        line = self._line(kind, step) | {"epoch": round(epoch, 4)}
        self._put(line | numbers)
        for tracker in self._trackers:
            tracker.log(kind, line | values, step)

    def pictures(self, step: int, draw: Callable[[], Sequence[tuple[str, Any]]]) -> None:
        """Send sample images to the trackers. `draw` returns captions and PIL images; it is not called without any."""
        if self._trackers and (images := draw()):
            for tracker in self._trackers:
                tracker.pictures(images, step)

    def _put(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._record is not None:
            self._record(line, self.best)
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


def _plain(value: Any) -> float | int | None:
    number = value if isinstance(value, int) and not isinstance(value, bool) else float(value)
    return number if math.isfinite(number) else None


def as_python_numbers(metrics: dict[str, Any]) -> dict[str, int | float | str]:
    """Return the numbers as Python types: Ray fails on numbers of numpy or torch in a report."""
    return {k: v if type(v) in (int, str, bool) else float(v) for k, v in metrics.items()}
