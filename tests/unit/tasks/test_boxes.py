"""Box geometry, matching against brute force, golden cases and round trips of the codecs, and broken answers."""

import itertools
import time

import numpy as np
import pytest

from ray_vlm.data.images import ImageSpec
from ray_vlm.tasks.boxes import CODECS, Frame, box_problem, iou_matrix, match, read_boxes, write_boxes, write_region

GOLDEN = {  # QwenLM/Qwen3-VL, qwen-vl-finetune/tools/process_bbox.ipynb: image 640x428, box [146, 137, 615, 415]
    "qwen2_vl": [228, 320, 961, 970],
    "qwen2_5_vl": [147, 134, 619, 407],
    "qwen3_vl": [228, 320, 961, 970],
    "gemma": [320, 228, 970, 961],
    "paligemma": [327, 233, 992, 983],  # round(v * 1023), as big_vision/pp/proj/paligemma/segmentation.py
    "internvl": [228, 320, 961, 970],
    "molmo2": [228, 320, 961, 970],
}
PATCHES = dict.fromkeys(CODECS, 16) | {"qwen2_vl": 14, "qwen2_5_vl": 14}
PADS = {"stretch": {}, "pad_end": {"pad": (0, 0, 0)}, "pad_center": {"pad": (0, 0, 0), "center": True}}
JSON = Frame((1000, 500), (1000, 500))
PIXELS = Frame((1000, 500), (1000, 500), CODECS["qwen2_5_vl"])
TOKENS = Frame((1000, 500), (1000, 500), CODECS["qwen2_vl"])
LOCATED = Frame((1000, 500), (1000, 500), CODECS["paligemma"])
TAGGED = Frame((1000, 500), (1000, 500), CODECS["internvl"])
DOG = "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(10,20),(30,40)<|box_end|>"


@pytest.mark.parametrize("codec", list(CODECS))
def test_official_golden_case(codec: str) -> None:
    frame = Frame((640, 428), (644, 420), CODECS[codec])
    assert frame.encode([146, 137, 615, 415]) == GOLDEN[codec]


def _random_frame(rng: np.random.Generator, codec: str, pad: str) -> Frame:
    size = (int(rng.integers(40, 4000)), int(rng.integers(40, 4000)))
    token = (2 * PATCHES[codec]) ** 2
    placement = ImageSpec(PATCHES[codec], 2, 256 * token, 1280 * token, **PADS[pad]).place(size)
    return Frame(size, placement.resized, CODECS[codec], placement.content, placement.offset)


def _error_and_bar(frame: Frame, value: float, back: float, axis: int) -> tuple[float, float]:
    """Return a coordinate's error and the largest allowed one, in pixels of the resized image or thousandths of it."""
    scale = (frame.content or frame.resized)[axis] / frame.original[axis]
    if units := {"relative_1000": 1000, "relative_1023": 1023}.get(frame.codec.coordinates):
        return abs(back - value) * scale / frame.resized[axis] * units, 0.5
    at_edge = value * scale + frame.offset[axis] > frame.resized[axis] - 1.5  # the last number is side - 1
    return abs(back - value) * scale, 1.0 if at_edge else 0.5


