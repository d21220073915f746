"""Turn rows of text with images into records: conversations, preferences and prompts as other tools write them.

Turns become `(role, text)` with the roles system, user and assistant; an `<image>` in a text stands for an image. Every
function raises `ValueError` with the problem and its fix.
"""

import re
from dataclasses import replace
from typing import Any

from ray_vlm.data.records import Box, Image, Point, PreferenceRecord, PromptRecord, SftRecord, plain_bytes
from ray_vlm.data.sources import fields
from ray_vlm.data.sources.data_uris import is_data_uri
from ray_vlm.data.sources.fields import Row, shown
from ray_vlm.tasks.answers import IMAGE, Turns

_BOX, _NAME = "<bbox>", "<ref-object>"
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",  # OpenAI's newer name for it
}
_CALLS = ("tool_calls", "function_call")
_URL_PARTS, _TEXT_PARTS = ("image_url", "input_image"), ("text", "input_text", "output_text")  # of OpenAI's two APIs
_ORDER = "turns are an optional system turn, then user and assistant alternately"
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_MEDIA_TAGS = ("<video>", "<audio>")
_TEXTS = (
    *("id", "group", "prompt", "problem", "chosen", "rejected", "rejected_response", "solution", "answer"),
    *("query", "response", "instruction", "input", "output", "system", "normal_caption"),
)
_PICTURE = re.compile(r"\S+\.(jpe?g|png|webp|avif|gif|bmp|tiff?|ppm)", re.IGNORECASE)
_NOT_COLUMNS = ("id", "image", "images", "group")
_DIALOGUES, _PROBLEMS = ("conversations", "messages"), ("problem", "prompt")


def chat_record(row: Row, column: str) -> SftRecord:
    """Read the turns in `column`, and `image` or `images`. The last answer is the truth.

    `conversations` are LLaVA's, of `{"from", "value"}`; `messages` are of `{"role", "content"}`, where a content may be
    OpenAI's list of parts (platform.openai.com/docs/api-reference/chat), and `objects` fill `<ref-object>` and `<bbox>`
    in their texts. A text in `system` goes before both.
    """
    listed = fields.nested(row.first(column), column)
    turns, inline = _read_turns(listed, column, row)
    _check_learned(listed, column)
    return _chat(row, _with_system(row, turns), inline, column)


def query_record(row: Row) -> SftRecord:
    """Read ms-swift's `query` and `response`, with `system`, `history` of `[query, response]`, `images` and `objects`
    (swift.readthedocs.io, Custom Dataset)."""
    asked = ("user", _cell_text(row, "query"))
    turns = (*_read_system(row), *_read_history(row), asked, ("assistant", _cell_text(row, "response")))
    return _chat(row, turns, (), "response")


def alpaca_record(row: Row) -> SftRecord:
    """Read `instruction`, `input` and `output` (github.com/tatsu-lab/stanford_alpaca), with `system`, `history` of
    `[instruction, output]` and `images` as LLaMA-Factory has them (github.com/hiyouga/LLaMA-Factory, data/README.md).
    A question is the instruction, and the input on a line behind it."""
    lines = [_cell_text(row, name) for name in ("instruction", "input") if row.first(name) is not None]
    asked = ("user", "\n".join(lines))
    turns = (*_read_system(row), *_read_history(row), asked, ("assistant", _cell_text(row, "output")))
    return _chat(row, turns, (), "output")


def _cell_text(row: Row, name: str) -> str:
    value = row.first(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} holds {shown(value)} in place of a text; mend it")
    return value


def _read_system(row: Row) -> Turns:
    return () if row.first("system") is None else (("system", _cell_text(row, "system")),)


def _with_system(row: Row, turns: Turns) -> Turns:
    """Return the turns behind the text in the column `system`, where LLaMA-Factory has it beside them."""
    system = _read_system(row)
    if not system or turns[:1] == system:
        return turns
    if turns[:1] and turns[0][0] == "system":
        raise ValueError("the row has a system turn, and another text in its column system; leave one of the two out")
    return (*system, *turns)


