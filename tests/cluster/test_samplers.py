"""Samplers beside the workers of a GRPO run: the same numbers to the bit, a step ahead, and going on after deaths."""

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.load import load_job
from ray_vlm.config.paths import absolute_paths
from ray_vlm.data.parts import load_parts
from ray_vlm.data.preprocessing import read_preprocessing
from ray_vlm.data.spec import sample_spec
from ray_vlm.errors import Interrupted, RunError
from ray_vlm.evaluate.actors import InferenceJob
from ray_vlm.evaluate.pairs import plan_prompts, sample_answers
from ray_vlm.evaluate.run import evaluate, read_predictions
from ray_vlm.runs.monitor import current_lines, read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.driver import TrialContext, train
from tests.cluster.test_recovery import _at_step, _steps, _train, _weights
from tests.support.ray_processes import kill_process, processes

pytestmark = pytest.mark.cluster
TITLE = "ray::Sampler"
LORA = {"rank": 4, "alpha": 8, "target": ["language"]}
SIZES = {"global_batch_size": 16}


def _lines(paths: RunPaths, kind: str = "train") -> list[dict[str, Any]]:
    return [line for line in current_lines(read_metrics(paths.metrics)) if line["kind"] == kind]


def _numbers(paths: RunPaths) -> list[dict[str, Any]]:
    """All numbers of steps and validations, without times, and without the work that samplers take from the worker."""
    hidden = ("time", "_s", "peak_memory_gib", "staleness", "attempt", "samplers", "model_tokens", "model_tflop")
    lines = _lines(paths) + _lines(paths, "eval")
    return [{k: v for k, v in line.items() if not k.endswith(hidden)} for line in lines]


def _same(paths: RunPaths, other: RunPaths) -> None:
    assert _numbers(paths) == _numbers(other)
    assert _weights(paths) == _weights(other)


def _wait_for_the_end(limit_s: float = 20.0) -> None:
    """Wait until Ray has ended the processes of all samplers."""
    end = time.monotonic() + limit_s
    while processes(TITLE) and time.monotonic() < end:
        time.sleep(0.1)
    assert not processes(TITLE)


@pytest.mark.parametrize(
    ("target", "steps", "counts"),
    [
        (["language"], 4, [2]),
        pytest.param(["language"], 20, [1, 2], marks=pytest.mark.slow),
        pytest.param(["language", "vision"], 20, [1, 2], marks=pytest.mark.slow),
    ],
)
def test_samplers_sample_what_a_worker_samples_to_the_bit(
    ray_cluster, job_of, target: list[str], steps: int, counts: list[int]
) -> None:
    """With a frozen image encoder, whose features a step keeps, and with one that learns."""
    path = job_of("grpo", lora=LORA | {"target": target}, train=SIZES | {"max_steps": steps})
    inside = _train(path, "run.name=inside", "cluster.num_workers=1", "method.sampling_batch=1")
    assert len(_steps(inside)) == steps
    for count in counts:
        paths = _train(path, f"run.name=beside-{count}", "cluster.num_workers=1", f"method.samplers={count}")
        _same(paths, inside)
        assert {line["staleness"] for line in _lines(paths)} == {0.0}
    _wait_for_the_end()


@pytest.mark.slow
def test_two_workers_share_samplers_to_the_bit(ray_cluster, job_of) -> None:
    path = job_of("grpo", lora=LORA, train=SIZES | {"max_steps": 8}, cluster={"num_workers": 2})
    _same(_train(path, "run.name=beside", "method.samplers=3"), _train(path, "run.name=in", "method.sampling_batch=1"))


@pytest.mark.slow
def test_a_step_ahead(ray_cluster, job_of) -> None:
    """Rewards come of the adapter before; the number of samplers changes nothing; a resumed run begins in step."""
    path = job_of("grpo", lora=LORA, train=SIZES | {"max_steps": 6}, cluster={"num_workers": 1})
    one, two = (
        _train(path, f"run.name=ahead-{count}", "method.max_staleness=1", f"method.samplers={count}")
        for count in (1, 2)
    )
    _same(two, one)
    lines = _lines(one)
    assert [line["staleness"] for line in lines] == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert all(0.0 <= line["corrected"] <= 1.0 for line in lines)
    assert lines[0]["rollout_gap"] < 1e-4 < max(line["rollout_gap"] for line in lines[1:])
    in_step = _train(path, "run.name=in-step", "method.samplers=1")
    assert _steps(in_step)[0][1:] == pytest.approx(_steps(one)[0][1:], rel=1e-3, abs=1e-5)
    assert _steps(in_step)[2] != _steps(one)[2]
    hurt = RunPaths(one.root.parent / "hurt")
    more = ("checkpoint.every_steps=2", "method.max_staleness=1", "method.samplers=1", "run.name=hurt")
    _at_step(hurt, 4, lambda: kill_process("RayTrainWorker"))
    _train(path, *more)
    by_attempt = {line["attempt"]: line for line in reversed(_lines(hurt))}  # the first line of each
    assert len(by_attempt) == 2
    assert {line["staleness"] for line in by_attempt.values()} == {0.0}


