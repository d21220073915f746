"""Golden texts of every family's convention, read back, and answers as models of these families write them."""

import json
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.task import DetectionTask, GuiStepsTask, _Task
from ray_vlm.data.records import SftRecord
from ray_vlm.errors import DataError
from ray_vlm.models.families import CODEC_OF, FAMILIES
from ray_vlm.tasks import chat, detection, gui_steps
from ray_vlm.tasks.answers import PromptContext
from ray_vlm.tasks.boxes import CODECS, Frame, read_boxes, write_region
from ray_vlm.tasks.codecs import choose_codec, find_numbers

SIZE, RESIZED = (640, 428), (644, 420)
DOG, CAT = (146.0, 137.0, 615.0, 415.0), (64.0, 214.0, 320.0, 321.0)
LABELS = ("dog", "traffic light")
TEXTS = {
    "qwen2_vl": "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(228,320),(961,970)<|box_end|>"
    "<|object_ref_start|>traffic light<|object_ref_end|><|box_start|>(100,500),(500,750)<|box_end|>",
    "qwen2_5_vl": '```json\n[\n\t{"bbox_2d": [147, 134, 619, 407], "label": "dog"},'
    '\n\t{"bbox_2d": [64, 210, 322, 315], "label": "traffic light"}\n]\n```',
    "qwen3_vl": '```json\n[\n\t{"bbox_2d": [228, 320, 961, 970], "label": "dog"},'
    '\n\t{"bbox_2d": [100, 500, 500, 750], "label": "traffic light"}\n]\n```',
    "gemma": '```json\n[\n  {"box_2d": [320, 228, 970, 961], "label": "dog"},'
    '\n  {"box_2d": [500, 100, 750, 500], "label": "traffic light"}\n]\n```',
    "paligemma": "<loc0327><loc0233><loc0992><loc0983> dog ; <loc0512><loc0102><loc0767><loc0512> traffic light",
    "internvl": "<ref>dog</ref><box>[[228, 320, 961, 970]]</box>\n"
    "<ref>traffic light</ref><box>[[100, 500, 500, 750]]</box>",
    "molmo2": '```json\n[\n\t{"bbox_2d": [228, 320, 961, 970], "label": "dog"},'
    '\n\t{"bbox_2d": [100, 500, 500, 750], "label": "traffic light"}\n]\n```',
}
QUESTIONS = {
    "qwen2_vl": "Locate every instance that belongs to the following categories: 'dog, traffic light'. "
    "Report bbox coordinates.",
    "gemma": "Detect every instance that belongs to the following categories: 'dog, traffic light'. "
    "The box_2d should be [ymin, xmin, ymax, xmax] normalized to 0-1000.",
    "paligemma": "detect dog ; traffic light",
    "internvl": "Please detect and label all objects of these classes in the image and mark their positions: "
    "dog, traffic light.",
}
_JSON_QUESTION = (
    "Locate every instance that belongs to the following categories: 'dog, traffic light'. "
    "Report bbox coordinates in JSON format."
)


def _frame(codec: str) -> Frame:
    return Frame(SIZE, RESIZED, CODECS[codec])


def _detection() -> SftRecord:
    return SftRecord("1", 0, ("a.jpg",), (SIZE,), {"boxes": (DOG, CAT), "labels": LABELS})


def _assert_near(read: Any, right: Any, frame: Frame) -> None:
    unit = max(b - a for a, b in zip(frame.decode_point((0, 0)), frame.decode_point((1, 1)), strict=True))
    assert read == pytest.approx(right, abs=unit / 2 + 1e-9)


