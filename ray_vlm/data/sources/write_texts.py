"""Write conversations, preferences and prompts as other tools read them: one function each, which returns the name of
the file of rows.

An `<image>` in a text stands for the next image of the row.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from ray_vlm.data.records import PreferenceRecord, PromptRecord, Record, SftRecord
from ray_vlm.data.sources.output import ROW_COLUMNS, Output, as_json, id_and_group
from ray_vlm.tasks.answers import IMAGE, Turns

_LLAVA_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


def _write_lines(rows: Iterable[Any], out: Output) -> str:
    """Write JSONL, a row a line, and return the file's name."""
    with out.open("rows.jsonl") as file:
        for row in rows:
            file.write(f"{as_json(row)}\n")
    return "rows.jsonl"


def _write_list(rows: Iterable[Any], out: Output) -> str:
    """Write a JSON list, a row a line too, and return the file's name."""
    with out.open("rows.json") as file:
        file.write("[")
        for number, row in enumerate(rows):
            file.write(f"{',' if number else ''}\n{as_json(row)}")
        file.write("\n]\n")
    return "rows.json"


def _images(record: Record, out: Output) -> list[str]:
    return [out.images.add(record, number) for number in range(len(record.images))]


def _chat(record: Record) -> Turns:
    """Return all turns of a conversation, with the answer."""
    assert isinstance(record, SftRecord)
    return (*record.context["turns"], ("assistant", record.truth["answer"]))


def split_system(turns: Turns) -> tuple[str, Turns]:
    """Return the text of the system turn, empty without one, and the other turns."""
    return (turns[0][1], turns[1:]) if turns[0][0] == "system" else ("", turns)


def pairs_of(turns: Turns) -> list[list[str]]:
    """Return questions with their answers, as earlier rounds are written."""
    return [[question, answer] for (_, question), (_, answer) in zip(turns[::2], turns[1::2], strict=True)]


