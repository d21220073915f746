"""Short runs reproduce the stored numbers and files, and run folders of earlier versions still work."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.cli import main
from tests.golden.cases import (
    GOLDEN,
    METHODS,
    OLD_RUNS,
    describe_run,
    describe_sweep,
    draw_data,
    job_of,
    sweep,
    this_machine,
    train,
)

WANTED = json.loads(GOLDEN.read_text())
ANOTHER_MACHINE = 2e-3  # relative; of losses and norms of three steps in float32
ROUNDED = 5e-6  # absolute: DPO's rewards are differences of sums of log-probabilities, times beta


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes that all runs train on."""
    return draw_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture
def old_runs(tmp_path: Path) -> Path:
    """Run folders of three steps that an earlier version left."""
    with tarfile.open(OLD_RUNS) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "runs"


def _check(actual: dict[str, Any], wanted: dict[str, Any], drawn: bool = False) -> None:
    """Compare a run with the stored description, to the bit on the same machine.

    `drawn`: the run samples answers, which rounding changes.
    """
    assert actual["files"] == wanted["files"]
    assert len(actual["numbers"]) == len(wanted["numbers"])
    same_machine = WANTED["machine"] == this_machine()
    for line, expected in zip(actual["numbers"], wanted["numbers"], strict=True):
        assert line.keys() == expected.keys()
        if same_machine:
            assert line == expected
        elif not drawn:
            for name, value in expected.items():
                near = isinstance(value, float)
                assert line[name] == (pytest.approx(value, rel=ANOTHER_MACHINE, abs=ROUNDED) if near else value)
    if same_machine:
        assert actual["weights"] == wanted["weights"]


@pytest.mark.parametrize("method", ["sft", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS[1:])])
def test_a_short_run_leaves_what_it_left(method: str, tmp_path: Path, data: Path) -> None:
    _check(describe_run(train(method, tmp_path, data)), WANTED["runs"][method], drawn=method == "grpo")


@pytest.mark.slow
@pytest.mark.cluster
def test_a_sweep_leaves_what_it_left(tmp_path: Path, data: Path, ray_cluster: None) -> None:
    actual = describe_sweep(sweep(tmp_path, data))
    assert actual["files"] == WANTED["sweep"]["files"]
    for trial, wanted in zip(actual["trials"], WANTED["sweep"]["trials"], strict=True):
        _check(trial, wanted)


@pytest.mark.parametrize("method", ["sft", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS[1:])])
def test_an_old_run_goes_on(method: str, tmp_path: Path, data: Path, old_runs: Path) -> None:
    """It continues with its rows, schedule and weights, and ends like a run of five steps."""
    job = job_of(method, tmp_path, data)
    assert main(["train", str(job), "--resume", "train.max_steps=5"]) == 0
    uninterrupted = describe_run(train(method, tmp_path / "whole", data, ["train.max_steps=5"]))
    last = [line for line in describe_run(old_runs / method)["numbers"] if line["kind"] == "train"][-1]
    assert last["step"] == 5
    expected = [line for line in uninterrupted["numbers"] if line["kind"] == "train"][-1]
    assert last["loss"] == pytest.approx(expected["loss"], rel=0.05)


@pytest.mark.slow
def test_an_old_run_is_measured_asked_exported_and_compared(tmp_path: Path, data: Path, old_runs: Path) -> None:
    job, run = job_of("sft", tmp_path, data), old_runs / "sft"
    resolved = (run / "resolved.json").read_text()  # a merge reads the run's own rows at their old path
    data_folder = Path(json.loads(resolved)["data"]["train"]["path"]).parent
    (run / "resolved.json").write_text(resolved.replace(str(data_folder), str(data)))
    image = sorted((data / "test").iterdir())[0]
    commands: list[list[Any]] = [
        ["evaluate", job, "--adapter", run / "final", "--output", tmp_path / "measured"],
        ["predict", run, image, "--output", tmp_path / "predictions.jsonl"],
        ["export", run],
        ["export", run, "--merged"],
        ["runs", "show", run],
        ["runs", "compare", *(old_runs / method for method in METHODS)],
    ]
    for command in commands:
        assert main([str(word) for word in command]) == 0, command
    assert (tmp_path / "measured" / "report.html").exists()
    assert json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])["found"]