@pytest.mark.parametrize("pad", list(PADS))
@pytest.mark.parametrize("codec", list(CODECS))
def test_boxes_and_points_survive_the_text_within_half_a_unit(codec: str, pad: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        frame = _random_frame(rng, codec, pad)
        width, height = frame.original
        x1, y1 = rng.uniform(0, 0.9 * width), rng.uniform(0, 0.9 * height)
        box = (x1, y1, rng.uniform(x1 + 0.05 * width, width), rng.uniform(y1 + 0.05 * height, height))
        objects, ok, repairs = read_boxes(write_boxes([(box, "dog")], frame).text, frame)
        assert (ok, repairs, [label for _, label in objects]) == (True, [], ["dog"])
        point = frame.decode_point(frame.encode_point(box[:2]))
        for axis, (value, back) in enumerate(zip((*box, *box[:2]), (*objects[0][0], *point), strict=True)):
            error, bar = _error_and_bar(frame, value, back, axis % 2)
            assert error <= bar + 1e-6, (frame, box)


@pytest.mark.parametrize("codec", list(CODECS))
def test_no_box_is_written_empty_or_outside(codec: str) -> None:
    frame = Frame((640, 428), (644, 420), CODECS[codec])
    largest = {"qwen2_5_vl": (643, 419), "paligemma": (1023, 1023)}.get(codec, (1000, 1000))
    for box in [(0, 0, 0.1, 0.1), (639.9, 427.9, 640, 428), (-1, -1, 641, 429), (300, 300, 300.01, 300.01)]:
        x1, y1, x2, y2 = frame.codec.order(frame.encode(box))
        assert 0 <= x1 < x2 <= largest[0]
        assert 0 <= y1 < y2 <= largest[1]
    assert frame.encode((0, 0, 640, 428)) == [0, 0, *largest]
    assert frame.encode_point((640, 428)) == list(largest)


def test_points_and_regions_are_written_in_the_family_s_form() -> None:
    assert write_region((500, 250), JSON) == "[500, 500]"
    assert write_region((500, 250), PIXELS) == "[500, 250]"
    assert write_region((500, 250), TOKENS) == "<|box_start|>(500,500)<|box_end|>"
    assert write_region((0, 0, 500, 250), TOKENS) == "<|box_start|>(0,0),(500,500)<|box_end|>"
    assert JSON.decode_point([500, 500]) == (500.0, 250.0)


def test_padding_moves_boxes_with_their_image() -> None:
    frame = Frame((100, 100), (200, 100), CODECS["qwen2_5_vl"], (100, 100), (50, 0))
    assert frame.encode((0, 0, 50, 50)) == [50, 0, 100, 50]
    assert frame.decode((50, 0, 100, 50)) == (0.0, 0.0, 50.0, 50.0)


@pytest.mark.parametrize("frame", [Frame((1000, 500), (1000, 500), codec) for codec in CODECS.values()])
def test_spans_are_the_objects_and_nothing_is_an_answer(frame: Frame) -> None:
    objects = [((0, 0, 100, 100), "dog"), ((200, 200, 300, 300), 'a "cat"')]
    answer = write_boxes(objects, frame)
    assert [label for _, _, label in answer.spans] == ["dog", 'a "cat"']
    for start, end, label in answer.spans:
        assert read_boxes(answer.text[start:end], frame)[0][0][1] == label
    nothing = write_boxes([], frame)
    assert nothing.spans == ()
    assert read_boxes(nothing.text, frame) == ([], True, [])


ONE = '{"bbox_2d": [10, 20, 30, 40], "label": "dog"}'
TWO = '{"bbox_2d": [50, 60, 70, 80], "label": "cat"}'


@pytest.mark.parametrize(
    ("text", "frame", "count", "ok", "repaired"),
    [
        (f"```json\n[{ONE}, {TWO}]\n```", JSON, 2, True, ""),
        (f"[{ONE}]", JSON, 1, True, ""),
        (f"Sure! Here:\n```json\n[{ONE}]\n```\nAnything else?", JSON, 1, True, ""),
        (f"I see [{ONE}, {TWO}] there.", JSON, 2, False, "text around the JSON"),
        (f"<think>maybe [{TWO}, {TWO}]</think>\n[{ONE}]", JSON, 1, True, ""),
        (f"<think>maybe [{ONE}]", JSON, 0, False, "no object"),
        (f"<think>hm</think><answer>[{ONE}]</answer>", JSON, 1, True, ""),
        (f"```json\n[{ONE}, {TWO}]\n```\nNo:\n```json\n[{ONE}]\n```", JSON, 1, False, "text around the JSON"),
        (f"```json\n[{ONE}]\n```\nNo:\n```json\n[{ONE}, {TWO}, {TWO[:9]}", JSON, 2, False, "cut off"),
        (f"[{ONE}, {TWO}]\ndogs: []", JSON, 2, False, "text around the JSON"),
        (f'[{ONE}] with confidence {{"score": 0.9}}', JSON, 1, False, "text around the JSON"),
        (f'[{ONE}, {{"bbox_2d": [], "label": "b', JSON, 1, False, "cut off"),
        (f'[{ONE}, {{"of": [{TWO}], "label": "b', JSON, 1, False, "cut off"),
        ("Nothing: []", JSON, 0, False, "text around the JSON"),
        (f"<think>maybe [{ONE}]</think> There is nothing.", JSON, 0, False, "no object"),
        (f"<think>{DOG}</think>{DOG}", TOKENS, 1, True, ""),
        (f"<think>{DOG}</think>None", TOKENS, 0, True, ""),
        (f"<think>{DOG}</think>[{ONE}, {TWO}]", JSON, 2, True, ""),
        (f"See [1]. [{ONE}, {TWO}]", JSON, 2, False, "text around the JSON"),
        (f"```json\n[{ONE}, {TWO[:20]}", JSON, 1, False, "cut off"),
        (f"```json\n[{ONE}, {TWO[:-1]}", JSON, 1, False, "cut off"),
        (f"[{ONE}, {ONE}, {TWO}]", JSON, 2, True, "repeated box"),
        ('[{"bbox_2d": [9, 9, 9, 20], "label": "x"}]', JSON, 0, True, "empty box"),
        ('[{"bbox_2d": [9, 9, 1, 1], "label": "x"}]', JSON, 0, True, "empty box"),
        (ONE, JSON, 1, False, "one object in place of a list"),
        (DOG, JSON, 1, False, "box tokens in place of JSON"),
        (f"```json\n[{ONE}]\n```", TOKENS, 1, False, "JSON in place of box tokens"),
        (DOG + DOG.replace("dog", "cat"), TOKENS, 2, True, ""),
        (f"I see {DOG}", TOKENS, 1, False, "text around"),
        (DOG + DOG[:-12], TOKENS, 1, False, "text around"),  # its last number may lack digits
        (DOG + DOG[:60], TOKENS, 1, False, "text around"),
        ("None", TOKENS, 0, True, ""),
        ("[]", JSON, 0, True, ""),
        ("", JSON, 0, False, "no object"),
        ("", TOKENS, 0, False, "no object"),
        ("I see nothing.", JSON, 0, False, "no object"),
        ('[{"bbox_2d": [0, 0, NaN, 10], "label": "x"}]', JSON, 0, False, "dropped"),
        ('[{"bbox_2d": [0, 0, 1e999, 10], "label": "x"}]', JSON, 0, False, "dropped"),
        ('[{"bbox_2d": [0, 0, 123456789012345678901234567890, 10], "label": "x"}]', JSON, 0, False, "dropped"),
        ('[{"bbox_2d": [0, 0, true, 10], "label": "x"}]', JSON, 0, False, "dropped"),
        ('[{"bbox_2d": [0, 0, "5", 10], "label": "x"}]', JSON, 0, False, "dropped"),
        ('[{"bbox_2d": [0, 0, 5], "label": "x"}]', JSON, 0, False, "dropped"),
        ('[{"bbox_2d": [0, 0, 5, 5]}]', JSON, 0, False, "dropped"),
        ("[3, null, []]", JSON, 0, False, "dropped 3"),
    ],
)
def test_broken_answers_are_repaired_and_reported(text: str, frame: Frame, count: int, ok: bool, repaired: str) -> None:
    objects, read_ok, repairs = read_boxes(text, frame)
    assert (len(objects), read_ok) == (count, ok)
    assert repaired in " ".join(repairs)
    assert bool(repaired) == bool(repairs)
    assert not objects or objects[0] == ((10.0, 10.0, 30.0, 20.0), "dog")


@pytest.mark.parametrize("frame", [JSON, PIXELS, TOKENS, LOCATED, TAGGED])
@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        " " * 100_000,
        '{"a":' * 10_000,
        '[{"a":' * 8_000,
        "```" + " " * 100_000,
        "```json" + "\n" * 100_000 + "x",
        '[{"bbox_2d": [' + "1, " * 30_000,
        '"bbox_2d":[' * 9_000,
        '[{"bbox_2d": [1, 2, 3, 4], "label": "' + "\\" * 100_000,
        "<|object_ref_start|>" * 5_000,
        "<|box_start|>" * 8_000,
        "<|box_start|>(" + "1" * 100_000,
        "<|box_start|>(1,2)," * 5_000,
        "-" * 100_000,
        "\ud800" * 1000,
        DOG * 1_000,
        "<loc" * 20_000,
        "<loc0001>" * 9_003,
        "<loc0001><loc0002><loc0003><loc0004>" + " " * 100_000,
        "<ref>" * 20_000,
        "<box>" * 20_000,
        "<box>[[" + "1, " * 30_000,
        "<box>" + "[" * 8_990,
    ],
    ids=lambda text: text[:12].encode("ascii", "backslashreplace").decode(),
)
def test_floods_are_read_within_a_second(text: str, frame: Frame) -> None:
    started = time.process_time()
    objects, ok, repairs = read_boxes(text, frame)
    assert time.process_time() - started < 1.0
    assert len(objects) <= 1
    nothing = frame is LOCATED and not text.strip()  # PaliGemma writes nothing where nothing is
    assert ok == (nothing or (bool(objects) and text.startswith("<") and frame is TOKENS))
    assert objects or repairs or nothing


