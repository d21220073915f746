"""Every table by task has every task, so that a new one cannot be forgotten in a room."""

from collections.abc import Mapping

import pytest

from ray_vlm.config.check_method import FORMAT_TASKS, TASK_METRICS
from ray_vlm.evaluate import intervals, metrics, predictor, report
from ray_vlm.methods import reward_check, rewards
from ray_vlm.tasks import TASKS

TABLES: dict[str, Mapping] = {
    "metrics": metrics._MEASURES,
    "intervals": intervals._BUILD,
    "predictor": predictor._READ,
    "rewards": rewards.PARTS,
    "reward_check": reward_check._CASES,
    "check_method": TASK_METRICS,
}


@pytest.mark.parametrize("room", TABLES)
def test_a_table_has_every_task(room: str) -> None:
    assert set(TABLES[room]) == set(TASKS)


def test_every_task_has_a_format_and_titles_of_its_metrics() -> None:
    assert set(FORMAT_TASKS.values()) == set(TASKS)
    assert {name for names in TASK_METRICS.values() for name in names} <= set(report._TITLES)