def _refuse_tools(row: Row) -> None:
    if not fields.is_empty(fields.nested(row.cells.get("tools"), "tools")):
        raise ValueError("the row has tools, and calls of tools are not read; leave the row out, or empty the column")


def _read_history(row: Row) -> Turns:
    """Return the earlier turns of a row, which come as a list of questions with their answers."""
    pairs = fields.nested(row.first("history"), "history")
    if fields.is_empty(pairs):
        return ()
    if not isinstance(pairs, list | tuple):
        raise ValueError(f"history {shown(pairs)} is not a list of [question, answer]; mend it")
    turns: list[tuple[str, str]] = []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"history[{i}] {shown(pair)} is not two texts [question, answer]; mend it")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return tuple(turns)


def _chat(row: Row, turns: Turns, inline: tuple[Image, ...], column: str) -> SftRecord:
    """Return the record of a dialogue. `inline`: images in its turns; `column`: that of the last answer."""
    _check_order(turns, "assistant")
    _refuse_tools(row)
    if not turns[-1][1].strip():
        raise ValueError(f"the last answer in {column} is empty, so there is nothing to learn; fill or remove the row")
    pictures = _pictures(row, turns, inline)
    turns = _insert_image_tags(turns, len(pictures))
    context: dict[str, Any] = {"turns": turns[:-1]}
    if column in ("messages", "response") and row.first("objects") is not None:
        refs, regions, image_of, units = read_objects(row, len(pictures))
        for mark, entries, name in ((_NAME, refs, "ref"), (_BOX, regions, "bbox")):
            count = sum(text.count(mark) for _, text in turns)
            if count != len(entries):
                raise ValueError(
                    f"the texts hold {count} {mark} for {len(entries)} entries of objects.{name}; mend one"
                )
        context |= {"refs": refs, "boxes": regions, "image_of": image_of, **units}
    return SftRecord(row.id, row.number, pictures, (), {"answer": turns[-1][1]}, context, row.group)


def _check_learned(turns: list[dict[str, Any]], column: str) -> None:
    """Raise `ValueError` for an answer that is marked as not to be learned."""
    for i, turn in enumerate(turns):
        is_left_out = turn.get("loss") is False or (turn.get("weight") == 0 and turn["weight"] is not False)
        if is_left_out and _ROLES[str(turn.get("role", turn.get("from")))] == "assistant":
            raise ValueError(
                f"{column}[{i}] is marked as not to be learned (loss or weight), and every answer is learned; end the "
                "row before it, or move what was said so far into the question"
            )


def read_objects(
    row: Row, num_images: int
) -> tuple[tuple[str, ...], tuple[Box | Point, ...], tuple[int, ...], dict[str, str]]:
    """Return names, boxes or points, the image (0-based) of each of these, and the units for a record's context."""
    objects = fields.nested(row.first("objects"), "objects")
    if not isinstance(objects, dict) or not all(isinstance(objects.get(k), list) for k in ("ref", "bbox")):
        other = isinstance(objects, dict) and not {"category", "categories", "label", "labels"}.isdisjoint(objects)
        more = ": names, and corners x1, y1, x2, y2 (where there are categories, bbox is mostly x, y, width, height)"
        raise ValueError(
            f'objects {shown(objects)} is not {{"ref": [...], "bbox": [...]}}; write two lists{more if other else ""}'
        )
    refs = tuple(fields.word(ref, f"objects.ref[{i}]") for i, ref in enumerate(objects["ref"]))
    regions = tuple(fields.region(value, f"objects.bbox[{i}]") for i, value in enumerate(objects["bbox"]))
    image_of = objects.get("image_id")
    image_of = [0] * len(regions) if image_of is None or image_of == [] else image_of
    if not isinstance(image_of, list) or len(image_of) != len(regions):
        raise ValueError(
            f"objects.image_id {shown(image_of)} is not a list of one image for each of {len(regions)} bbox"
        )
    for number in image_of:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < num_images:
            raise ValueError(f"objects.image_id {shown(number)} is none of {num_images} images; count them from 0")
    kind = objects.get("bbox_type")
    if kind not in (None, "real", "norm1"):
        raise ValueError(f"objects.bbox_type {shown(kind)} is neither real (pixels) nor norm1 (0 to 1); mend it")
    units = {} if kind == "real" else {"box_units": "relative_1"} if kind == "norm1" else fields.box_units(row)
    return refs, regions, tuple(image_of), units if regions else {}


