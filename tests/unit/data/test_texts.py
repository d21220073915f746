"""Dialogues and referring expressions of other tools give the records of the same rows in `messages` and `prompt`."""

import json
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.data import Source
from ray_vlm.data.records import BadRow, PromptRecord
from ray_vlm.data.sources.formats import read_rows

CONTAINERS = ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"]


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def _one(folder: Path, format: str, row: dict[str, Any], name: str = "rows.jsonl", **options: Any) -> Any:
    ((record,), _) = read_rows(Source(path=_write(folder / name, [row]), format=format, **options))
    return record


def _messages(*texts: str, system: str | None = None) -> dict[str, Any]:
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": turns}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_query_is_the_same_dialogue_as_messages(tmp_path: Path, name: str) -> None:
    images = {"images": ["a.jpg", "b.jpg"]}
    row = {"query": "<image>And this?", "response": "A cat.", "system": "Be brief."} | images
    row["history"] = [["<image>What is it?", "A dog."], ["Sure?", "Yes."]]
    same = _messages("<image>What is it?", "A dog.", "Sure?", "Yes.", "<image>And this?", "A cat.", system="Be brief.")
    record = _one(tmp_path, "query_response", row, name)
    assert record == _one(tmp_path, "messages", same | images)
    assert record.context["turns"][-1] == ("user", "<image>And this?")
    assert record.truth == {"answer": "A cat."}


@pytest.mark.parametrize("empty", [None, [], "", "[]"])
def test_a_query_alone_gets_the_tag_of_its_image(tmp_path: Path, empty: Any) -> None:
    row = {"query": "What?", "response": "A dog.", "history": empty, "system": empty and "", "images": "a.jpg"}
    assert _one(tmp_path, "query_response", row).context == {"turns": (("user", "<image>\nWhat?"),)}


def test_a_query_with_objects(tmp_path: Path) -> None:
    more = {"images": ["a.jpg"], "objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}}
    row = {"query": "Where is <ref-object>?", "response": "At <bbox>."} | more
    record = _one(tmp_path, "query_response", row)
    assert record == _one(tmp_path, "messages", _messages("Where is <ref-object>?", "At <bbox>.") | more)
    assert record.context["boxes"] == ((1.0, 2.0, 3.0, 4.0),)


@pytest.mark.parametrize("name", CONTAINERS)
def test_alpaca_is_the_same_dialogue_as_messages(tmp_path: Path, name: str) -> None:
    row = {"instruction": "Name the animal.", "input": "In one word.", "output": "Dog.", "images": ["a.jpg"]}
    row |= {"system": "Be brief.", "history": [["Hi.", "Hello."]]}
    same = _messages("Hi.", "Hello.", "Name the animal.\nIn one word.", "Dog.", system="Be brief.")
    assert _one(tmp_path, "alpaca", row, name) == _one(tmp_path, "messages", same | {"images": ["a.jpg"]})


@pytest.mark.parametrize("blank", [{}, {"input": ""}, {"input": None}, {"input": " "}])
def test_stanford_rows_without_input_or_image(tmp_path: Path, blank: dict[str, Any]) -> None:
    record = _one(tmp_path, "alpaca", {"instruction": "Say hello.", "output": "Hello."} | blank)
    assert (record.images, record.context) == ((), {"turns": (("user", "Say hello."),)})


QUERY = {"query": "What?", "response": "A dog."}
ALPACA = {"instruction": "What?", "output": "A dog."}


@pytest.mark.parametrize(
    ("format", "row", "words"),
    [
        ("query_response", {"query": "What?"}, "no response; the row has query"),
        ("query_response", QUERY | {"history": [["a"]]}, r"history\[0\] .* is not two texts"),
        ("query_response", QUERY | {"history": [["a", 3]]}, r"history\[0\] .* is not two texts"),
        ("query_response", QUERY | {"history": {"a": "b"}}, "is not a list of"),
        ("query_response", QUERY | {"query": ["What?"]}, "query holds .* in place of a text"),
        ("query_response", QUERY | {"system": 3}, "system holds 3 in place of a text"),
        ("query_response", QUERY | {"images": ["a.jpg", "b.jpg"]}, "0 <image> tags for 2 images"),
        ("query_response", QUERY | {"videos": ["a.mp4"]}, "the row has videos"),
        ("query_response", QUERY | {"image_path": "a.jpg"}, "its column image_path names one"),
        ("query_response", QUERY | {"tools": '[{"name": "zoom"}]'}, "the row has tools"),
        ("query_response", QUERY | {"response": "<image>"}, "images belong to the user's turns"),
        ("alpaca", ALPACA | {"output": ""}, "no output; the row has instruction"),
        ("alpaca", {"output": "A dog."}, "no instruction or input"),
        ("alpaca", ALPACA | {"audios": ["a.wav"]}, "the row has audios"),
        ("alpaca", ALPACA | {"photo": "data:image/png;base64,AAAA"}, "its column photo names one"),
        ("rec", {"image": "a.jpg", "problem": "Where?"}, "no solution and no last answer"),
        ("rec", {"image": "a.jpg", "normal_caption": "the dog", "solution": [1, 2, 3, 4]}, "no problem or prompt"),
        ("rec", {"image": "a.jpg", "conversations": [{"from": "gpt", "value": "x"}]}, "not a list of turns"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, format: str, row: dict[str, Any], words: str) -> None:
    import re

    record = _one(tmp_path, format, row)
    assert isinstance(record, BadRow)
    assert re.search(words, record.reason), record.reason


def _asked(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "A dog."}]}


TEXT = {"type": "text", "text": "What?"}


@pytest.mark.parametrize("format", ["messages", "openai"])
@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "a.jpg", "detail": "high"}},
        {"type": "image_url", "image_url": "a.jpg"},
        {"type": "input_image", "image_url": "a.jpg"},
        {"type": "image", "image": "a.jpg"},
        {"type": "image", "url": "a.jpg"},
        {"type": "image", "path": "a.jpg"},
    ],
)
def test_parts_name_images(tmp_path: Path, format: str, part: dict[str, Any]) -> None:
    record = _one(tmp_path, format, _asked(part, TEXT))
    assert record.images == (str((tmp_path / "a.jpg").resolve()),)
    assert record.context == {"turns": (("user", "<image>What?"),)}


