"""Answers beside their truth: a classification is in the promised form only with the attributes that were asked for."""

from types import SimpleNamespace
from typing import Any

import pytest

from ray_vlm.config.task import ClassificationTask
from ray_vlm.data.records import SftRecord
from ray_vlm.data.samples import parse_answer
from ray_vlm.evaluate.prediction import build_predictions
from ray_vlm.tasks import classification

LABELS = ("object=grate", "object=pipe", "condition=clear")


def _builder(labels: tuple[str, ...] = LABELS) -> Any:
    spec = SimpleNamespace(task=ClassificationTask(), labels=labels)
    return SimpleNamespace(task=classification, frames=lambda record: (), spec=spec, truth=lambda record: record.truth)


def _record(**attributes: str) -> SftRecord:
    return SftRecord("1", 0, ("a.png",), ((9, 9),), {"attributes": attributes})


@pytest.mark.parametrize(
    ("text", "ok", "repair"),
    [
        ('{"object": "grate", "condition": "clear"}', True, ""),
        ('{"condition": "clear", "object": "grate"}', True, ""),
        ('{"object": "grate"}', False, "attribute 'condition' is missing"),
        ('{"object": "grate", "condition": "clear", "why": "x"}', False, "attribute 'why' was not asked for"),
        ("{}", False, "attribute 'object' is missing"),
    ],
)
def test_other_attributes_than_asked_are_not_the_promised_form(text: str, ok: bool, repair: str) -> None:
    (prediction,) = build_predictions([_record(object="grate", condition="clear")], [text], _builder())
    assert prediction.ok is ok
    assert repair in " ".join(prediction.repairs)
    assert (prediction.repairs == ()) is ok
    assert prediction.score["correct"]["object"] is ("grate" in text), "what is right counts all the same"
    assert parse_answer(text, _record(), _builder()).ok is ok, "without a truth the labels say what was asked"


def test_a_row_is_held_to_its_own_attributes() -> None:
    assert parse_answer('{"object": "grate"}', _record(object="pipe"), _builder()).ok
    assert parse_answer('{"object": "grate"}', _record(), _builder(labels=())).ok, "nothing is known"
