"""Write the golden file, or the descriptions of some runs in it; with `--old-runs` the run folders that later versions
must read.

`python -m tests.golden.write [--old-runs] [sft|dpo|grpo|sweep ...]`: after a change that is meant. Read the difference
before it is kept.
"""

import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Collection
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # as in tests that share a machine; rounding depends on it

from tests.golden import cases

ALL = (*cases.METHODS, "sweep")


def write_golden(names: Collection[str], old_runs: bool) -> None:
    """Train the run of each method, and the sweep, among `names`, and store their descriptions."""
    sys.argv = ["ray-vlm", "train", "job.yaml"]  # runs store their command line
    golden = json.loads(cases.GOLDEN.read_text())
    if set(names) == set(ALL):
        golden["machine"] = cases.this_machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = cases.draw_data(folder / "data")
        for method in filter(names.__contains__, cases.METHODS):
            golden["runs"][method] = cases.describe_run(cases.train(method, folder, data))
        if "sweep" in names:
            golden["sweep"] = cases.describe_sweep(cases.sweep(folder / "swept", data))
        if old_runs:
            with tarfile.open(cases.OLD_RUNS, "w:xz") as archive:
                archive.add(folder / "runs", "runs")
    cases.GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    chosen = [word for word in sys.argv[1:] if word != "--old-runs"]
    if unknown := set(chosen) - set(ALL):
        sys.exit(f"{', '.join(sorted(unknown))}: no such run; there are {', '.join(ALL)}")
    write_golden(chosen or ALL, old_runs="--old-runs" in sys.argv)
