"""The plan in the comment of a job file is the planner's output."""

import re
from pathlib import Path

import pytest

from ray_vlm.cli import main

JOBS = Path(__file__).parents[3] / "jobs"
PLANNED = sorted(path for path in JOBS.glob("*.yaml") if "# Planned:" in path.read_text())


def test_every_job_for_a_gpu_has_a_plan() -> None:
    for_gpus = [path for path in JOBS.glob("*_*.yaml") if re.search(r"gpus_per_worker: [1-9]", path.read_text())]
    assert sorted(for_gpus) == PLANNED
    assert len(PLANNED) >= 8


def test_the_table_of_jobs_has_their_peaks() -> None:
    table = (JOBS / "README.md").read_text()
    for path in PLANNED:
        (row,) = (line for line in table.splitlines() if f"`{path.name}`" in line)
        peaks = re.findall(r"^#   peak +([\d.]+) GiB", path.read_text(), re.MULTILINE)
        assert f"| {float(peaks[0]):.1f} GiB a card" in row, "of a worker, which comes before a sampler"


@pytest.mark.slow
@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_plans_are_those_of_the_planner(path: Path, capsys: pytest.CaptureFixture) -> None:
    head = path.read_text()
    tokens = re.search(r"--tokens (\S+)", head)
    assert tokens is not None
    assert main(["memory", str(path), "--tokens", tokens.group(1)]) == 0
    lines = [f"# {line}".rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines == [line for line in head.splitlines() if line.startswith("#")][-len(lines) - 1 : -1]
