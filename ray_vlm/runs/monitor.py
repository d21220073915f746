"""Every number that is ever shown: one line in `metrics.jsonl`, and the same to trackers where asked for.

Lines have `kind` start, train (every optimizer step), epoch, eval, checkpoint, energy (of the attempt so far), note or
progress (how far a validation or the load of the base is), with `attempt`, `step` (the true global step), `epoch` and
`time` (seconds since 1970). Only rank 0 writes. The file only grows: an attempt that goes on from step k opens with a
start line of that step, and what earlier attempts say of later steps is history.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_vlm.runs.schema import is_number, is_sound_line, load_sound

LINE_KEYS = ("kind", "attempt", "step", "epoch", "time")  # of a line, beside its numbers
NOT_MEASURES = (*LINE_KEYS, "validation_s", "background_s")  # of a validation's line, beside what was measured
LOWER_IS_BETTER = ("loss",)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a `metrics.jsonl`; a line cut off by a crash is left out."""
    if not path.is_file():
        return []
    return [line for text in path.read_bytes().splitlines() if (line := read_line(text)) is not None]


def whole_lines(data: bytes) -> list[Any]:
    """The values of all whole lines of JSON; a line cut off by a crash is left out."""
    found = []
    for text in data.splitlines():
        try:
            found.append(load_sound(text))
        except ValueError:
            continue
    return found


def read_line(text: bytes) -> dict[str, Any] | None:
    """One line of `metrics.jsonl`, or None for one that a crash cut off."""
    try:
        line = load_sound(text)
    except ValueError:
        return None
    return line if is_sound_line(line) else None


def current_lines(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines without what a later attempt did again: one line for each step that counts."""
    kept: list[dict[str, Any]] = []
    newest = 0
    for line in lines:
        if line["attempt"] < newest:  # a worker of an older attempt that was cut off and is still alive
            continue
        newest = line["attempt"]
        if line["kind"] == "start":
            kept = [old for old in kept if old["step"] <= line["step"] or old["kind"] == "start"]
        kept.append(line)
    return kept


def rank_validation(numbers: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """What validations are ordered by, higher is better: the job's metric, and among equals the validation loss. None
    without a finite number. Of two that are equal in both the later one is taken, which has seen more."""
    value, loss = (numbers.get(name) for name in (metric, "loss"))
    if value is None or not is_number(value):
        return None
    by_loss = -float(loss) if loss is not None and is_number(loss) else -math.inf
    return (-float(value) if metric in LOWER_IS_BETTER else float(value)), by_loss


def best_line(lines: Iterable[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The validation line that is best by `metric` (`rank_validation`), the later one among equals."""
    evals = [line for line in lines if line["kind"] == "eval"]
    ranked = [(rank, i) for i, line in enumerate(evals) if (rank := rank_validation(line, metric))]
    return evals[max(ranked)[1]] if ranked else None


class Monitor:
    """Appends to `metrics.jsonl`; `close` it at the end.

    `trackers`: as `runs/trackers.py` has them. `show` is called with each line written, `record` with the line and
    `best`, the best checkpoint so far, `publish` when the file should be copied to where the run is kept.
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
        """The first line of an attempt: the step that it goes on from, weights by part of the model, and `about`: the
        `device` that rank 0 has by name, `num_steps` in all, `num_workers`."""
        self._put(self._line("start", step) | {"trainable": trainable} | about)
        self.publish()

    def note(self, step: int, text: str) -> None:
        """A sentence for the person who watches."""
        self._put(self._line("note", step) | {"text": text})

    def progress(self, step: int, text: str) -> None:
        """How far something that lasts is; of no interest later."""
        self._put(self._line("progress", step) | {"text": text})

    def _line(self, kind: str, step: int) -> dict[str, Any]:
        return {"kind": kind, "attempt": self._attempt, "step": step, "time": time.time()}

    def write(self, kind: str, step: int, epoch: float, values: dict[str, float]) -> None:
        """One line of numbers. Values become plain floats; NaN and infinity become null."""
        numbers = {k: _plain(v) for k, v in values.items()}
        line = self._line(kind, step) | {"epoch": round(epoch, 4)}
        self._put(line | numbers)
        for tracker in self._trackers:
            tracker.log(kind, line | values, step)

    def pictures(self, step: int, draw: Callable[[], Sequence[tuple[str, Any]]]) -> None:
        """Sample images for the trackers; `draw` gives captions and PIL images, and is called only if there are any."""
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
        """Copy the file to where the run is kept; should the store stumble, the next time brings all."""
        with suppress(OSError):
            self._publish()

    def close(self) -> None:
        """Write out and copy what is left, that of trackers too."""
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