def parts_of(text: str, image: Sequence[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Return a text as a list of parts, with one for each image in it. `image`: the parts of its images in order."""
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(IMAGE)):
        if number:
            parts.append(image[number - 1] if image is not None else {"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts or [{"type": "text", "text": text}]


def write_llava(records: Iterable[Record], out: Output) -> str:
    """Write LLaVA's conversations (github.com/haotian-liu/LLaVA, "Finetune LLaVA on Custom Datasets")."""

    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            names = _images(record, out)
            image = {"image": names[0] if len(names) == 1 else names} if names else {}
            turns = [{"from": _LLAVA_ROLES[role], "value": text} for role, text in _chat(record)]
            yield {**id_and_group(record), **image, "conversations": turns}

    return _write_list(rows(), out)


def write_messages(records: Iterable[Record], out: Output) -> str:
    """Write messages as ms-swift and LLaMA-Factory read them, with `images`, and with `objects` where texts have
    `<ref-object>` and `<bbox>` (swift.readthedocs.io, "Custom Dataset")."""

    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            assert isinstance(record, SftRecord)
            row: dict[str, Any] = dict(id_and_group(record))
            row["messages"] = [{"role": role, "content": text} for role, text in _chat(record)]
            yield {**row, "images": _images(record, out), **_regions(record)}

    return _write_lines(rows(), out)


def _regions(record: Record) -> dict[str, Any]:
    """Return the cell `objects`, whose names and boxes stand for `<ref-object>` and `<bbox>`, if there are any."""
    assert isinstance(record, SftRecord)
    if not record.context.get("refs") and not record.context.get("boxes"):
        return {}
    boxes = [list(map(float, region)) for region in record.context["boxes"]]
    about = {"ref": list(record.context["refs"]), "bbox": boxes, "bbox_type": "real"}
    return {"objects": about | {"image_id": list(record.context["image_of"])}}


def write_openai(records: Iterable[Record], out: Output) -> str:
    """Write chat messages of OpenAI's API (platform.openai.com/docs/guides/vision-fine-tuning): content in parts, an
    image as the `url` of an `image_url`, here its path."""

    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            names = _images(record, out)
            messages = []
            for role, text in _chat(record):
                count = text.count(IMAGE)
                urls = [{"type": "image_url", "image_url": {"url": name}} for name in names[:count]]
                names = names[count:]
                messages.append({"role": role, "content": parts_of(text, urls) if count else text})
            yield {**id_and_group(record), "messages": messages}

    return _write_lines(rows(), out)


def write_query_response(records: Iterable[Record], out: Output) -> str:
    """Write `query` and `response` as ms-swift has them, earlier rounds as `history` (swift.readthedocs.io)."""

    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            system, turns = split_system(_chat(record))
            *history, (query, response) = pairs_of(turns)
            row: dict[str, Any] = {**id_and_group(record), "query": query, "response": response}
            row |= {"system": system} if system else {}
            row |= {"history": history} if history else {}
            yield {**row, "images": _images(record, out), **_regions(record)}

    return _write_lines(rows(), out)


def write_alpaca(records: Iterable[Record], out: Output) -> str:
    """Write Alpaca's `instruction`, `input` and `output` (github.com/tatsu-lab/stanford_alpaca), with LLaMA-Factory's
    `system`, `history` and `images`."""

    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            system, turns = split_system(_chat(record))
            *history, (instruction, output) = pairs_of(turns)
            row: dict[str, Any] = {**id_and_group(record), "instruction": instruction, "input": "", "output": output}
            row |= {"system": system} if system else {}
            row |= {"history": history} if history else {}
            yield {**row, "images": _images(record, out)}

    return _write_list(rows(), out)


def _in_parts(turns: Turns) -> list[dict[str, Any]]:
    return [{"role": role, "content": parts_of(text)} for role, text in turns]


def write_preference(records: Iterable[Record], out: Output) -> str:
    """Write TRL's preferences with images (huggingface.co/docs/trl/dataset_formats): `prompt`, `chosen` and `rejected`
    as lists of turns, and `images`."""

    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            assert isinstance(record, PreferenceRecord)
            row: dict[str, Any] = {**id_and_group(record), "images": _images(record, out)}
            row["prompt"] = _in_parts(record.prompt)
            row["chosen"] = _in_parts((("assistant", record.chosen),))
            row["rejected"] = _in_parts((("assistant", record.rejected),))
            yield row

    return _write_lines(rows(), out)


def write_prompt(records: Iterable[Record], out: Output) -> str:
    """Write TRL's prompts with images (huggingface.co/docs/trl/dataset_formats), and the columns for rewards."""

    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            assert isinstance(record, PromptRecord)
            row = {**id_and_group(record), "images": _images(record, out), "prompt": _in_parts(record.prompt)}
            yield row | _columns(record, ROW_COLUMNS["prompt"])

    return _write_lines(rows(), out)


def write_rec(records: Iterable[Record], out: Output) -> str:
    """Write referring expressions as VLM-R1 has them (github.com/om-ai-lab/VLM-R1): the prompt and the solution as
    `conversations`, and the solution as it is in `solution`, which goes before its text."""

    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            assert isinstance(record, PromptRecord)
            names = _images(record, out)
            image = {"image": names[0] if len(names) == 1 else names} if names else {}
            columns = _columns(record, ROW_COLUMNS["rec"])
            solution = columns["solution"]
            turns = [{"from": _LLAVA_ROLES[role], "value": text} for role, text in record.prompt]
            turns.append({"from": "gpt", "value": solution if isinstance(solution, str) else as_json(solution)})
            yield {**id_and_group(record), **image, "conversations": turns, **columns}

    return _write_lines(rows(), out)


def _columns(record: PromptRecord, taken: Collection[str]) -> dict[str, Any]:
    """Return the columns for rewards as JSON has them, without the names that are `taken`. What JSON does not have,
    such as a date, becomes a text."""
    columns: dict[str, Any] = {}
    for name, value in record.columns.items():
        if name in taken:
            continue
        try:
            as_json(value)
            columns[name] = value
        except (TypeError, ValueError, RecursionError):
            columns[name] = str(value)
    return columns
