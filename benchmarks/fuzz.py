"""Does anything break it? Ten thousand seeded mutations of rows, jobs, spaces, adapters, images, checkpoints and runs.

Each is read as the verbs read it. Allowed are a result and our four errors; another exception, a wait of more than the
limit, and rows or weights that are lost without a word are finds, told on stderr with what makes them again:
`python -m benchmarks.fuzz --one KIND NUMBER`.
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
    """The time limit is over; not an `Exception`, so that nobody on the way takes it for one."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `Hang` in this thread after so long. A call into C that never comes back ends the process, with a trace."""

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
    """What came of a mutation: `accepted`, `refused` or the find as text; how much was lost; seconds of the
    processor."""
    rng = np.random.default_rng([SEED, list(KINDS).index(kind), number])
    lost, started = 0, time.process_time()
    try:
        with time_limit(LIMIT_S), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lost, found = attempt(rng), "accepted"
        found = f"{lost} lost without a word" if lost else found
    except OURS as error:
        bare = [p for p in error.problems if not p.strip()] or not error.problems
        found = "an error without words" if bare else "refused"
    except (Hang, Exception) as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f for f in reversed(frames) if "/ray_vlm/" in f.filename), frames[-1])
        text = f"{type(error).__name__}: {error}"[:200].encode("ascii", "backslashreplace").decode()
        found = f"{text} at {Path(place.filename).name}:{place.lineno} {place.name}"
    return found, lost, time.process_time() - started


def run_kind(kind: str, count: int) -> dict[str, Any]:
    """Counts of a kind's mutations; finds go to stderr as they come."""
    told = {"mutations": count, "accepted": 0, "refused": 0, "others": 0, "lost": 0, "slowest": 0.0}
    with tempfile.TemporaryDirectory() as temporary:
        attempt = KINDS[kind][0](Path(temporary))
        for number in range(count):
            found, lost, seconds = attempt_one(kind, number, attempt)
            told["slowest"] = max(told["slowest"], seconds)
            told["lost"] += lost
            if found in ("accepted", "refused"):
                told[found] += 1
            else:
                told["others"] += not lost
                print(f"{kind} {number}: {found}", file=sys.stderr, flush=True)
            if seconds > SLOWEST_S:
                print(f"{kind} {number}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return told


def measure(quick: bool) -> list[dict[str, Any]]:
    """All kinds; `quick`: a tenth of the mutations."""
    prepare()
    figures = []
    for kind, (_, count) in KINDS.items():
        told = run_kind(kind, count // 10 if quick else count)
        figures += [figure(f"fuzz.{kind}.{name}", told[name], "") for name in ("mutations", "accepted", "refused")]
        figures.append(figure(f"fuzz.{kind}.other_errors", told["others"], "", 0))
        figures.append(figure(f"fuzz.{kind}.lost", told["lost"], "", 0))
        figures.append(figure(f"fuzz.{kind}.slowest", told["slowest"], "s", SLOWEST_S))
    return figures


def prepare() -> None:
    """One thread, no network, no chatter."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from ray_vlm.models.library_logging import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    faulthandler.enable()


def run_one(kind: str, number: int) -> None:
    """One mutation again, with the whole trace of what it raises."""
    prepare()
    with tempfile.TemporaryDirectory() as temporary:
        attempt = KINDS[kind][0](Path(temporary))
        print(attempt(np.random.default_rng([SEED, list(KINDS).index(kind), number])), "lost")


if __name__ == "__main__":
    if "--one" in sys.argv:
        run_one(sys.argv[-2], int(sys.argv[-1]))
    else:
        report(measure)
