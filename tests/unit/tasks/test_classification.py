"""Classification: attributes as JSON, positions in words, tolerant parsing, scores."""

import pytest

from ray_vlm.config.task import ClassificationTask
from ray_vlm.data.records import SftRecord
from ray_vlm.tasks import classification
from ray_vlm.tasks.answers import Parsed, PromptContext
from ray_vlm.tasks.boxes import Frame

LABELS = ("object=toe_drain", "object=grate", "condition=clear", "condition=blocked")
FRAMES = (Frame((200, 100), (200, 100)),)


def _record(box=(20.0, 70.0, 60.0, 80.0), **attributes) -> SftRecord:
    attributes = attributes or {"object": "toe_drain", "condition": "blocked"}
    context = {"box": box} if box else {}
    return SftRecord("1", 0, ("a.jpg",), ((200, 100),), {"attributes": attributes}, context)


def test_answer_reads_back_and_its_values_are_spans() -> None:
    answer = classification.answer(_record(), FRAMES, PromptContext(ClassificationTask()))
    assert answer.text == '{"object": "toe_drain", "condition": "blocked"}'
    assert [(answer.text[a:b], tag) for a, b, tag in answer.spans] == [
        ('"toe_drain"', "object=toe_drain"),
        ('"blocked"', "condition=blocked"),
    ]
    parsed = classification.parse(answer.text, FRAMES)
    assert parsed.ok
    assert classification.score(parsed, _record().truth) == {
        "correct": {"object": True, "condition": True},
        "all": True,
    }


def test_the_prompt_has_the_position_only_with_the_option() -> None:
    def question(record: SftRecord | None = None, **options) -> str:
        setting = PromptContext(ClassificationTask(**options), LABELS)
        return classification.ask(record or _record(), FRAMES, setting)[-1][1]

    assert "x=" not in question()
    assert "x=0.20, y=0.75, in the lower left of the image" in question(position=True)
    assert "in the down of" in question(position=True, regions=(("up",), ("down",)))
    assert "x=" not in question(_record(box=None), position=True)
    assert question(position=True, prompt="{position} Which?").endswith("image. Which?")
    assert "object: toe_drain, grate; condition: clear, blocked" in question()


def test_usual_places_come_from_the_training_rows() -> None:
    low = [_record(object="toe_drain") for _ in range(4)]
    spread = [_record(box=(x, y, x + 10.0, y + 10.0), object="grate") for x in (0.0, 90.0, 180.0) for y in (0.0, 45.0)]
    hints = classification.describe_regions([*low, *spread], ClassificationTask())
    assert hints == "Usual places: toe_drain: lower left."
    turns = classification.ask(_record(), FRAMES, PromptContext(ClassificationTask(), LABELS, hints))
    assert turns[-1][1].endswith(hints)
    assert classification.describe_regions([_record(box=None)], ClassificationTask()) == ""


@pytest.mark.parametrize(
    ("text", "attributes", "ok"),
    [
        ('{"object": "grate"}', {"object": "grate"}, True),
        ('```json\n{"object": "grate"}\n```', {"object": "grate"}, True),
        ('It is {"object": "grate"}, I think.', {"object": "grate"}, False),
        ('[{"object": "grate"}]', {"object": "grate"}, False),
        ('{"object": "grate", "x": [1]}', {"object": "grate"}, False),
        ('{"object": 3}', {"object": "3"}, True),
        ('{"object": "gra', {}, False),
        ('{"object": "\\ud83d"}', {"object": "\N{REPLACEMENT CHARACTER}"}, False),
        ('{"object": "\\ud83d\\ude00"}', {"object": "\N{GRINNING FACE}"}, True),
        ("grate", {}, False),
        ("", {}, False),
        ("{" * 50_000, {}, False),
        ('{"a":' * 20_000, {}, False),
    ],
)
def test_parse_never_raises(text: str, attributes: dict, ok: bool) -> None:
    parsed = classification.parse(text, FRAMES)
    assert (parsed.values["attributes"], parsed.ok) == (attributes, ok)
    assert parsed.ok or parsed.repairs


def test_score_looks_past_case_and_spaces_only() -> None:
    truth = {"attributes": {"object": "toe drain", "condition": "clear"}}
    score = classification.score(Parsed({"attributes": {"object": "Toe  Drain", "condition": "clean"}}), truth)
    assert score == {"correct": {"object": True, "condition": False}, "all": False}
    assert not classification.score(Parsed({"attributes": {}}), truth)["all"]


def test_unknown_values_and_boxes_outside_are_refused() -> None:
    assert classification.check(_record(), LABELS) is None
    assert "'object=cow' is not among" in (classification.check(_record(object="cow"), LABELS) or "")
    assert "outside" in (classification.check(_record(box=(0.0, 0.0, 900.0, 5.0)), LABELS) or "")
