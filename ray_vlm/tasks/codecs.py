"""How model families write boxes and points: numbers to text, and text to numbers.

Numbers here are in the units and in the order of the text; `tasks/boxes.py` converts them to and from pixels of the
original image. A convention that the publisher of a family documents has its source beside it. A family without one
uses `qwen3_vl`: JSON with numbers from 0 to 1000.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ray_vlm.errors import DataError
from ray_vlm.tasks.answers import read_json

_ASK_JSON = (
    "Locate every instance that belongs to the following categories: '{labels}'. "
    "Report bbox coordinates in JSON format."
)
_ASK = "Locate every instance that belongs to the following categories: '{labels}'. Report bbox coordinates."
_ASK_GEMMA = (  # the words of https://ai.google.dev/gemini-api/docs/image-understanding
    "Detect every instance that belongs to the following categories: '{labels}'. "
    "The box_2d should be [ymin, xmin, ymax, xmax] normalized to 0-1000."
)
_ASK_INTERNVL = "Please detect and label all objects of these classes in the image and mark their positions: {labels}."


@dataclass(frozen=True)
class Codec:
    """How a model family writes boxes.

    `coordinates`: `relative_1000` and `relative_1023` are `round(x / W * 1000)` and `round(x / W * 1023)`;
    `resized_pixels` are pixels of the resized image, at most its side minus one. `rows_first`: y stands before x.

    `syntax` is the form of a labelled box:

    - `json`: a fenced list of `{"bbox_2d": [x1, y1, x2, y2], "label": "..."}`, with the key `box_key`;
    - `tokens`: `<|object_ref_start|>label<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`;
    - `ref_tags`: a line `<ref>label</ref><box>[[x1, y1, x2, y2]]</box>` for each box;
    - `loc_tokens`: `<locYYYY><locXXXX><locYYYY><locXXXX> label`, boxes with ` ; ` between them.

    `point_tag`: a point in a text is `<points coords="IMAGE 1 XXX YYY"/>`. `tokens`: some of the tokens that the
    tokenizer of the family has for it. `question` asks for boxes of the classes `{labels}`, which `separator` joins.
    `sources`: model type -> where its publisher documents the convention.
    """

    coordinates: Literal["relative_1000", "relative_1023", "resized_pixels"]
    syntax: Literal["json", "tokens", "ref_tags", "loc_tokens"] = "json"
    rows_first: bool = False
    box_key: str = "bbox_2d"
    indent: str = "\t"
    point_tag: bool = False
    tokens: tuple[str, ...] = ()
    question: str = _ASK_JSON
    separator: str = ", "
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    def order(self, numbers: Sequence[Any]) -> list[Any]:
        """Return x, y, x, y in the order of the text, or the reverse: both swap the axes where y stands first."""
        if not self.rows_first:
            return list(numbers)
        return [numbers[i + 1 - 2 * (i % 2)] for i in range(len(numbers))]


_QWEN_FINETUNE = "https://github.com/QwenLM/Qwen3-VL/blob/main/qwen-vl-finetune/tools/process_bbox.ipynb"
_QWEN_GROUNDING = "https://github.com/QwenLM/Qwen3-VL/blob/main/cookbooks/2d_grounding.ipynb"
_GLM = "https://github.com/zai-org/GLM-V#grounding"
_BIG_VISION = "https://github.com/google-research/big_vision/blob/main/big_vision"

CODECS = {
    "qwen2_vl": Codec(
        "relative_1000",
        "tokens",
        tokens=("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
        question=_ASK,
        sources={"qwen2_vl": _QWEN_FINETUNE},
    ),
    "qwen2_5_vl": Codec("resized_pixels", sources={"qwen2_5_vl": _QWEN_FINETUNE}),
    "qwen3_vl": Codec(
        "relative_1000",
        sources={"qwen3_vl": _QWEN_GROUNDING, "qwen3_vl_moe": _QWEN_GROUNDING, "glm4v": _GLM, "glm4v_moe": _GLM},
    ),
    # [y_min, x_min, y_max, x_max]: docs.cloud.google.com/vertex-ai/generative-ai/docs/bounding-box-detection
    "gemma": Codec(
        "relative_1000",
        rows_first=True,
        box_key="box_2d",
        indent="  ",
        question=_ASK_GEMMA,
        sources={
            "gemma4": "https://huggingface.co/blog/gemma4#object-detection-and-pointing",
            "gemma3": "https://huggingface.co/google/gemma-3-4b-it/discussions/38",  # Google: likely as Gemini
        },
    ),
    "paligemma": Codec(
        "relative_1023",
        "loc_tokens",
        rows_first=True,
        tokens=("<loc0000>", "<loc1023>"),
        question="detect {labels}",
        separator=" ; ",
        # order and rounding: pp/proj/paligemma/segmentation.py of the same repository; the report: arXiv:2407.07726
        sources={"paligemma": f"{_BIG_VISION}/configs/proj/paligemma/README.md"},
    ),
    "internvl": Codec(
        "relative_1000",
        "ref_tags",
        tokens=("<ref>", "</ref>", "<box>", "</box>"),
        question=_ASK_INTERNVL,
        sources={"internvl": "https://internvl.readthedocs.io/en/latest/get_started/chat_data_format.html"},
    ),
    "molmo2": Codec(
        "relative_1000",
        point_tag=True,
        sources={"molmo2": "https://huggingface.co/allenai/Molmo2-8B#multi-image-point-qa"},
    ),
}


def choose_codec(wanted: str | None, own: str, token_id: Callable[[str], int | None]) -> str:
    """Return the name of the codec of a base: the job's (`task.codec`), or else its family's `own`.

    `token_id` returns a token's id, or None if the tokenizer does not know it. A base whose tokenizer lacks the tokens
    of its family's form cannot have learnt it, and uses `qwen3_vl`. Raise `DataError` if the job asks for such a form.
    """
    name = wanted or own
    missing = [token for token in CODECS[name].tokens if token_id(token) is None]
    if missing and wanted is not None:
        raise DataError(
            f"task.codec={wanted!r} writes boxes with tokens that the base's tokenizer does not have "
            f"({', '.join(missing)}). Remove task.codec, or set one that writes JSON, such as qwen3_vl."
        )
    return "qwen3_vl" if missing else name


ANSWER_TOKENS = re.compile(  # special tokens that answers may hold
    r"<\|(?:object_ref|box|quad)_(?:start|end)\|>|</?(?:ref|box|quad)>|<loc\d{4}>|<\|(?:begin|end)_of_box\|>"
)
_NUMBER = r"(-?\d{1,9}(?:\.\d{1,9})?)"
_PAIR = rf"\(\s?{_NUMBER}\s?,\s?{_NUMBER}\s?\)"
_LIST2 = rf"\[\s?{_NUMBER}\s?,\s?{_NUMBER}\s?\]"
_LIST4 = rf"\[\s?{_NUMBER}\s?,\s?{_NUMBER}\s?,\s?{_NUMBER}\s?,\s?{_NUMBER}\s?\]"
_BOX_KEYS = ("bbox_2d", "box_2d")
_POINT_KEY = "point_2d"
TARGET_KEYS = (*_BOX_KEYS, _POINT_KEY)  # keys of a GUI step that hold its target
_TOKENS = re.compile(
    rf"<\|object_ref_start\|>([^<]{{0,200}})<\|object_ref_end\|>|<\|box_start\|>{_PAIR}\s?,\s?{_PAIR}(?:<\|box_end\|>)?"
)
_TAGS = re.compile(r"<ref>([^<]{0,200})</ref>|<box>([-\[\]\d., ]{0,9000})(</box>)?")
_LOC = r"<loc(\d{4})>"
_LOCATED = re.compile(rf"{_LOC * 4}(?:<seg\d{{3}}>){{0,16}} ?([^<\n]{{0,200}})")
_FOUR = re.compile(_LIST4)
_LOOSE = re.compile(  # for objects in broken JSON, and for a truncated last one
    rf'"b(?:box|ox)_2d"\s?:\s?{_LIST4}\s?,\s?"label"\s?:\s?"((?:[^"\\]|\\.){{0,200}})"'
)
_FRAMING = re.compile(r"<\|(?:begin|end)_of_box\|>")  # GLM-V puts its answers between these
_FENCE_LINE = re.compile(r"```[a-z]{0,10}")
_REGIONS = {  # a box or a point in running text: the groups are its numbers
    "json": re.compile(rf"{_LIST4}|{_LIST2}|<points coords=\"\d{{1,4}} \d{{1,4}} (\d{{1,4}}) (\d{{1,4}})\" ?/>"),
    "tokens": re.compile(rf"<\|box_start\|>{_PAIR}(?:,{_PAIR})?<\|box_end\|>"),
    "ref_tags": re.compile(rf"<box>\[{_LIST4}\]</box>|{_LIST2}"),
    "loc_tokens": re.compile(rf"{_LOC * 2}(?:{_LOC * 2})?"),
}


def write_object(numbers: Sequence[int], label: str, codec: Codec) -> str:
    """Write a labelled box from its four numbers in the order of the text."""
    if codec.syntax == "json":
        name = json.dumps(label, ensure_ascii=False)
        return f'\n{codec.indent}{{"{codec.box_key}": {list(numbers)}, "label": {name}}}'
    region = write_numbers(numbers, codec)
    if codec.syntax == "loc_tokens":
        return f"{region} {label}"
    before, after = ("<ref>", "</ref>") if codec.syntax == "ref_tags" else codec.tokens[:2]
    return f"{before}{label}{after}{region}"


def frame_objects(codec: Codec, count: int) -> tuple[str, str, str]:
    """Return the text before `count` labelled boxes, between two of them, and after them."""
    if codec.syntax == "json":
        return "```json\n[", ",", ("\n" if count else "") + "]\n```"
    gap = {"tokens": "", "ref_tags": "\n", "loc_tokens": " ; "}[codec.syntax]
    return "", gap, "" if count else "None"


def write_numbers(numbers: Sequence[int], codec: Codec, image: int = 0) -> str:
    """Write a box or a point within a text, from its four or two numbers in the order of the text.

    `image`: the index of its image in the conversation.
    """
    if codec.syntax == "loc_tokens":
        return "".join(f"<loc{number:04d}>" for number in numbers)
    if codec.syntax == "tokens":
        pairs = ",".join(f"({numbers[i]},{numbers[i + 1]})" for i in range(0, len(numbers), 2))
        return f"<|box_start|>{pairs}<|box_end|>"
    if codec.syntax == "ref_tags" and len(numbers) == 4:
        return f"<box>[{list(numbers)}]</box>"
    if codec.point_tag and len(numbers) == 2:
        return f'<points coords="{image + 1} 1 {numbers[0]:03d} {numbers[1]:03d}"/>'
    return str(list(numbers))


def find_numbers(text: str, codec: Codec) -> list[list[float]]:
    """Return the numbers of every box and point that `write_numbers` wrote into a text, in the order of the text."""
    return [[float(v) for v in match.groups() if v] for match in _REGIONS[codec.syntax].finditer(text)]


def write_target(numbers: Sequence[int], codec: Codec) -> tuple[str, list[int] | str]:
    """Return the key and the value of a GUI step's target in its JSON: numbers, or PaliGemma's tokens for them."""
    key = codec.box_key if len(numbers) == 4 else _POINT_KEY
    return key, write_numbers(numbers, codec) if codec.syntax == "loc_tokens" else list(numbers)


def read_target(step: Mapping[str, Any], codec: Codec) -> tuple[list[float] | None, list[float] | None]:
    """Return the numbers of a GUI step's box and of its point, each None if it is absent or broken."""
    step = {key: step[key] for key in TARGET_KEYS if key in step}
    if codec.syntax == "loc_tokens":
        read = {key: find_numbers(value, codec) for key, value in step.items() if isinstance(value, str)}
        step = {key: regions[0] for key, regions in read.items() if len(regions) == 1}
    box = next(filter(None, (read_numbers(step, key, 4) for key in _BOX_KEYS)), None)
    return box, read_numbers(step, _POINT_KEY, 2)