def test_parts_of_the_responses_api_and_a_developer(tmp_path: Path) -> None:
    turns = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "A dog."}]},
    ]
    record = _one(tmp_path, "openai", {"messages": turns})
    assert record.context == {"turns": (("system", "Be brief."), ("user", "What?"))}
    assert record.truth == {"answer": "A dog."}


def test_parts_out_of_parquet_have_the_keys_of_all(tmp_path: Path) -> None:
    url = {"type": "image_url", "image_url": {"url": "a.jpg"}, "text": None}
    row = {"messages": [{"role": "user", "content": [url, TEXT | {"image_url": None}]}]}
    row["messages"].append({"role": "assistant", "content": [{"type": "text", "text": "A dog.", "image_url": None}]})
    record = _one(tmp_path, "openai", row, "rows.parquet")
    assert (len(record.images), record.truth) == (1, {"answer": "A dog."})


def _called(**turn: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "x"} | turn]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (_asked({"type": "image_url", "image_url": {"url": "https://x.org/a.jpg"}}), "URLs are not read; download it"),
        (_asked({"type": "image_url", "image_url": {}}), "without an address"),
        (_asked({"type": "image_url"}), "without an address"),
        (_asked({"type": "input_image", "file_id": "file-1"}), "without an address"),
        (_asked({"type": "image_url", "image_url": "../a.jpg"}), "outside image_root"),
        (_asked({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}), "'input_audio' is not read"),
        (_asked({"type": "image_url", "image_url": "a.jpg"}, TEXT) | {"images": ["b.jpg"]}, "others beside them"),
        (_called(content=None, tool_calls=[{"id": "1"}]), "holds tool_calls, and calls of tools are not read"),
        (_called(function_call={"name": "zoom"}), "holds function_call"),
        (_called(weight=0), "marked as not to be learned"),
        (_called(role="tool"), "the role 'tool'"),
        (_called() | {"tools": [{"type": "function"}]}, "the row has tools"),
    ],
)
def test_parts_and_turns_that_are_not_read(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    record = _one(tmp_path, "openai", row)
    assert isinstance(record, BadRow)
    assert words in record.reason


def test_images_named_twice_are_one(tmp_path: Path) -> None:
    row = _asked({"type": "image_url", "image_url": "a.jpg"}, TEXT) | {"images": ["a.jpg"]}
    assert len(_one(tmp_path, "openai", row).images) == 1


REC = {"image": "a.jpg", "normal_caption": "the dog", "dataset": "refcoco"}
ASKED = "Where is the dog?"


@pytest.mark.parametrize("name", CONTAINERS)
def test_rec_rows_with_problem_and_solution(tmp_path: Path, name: str) -> None:
    row = REC | {"id": "7", "problem": ASKED, "solution": [1.5, 2.0, 3.0, 4.0]}
    record = _one(tmp_path, "rec", row, name)
    solution = json.dumps(row["solution"]) if name == "rows.csv" else row["solution"]
    columns = {"normal_caption": "the dog", "dataset": "refcoco", "solution": solution}
    image = (str((tmp_path / "a.jpg").resolve()),)
    assert record == PromptRecord("7", 0, image, (), (("user", f"<image>\n{ASKED}"),), columns)


@pytest.mark.parametrize("answer", ["[1, 2, 3, 4]", [1, 2, 3, 4]])
def test_rec_takes_the_last_answer_as_the_solution(tmp_path: Path, answer: Any) -> None:
    turns = [{"from": "human", "value": f"<image>{ASKED}"}, {"from": "gpt", "value": answer}]
    record = _one(tmp_path, "rec", REC | {"conversations": turns})
    assert record.prompt == (("user", f"<image>{ASKED}"),)
    assert record.columns == {"normal_caption": "the dog", "dataset": "refcoco", "solution": answer}
    own = _one(tmp_path, "rec", REC | {"conversations": turns, "solution": "[5, 6, 7, 8]"})
    assert (own.prompt, own.columns["solution"]) == (record.prompt, "[5, 6, 7, 8]")
    asked = _one(tmp_path, "rec", REC | {"conversations": turns[:1], "box": [1, 2, 3, 4]}, columns={"solution": "box"})
    assert (asked.prompt, asked.columns["solution"]) == (record.prompt, [1, 2, 3, 4])


def test_rec_keeps_the_turns_before(tmp_path: Path) -> None:
    row = _messages("<image>What is it?", "A dog.", "Where?", "[1, 2, 3, 4]", system="Be brief.") | {
        "images": ["a.jpg"]
    }
    record = _one(tmp_path, "rec", row)
    assert [role for role, _ in record.prompt] == ["system", "user", "assistant", "user"]
    assert record.columns == {"solution": "[1, 2, 3, 4]"}


def test_file_name_is_the_image_where_no_column_has_that_name(tmp_path: Path) -> None:
    row = {"file_name": "a.jpg", "label": "dog"}
    record = _one(tmp_path, "image_csv", row, "metadata.csv")
    assert record.images == (str((tmp_path / "a.jpg").resolve()),)
    assert record.truth == {"attributes": {"label": "dog"}}
    assert _one(tmp_path, "image_csv", row, "metadata.jsonl") == record
    both = _one(tmp_path, "image_csv", {"image": "b.jpg"} | row)
    assert both.images == (str((tmp_path / "b.jpg").resolve()),)
    assert both.truth == {"attributes": {"file_name": "a.jpg", "label": "dog"}}
    named = _one(tmp_path, "image_csv", {"photo": "b.jpg"} | row, columns={"image": "photo"})
    assert named.truth == {"attributes": {"file_name": "a.jpg", "label": "dog"}}


@pytest.mark.parametrize("format", ["prompt", "rec"])
def test_prompts_have_no_truth_for_the_rewards_of_a_task(format: Any) -> None:
    from ray_vlm.config.method import GrpoMethod
    from ray_vlm.errors import ConfigError
    from ray_vlm.methods.rewards import job_rewards

    method = GrpoMethod(name="grpo")
    with pytest.raises(ConfigError, match="compare with a truth, and rows of prompt and rec have none"):
        job_rewards("detection", method, Source(path="rows.jsonl", format=format))
    assert job_rewards("detection", method, Source(path="rows.json", format="coco")) is not None


@pytest.mark.parametrize("format", ["llava", "messages"])
def test_a_system_text_beside_the_turns_goes_before_them(tmp_path: Path, format: str) -> None:
    """As LLaMA-Factory has it."""
    row: dict[str, Any] = _messages("<image>Who?", "Kane.") | {"images": ["a.jpg"]}
    same = _one(tmp_path, "messages", _messages("<image>Who?", "Kane.", system="Be brief.") | {"images": ["a.jpg"]})
    if format == "llava":
        row["conversations"] = [{"from": t["role"], "value": t["content"]} for t in row.pop("messages")]
    assert _one(tmp_path, format, row | {"system": "Be brief."}) == same
    assert _one(tmp_path, format, row | {"system": ""}).context["turns"] == same.context["turns"][1:]


def test_two_system_texts(tmp_path: Path) -> None:
    row = _messages("Who?", "Kane.", system="Be brief.")
    assert _one(tmp_path, "messages", row | {"system": "Be brief."}) == _one(tmp_path, "messages", row)
    assert "another text in its column system" in _one(tmp_path, "messages", row | {"system": "Be long."}).reason


def test_preferences_have_a_system_text_and_no_tools(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Who?"}]
    answers = {"chosen": {"from": "gpt", "value": "Kane."}, "rejected": {"from": "gpt", "value": "No."}}
    record = _one(tmp_path, "preference", {"conversations": turns, "system": "Be brief.", **answers})
    assert record.prompt == (("system", "Be brief."), ("user", "Who?"))
    record = _one(tmp_path, "preference", {"conversations": turns, "tools": '[{"name": "f"}]', **answers})
    assert "the row has tools" in record.reason