@pytest.mark.parametrize("codec", list(CODECS))
def test_golden_questions_and_answers_of_detection(codec: str) -> None:
    frame, context = _frame(codec), PromptContext(DetectionTask(), LABELS)
    question = detection.ask(_detection(), (frame,), context)
    assert question == (("user", f"<image>{QUESTIONS.get(codec, _JSON_QUESTION)}"),)
    answer = detection.answer(_detection(), (frame,), context)
    assert answer.text == TEXTS[codec]
    assert [label for _, _, label in answer.spans] == list(LABELS)
    parsed = detection.parse(answer.text, (frame,))
    assert (parsed.ok, parsed.repairs, parsed.values["labels"]) == (True, (), LABELS)
    for read, right in zip(parsed.values["boxes"], (DOG, CAT), strict=True):
        _assert_near(read, right, frame)
    assert detection.score(parsed, _detection().truth)["hits"] == {"dog": 1, "traffic light": 1}


# In text: a box and a point at (320, 214), the middle of the image, of the second image of a conversation.
REGIONS = {
    "qwen2_vl": ("<|box_start|>(228,320),(961,970)<|box_end|>", "<|box_start|>(500,500)<|box_end|>"),
    "qwen2_5_vl": ("[147, 134, 619, 407]", "[322, 210]"),
    "qwen3_vl": ("[228, 320, 961, 970]", "[500, 500]"),
    "gemma": ("[320, 228, 970, 961]", "[500, 500]"),
    "paligemma": ("<loc0327><loc0233><loc0992><loc0983>", "<loc0512><loc0512>"),
    "internvl": ("<box>[[228, 320, 961, 970]]</box>", "[500, 500]"),
    "molmo2": ("[228, 320, 961, 970]", '<points coords="2 1 500 500"/>'),
}


@pytest.mark.parametrize("codec", list(CODECS))
def test_golden_regions_within_texts(codec: str) -> None:
    frame = _frame(codec)
    written = tuple(write_region(region, frame, image=1) for region in (DOG, (320.0, 214.0)))
    assert written == REGIONS[codec]
    numbers = find_numbers(f"The dog at {written[0]} looks at {written[1]}.", frame.codec)
    read = [frame.decode(v) if len(v) == 4 else frame.decode_point(v) for v in numbers]
    assert [len(region) for region in read] == [4, 2]
    _assert_near(read[0], DOG, frame)
    _assert_near(read[1], (320.0, 214.0), frame)
    turns = (("user", "<image><image>Where?"),)
    context = {"turns": turns, "boxes": (DOG, (320.0, 214.0)), "refs": (), "image_of": (0, 1)}
    record = SftRecord("1", 0, ("a", "b"), (SIZE, SIZE), {"answer": "At <bbox> and <bbox>."}, context)
    text = chat.answer(record, (frame, frame), PromptContext(GuiStepsTask())).text
    assert text == f"At {written[0]} and {written[1]}."


# The row's y of the box and of the point differ from their x, so that an order that is not the family's shows.
STEPS = {
    "qwen2_vl": ('"bbox_2d": [228, 320, 961, 970]', '"point_2d": [250, 500]'),
    "qwen2_5_vl": ('"bbox_2d": [147, 134, 619, 407]', '"point_2d": [161, 210]'),
    "gemma": ('"box_2d": [320, 228, 970, 961]', '"point_2d": [500, 250]'),
    "paligemma": ('"bbox_2d": "<loc0327><loc0233><loc0992><loc0983>"', '"point_2d": "<loc0512><loc0256>"'),
}


@pytest.mark.parametrize("codec", list(CODECS))
def test_golden_gui_steps(codec: str) -> None:
    frame = _frame(codec)
    texts = STEPS.get(codec, ('"bbox_2d": [228, 320, 961, 970]', '"point_2d": [250, 500]'))
    for text, box, point in ((texts[0], DOG, None), (texts[1], None, (160.0, 214.0))):
        truth = {"output": {"action": "click"}, "box": box, "point": point}
        record = SftRecord("t", 0, ("a",), (SIZE,), truth, {"instruction": "x", "history": ()})
        answer = gui_steps.answer(record, (frame,), PromptContext(GuiStepsTask())).text
        assert answer == f'{{"action": "click", {text}}}'
        parsed = gui_steps.parse(f"```json\n{answer}\n```", (frame,))
        assert (parsed.ok, parsed.values["output"]) == (True, {"action": "click"})
        _assert_near(parsed.values["box"] or parsed.values["point"], box or point, frame)
        assert gui_steps.score(parsed, truth)["success"]


