"""Detection: the answer's text, reading it back whatever its state, and scoring it."""

import pytest

from ray_vlm.tasks import detection
from ray_vlm.tasks.boxes import Frame

FRAME = Frame((1000, 500), (992, 512), "relative_1000")
TRUTH = {"boxes": ((600.0, 10.0, 700.0, 60.0), (0.0, 10.0, 100.0, 60.0)), "labels": ("dog", 'a "cat"')}


def test_answer_is_ordered_and_reads_back() -> None:
    text = detection.answer(TRUTH, FRAME)
    assert text.startswith('```json\n[\n\t{"bbox_2d": [0, 20, 100, 120], "label": "a \\"cat\\""},\n')
    parsed = detection.parse(text, FRAME)
    assert parsed.ok
    assert parsed.repairs == ()
    assert parsed.labels == ('a "cat"', "dog")
    assert parsed.boxes == (TRUTH["boxes"][1], TRUTH["boxes"][0])


def test_nothing_here_is_an_answer() -> None:
    text = detection.answer({"boxes": (), "labels": ()}, FRAME)
    assert text == "```json\n[]\n```"
    assert detection.parse(text, FRAME) == detection.Parsed()


@pytest.mark.parametrize(
    ("text", "found", "ok"),
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
def test_parse_never_raises_and_says_what_it_mended(text: str, found: int, ok: bool) -> None:
    parsed = detection.parse(text, FRAME)
    assert len(parsed.boxes) == len(parsed.labels) == found
    assert parsed.ok == ok
    assert parsed.ok or parsed.repairs


@pytest.mark.parametrize("label", ["é", "日本", 'a"b', "a\\b", "a\nb", "x```y", "[1, 2]"])
def test_odd_labels_survive_whole_and_cut_off(label: str) -> None:
    truth = {"boxes": ((0.0, 0.0, 100.0, 100.0),) * 2, "labels": (label, label)}
    text = detection.answer(truth, FRAME)
    assert detection.parse(text, FRAME).ok
    assert detection.parse(text, FRAME).labels == (label, label)
    assert detection.parse(text[:-8], FRAME).labels[:1] == (label,)


def test_thin_boxes_are_never_taught_as_empty() -> None:
    for coordinates in ("relative_1000", "resized_pixels"):
        frame = Frame((4000, 3000), (1024, 768), coordinates)
        for x in (0.0, 1000.0, 3998.0):
            truth = {"boxes": ((x, 10.0, x + 1.5, 50.0),), "labels": ("a",)}
            parsed = detection.parse(detection.answer(truth, frame), frame)
            assert len(parsed.boxes) == 1
            assert parsed.repairs == ()


def test_score_counts_hits_misses_and_invented() -> None:
    truth = {"boxes": ((0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)), "labels": ("a", "a", "b")}
    boxes = ((0, 0, 10, 10), (0, 0, 10, 9), (41, 0, 50, 10), (40, 0, 50, 10))
    parsed = detection.Parsed(boxes, ("a", "a", "a", "b"))
    score = detection.score(parsed, truth)
    assert score["hits"] == {"a": 1, "b": 1}
    assert score["misses"] == {"a": 1}
    assert score["invented"] == {"a": 2}
    assert score["ious"] == [1.0, 0.0, 1.0]


def test_a_box_counts_once_even_where_greedy_would_waste_it() -> None:
    truth = {"boxes": ((0, 0, 10, 10), (4, 0, 14, 10)), "labels": ("a", "a")}
    parsed = detection.Parsed(((3, 0, 13, 10), (3.5, 0, 13.5, 10)), ("a", "a"))
    assert detection.score(parsed, truth)["hits"] == {"a": 2}


def test_ask_lists_the_labels() -> None:
    assert "'a, b'" in detection.ask(["a", "b"])
    assert detection.ask(["a", "b"], "Find {labels}!") == "Find a, b!"