def read_objects(text: str, codec: Codec) -> tuple[list[Any], list[str]]:
    """Return the labelled boxes of an answer, as `{"bbox_2d": numbers, "label": text}` if they are whole, and the
    repairs that were needed.

    JSON is read in place of Qwen2-VL's tokens and InternVL's tags, and Qwen2-VL's tokens in place of JSON; PaliGemma's
    form only as its own, since its numbers have other units.
    """
    text = _FRAMING.sub("", text)
    if codec.syntax == "loc_tokens":
        return _read_located(text)
    if codec.syntax == "json":
        if "<|box_start|>" not in text:
            return _read_list(text, codec)
        items, repairs = _read_tokens(text)
        return items, [*repairs, "box tokens in place of JSON"]
    items, repairs = (_read_tokens if codec.syntax == "tokens" else _read_tags)(text)
    if not items and text.strip() != "None":
        items, repairs = _read_list(text, codec)
        repairs = [*repairs, "JSON in place of box tokens"] if items else ["no object found in it"]
    return items, repairs


def _read_list(text: str, codec: Codec) -> tuple[list, list[str]]:
    value, repairs = read_json(text)
    if isinstance(value, dict):
        value, repairs = [value], [*repairs, "one object in place of a list"]
    if isinstance(value, list):
        return _rename_key(value, codec, repairs)
    loose = [{"bbox_2d": [float(v) for v in m[:4]], "label": _unescape(m[4])} for m in _LOOSE.findall(text)]
    return loose, ["not the promised JSON; objects picked out of the text" if loose else "no object found in it"]