def preference_record(row: Row) -> PreferenceRecord:
    """Read TRL's `prompt, chosen, rejected`, LLaMA-Factory's `conversations` with two answers, or ms-swift's
    `messages`, whose last turn is the chosen answer, with `rejected_response`."""
    _refuse_tools(row)
    turns, inline = _read_prompt(row, ("prompt",), ("messages", "conversations"))
    turns = _with_system(row, turns)
    if (answer := row.first("chosen")) is None:
        _check_order(turns, "assistant")
        turns, chosen = turns[:-1], turns[-1][1]
    else:
        chosen = _read_answer(answer, "chosen", row)
    rejected = _read_answer(row.first("rejected", "rejected_response"), "rejected", row)
    _check_order(turns, "user")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise ValueError(f"the {name} answer is empty, so there is nothing to learn; fill or remove the row")
        _refuse_tags(text, f"the {name} answer")
    if chosen.strip() == rejected.strip():
        raise ValueError("chosen and rejected are the same, so there is nothing to prefer; mend or remove the row")
    pictures = _pictures(row, turns, inline)
    return PreferenceRecord(
        row.id, row.number, pictures, (), _insert_image_tags(turns, len(pictures)), chosen, rejected, row.group
    )


def prompt_record(row: Row) -> PromptRecord:
    """Read `prompt` (or EasyR1's `problem`) with `images`; all other columns are passed on unchanged."""
    turns, inline = _read_prompt(row, ("prompt", "problem"))
    _check_order(turns, "user")
    return _sampled(row, turns, inline, _PROBLEMS if fields.is_empty(row.cells.get("prompt")) else ("prompt",))


def rec_record(row: Row) -> PromptRecord:
    """Read rows of referring expressions as VLM-R1 has them (github.com/om-ai-lab/VLM-R1): `problem` and `solution`, or
    `conversations` whose last answer becomes the column `solution` unless the row has one. All other columns are
    passed on unchanged."""
    if (value := row.first(*_DIALOGUES)) is None:
        turns, inline = _read_prompt(row, _PROBLEMS)
        answer = None
    else:
        name = next(name for name in _DIALOGUES if row.cells.get(name) is value)
        listed, answer = _take_answer(fields.nested(value, name), name, row)
        turns, inline = _read_turns(listed, name, row)
    _check_order(turns, "user")
    solution = row.first("solution")
    if solution is None and fields.is_empty(answer):
        setting = fields.column_setting("solution")
        raise ValueError(f"the row has no solution and no last answer; fill it, or name its column, as in {setting}")
    record = _sampled(row, turns, inline, (*_DIALOGUES, *_PROBLEMS, "solution"))
    columns = {**record.columns, "solution": plain_bytes(answer if solution is None else solution)}
    return replace(record, columns=columns)


def _take_answer(listed: object, name: str, row: Row) -> tuple[object, object]:
    """Return the turns before the last answer, and that answer: a text, or the numbers of a box; None without one."""
    last = listed[-1] if isinstance(listed, list) and listed else None
    role = last.get("role", last.get("from")) if isinstance(last, dict) else None
    if not isinstance(listed, list) or not isinstance(last, dict) or _ROLES.get(str(role)) != "assistant":
        return listed, None
    content = last.get("content", last.get("value"))
    if isinstance(content, list) and content and all(fields.is_number(value) for value in content):
        return listed[:-1], content
    ((_, text),), _ = _read_turns([last], name, row)
    return listed[:-1], text