@pytest.mark.parametrize(
    ("codec", "text", "labels", "box", "ok"),
    [
        # https://huggingface.co/blog/gemma4
        (
            "gemma",
            '```json\n[\n  {"box_2d": [171, 75, 245, 308], "label": "recipe"}\n]\n```',
            "recipe",
            (75, 171),
            True,
        ),
        (
            "gemma",
            'Here:\n```json\n[\n  {"box_2d": [171, 75, 245, 308], "label": "a"}\n]\n```\nOK?',
            "a",
            (75, 171),
            True,
        ),
        ("gemma", '[{"box_2d": [171, 75, 245, 308], "label": "a"}, {"box_2d": [1', "a", (75, 171), False),
        ("gemma", '[{"bbox_2d": [171, 75, 245, 308], "label": "a"}]', "a", (75, 171), False),
        ("qwen3_vl", '[{"box_2d": [171, 75, 245, 308], "label": "a"}]', "a", (171, 75), False),
        # https://github.com/zai-org/GLM-V#grounding
        ("qwen3_vl", '<|begin_of_box|>[{"label": "a", "bbox_2d": [1, 2, 30, 40]}]<|end_of_box|>', "a", (1, 2), True),
        ("qwen3_vl", '<think>hm</think>{"bbox_2d": [1, 2, 30, 40], "label": "a"}', "a", (1, 2), False),
        ("internvl", "<ref>a</ref><box>[[1, 2, 30, 40], [5, 6, 70, 80]]</box>", "a a", (1, 2), True),
        (  # https://internvl.readthedocs.io/en/latest/get_started/chat_data_format.html
            "internvl",
            "Sure, I will detect and label all objects in the image and mark their positions.\n\n```\n"
            "<ref>Gun Model</ref><box>[[32, 231, 977, 662]]</box>\n<ref>screw</ref><box>[[754, 376, 851, 429]]</box>"
            "\n```",
            "Gun Model screw",
            (32, 231),
            False,
        ),
        ("internvl", "```\n<ref>a</ref><box>[[1,2,30,40]]</box>\n```", "a", (1, 2), True),
        ("internvl", "<ref>a</ref><box>[[1, 2, 30, 40]]</box><ref>b</ref><box>[[5, 6, 7", "a", (1, 2), False),
        ("internvl", '```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "a"}]\n```', "a", (1, 2), False),
        (
            "paligemma",
            "<loc0002><loc0001><loc0040><loc0030> a;<loc0002><loc0001><loc0040><loc0031>b",
            "a b",
            (1, 2),
            True,
        ),
        ("paligemma", "<loc0002><loc0001><loc0040><loc0030> a\n\nA dog.", "a", (1, 2), False),
        ("paligemma", "<loc0002><loc0001><loc0040><loc0030> a ; <loc0001><loc0001>", "a", (1, 2), False),
        ("paligemma", "<loc0002><loc0001><loc0040><loc0030><seg001><seg002> a", "a", (1, 2), True),
        ("paligemma", "", "", None, True),
        ("paligemma", "None", "", None, True),
        ("paligemma", "unanswerable", "", None, False),
    ],
)
def test_answers_as_models_write_them(codec: str, text: str, labels: str, box: tuple | None, ok: bool) -> None:
    units = 1023 if codec == "paligemma" else 1000
    objects, read_ok, repairs = read_boxes(text, Frame((units, units), (units, units), CODECS[codec]))
    assert " ".join(label for _, label in objects) == labels
    assert read_ok == ok == (not repairs)
    assert box is None or objects[0][0][:2] == pytest.approx(box)


@pytest.mark.parametrize("value", ["<loc0001>", "<loc0001><loc0002><loc0003>", 7, [1, 2, 3], "", None])
def test_broken_targets_of_gui_steps_are_reported(value: object) -> None:
    parsed = gui_steps.parse(json.dumps({"action": "click", "bbox_2d": value}), (_frame("paligemma"),))
    assert (parsed.ok, parsed.values["box"]) == (False, None)
    assert "not four or two numbers" in " ".join(parsed.repairs)


