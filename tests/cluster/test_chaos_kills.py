"""DPO and GRPO with a worker killed at a random moment, as `benchmarks/chaos.py` does it ten times over."""

from pathlib import Path

import pytest

from tests.support.killing import EVERY, kill_runs, notes_of, write_job, write_method_job

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_a_kill_at_a_random_moment(ray_cluster, method: str, tmp_path: Path) -> None:
    """The end is the undisturbed one: DPO's to the bit, GRPO's by steps and prompts."""
    path = write_method_job(tmp_path, write_job(tmp_path), method)
    runs = kill_runs(path, method, 1, notes_of(tmp_path) if method == "grpo" else None)
    assert (runs.hit, runs.ended) == (1, 1)
    assert runs.steps_again <= EVERY
    if method == "dpo":
        assert runs.equal == 1
    else:
        assert (runs.other_num_steps, runs.other_prompts) == (0, 0)