def _kill_at_random(seed: int, over: threading.Event) -> None:
    """Kill a sampler after a random time, again and again."""
    chance = random.Random(seed)
    while not over.wait(
        chance.uniform(0.2, 20.0)
    ):  # a sampler takes some 8 s to start: killed sooner, it never answers
        kill_process(TITLE, chance.randrange(2))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_samplers_killed_at_random_moments(ray_cluster, job_of, seed: int) -> None:
    path = job_of("grpo", lora=LORA, train=SIZES | {"max_steps": 12}, cluster={"num_workers": 1, "max_failures": 20})
    inside = _train(path, "run.name=inside", "method.sampling_batch=1")
    paths, over = RunPaths(inside.root.parent / "killed"), threading.Event()
    _at_step(paths, 1, lambda: _kill_at_random(seed, over))
    try:
        _train(path, "run.name=killed", "method.samplers=2")
    finally:
        over.set()
    _same(paths, inside)


@pytest.mark.slow
def test_a_killed_sampler_and_a_killed_worker(ray_cluster, job_of) -> None:
    path = job_of("grpo", lora=LORA, train=SIZES | {"max_steps": 6}, cluster={"num_workers": 1})
    inside = _train(path, "run.name=inside", "method.sampling_batch=1")
    paths = RunPaths(inside.root.parent / "hurt")
    _at_step(paths, 1, lambda: kill_process(TITLE))
    _at_step(paths, 4, lambda: kill_process("RayTrainWorker"))
    _train(path, "run.name=hurt", "method.samplers=1", "checkpoint.every_steps=2")
    _same(paths, inside)
    _wait_for_the_end()


def _command(*words: str) -> None:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def sample_rows(path: Path, adapter: Path, output: Path, *overrides: str) -> None:
    """Write what `pairs` samples for the rows of `data.eval`: a tiny model's answers are too much alike for pairs."""
    job = absolute_paths(load_job(path, overrides))
    parts = load_parts(job, ["eval"], read_preprocessing(adapter, sample_spec(job, [])))
    assert parts.eval is not None
    batches = plan_prompts(len(parts.eval), job.evaluate.batch_size, job.pairs.num_samples)
    inference = InferenceJob(job, parts.spec, parts.eval.records, str(adapter), batches)
    answers = [[astuple(a) for a in group] for batch in sample_answers(inference, 0) for group in batch]
    output.write_text(json.dumps(answers))


_SAMPLE = """
import sys
from pathlib import Path
from tests.cluster.test_samplers import sample_rows
sample_rows(*map(Path, sys.argv[1:4]), *sys.argv[4:])
"""


def _answers(folder: Path) -> list[str]:
    return [prediction["answer"] for prediction in read_predictions(folder)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_evaluate_and_pairs_by_the_samplers_of_a_run_that_goes_on(ray_cluster, job_of, tmp_path: Path) -> None:
    """Other processes ask; they get what the own loop answers, and the run trains as if nobody had asked."""
    path = job_of(
        "grpo",
        lora=LORA,
        train=SIZES | {"max_steps": 5000},
        cluster={"num_workers": 1},
        checkpoint={"every_steps": 10, "keep": 500},
    )
    more = ("data.eval.max_rows=8", "data.test_on_eval=true")
    over, adapters, failed = threading.Event(), list[Path](), list[BaseException]()
    paths = RunPaths(tmp_path / "runs" / "asked")

    def ask() -> None:
        try:
            adapters.append(next(paths.root.glob("checkpoint-10-*")))
            by, options = "evaluate.engine=samplers", ("--adapter", str(adapters[0]), *more)
            _command("-m", "ray_vlm", "evaluate", str(path), "--output", str(tmp_path / "theirs"), by, *options)
            _command("-c", _SAMPLE, str(path), str(adapters[0]), str(tmp_path / "theirs.json"), by, *more)
        except BaseException as error:
            failed.append(error)
        over.set()

    def run(name: str, should_stop: Callable[[], bool]) -> RunPaths:
        job = load_job(path, [f"run.name={name}", "method.samplers=1"])
        try:
            return train(job, path.read_text(), trial=TrialContext(stop=should_stop))
        except Interrupted:
            return RunPaths(tmp_path / "runs" / name)

    _at_step(paths, 12, ask)
    run("asked", over.is_set)
    assert not failed, failed
    taught = _steps(paths)
    alone = RunPaths(tmp_path / "runs" / "alone")
    alone = run("alone", lambda: len(read_metrics(alone.metrics)) > 30)
    same = min(len(taught), len(_steps(alone)))
    assert same > 12
    assert taught[:same] == _steps(alone)[:same]
    job = load_job(path, more)
    evaluate(job, str(adapters[0]), tmp_path / "own")
    assert _answers(tmp_path / "own") == _answers(tmp_path / "theirs")
    sample_rows(path, adapters[0], tmp_path / "own.json", *more)
    assert json.loads((tmp_path / "own.json").read_text()) == json.loads((tmp_path / "theirs.json").read_text())
    gone = load_job(path, ["evaluate.engine=samplers", *more])
    with pytest.raises(RunError, match="does not go on"):
        evaluate(gone, str(adapters[0]), tmp_path / "gone")
