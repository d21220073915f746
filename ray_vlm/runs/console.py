"""Console lines: the progress of long work, and one aligned line for each line of `metrics.jsonl` that is shown.

Progress lines say how much is done, the speed, the time left; work of a few seconds has none.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from ray_vlm.logs import PROGRESS
from ray_vlm.runs.monitor import NOT_MEASURES, read_line
from ray_vlm.runs.paths import RunPaths
from ray_vlm.runs.text import format_duration

logger = logging.getLogger(__name__)
_FIRST_S = 5.0  # shorter work prints no line
_EVERY_S = 10.0  # between lines, later a tenth of the time so far: about 30 lines for an hour
_T = TypeVar("_T")


class Progress:
    """The progress of work of `total` units, None if it is not known. `what`: the start of each line; `clock`: returns
    seconds."""

    def __init__(self, what: str, total: int | None, unit: str = "rows", clock: Callable[[], float] = time.monotonic):
        self._what, self._total, self._unit, self._clock = what, total, unit, clock
        self._started = clock()
        self._due = self._started + _FIRST_S
        self._shown = False

    def reach(self, done: int) -> None:
        """Record that `done` units are done; log a line if one is due, and at the end if there were lines before."""
        now = self._clock()
        spent = now - self._started
        if self._total is not None and done >= self._total:
            if self._shown:
                PROGRESS.info(f"{self._what}: {done:,} {self._unit} in {format_duration(spent)}")
            self._shown = False
        elif now >= self._due:
            rate = done / spent
            speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
            of, left = "", ""
            if self._total is not None:
                of = f" of {self._total:,}"
                left = f", {format_duration((self._total - done) / rate)} left" if done else ""
            PROGRESS.info(f"{self._what}: {done:,}{of} {self._unit}, {speed} a second{left}")
            self._shown = True
            self._due = now + max(_EVERY_S, spent / 10)


def track(items: Iterable[_T], what: str, total: int, unit: str = "rows") -> Iterator[_T]:
    """Yield the items, with progress lines on how many of the `total` were taken."""
    progress = Progress(what, total, unit)
    for number, item in enumerate(items):
        progress.reach(number)
        yield item
    progress.reach(total)


@contextmanager
def lasting(what: str, look: Callable[[], str] = lambda: "", over: threading.Event | None = None) -> Iterator[None]:
    """While the body runs, log lines on the time so far, for work of unknown length.

    `look`: returns more text for a line, or ''. `over`: set it if the work ends before the body does.
    """
    over, started = over or threading.Event(), time.monotonic()

    def repeat() -> None:
        pause = _FIRST_S
        while not over.wait(pause):
            spent = time.monotonic() - started
            more = look()
            PROGRESS.info(f"{what}: {format_duration(spent)} so far{', ' if more else ''}{more}")
            pause = max(_EVERY_S, spent / 10)

    thread = threading.Thread(target=repeat, name="ray-vlm-lasting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


_POLL_S = 0.3
_POLL_REMOTE_S = 3.0


class Console:
    """Logs metrics lines, of training every `log_every_steps`."""

    def __init__(self, num_steps: int, log_every_steps: int):
        self._num_steps = num_steps
        self._every = log_every_steps
        self.begun = threading.Event()  # set once a worker has written a line
        self._first: tuple[int, float] | None = None  # the first step of this attempt and the time of its end

    def show(self, line: dict[str, Any]) -> None:
        """Log one line of `metrics.jsonl`, or nothing."""
        self.begun.set()
        if line["kind"] == "start":
            self._first = None
            logger.info(describe_trainable(line["trainable"]))
            if line["step"]:
                workers = f", with {line['num_workers']} workers" if line.get("num_workers", 1) > 1 else ""
                logger.info(f"attempt {line['attempt']} goes on from step {line['step']}{workers}")
        elif line["kind"] == "checkpoint":
            logger.info(f"checkpoint at step {line['step']} ({line['checkpoint_s']:.1f} s)")
        elif line["kind"] in ("note", "progress"):
            logger.info(line["text"])
        elif line["kind"] == "eval":
            numbers = "  ".join(
                f"{k} {v:.4f}" for k, v in line.items() if isinstance(v, int | float) and k not in NOT_MEASURES
            )
            logger.info(f"validation at step {line['step']}: {numbers}")
        elif line["kind"] == "train":
            self._first = self._first or (line["step"], line["time"])
            if line["step"] % self._every == 0 or line["step"] == self._num_steps:
                logger.info(self._train_line(line))

    def _train_line(self, line: dict[str, Any]) -> str:
        step, (first, ended) = line["step"], self._first or (line["step"], line["time"])
        left = "-"  # unknown after the first step, which is slower than the others
        if step > first or step == self._num_steps:
            left = format_duration((line["time"] - ended) / max(step - first, 1) * (self._num_steps - step))
        count, epoch = f"{step:>{len(str(self._num_steps))}}/{self._num_steps}", line.get("epoch") or 0.0
        shown = "".join(f"{text} {_number(line[name], '.3f')}  " for name, text in _SHOWN.items() if name in line)
        return (
            f"step {count}  epoch {epoch:.2f}  loss {_number(line['loss'], '8.4f')}  {shown}"
            f"lr {_number(line.get('learning_rate'), '.2e')}  grad {_number(line.get('grad_norm'), '7.3f')}  "
            f"{_number(line.get('tokens_per_s'), '8,.0f')} tok/s  left {left:>9}"
        )


_SHOWN = {"reward": "reward", "preference_accuracy": "preferred", "reward_margin": "margin", "kl": "kl"}


def _number(value: float | None, form: str) -> str:
    return "nan" if value is None else format(value, form)


def describe_trainable(counts: dict[str, dict[str, int]]) -> str:
    """Return the table of trainable weights by part of the model, printed at the start of a run."""
    rows = [
        f"  {part:<10} {_shares(c['trainable'], c['total'])}"
        + (f", {c['in_4bit'] / c['total']:.0%} of them in 4 bit" if c.get("in_4bit") and c["total"] else "")
        for part, c in sorted(counts.items())
    ]
    trained, total = (sum(c[key] for c in counts.values()) for key in ("trainable", "total"))
    return "\n".join([f"trainable weights: {_shares(trained, total).strip()}", *rows])


def _shares(trained: int, total: int) -> str:
    return f"{trained:>13,}, {trained / max(total, 1):>7.2%} of the base's {total:>14,}"


@contextmanager
def follow(paths: RunPaths, console: Console) -> Iterator[None]:
    """While the body runs, log each line that another process appends to the run's `metrics.jsonl`."""
    done = threading.Event()
    shown = paths.metrics.stat().st_size if paths.metrics.is_file() else 0  # earlier attempts are not printed again
    thread = threading.Thread(target=_follow, args=(paths, console, done, shown), name="ray-vlm-console", daemon=True)
    thread.start()
    try:
        with lasting("waiting for the workers", over=console.begun):
            yield
    finally:
        done.set()
        thread.join(timeout=5)


def _follow(paths: RunPaths, console: Console, done: threading.Event, read: int) -> None:
    while True:
        last = done.is_set()
        with suppress(OSError):  # a transient failure of an object store; the next poll reads the file
            paths.refresh(paths.metrics)
        if paths.metrics.is_file():
            with open(paths.metrics, "rb") as file:
                file.seek(read)
                text = file.read()
            complete = text[: text.rfind(b"\n") + 1]
            read += len(complete)
            for text in complete.splitlines():
                if (line := read_line(text)) is not None:
                    console.show(line)
        if last:
            return
        done.wait(_POLL_S if paths.remote is None else _POLL_REMOTE_S)
