"""The plan in a job's head is what the planner says."""

import re
from pathlib import Path

import pytest

from ray_vlm.cli import main

JOBS = Path(__file__).parents[3] / "jobs"
PLANNED = sorted(path for path in JOBS.glob("*.yaml") if "# Planned:" in path.read_text())


def test_every_job_for_a_card_has_a_plan() -> None:
    for_cards = [path for path in JOBS.glob("*_*.yaml") if re.search(r"gpus_per_worker: [1-9]", path.read_text())]
    assert sorted(for_cards) == PLANNED
    assert len(PLANNED) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_plans_are_the_planners(path: Path, capsys: pytest.CaptureFixture) -> None:
    head = path.read_text()
    tokens = re.search(r"--tokens (\S+)", head)
    assert tokens is not None
    assert main(["memory", str(path), "--tokens", tokens.group(1)]) == 0
    told = [f"# {line}".rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert told == [line for line in head.splitlines() if line.startswith("#")][-len(told) - 1 : -1]
