"""A supervised child process that runs the blocks: a block that fails, hangs or kills its process costs only its own
figures.

The parent imports nothing heavy. The child writes a line to `events` when a block begins and when it ends; the parent
kills a child whose block is over its limit and does not stop by itself, and starts another child for the remaining
blocks. After a CUDA error the child exits by itself, because no later result on the card can be trusted.
"""

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.blocks import Block
from benchmarks.gpu.figure_file import FigureFile

GRACE_S = 8.0  # for a block to stop by itself once its time is over
_LOOK_S = 0.1
_TAINTED = 3  # exit code of a child that leaves because the card's state, or that of its modules, is unknown


class TimeOver(BaseException):
    """A block's time is over; not an `Exception`, so that no library catches it as one."""


class Refused(Exception):
    """A block cannot run here; the message says why and what to do."""


def is_cuda_error(error: BaseException) -> bool:
    """Return whether results on the card cannot be trusted after this error."""
    return "CUDA error" in str(error)


def leave_after_cuda_error(error: BaseException) -> None:
    """Raise the error again if results on the card cannot be trusted after it."""
    if is_cuda_error(error):
        raise error


def was_importing(error: BaseException) -> bool:
    """Return whether the error came while a module was imported, half of which stays behind."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_code.co_filename.startswith("<frozen importlib") for frame in frames)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut to fit into a table."""
    return next(iter(str(error).splitlines()), "")[:150]


@dataclass(frozen=True)
class Events:
    """A file of lines `{"block", "what": "begin" | "end", "reason"}` from the child to its parent."""

    path: Path

    def write(self, block: str, what: str, reason: str | None = None) -> None:
        """Append a line; `reason`: why a block failed."""
        with self.path.open("a") as file:
            file.write(json.dumps({"block": block, "what": what, "reason": reason}) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return all complete lines."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def run_children(
    blocks: Sequence[Block],
    start: Callable[[Sequence[str]], subprocess.Popen],
    events: Events,
    figures: FigureFile,
    whole_s: float,
) -> bool:
    """Run the blocks in children; return whether all ended as planned. `start(names)` starts a child for blocks."""
    end, left, whole = time.monotonic() + whole_s, list(blocks), True
    while left:
        if time.monotonic() >= end:
            for block in left:
                figures.fail(block.name, f"not begun: the {whole_s:g} s of all blocks were over")
            return False
        child = start([block.name for block in left])
        reasons = _follow(child, left, events, end)
        ended, left = left[: len(reasons)], left[len(reasons) :]
        failed = [block for block in ended if reasons[block.name] is not None]
        for block in failed:
            figures.fail(block.name, str(reasons[block.name]))
        whole = whole and not failed
        why = next((f"block {block.name} failed" for block in failed if block.must), None)
        if why is None and all(block.must for block in ended):  # another child will not do better
            why = f"the process ended with exit code {child.returncode}"
        if why is not None:
            for block in left:
                figures.fail(block.name, f"not begun: {why}")
            return False
        if left:  # `must` blocks prepare a process, so the next one has them again
            left = [*(block for block in ended if block.must), *left]
    return whole


def _follow(child: subprocess.Popen, blocks: Sequence[Block], events: Events, end: float) -> dict[str, str | None]:
    """Wait for the child; of each block that it began, in their order: None, or why it failed."""
    limits = {block.name: block.limit_s for block in blocks}
    reasons: dict[str, str | None] = {}
    current, since, number = None, time.monotonic(), len(events.read())
    while True:
        over = child.poll() is not None
        for event in events.read()[number:]:
            number += 1
            if event["what"] == "begin":
                current, since = event["block"], time.monotonic()
            else:
                reasons[event["block"]], current = event["reason"], None
        if over:
            break
        late = current is not None and time.monotonic() > since + limits[current] + GRACE_S
        if late or time.monotonic() > end + GRACE_S:
            child.kill()
            child.wait()
            if current is not None:
                reasons[current] = f"ended after {time.monotonic() - since:.0f} s: it hung in its {limits[current]:g} s"
            return reasons
        time.sleep(_LOOK_S)
    if current is not None:
        reasons[current] = f"its process ended with exit code {child.returncode}"
    return reasons


def run_blocks(blocks: Sequence[Block], bench: Any, events: Events, end: float) -> int:
    """Run the blocks in this process, the child; return the exit code. `end`: a time on `time.monotonic`'s clock."""
    for block in blocks:
        events.write(block.name, "begin")
        reason, tainted = _run_block(block, bench, min(block.limit_s, end - time.monotonic()))
        events.write(block.name, "end", reason)
        print(f"[{block.name}] {'done' if reason is None else reason}", flush=True)
        if tainted:
            return _TAINTED
        if reason is not None and block.must:
            return 1
        bench.clean_up()
    return 0


def _run_block(block: Block, bench: Any, limit_s: float) -> tuple[str | None, bool]:
    """Why the block failed, if it did, and whether the process is of no more use since."""
    if absent := [name for name in block.needs if importlib.util.find_spec(name) is None]:
        return (
            f"not run: {', '.join(absent)} cannot be imported here (`python -m benchmarks.gpu.carry` packs it)",
            False,
        )
    if limit_s <= 1:
        return "not begun: the time of all blocks was over", False
    try:
        module, _, function = block.call.partition(":")
        with _time_limit(limit_s):
            getattr(importlib.import_module(module), function)(bench.of_block(block.name, limit_s))
    except TimeOver as error:
        return f"ended after its {limit_s:.0f} s", was_importing(error)
    except Refused as error:
        return f"not run: {error}", False
    except Exception as error:  # whatever a block meets, the others run
        traceback.print_exc()
        return f"{type(error).__name__}: {first_line(error)}", is_cuda_error(error)
    return None, False


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeOver` in the body after so many seconds; a call that does not come back to Python is not ended."""

    def ring(number: int, frame: Any) -> None:
        raise TimeOver

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def start_child(arguments: Sequence[str]) -> subprocess.Popen:
    """Start this program again with other arguments, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