def _sampled(row: Row, turns: Turns, inline: tuple[Image, ...], read: tuple[str, ...]) -> PromptRecord:
    """Return the record of a prompt. `read`: the columns that are no columns of the record, unless the user names them
    for the reward functions."""
    pictures = _pictures(row, turns, inline)
    used = {*read, *_NOT_COLUMNS, *row.source.columns.values()}
    extra = set(row.source.columns) - {*_PROBLEMS, *read, *_NOT_COLUMNS}
    columns = {name: plain_bytes(v) for name, v in row.cells.items() if name not in used or name in extra}
    return PromptRecord(row.id, row.number, pictures, (), _insert_image_tags(turns, len(pictures)), columns, row.group)


def _pictures(row: Row, turns: Turns, inline: tuple[Image, ...]) -> tuple[Image, ...]:
    """Return the row's images. Raise `ValueError` for media that the model would not see: video, audio, or an image in
    a column that is not read."""
    for medium in _OTHER_MEDIA:
        if medium in row.cells and _is_medium(row.cells[medium]):
            raise ValueError(f"the row has {medium}, which is not read; leave the row out, or give images of it")
    for tag in _MEDIA_TAGS:
        if any(tag in text for role, text in turns if role == "user"):
            raise ValueError(f"a text holds {tag}, which is not read; leave the row out, or remove the tag")
    listed = fields.images(row, "images", "image")
    if listed and inline and listed != inline:
        raise ValueError("the row has images inside its turns and others beside them; leave one of the two out")
    pictures = listed or inline
    if not pictures and (other := _misnamed(row)) is not None:
        raise ValueError(
            f"the row has no image, and its column {other} names one ({shown(row.cells[other])}); read it by "
            f"{fields.column_setting('image', other)}"
        )
    return pictures


def _is_medium(value: object) -> bool:
    """Return whether a cell names or holds a video or a sound."""
    if isinstance(value, list | tuple):
        return any(map(_is_medium, value))
    if isinstance(value, dict):
        return any(map(_is_medium, value.values()))
    return isinstance(value, str | bytes) and not fields.is_empty(value) and len(value) > 0


def _misnamed(row: Row) -> str | None:
    """Return the name of an unread column that holds an image (a file name, or Parquet's bytes and path), if any."""
    for name, value in row.cells.items():
        first = value[0] if isinstance(value, list) and value else value
        if name in (*_TEXTS, *row.source.columns, *row.source.columns.values()):
            continue
        if isinstance(first, str) and (is_data_uri(first) or (len(first) < 1000 and _PICTURE.fullmatch(first.strip()))):
            return name
        if isinstance(first, dict) and isinstance(first.get("bytes"), bytes):
            return name
    return None


def _read_prompt(row: Row, texts: tuple[str, ...], lists: tuple[str, ...] = ()) -> tuple[Turns, tuple[Image, ...]]:
    """Return the turns in the columns `texts`, where a plain text is the user's, or else in the columns `lists`."""
    value = row.first(*texts)
    if isinstance(value, str):
        return (("user", value),), ()
    name, value = (texts[0], value) if value is not None else (lists[0], row.first(*lists))
    return _read_turns(value, name, row)


def _read_answer(value: object, name: str, row: Row) -> str:
    """Return an answer that is a text, one turn, or a list of one turn."""
    if value is None or isinstance(value, str):
        return value or ""
    turns, _ = _read_turns([value] if isinstance(value, dict) else value, name, row)
    if len(turns) != 1 or turns[0][0] != "assistant":
        raise ValueError(f"{name} must be a text or one turn of the assistant; it has {len(turns)} turns")
    return turns[0][1]