def test_iou_of_known_boxes() -> None:
    ious = iou_matrix([(0, 0, 10, 10), (0, 0, 0, 0)], [(0, 0, 10, 10), (5, 0, 15, 10), (20, 20, 30, 30)])
    assert np.allclose(ious, [[1, 1 / 3, 0], [0, 0, 0]])
    assert iou_matrix([], [(0, 0, 1, 1)]).shape == (0, 1)


def test_matching_equals_brute_force() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        rows, columns = rng.integers(1, 6, 2)
        scores = rng.random((rows, columns)) * (rng.random((rows, columns)) < 0.6)
        got = sum(scores[r, c] for r, c in match(scores))
        small, large = sorted((rows, columns))
        table = scores if rows <= columns else scores.T
        orders = itertools.permutations(range(int(large)), int(small))
        best = max(sum(table[i, p[i]] for i in range(small)) for p in orders)
        assert got == pytest.approx(best)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((0, 0, 640, 428), None),
        ((-0.9, 0, 640.9, 428), None),
        ((10, 10, 10, 20), "empty or inverted"),
        ((20, 10, 10, 20), "empty or inverted"),
        ((0, 0, 642, 428), "outside"),
        ((640.1, 0, 640.9, 428), "from outside only"),
        ((640.5, 428.0), None),
        ((642, 3), "lies outside"),
    ],
)
def test_boxes_and_points_outside_their_image_are_named(box: tuple, reason: str | None) -> None:
    problem = box_problem(box, (640, 428))
    assert problem is None if reason is None else reason in problem