def _rename_key(items: list, codec: Codec, repairs: list[str]) -> tuple[list, list[str]]:
    """Put the boxes of JSON objects under `bbox_2d`, whatever their key; another than the codec's is a repair."""
    renamed, other = [], None
    for item in items:
        key = next((k for k in (codec.box_key, *_BOX_KEYS) if isinstance(item, dict) and k in item), None)
        other = other if key in (None, codec.box_key) else key
        renamed.append(item if key in (None, "bbox_2d") else {**item, "bbox_2d": item[key]})
    return renamed, [*repairs, f"{other} in place of {codec.box_key}"] if other else repairs


def _read_tokens(text: str) -> tuple[list, list[str]]:
    items: list[dict[str, Any]] = []
    label = ""
    for name, *numbers in _TOKENS.findall(text):
        if not numbers[0]:
            label = name
        else:
            items.append({"bbox_2d": [float(v) for v in numbers], "label": label})
    return items, _around(_TOKENS.sub("", text))


def _read_tags(text: str) -> tuple[list, list[str]]:
    items: list[dict[str, Any]] = []
    label, whole = "", True
    for name, boxes, end in _TAGS.findall(text):
        if not boxes:
            label = name
            continue
        four = [[float(v) for v in numbers] for numbers in _FOUR.findall(boxes)]
        items += [{"bbox_2d": numbers, "label": label} for numbers in four]
        whole = whole and bool(end) and bool(four)
    repairs = _around(_FENCE_LINE.sub("", _TAGS.sub("", text)))
    return items, repairs if whole else [*repairs, "a list of boxes is cut off or broken"]


def _read_located(text: str) -> tuple[list, list[str]]:
    items: list[dict[str, Any]] = []
    for *numbers, label in _LOCATED.findall(text):
        items.append({"bbox_2d": [float(v) for v in numbers], "label": label.strip().rstrip(";").rstrip()})
    if not items and text.strip() not in ("", "None"):  # it writes nothing where nothing is
        return [], ["no object found in it"]
    repairs = _around(_LOCATED.sub("", text))
    return items, repairs if all(item["label"] for item in items) else [*repairs, "a box without a label"]


def _around(rest: str) -> list[str]:
    return ["text around the boxes"] if rest.strip() not in ("", "None") else []


def _unescape(label: str) -> str:
    """Decode the JSON escapes in a label that was cut out from between its quotes."""
    value, _ = read_json(f'"{label}"')
    return value if isinstance(value, str) else label


def read_numbers(item: object, key: str, count: int) -> list[float] | None:
    """Return the `count` finite numbers under `key` of a mapping, or None."""
    numbers = item.get(key) if isinstance(item, Mapping) else None
    if not isinstance(numbers, list) or len(numbers) != count:
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9 for v in numbers):
        return None
    return [float(v) for v in numbers]