def _read_turns(value: object, name: str, row: Row) -> tuple[Turns, tuple[Image, ...]]:
    """Return turns in either spelling, and the images inside them (`{"type": "image", "image": path}`)."""
    listed = fields.nested(value, name)
    if not isinstance(listed, list) or not listed:
        raise ValueError(
            f"{name} {shown(listed)} is not a list of turns; write one, or name the column that has "
            f"one, as in {fields.column_setting(name)}"
        )
    turns: list[tuple[str, str]] = []
    inline: list[Image] = []
    for i, turn in enumerate(listed):
        if not isinstance(turn, dict):
            raise ValueError(f"{name}[{i}] is {shown(turn)}; a turn is an object with its role and text")
        role = turn.get("role", turn.get("from"))
        if (call := next((key for key in _CALLS if not fields.is_empty(turn.get(key))), None)) is not None:
            raise ValueError(f"{name}[{i}] holds {call}, and calls of tools are not read; leave the row out")
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f"{name}[{i}] has the role {shown(role)}; use system, user (human) or assistant (gpt)")
        content = turn.get("content", turn.get("value"))
        text = content if isinstance(content, str) else _text(content, f"{name}[{i}]", inline, row)
        turns.append((_ROLES[role], text))
    return tuple(turns), tuple(inline)


def _text(content: object, where: str, inline: list[Image], row: Row) -> str:
    """Return the text of a turn that is a list of parts; append the images inside it to `inline`."""
    if not isinstance(content, list):
        raise ValueError(f"{where} holds {shown(content)} in place of a text; mend it")
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            pieces.append(IMAGE)
            if (named := next((part[key] for key in ("image", "url", "path") if part.get(key)), None)) is not None:
                inline.append(fields.image(named, row))
        elif kind in _URL_PARTS:
            pieces.append(IMAGE)
            inline.append(fields.image(_url_of(part, where), row))
        elif kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        else:
            other = kind if isinstance(kind, str) and kind not in _TEXT_PARTS else None
            reason = f" (a part of type {shown(other)} is not read)" if other else ""
            raise ValueError(
                f'{where} holds {shown(part)}{reason}; use {{"type": "text", "text"}} or {{"type": "image"}}'
            )
    return "".join(pieces)


def _url_of(part: dict[str, Any], where: str) -> str:
    """Return the address in a part of OpenAI's, `{"image_url": {"url"}}` or `{"image_url"}`."""
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str) or not url.strip():
        raise ValueError(f'{where} holds {shown(part)} without an address; use {{"image_url": {{"url": ...}}}}')
    return url


def _check_order(turns: Turns, last: str) -> None:
    start = 1 if turns[:1] and turns[0][0] == "system" else 0
    for i, (role, text) in enumerate(turns[start:]):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise ValueError(f"turn {start + i} is of the {role}, where the {expected}'s was expected; {_ORDER}")
        if role == "assistant" and IMAGE in text:
            _refuse_tags(text, f"turn {start + i}, of the assistant,")
    if len(turns) == start or turns[-1][0] != last:
        answered = len(turns) > start and last == "user"
        fix = "; take the answer out, and keep it in a column of its own for rewards" if answered else f"; {_ORDER}"
        raise ValueError(f"the last turn is not of the {last}{fix}")


def _refuse_tags(text: str, what: str) -> None:
    if IMAGE in text:
        raise ValueError(f"{what} holds an {IMAGE} tag; images belong to the user's turns")


def _insert_image_tags(turns: Turns, num_images: int) -> Turns:
    """Return the turns with one tag for each image; a single image without a tag goes before the first question."""
    num_tags = sum(text.count(IMAGE) for _, text in turns)
    if num_tags == 0 and num_images == 1:
        first = next(i for i, (role, _) in enumerate(turns) if role == "user")
        return (*turns[:first], ("user", f"{IMAGE}\n{turns[first][1]}"), *turns[first + 1 :])
    if num_tags != num_images:
        raise ValueError(f"{num_tags} {IMAGE} tags for {num_images} images; write one tag for each image")
    return turns
