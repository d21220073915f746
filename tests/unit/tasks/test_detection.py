"""Detection: writing an answer, parsing it in any state, and scoring it."""

import pytest

from ray_vlm.config.task import DetectionTask
from ray_vlm.data.records import SftRecord
from ray_vlm.tasks import detection
from ray_vlm.tasks.answers import Parsed, PromptContext
from ray_vlm.tasks.boxes import CODECS, Frame

FRAME = Frame((1000, 500), (992, 512))
TRUTH = {"boxes": ((600.0, 10.0, 700.0, 60.0), (0.0, 10.0, 100.0, 60.0)), "labels": ("dog", 'a "cat"')}


def _record(truth: dict) -> SftRecord:
    return SftRecord("1", 0, ("a.jpg",), ((1000, 500),), truth)


def _answer(truth: dict, frame: Frame = FRAME) -> str:
    return detection.answer(_record(truth), (frame,), PromptContext(DetectionTask())).text


def test_answer_is_ordered_and_reads_back() -> None:
    text = _answer(TRUTH)
    assert text.startswith('```json\n[\n\t{"bbox_2d": [0, 20, 100, 120], "label": "a \\"cat\\""},\n')
    parsed = detection.parse(text, (FRAME,))
    assert parsed.ok
    assert parsed.repairs == ()
    assert parsed.values["labels"] == ('a "cat"', "dog")
    assert parsed.values["boxes"] == (TRUTH["boxes"][1], TRUTH["boxes"][0])


def test_nothing_here_is_an_answer() -> None:
    text = _answer({"boxes": (), "labels": ()})
    assert text == "```json\n[]\n```"
    assert detection.parse(text, (FRAME,)) == Parsed({"boxes": (), "labels": ()})


@pytest.mark.parametrize(
    ("text", "count", "ok"),
    [
        ('[{"bbox_2d": [0, 0, 10, 10], "label": "x"}]', 1, True),
        ('Here: ```json\n[{"bbox_2d": [0, 0, 10, 10], "label": "x"}]\n``` done', 1, True),
        ('```json\n[{"bbox_2d": [0, 0, 10, 10], "label": "x"}, {"bbox_2d": [1, 2', 1, False),
        ('[{"bbox_2d": [0, 0, 10, 10]}]', 0, False),
        ('[{"bbox_2d": [0, 0, 10], "label": "x"}]', 0, False),
        ('[{"bbox_2d": [9, 9, 1, 1], "label": "x"}]', 0, True),
        ('[{"bbox_2d": [0, 0, NaN, 10], "label": "x"}]', 0, False),
        ('[{"bbox_2d": [0, 0, 1e999, 10], "label": "x"}]', 0, False),
        ('{"bbox_2d": [0, 0, 10, 10], "label": "x"}', 1, False),
        ("[3, null]", 0, False),
        ("[" * 100_000, 0, False),
        ("```" + " " * 20_000, 0, False),
        ("```json" + "\n" * 20_000 + "x", 0, False),
        ("", 0, False),
        ("I see nothing.", 0, False),
    ],
)
def test_parse_never_raises_and_lists_its_repairs(text: str, count: int, ok: bool) -> None:
    parsed = detection.parse(text, (FRAME,))
    assert len(parsed.values["boxes"]) == len(parsed.values["labels"]) == count
    assert parsed.ok == ok
    assert parsed.ok or parsed.repairs


@pytest.mark.parametrize("label", ["é", "日本", 'a"b', "a\\b", "a\nb", "x```y", "[1, 2]"])
def test_odd_labels_survive_in_complete_and_truncated_answers(label: str) -> None:
    truth = {"boxes": ((0.0, 0.0, 100.0, 100.0), (0.0, 9.0, 100.0, 100.0)), "labels": (label, label)}
    text = _answer(truth)
    assert detection.parse(text, (FRAME,)).ok
    assert detection.parse(text, (FRAME,)).values["labels"] == (label, label)
    assert detection.parse(text[:-8], (FRAME,)).values["labels"][:1] == (label,)


