"""Write the golden file, and with `--old-runs` the run folders that later versions must read.

`python -m tests.golden.write [--old-runs]`: after a change that is meant. Read the difference before it is kept.
"""

import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # as in tests that share a machine; rounding depends on it

from tests.golden import cases


def write_golden(old_runs: bool) -> None:
    """Train each method's run and store its description."""
    sys.argv = ["ray-vlm", "train", "job.yaml"]  # runs store their command line
    golden = {"machine": cases.this_machine(), "runs": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = cases.draw_data(folder / "data")
        for method in cases.METHODS:
            golden["runs"][method] = cases.describe_run(cases.train(method, folder, data))
        golden["sweep"] = cases.describe_sweep(cases.sweep(folder / "swept", data))
        if old_runs:
            with tarfile.open(cases.OLD_RUNS, "w:xz") as archive:
                archive.add(folder / "runs", "runs")
    cases.GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write_golden(old_runs="--old-runs" in sys.argv)
