"""What the command line says of itself, and of a reader who leaves."""

import subprocess
import sys
from pathlib import Path

import pytest

from ray_vlm.cli import main

ROOT = Path(__file__).parents[2]


def test_settings_are_not_called_required(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["train"])
    told = capsys.readouterr().err
    assert "[key=value ...]" in told
    assert told.rstrip().endswith("the following arguments are required: job")


def test_settings_may_stand_before_and_behind_options(capsys: pytest.CaptureFixture) -> None:
    job = str(ROOT / "jobs" / "demo_sft.yaml")
    for words in (["config", job], ["config", job, "seed=7"], ["config", job, "seed=7", "train.max_steps=3"]):
        assert main(words) == 0
        assert ("seed: 7" in capsys.readouterr().out) == ("seed=7" in words)


def test_a_reader_who_leaves_gets_no_traceback() -> None:
    command = [sys.executable, "-m", "ray_vlm", "config", "jobs/demo_sft.yaml"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141
    assert told == b""
