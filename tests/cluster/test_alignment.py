"""DPO and GRPO on Ray workers: the same numbers on one worker and on two, and going on after a worker died."""

from pathlib import Path

import pytest

from ray_vlm.runs.paths import RunPaths
from tests.cluster.test_recovery import _at_step, _steps, _train, _weights
from tests.support.ray_processes import kill_process

pytestmark = pytest.mark.cluster


def _eval(paths: RunPaths) -> list[dict[str, float]]:
    from ray_vlm.runs.monitor import read_metrics

    hidden = ("time", "validation_s", "kind")
    lines = [line for line in read_metrics(paths.metrics) if line["kind"] == "eval"]
    return [{k: v for k, v in line.items() if k not in hidden} for line in lines]


@pytest.mark.parametrize("method", [pytest.param("dpo", marks=pytest.mark.slow), "grpo"])
def test_two_workers_equal_one_process(ray_cluster, method: str, job_of) -> None:
    """Groups stay whole and are the same answers, so advantages and losses are the same."""
    path = job_of(method)
    alone = _train(path, "run.name=alone", "cluster.num_workers=0")
    two = _train(path, "run.name=two", "cluster.num_workers=2", "train.micro_batch_size=2")
    for a, b in zip(_steps(alone), _steps(two), strict=True):
        assert b[1:] == pytest.approx(a[1:], rel=1e-4, abs=1e-6)
    for one, other in zip(_eval(alone), _eval(two), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_a_killed_worker(ray_cluster, method: str, job_of, tmp_path: Path) -> None:
    more = {"train": {"max_steps": 6}, "checkpoint": {"every_steps": 2}, "cluster": {"num_workers": 2}}
    path = job_of(method, **more)
    undisturbed = _train(path, "run.name=whole")
    paths = RunPaths(tmp_path / "runs" / "hurt")
    _at_step(paths, 3, lambda: kill_process("RayTrainWorker", 1))
    _train(path, "run.name=hurt")
    assert _steps(paths) == _steps(undisturbed)
    assert _weights(paths) == _weights(undisturbed)
