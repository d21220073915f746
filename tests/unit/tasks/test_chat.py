"""Chat: several images and turns, boxes written into texts by the codec, and string scores."""

import time

import pytest

from ray_vlm.config.task import ChatTask
from ray_vlm.data.records import SftRecord
from ray_vlm.tasks import chat
from ray_vlm.tasks.answers import Parsed, PromptContext
from ray_vlm.tasks.boxes import CODECS, Frame

SIZES = ((100, 100), (200, 100))


def _record(turns, answer="yes", images=("a.jpg", "b.jpg"), **context) -> SftRecord:
    return SftRecord("1", 0, images, SIZES[: len(images)], {"answer": answer}, {"turns": tuple(turns), **context})


TURNS = (("user", "<image>What?"), ("assistant", "A dog."), ("user", "<image>And here?"))


def _frames(codec: str = "qwen3_vl") -> tuple[Frame, ...]:
    return tuple(Frame(size, size, CODECS[codec]) for size in SIZES)


def test_all_turns_are_asked_and_the_last_is_the_answer() -> None:
    assert chat.ask(_record(TURNS), _frames(), PromptContext(ChatTask())) == TURNS
    assert chat.answer(_record(TURNS), _frames(), PromptContext(ChatTask())).text == "yes"
    turns = chat.ask(_record(TURNS), _frames(), PromptContext(ChatTask(system="Be brief.")))
    assert turns[0] == ("system", "Be brief.")
    own = (("system", "Mine."), *TURNS)
    assert chat.ask(_record(own), _frames(), PromptContext(ChatTask(system="Be brief.")))[0] == (
        "system",
        "Mine.",
    )


@pytest.mark.parametrize(
    ("codec", "words"),
    [("qwen3_vl", "[100, 200, 500, 600]"), ("qwen2_vl", "<|box_start|>(100,200),(500,600)<|box_end|>")],
)
def test_boxes_are_written_in_the_family_s_form_and_in_their_own_image(codec: str, words: str) -> None:
    record = _record(
        TURNS,
        "The <ref-object> is at <bbox>.",
        boxes=((20.0, 20.0, 100.0, 60.0),),
        refs=("dog",),
        image_of=(1,),
    )
    assert chat.answer(record, _frames(codec), PromptContext(ChatTask())).text == f"The dog is at {words}."


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("A cat", "A cat", (True, True, 1.0)),
        ("a Cat.", "cat", (False, True, 0.0)),
        ("hallo", "hello", (False, False, 0.8)),
        ("", "hello", (False, False, 0.0)),
        ("xyz", "hello", (False, False, 0.0)),
        ("", "", (True, True, 1.0)),
    ],
)
def test_scores(answer: str, right: str, expected: tuple) -> None:
    score = chat.score(Parsed({"answer": answer}), {"answer": right})
    assert (score["exact"], score["normalised"]) == expected[:2]
    if expected[2] or answer != "a Cat.":
        assert score["anls"] == pytest.approx(expected[2])


def test_rows_that_cannot_be_learned_say_why() -> None:
    assert chat.check(_record(TURNS), ()) is None
    assert "2 <image> tags for 1 images" in (chat.check(_record(TURNS, images=("a.jpg",)), ()) or "")
    assert "empty" in (chat.check(_record(TURNS, " "), ()) or "")
    outside = _record(TURNS, boxes=((0.0, 0.0, 900.0, 5.0),), image_of=(0,))
    assert "outside its 100x100" in (chat.check(outside, ()) or "")


def test_long_answers_are_scored_in_no_time() -> None:
    """Every letter against every other one took half a minute."""
    started = time.process_time()
    assert chat.anls("ab" * 4000, "ba" * 4000) == pytest.approx(1 - 2 / 8000)
    assert chat.anls("a" * 100_000, "b" * 1000) == 0.0
    assert time.process_time() - started < 10
