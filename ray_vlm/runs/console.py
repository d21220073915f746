"""What a person sees in the terminal while a run goes on: one aligned line for each metrics line worth showing."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray_vlm.runs.monitor import NOT_MEASURES, read_line
from ray_vlm.runs.paths import RunPaths

_POLL_S = 0.3
_POLL_REMOTE_S = 3.0


class Console:
    """Prints metrics lines; `log_every_steps` thins out training lines. `say` is where lines go (print)."""

    def __init__(self, num_steps: int, log_every_steps: int, say: Callable[[str], None] | None = None):
        self._num_steps = num_steps
        self._every = log_every_steps
        self._say = say or (lambda text: print(text, flush=True))
        self._first: tuple[int, float] | None = None

    def show(self, line: dict[str, Any]) -> None:
        """Print one line of `metrics.jsonl`, or nothing."""
        if line["kind"] == "start":
            self._first = None
            self._say(describe_trainable(line["trainable"]))
            if line["step"]:
                self._say(f"attempt {line['attempt']} goes on from step {line['step']}")
        elif line["kind"] == "checkpoint":
            self._say(f"checkpoint at step {line['step']} ({line['checkpoint_s']:.1f} s)")
        elif line["kind"] == "note":
            self._say(line["text"])
        elif line["kind"] == "eval":
            numbers = "  ".join(
                f"{k} {v:.4f}" for k, v in line.items() if isinstance(v, int | float) and k not in NOT_MEASURES
            )
            self._say(f"validation at step {line['step']}: {numbers}")
        elif line["kind"] == "train":
            self._first = self._first or (line["step"] - 1, line["time"] - (line.get("step_s") or 0.0))
            if line["step"] % self._every == 0 or line["step"] == self._num_steps:
                self._say(self._train_line(line))

    def _train_line(self, line: dict[str, Any]) -> str:
        step, (first, started) = line["step"], self._first or (0, line["time"])
        left = max(0, int((line["time"] - started) / max(step - first, 1) * (self._num_steps - step)))
        shown = "".join(f"{text} {_number(line[name], '.3f')}  " for name, text in _SHOWN.items() if name in line)
        return (
            f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  loss {_number(line['loss'], '8.4f')}  {shown}"
            f"lr {_number(line.get('learning_rate'), '.2e')}  grad {_number(line.get('grad_norm'), '7.3f')}  "
            f"{_number(line.get('tokens_per_s'), '8,.0f')} tok/s  left {left // 60:3d}:{left % 60:02d}"
        )


_SHOWN = {"reward": "reward", "preference_accuracy": "preferred", "reward_margin": "margin", "kl": "kl"}


def _number(value: float | None, form: str) -> str:
    return "nan" if value is None else format(value, form)


def describe_trainable(counts: dict[str, dict[str, int]]) -> str:
    """What is trainable, how much and where: the table at the start of a run."""
    total = sum(c["total"] for c in counts.values())
    trained = sum(c["trainable"] for c in counts.values())
    rows = [
        f"  {part:<10} {c['trainable']:>13,} of {c['total']:>14,}"
        + (f", {c['in_4bit'] / c['total']:.0%} in 4 bit" if c.get("in_4bit") else "")
        for part, c in sorted(counts.items())
    ]
    return "\n".join([f"trainable weights: {trained:,} of {total:,} ({trained / max(total, 1):.2%})", *rows])


@contextmanager
def follow(paths: RunPaths, console: Console) -> Iterator[None]:
    """While the body runs, show each line that another process appends to the run's `metrics.jsonl`."""
    done = threading.Event()
    shown = paths.metrics.stat().st_size if paths.metrics.is_file() else 0  # by earlier attempts
    thread = threading.Thread(target=_follow, args=(paths, console, done, shown), name="ray-vlm-console", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


def _follow(paths: RunPaths, console: Console, done: threading.Event, read: int) -> None:
    while True:
        last = done.is_set()
        with suppress(OSError):  # an object store that stumbles: the next look gets it
            paths.refresh(paths.metrics)
        if paths.metrics.is_file():
            with open(paths.metrics, "rb") as file:
                file.seek(read)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            read += len(whole)
            for text in whole.splitlines():
                if (line := read_line(text)) is not None:
                    console.show(line)
        if last:
            return
        done.wait(_POLL_S if paths.remote is None else _POLL_REMOTE_S)
