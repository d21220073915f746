"""Ten thousand seeded mutations of rows, jobs, spaces, adapters, images, checkpoints and runs.

Each mutation is read as the commands read it. Allowed outcomes are a result and this package's four errors. Any other
exception, a time over the limit, and rows or weights that are lost silently are findings; each is printed to stderr
with what reproduces it: `python -m benchmarks.fuzz --one KIND NUMBER`.
"""

import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import fuzz_bases, fuzz_exports, fuzz_folders, fuzz_images, fuzz_inputs, fuzz_settings
from benchmarks.figures import figure, report
from ray_vlm.errors import ConfigError, DataError, ModelError, RunError

OURS = (ConfigError, DataError, ModelError, RunError)
SEED = 0
LIMIT_S = 20.0  # an attempt that takes longer by the clock is stopped
SLOWEST_S = 5.0  # of an attempt, in seconds of the processor: others may be at work on this machine
# kind -> what makes an attempt, and how many of 10,000 mutations it gets
KINDS: dict[str, tuple[Callable[[Path], fuzz_inputs.Attempt], int]] = {
    "rows": (fuzz_inputs.of_rows, 2700),
    "jobs": (fuzz_settings.of_jobs, 1500),
    "spaces": (fuzz_settings.of_spaces, 600),
    "completions": (fuzz_inputs.of_completions, 800),
    "images": (fuzz_images.of_images, 800),
    "adapters": (fuzz_folders.of_adapters, 500),
    "checkpoints": (fuzz_folders.of_checkpoints, 300),
    "runs": (fuzz_folders.of_runs, 500),
    "exports": (fuzz_exports.of_exports, 900),
    "exif": (fuzz_images.of_exif, 600),
    "templates": (fuzz_bases.of_templates, 600),
    "processors": (fuzz_bases.of_processors, 700),
}


class Hang(BaseException):
    """The time limit is exceeded; not an `Exception`, so that no caller in between catches it as one."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `Hang` in this thread after `seconds`. A call into C that never returns ends the process, with a trace."""

    def stop(signum: int, frame: Any) -> None:
        raise Hang(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(6 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # a test runner's own limit


def attempt_one(kind: str, number: int, attempt: fuzz_inputs.Attempt) -> tuple[str, int, float]:
    """Return the outcome of a mutation (`accepted`, `refused` or the finding as text), the number of losses, and the
    processor's seconds."""
    rng = np.random.default_rng([SEED, list(KINDS).index(kind), number])
    lost, started = 0, time.process_time()
    try:
        with time_limit(LIMIT_S), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lost, outcome = attempt(rng), "accepted"
        outcome = f"{lost} lost without a word" if lost else outcome
    except OURS as error:
        bare = [p for p in error.problems if not p.strip()] or not error.problems
        outcome = "an error without words" if bare else "refused"
    except (Hang, Exception) as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((f for f in reversed(frames) if "/ray_vlm/" in f.filename), frames[-1])
        text = f"{type(error).__name__}: {error}"[:200].encode("ascii", "backslashreplace").decode()
        outcome = f"{text} at {Path(frame.filename).name}:{frame.lineno} {frame.name}"
    return outcome, lost, time.process_time() - started


def run_kind(kind: str, count: int) -> dict[str, Any]:
    """Return the counts of a kind's mutations; print each finding to stderr at once."""
    counts = {"mutations": count, "accepted": 0, "refused": 0, "others": 0, "lost": 0, "slowest": 0.0}
    with tempfile.TemporaryDirectory() as temporary:
        attempt = KINDS[kind][0](Path(temporary))
        for number in range(count):
            outcome, lost, seconds = attempt_one(kind, number, attempt)
            counts["slowest"] = max(counts["slowest"], seconds)
            counts["lost"] += lost
            if outcome in ("accepted", "refused"):
                counts[outcome] += 1
            else:
                counts["others"] += not lost
                print(f"{kind} {number}: {outcome}", file=sys.stderr, flush=True)
            if seconds > SLOWEST_S:
                print(f"{kind} {number}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return counts


def measure(quick: bool) -> list[dict[str, Any]]:
    """Run all kinds; `quick`: a tenth of the mutations."""
    prepare()
    figures = []
    for kind, (_, count) in KINDS.items():
        counts = run_kind(kind, count // 10 if quick else count)
        figures += [figure(f"fuzz.{kind}.{name}", counts[name], "") for name in ("mutations", "accepted", "refused")]
        figures.append(figure(f"fuzz.{kind}.other_errors", counts["others"], "", 0))
        figures.append(figure(f"fuzz.{kind}.lost", counts["lost"], "", 0))
        figures.append(figure(f"fuzz.{kind}.slowest", counts["slowest"], "s", SLOWEST_S))
    return figures


def prepare() -> None:
    """Limit this process to one thread, without network and library logging."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from ray_vlm.models.libraries import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    faulthandler.enable()


def run_one(kind: str, number: int) -> None:
    """Run one mutation again, with the full trace of the exception."""
    prepare()
    with tempfile.TemporaryDirectory() as temporary:
        attempt = KINDS[kind][0](Path(temporary))
        print(attempt(np.random.default_rng([SEED, list(KINDS).index(kind), number])), "lost")


if __name__ == "__main__":
    if "--one" in sys.argv:
        run_one(sys.argv[-2], int(sys.argv[-1]))
    else:
        report(measure)
