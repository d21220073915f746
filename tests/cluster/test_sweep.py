"""Sweeps on a real Ray cluster: trials are runs, the best is exported, a killed one goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from ray_vlm.cli import main
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.tune.sweep import tune

pytestmark = pytest.mark.cluster
RATES = [1e-3, 2e-2, 1e-5]


def _job(job_file: Any, scenes: Path, **tuned: Any) -> Path:
    data = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "eval", "test")}
    evaluate = {"every_steps": 2, "num_samples": 5, "max_new_tokens": 8, "metric": "loss"}
    tune_section = {"num_trials": 3, "scheduler": "none", "default_first": False} | tuned
    return job_file(data=data, evaluate=evaluate, train={"max_steps": 4}, tune=tune_section)


def _space(tmp_path: Path, space: Any = None) -> str:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(space or {"train.learning_rate": {"grid": RATES}, "lora.alpha": "2 * lora.rank"}))
    return str(path)


def _losses(run: Path, kind: str = "train") -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]


@pytest.mark.parametrize("resident", [pytest.param(False, marks=pytest.mark.slow), True])
def test_trials_are_runs_and_the_best_is_exported(
    resident: bool,
    ray_cluster: None,
    job_file: Any,
    scenes: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    lines: list[str],
) -> None:
    from peft import PeftConfig

    path = _job(job_file, scenes, resident=resident)
    sweep = Path(tune(str(path), [], _space(tmp_path)))
    assert "View detailed results" not in capfd.readouterr().out, "Ray Tune's own words"
    trials = json.loads((sweep / "sweep.json").read_text())
    assert [t["values"]["train.learning_rate"] for t in trials["trials"]] == RATES
    assert {t["status"] for t in trials["trials"]} == {"finished"}
    best = min(trials["trials"], key=lambda t: t["metrics"]["loss"])
    assert trials["best"] == best["name"]
    assert PeftConfig.from_pretrained(sweep / "export" / "adapter").lora_alpha == 8
    card = (sweep / "export" / "adapter" / "README.md").read_text()
    assert "12 test rows" in card
    assert "parallel" not in card
    page = (sweep / "report.html").read_text()
    assert "Settings and result" in page
    assert sum("step" in line and line.startswith("trial") for line in lines) == 6, "two validations of each trial"
    alone = tmp_path / "runs" / "alone"
    words = [f"train.learning_rate={RATES[1]}", "lora.alpha=8", "run.name=alone"]
    assert main(["train", str(path), *words]) == 0
    assert _losses(sweep / "trials" / "001") == _losses(alone)
    assert _losses(sweep / "trials" / "001", "eval") == _losses(alone, "eval")


@pytest.mark.slow
def test_trials_with_workers_of_their_own_equal_those_in_process(
    ray_cluster: None, job_file: Any, scenes: Path, tmp_path: Path
) -> None:
    path, space = _job(job_file, scenes, export=None), _space(tmp_path, {"train.learning_rate": {"grid": RATES[:2]}})
    one = Path(tune(str(path), ["tune.num_trials=2", "run.name=one"], space))
    # Of the cluster's 8 CPUs a trial finds two, one for its worker and one for its loader: it must take no more itself.
    taken = ray.remote(num_cpus=6)(_Idle).remote()
    ray.get(taken.ready.remote())
    own = ["run.name=two", "cluster.num_workers=1", "tune.max_concurrent=1", "data.num_loaders=1"]
    two = Path(tune(str(path), ["tune.num_trials=2", *own], space))
    ray.kill(taken)
    for name in ("000", "001"):
        assert _losses(two / "trials" / name) == pytest.approx(_losses(one / "trials" / name), rel=1e-6)
    _wait_for_free_resources()


class _Idle:
    """Holds CPUs."""

    def ready(self) -> None:
        """Returns once it runs."""


def _wait_for_free_resources() -> None:
    """No placement group is left behind."""
    from ray.util.state import list_placement_groups

    until = time.monotonic() + 30
    while left := [g for g in list_placement_groups() if g.state not in ("REMOVED",)]:
        assert time.monotonic() < until, left
        time.sleep(0.5)


@pytest.mark.slow
def test_asha_ends_what_is_behind_and_optuna_draws(
    ray_cluster: None, job_file: Any, scenes: Path, tmp_path: Path
) -> None:
    tuned: dict[str, Any] = {"num_trials": 5, "scheduler": "asha", "reduction_factor": 2, "resident": True}
    path = _job(job_file, scenes, search="optuna", max_concurrent=1, default_first=True, **tuned)
    space = {
        "train.learning_rate": {"loguniform": [1e-5, 1e-1]},
        "data.oversample": {"choice": [None, {"circle": 2.0}]},
    }
    sweep = Path(tune(str(path), ["train.max_steps=6"], _space(tmp_path, space)))
    trials = json.loads((sweep / "sweep.json").read_text())["trials"]
    assert [t["name"] for t in trials] == [f"{i:03d}" for i in range(5)]
    assert trials[0]["values"] == {"train.learning_rate": 1e-3, "data.oversample": None}, "the job as it stands"
    assert len({t["values"]["train.learning_rate"] for t in trials}) == 5
    pruned = [t for t in trials if t["status"] == "pruned"]
    assert pruned
    assert all(t["step"] < 6 for t in pruned)
    for trial in pruned:  # its end is its own, not that of the sweep, or its cost would be wrong
        folder = sweep / "trials" / trial["name"]
        ended = json.loads((folder / "run.json").read_text())["attempts"][-1]["ended"]
        assert ended - read_metrics(folder / "metrics.jsonl")[-1]["time"] < 2
    assert any(t["status"] == "finished" for t in trials)
    _wait_for_free_resources()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_trains_nothing_twice(job_file: Any, scenes: Path, tmp_path: Path) -> None:
    path, space = _job(job_file, scenes, max_concurrent=1), _space(tmp_path)
    command = [sys.executable, "-m", "ray_vlm", "tune", str(path), "--space", space, "train.max_steps=12"]
    sweep = tmp_path / "runs" / "run-space"
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True)
    second = sweep / "trials" / "001" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (second.exists() and any(e["kind"] == "eval" for e in read_metrics(second))):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = (sweep / "trials" / "000" / "metrics.jsonl").read_bytes()
    refused = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert refused.returncode != 0
    assert "--resume" in refused.stderr
    subprocess.run([*command, "--resume"], cwd=Path(__file__).parents[2], check=True, timeout=240)
    assert (sweep / "trials" / "000" / "metrics.jsonl").read_bytes() == first, "a finished trial is not run again"
    summary = json.loads((sweep / "sweep.json").read_text())
    assert summary["status"] == "finished"
    assert [(t["status"], t["step"]) for t in summary["trials"]] == [("finished", 12)] * 3
    assert len(json.loads((sweep / "trials" / "001" / "run.json").read_text())["attempts"]) == 2
    assert (sweep / "export" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_ctrl_c_stops_a_sweep_that_can_go_on(job_file: Any, scenes: Path, tmp_path: Path) -> None:
    path, space = _job(job_file, scenes, max_concurrent=1), _space(tmp_path)
    command = [sys.executable, "-m", "ray_vlm", "tune", str(path), "--space", space]
    command += ["train.max_steps=40", "evaluate.every_steps=10"]
    sweep = tmp_path / "runs" / "run-space"
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)
    first = sweep / "trials" / "000" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (first.exists() and any(e["kind"] == "eval" for e in read_metrics(first))):
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=120)
    assert process.returncode == 130, output[-2000:]
    assert "--resume goes on" in output
    assert json.loads((sweep / "sweep.json").read_text())["status"] == "interrupted"
    subprocess.run([*command, "--resume"], cwd=Path(__file__).parents[2], check=True, timeout=240)
    assert json.loads((sweep / "sweep.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_a_trial_that_fails_is_tried_again_and_then_left(
    ray_cluster: None, job_file: Any, scenes: Path, tmp_path: Path, lines: list[str]
) -> None:
    """An adapter that is not there: found out when the trial starts, and no reason to end the others."""
    path = _job(job_file, scenes, max_retries=1)
    space = _space(tmp_path, {"model.adapter": {"grid": [None, str(tmp_path / "nowhere")]}})
    sweep = Path(tune(str(path), ["tune.num_trials=2"], space))
    trials = json.loads((sweep / "sweep.json").read_text())["trials"]
    assert [t["status"] for t in trials] == ["finished", "failed"]
    assert any("nowhere" in line for line in lines)
    assert (sweep / "export" / "adapter").is_dir()


@pytest.mark.slow  # tests/unit/tune/test_plan.py has the quick one
def test_a_trial_without_a_number_is_never_the_best(
    ray_cluster: None, job_file: Any, scenes: Path, tmp_path: Path
) -> None:
    path = _job(job_file, scenes)
    space = _space(tmp_path, {"train.learning_rate": {"grid": [1e-3, 1e30]}})
    sweep = Path(tune(str(path), ["tune.num_trials=2"], space))
    summary = json.loads((sweep / "sweep.json").read_text())
    assert summary["best"] == "000"
    assert "loss" not in summary["trials"][1]["metrics"]


def test_what_cannot_work_is_refused_before_any_trial(
    ray_cluster: None, job_file: Any, scenes: Path, tmp_path: Path
) -> None:
    path, space = _job(job_file, scenes), _space(tmp_path)
    refusals: list[tuple[list[str], str, type[Exception], str]] = [
        (["data.eval=null"], space, ConfigError, "data.eval"),
        (["tune.metric=anls"], space, ConfigError, "do not produce anls"),
        (["cluster.cpus_per_worker=999"], space, RunError, "a trial needs 999 CPU"),
        (["cluster.num_workers=3", "tune.resident=true"], space, ConfigError, "one process with one device"),
        (["data.train.path=nowhere.json"], space, Exception, "nowhere.json"),
        ([], _space(tmp_path / "..", {"lora.rnk": {"choice": [1, 2]}}), ConfigError, "is not a setting"),
    ]
    for overrides, space_path, kind, reason in refusals:
        with pytest.raises(kind, match=reason):
            tune(str(path), overrides, space_path)
        assert not (tmp_path / "runs" / "run-space" / "trials").exists()
    other = tmp_path / "runs" / "run-space"
    other.mkdir(parents=True, exist_ok=True)
    (other / "something.txt").write_text("mine")
    with pytest.raises(RunError, match="no sweep here"):
        tune(str(path), [], space, overwrite=True)
    assert (other / "something.txt").read_text() == "mine"
