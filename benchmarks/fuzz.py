"""Ten thousand seeded mutations of rows, jobs, spaces, adapters, images, checkpoints and runs.

`tests/support/fuzz/` has the mutations and what counts as a finding; each finding is printed to stderr with what
reproduces it: `python -m benchmarks.fuzz --one KIND NUMBER`.
"""

import faulthandler
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import figure, report
from tests.support.fuzz.attempts import KINDS, SEED, SLOWEST_S, run_kind


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
