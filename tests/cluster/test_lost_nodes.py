"""Nodes that die, lose their cable, are taken away with a notice, or come: the run goes on with the same losses.

Each is a scene of `tests/support/lost_nodes.py`, with what it has to come to.
"""

from pathlib import Path

import pytest

from tests.support.hosts import why_not
from tests.support.lost_nodes import (
    EVERY,
    change_samplers,
    cut_briefly,
    cut_for_good,
    cut_sampler,
    kill_and_add,
    restart_head,
    take_away,
    take_sampler_away,
)

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(autouse=True)
def hosts() -> None:
    if reason := why_not():
        pytest.skip(f"several hosts on one machine: {reason}")


def test_a_node_dies_and_another_comes(tmp_path: Path) -> None:
    result = kill_and_add(tmp_path)
    assert result["workers"][0] == 2
    assert 1 in result["workers"]
    assert result["workers"][-1] == 2
    assert result["went_on_s"] <= 60
    assert max(result["lost_steps"]) <= EVERY
    assert result["steps_once"]
    assert result["images"]
    assert result["apart"] <= 1e-5


def test_a_node_that_was_cut_off_comes_back_and_changes_nothing(tmp_path: Path) -> None:
    result = cut_for_good(tmp_path)
    assert result["went_on_s"] <= 60
    assert max(result["lost_steps"]) <= EVERY
    assert result["steps_once"]
    assert result["apart"] <= 1e-5


def test_a_short_cut_is_no_failure(tmp_path: Path) -> None:
    result = cut_briefly(tmp_path)
    assert result["status"] == ["finished"]
    assert result["steps_once"]
    assert result["apart"] <= 1e-5


def test_a_machine_is_left_within_its_notice(tmp_path: Path) -> None:
    result = take_away(tmp_path)
    assert result["saved_s"] < 15
    assert result["steps_old"] <= 10
    assert result["status"][0] == "preempted"
    assert result["lost_steps"][0] == 0
    assert result["steps_once"]
    assert result["apart"] <= 1e-5


def test_a_sampler_that_is_cut_off_for_good_changes_nothing(tmp_path: Path) -> None:
    result = cut_sampler(tmp_path)
    assert result["status"] == ["finished"]
    assert result["gone"]
    assert result["steps_once"]
    assert result["apart"] == 0.0


def test_a_notice_of_a_sampler_s_node_does_not_stop_the_run(tmp_path: Path) -> None:
    result = take_sampler_away(tmp_path)
    assert result["status"] == ["finished"]
    assert result["steps_once"]
    assert result["apart"] == 0.0


def test_samplers_come_and_go_with_nodes(tmp_path: Path) -> None:
    result = change_samplers(tmp_path)
    assert result["samplers"] == [1, 2, 1]
    assert result["status"] == ["finished"]
    assert result["steps_once"]
    assert result["apart"] == 0.0


def test_a_head_that_died_is_started_again(tmp_path: Path) -> None:
    result = restart_head(tmp_path)
    assert result["status"] == ["died", "finished"]
    assert max(result["lost_steps"]) <= EVERY
    assert result["steps_once"]
    assert result["apart"] <= 1e-5
