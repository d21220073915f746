"""The checks of a checkpoint against a job: rows, prompts, and the rules by which files become rows."""

from typing import Any

import pytest

from ray_vlm.config.load import load_resolved
from ray_vlm.data.preprocessing import CHANGED, RULES, own_settings, rules_since
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import sample_spec
from ray_vlm.errors import RunError
from ray_vlm.runs.checkpoints import Checkpoint
from ray_vlm.train.attempt import Attempt
from ray_vlm.train.callbacks.checkpointing import check_fits, describe_run


def _about(format: str = "coco", labels: tuple[str, ...] = ("dog",), rows: str = "a") -> dict[str, Any]:
    job = load_resolved(
        {"model": {"name": "tiny", "load_in_4bit": False}, "data": {"train": {"path": "x.json", "format": format}}}
    )
    return describe_run("base", rows, "tiny", None, [format], SampleBuilder(sample_spec(job, list(labels))))


def _check(old: dict[str, Any], now: dict[str, Any]) -> None:
    checkpoint = Checkpoint("step-1", step=1, attempt=1, about=old | {"world_size": 1})
    check_fits(Attempt(1, "a", checkpoint), now, num_steps=10, world_size=1)


def test_a_checkpoint_of_the_same_run_fits() -> None:
    _check(_about(), _about())
    before = {key: value for key, value in _about().items() if key not in ("rules", "question", "formats")}
    _check(before, _about())  # as earlier versions wrote them


def test_settings_of_other_tasks_are_not_of_the_question() -> None:
    """Checkpoints of earlier versions have the settings of all tasks."""
    now = _about()["question"]
    task = now["task"] | {"position": False, "short_memory": 3, "prompt": "Where?"}
    assert own_settings(now | {"task": task}) == now | {"task": now["task"] | {"prompt": "Where?"}}
    assert own_settings({"task": 3}) == {"task": 3}


def test_another_question_is_named_with_both_values() -> None:
    with pytest.raises(RunError, match=r"with another question: class names \['dog', 'fish'\], now \['dog'\]\. Use"):
        _check(_about(labels=("dog", "fish")), _about())


@pytest.mark.parametrize(
    ("format", "named", "not_named"),
    [("coco", "_background_, are no class; an annotation", "share an id"), ("llava", "rows that share an id", "crowd")],
)
def test_rules_that_have_changed_since_are_named(format: str, named: str, not_named: str) -> None:
    old = _about(format, rows="b")
    with pytest.raises(RunError, match=r"on other rows \(fingerprint b, data.train has a\)") as caught:
        _check({key: value for key, value in old.items() if key != "rules"}, _about(format))
    assert "Since it was written these rules have changed: " in str(caught.value)
    assert named in str(caught.value)
    assert not_named not in str(caught.value)
    with pytest.raises(RunError) as caught:
        _check(old, _about(format))  # rules are as they were: the rows themselves are others
    assert "rules" not in str(caught.value)


def test_each_rule_is_of_a_number_that_checkpoints_keep() -> None:
    assert {rule.number for rule in CHANGED} == set(range(1, RULES + 1))
    assert rules_since(RULES, ["coco", "llava"]) == []