def test_thin_boxes_are_never_taught_as_empty() -> None:
    for codec in CODECS.values():
        frame = Frame((4000, 3000), (1024, 768), codec)
        for x in (0.0, 1000.0, 3998.0):
            truth = {"boxes": ((x, 10.0, x + 1.5, 50.0),), "labels": ("a",)}
            parsed = detection.parse(_answer(truth, frame), (frame,))
            assert len(parsed.values["boxes"]) == 1
            assert parsed.repairs == ()


def test_score_counts_hits_misses_and_invented() -> None:
    truth = {"boxes": ((0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)), "labels": ("a", "a", "b")}
    boxes = ((0, 0, 10, 10), (0, 0, 10, 9), (41, 0, 50, 10), (40, 0, 50, 10))
    parsed = Parsed({"boxes": boxes, "labels": ("a", "a", "a", "b")})
    score = detection.score(parsed, truth)
    assert score["hits"] == {"a": 1, "b": 1}
    assert score["misses"] == {"a": 1}
    assert score["invented"] == {"a": 2}
    assert score["ious"] == [1.0, 0.0, 1.0]


def test_a_box_counts_once_even_where_greedy_would_waste_it() -> None:
    truth = {"boxes": ((0, 0, 10, 10), (4, 0, 14, 10)), "labels": ("a", "a")}
    parsed = Parsed({"boxes": ((3, 0, 13, 10), (3.5, 0, 13.5, 10)), "labels": ("a", "a")})
    assert detection.score(parsed, truth)["hits"] == {"a": 2}


def test_ask_lists_the_labels() -> None:
    for prompt, words in ((None, "'a, b'"), ("Find {labels}!", "<image>Find a, b!")):
        turns = detection.ask(_record(TRUTH), (FRAME,), PromptContext(DetectionTask(prompt=prompt), ("a", "b")))
        assert words in turns[-1][1]
    turns = detection.ask(_record(TRUTH), (FRAME,), PromptContext(DetectionTask(system="Be brief."), ("a",)))
    assert turns[0] == ("system", "Be brief.")


def test_each_object_is_a_span_of_its_class() -> None:
    for codec in CODECS.values():
        frame = Frame((1000, 500), (992, 512), codec)
        answer = detection.answer(_record(TRUTH), (frame,), PromptContext(DetectionTask()))
        assert [tag for _, _, tag in answer.spans] == ['a "cat"', "dog"]
        assert "dog" in answer.text[answer.spans[1][0] : answer.spans[1][1]]


def test_a_repeated_box_is_dropped_and_reported() -> None:
    text = "[" + ", ".join(['{"bbox_2d": [0, 0, 10, 10], "label": "x"}'] * 40) + "]"
    parsed = detection.parse(text, (FRAME,))
    assert len(parsed.values["boxes"]) == 1
    assert len(parsed.repairs) == 39


@pytest.mark.parametrize(
    ("truth", "images", "words"),
    [
        (TRUTH, ("a.jpg", "b.jpg"), "exactly one image"),
        ({"boxes": ((0, 0, 5, 5),), "labels": ("cow",)}, ("a.jpg",), "class 'cow' is not among"),
        ({"boxes": ((9, 9, 5, 5),), "labels": ("dog",)}, ("a.jpg",), "empty or inverted"),
        ({"boxes": ((0, 0, 5, 900),), "labels": ("dog",)}, ("a.jpg",), "box_units"),
    ],
)
def test_rows_that_cannot_be_learned_say_why(truth: dict, images: tuple, words: str) -> None:
    record = SftRecord("1", 0, images, ((1000, 500),) * len(images), truth)
    assert words in (detection.check(record, ["dog", 'a "cat"']) or "")
    assert detection.check(_record(TRUTH), ["dog", 'a "cat"']) is None
