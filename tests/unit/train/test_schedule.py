"""A run that is extended follows the schedule of its new length from the first step after the resume."""

from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.load import load_job
from ray_vlm.methods.trainer import align_learning_rates
from ray_vlm.runs.monitor import current_lines, read_metrics
from ray_vlm.train.driver import train


def _learning_rates(path: Path, name: str, max_steps: int, resume: bool = False) -> list[float]:
    job = load_job(path, [f"run.name={name}", f"train.max_steps={max_steps}", "train.warmup_ratio=0.2"])
    lines = current_lines(read_metrics(train(job, path.read_text(), resume=resume).metrics))
    return [line["learning_rate"] for line in lines if line["kind"] == "train"]


def test_an_extended_run_logs_the_rates_of_the_new_schedule(job_file: Any) -> None:
    path = job_file(train={"global_batch_size": 1, "micro_batch_size": 1})
    uninterrupted = _learning_rates(path, "uninterrupted", 5)
    first = _learning_rates(path, "extended", 3)
    extended = _learning_rates(path, "extended", 5, resume=True)
    assert extended[:3] == first
    assert extended[3:] == uninterrupted[3:]


def _schedule(num_steps: int) -> Any:
    """A linear schedule down to 0 of two parameter groups with rates of their own."""
    import torch

    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in (1e-3, 3e-5)]
    return torch.optim.lr_scheduler.LambdaLR(torch.optim.AdamW(groups), lambda step: 1 - step / num_steps)


@pytest.mark.parametrize("num_steps", [7, 10])
def test_every_parameter_group_has_its_own_rate_after_a_restore(num_steps: int) -> None:
    saved, expected, restored = _schedule(7), _schedule(num_steps), _schedule(num_steps)
    for _ in range(6):
        for schedule in (saved, expected):
            schedule.optimizer.step()
            schedule.step()
    restored.optimizer.load_state_dict(saved.optimizer.state_dict())
    restored.load_state_dict(saved.state_dict())
    assert (restored.get_last_lr() == expected.get_last_lr()) == (num_steps == 7)
    align_learning_rates(restored)
    assert restored.get_last_lr() == expected.get_last_lr(), "equal to the bit"
    assert [group["lr"] for group in restored.optimizer.param_groups] == expected.get_last_lr()