def test_a_step_s_output_may_not_hold_its_target() -> None:
    for key in ("bbox_2d", "box_2d", "point_2d"):
        truth = {"output": {"action": "click", key: [1, 2]}, "box": None, "point": None}
        assert key in str(gui_steps.check(SftRecord("t", 0, ("a",), (SIZE,), truth, {}), ()))


def test_a_base_without_the_tokens_writes_json() -> None:
    ids = {token: number for number, token in enumerate(CODECS["paligemma"].tokens)}
    assert choose_codec(None, "paligemma", ids.get) == "paligemma"
    assert choose_codec(None, "internvl", ids.get) == "qwen3_vl"
    assert choose_codec("gemma", "internvl", ids.get) == "gemma"
    with pytest.raises(DataError, match=r"task\.codec='internvl'.*<ref>, </ref>.*Remove task\.codec"):
        choose_codec("internvl", "gemma", ids.get)


def test_tokens_of_coordinates_are_single_and_are_not_stripped() -> None:
    from ray_vlm.demo.tiny import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<loc{i:0>4}>" for i in range(1024)])  # as the family's processor does
    text = TEXTS["paligemma"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert [token for token in tokens if token.startswith("<loc")] == [
        f"<loc{n:04d}>" for n in (327, 233, 992, 983)
    ] + [f"<loc{n:04d}>" for n in (512, 102, 767, 512)]
    for skip in (False, True):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == text
    assert read_boxes(tokenizer.decode(ids), _frame("paligemma"))[1]


def test_every_codec_may_be_set_and_has_its_sources() -> None:
    field = _Task.model_fields["codec"]
    assert set(CODECS) == set(field.annotation.__args__[0].__args__)  # type: ignore[union-attr]
    chosen = {name: family.codec for name, family in FAMILIES.items()} | CODEC_OF
    for name, codec in CODECS.items():
        assert codec.sources
        assert all(source.startswith("https://") for source in codec.sources.values())
        for family in codec.sources:
            assert chosen.get(family, "qwen3_vl") == name
    assert {name for name, codec in chosen.items() if name not in CODECS[codec].sources} == {
        *("llama4", "qwen3_5", "qwen3_5_moe"),  # their publishers document none
    }


def build_table() -> list[str]:
    """Return the table of conventions of docs/data.md: family, `task.codec`, a box in the text, order and units,
    source."""
    lines = [
        "| family | `task.codec` | a box of a dog, in 640x428 pixels | numbers | source |",
        "|---|---|---|---|---|",
    ]
    units = {
        "relative_1000": "0 to 1000",
        "relative_1023": "0 to 1023",
        "resized_pixels": "pixels of the resized image",
    }
    for name, codec in CODECS.items():
        text = detection.answer(_one_dog(), (_frame(name),), PromptContext(DetectionTask(), ("dog",))).text
        text = text.replace("```json\n", "").replace("\n```", "").strip("[]\n\t ")
        for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;")):
            text = text.replace(char, entity)
        by_source: dict[str, list[str]] = {}
        for family, source in codec.sources.items():
            by_source.setdefault(source, []).append(f"`{family}`")
        order = "y first, " if codec.rows_first else ""
        for source, families in by_source.items():
            lines.append(
                f"| {', '.join(families)} | `{name}` | <code>{text}</code> | {order}{units[codec.coordinates]} | "
                f"[{source.split('/')[2].removeprefix('www.')}]({source}) |"
            )
    return lines


def _one_dog() -> SftRecord:
    return SftRecord("1", 0, ("a.jpg",), (SIZE,), {"boxes": (DOG,), "labels": ("dog",)})


def test_the_table_of_the_documents_is_that_of_the_code() -> None:
    lines = (Path(__file__).parents[3] / "docs" / "data.md").read_text().splitlines()
    start = lines.index(build_table()[0])
    assert lines[start : start + len(build_table())] == build_table()
