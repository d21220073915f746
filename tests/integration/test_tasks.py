"""Each task from a file to a score, on tiny random models: train, evaluate, and what lies in the run folder."""

import csv
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_vlm.cli import main
from tests.conftest import FAMILIES
from tests.support.twins import slow_but


def _write_sources(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """A small source for each task but detection, with images beside it."""
    rng = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 255, (80, 96, 3), np.uint8)).save(tmp_path / f"{i}.png")
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "object", "condition", "x1", "y1", "x2", "y2"])
        table.writerows([f"{i}.png", "ab"[i % 2], "xy"[i % 4 == 0], 10, 10, 50, 60] for i in range(24))
    with (tmp_path / "steps.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Task_id", "Image_id", "Instruction", "Output", "Grounding"])
        for i in range(24):
            output = json.dumps({"action": "click", "target": f"b{i % 3}"} if i % 3 < 2 else {"action": "done"})
            grounding = json.dumps({"bbox": [10, 10, 40, 40]} if i % 3 < 2 else {})
            table.writerow([f"t{i // 3}", f"{i}.png", "click b0, then b1", output, grounding])
    with (tmp_path / "chat.jsonl").open("w") as file:
        for i in range(24):
            turns = [("human", "<image>\nWhat?"), ("gpt", f"Thing {i}."), ("human", "<image>\nAnd?"), ("gpt", "More.")]
            row = {"image": [f"{i}.png", f"{(i + 1) % 24}.png"]}
            file.write(json.dumps(row | {"conversations": [{"from": r, "value": v} for r, v in turns]}) + "\n")
    formats = {"classification": ("labels.csv", "image_csv"), "gui_steps": ("steps.csv", "gui_csv")}
    formats["chat"] = ("chat.jsonl", "llava")
    return {task: {"path": str(tmp_path / name), "format": kind} for task, (name, kind) in formats.items()}


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Sources of the test's own."""
    return _write_sources(tmp_path)


METRIC = {"classification": "accuracy", "gui_steps": "step_success", "chat": "anls"}
QUICK = [("classification", "qwen3_vl"), ("gui_steps", "qwen2_5_vl"), ("chat", "qwen3_vl")]


@pytest.mark.parametrize(("task", "family"), slow_but(QUICK, itertools.product(METRIC, FAMILIES)))
def test_train_and_evaluate(task: str, family: str, sources, job_file, tmp_path: Path, capsys) -> None:
    data = {"train": sources[task], "eval": 0.25, "test": 0.25}
    sections = {"task": task, "data": data, "evaluate": {"metric": METRIC[task], "max_new_tokens": 8}}
    path = job_file(family, **sections)
    assert main(["train", str(path)]) == 0
    run = tmp_path / "runs" / "run"
    assert main(["evaluate", str(path), "--adapter", str(run / "best")]) == 0
    folder = run / "evaluate" / "best"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["num_rows"] == 6
    assert METRIC[task] in metrics["overall"]
    assert json.loads((run / "best" / "preprocessing.json").read_text())["task"]["name"] == task
    assert (folder / "report.html").stat().st_size > 1000
    ids = {json.loads(line)["id"] for line in (folder / "predictions.jsonl").open()}
    if task == "gui_steps":
        assert len({name.split("/")[0] for name in ids}) == 2, "two whole tasks"
    resolved = json.loads((run / "resolved.json").read_text())
    assert resolved["data"]["test"]["ratio"] == 0.25


def test_gui_steps_are_told_whose_memory_the_job_says(
    sources, job_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from ray_vlm.evaluate import generate

    histories: list[list[tuple[str, ...]]] = []

    def stub(worker: Any, records: Any) -> list[str]:
        histories.append([record.context["history"] for record in records])
        return ['{"action": "wait"}' for _ in records]

    monkeypatch.setattr(generate, "answer_records", stub)
    data = {"train": None, "test": sources["gui_steps"] | {"max_rows": 6}}
    path, out = str(job_file(task="gui_steps", data=data)), tmp_path / "out"
    assert main(["evaluate", path, "--both-memories", "--output", str(out)]) == 0
    clicks, wait = ['{"action":"click","target":"b0"}', '{"action":"click","target":"b1"}'], '{"action":"wait"}'
    assert sorted(histories[0]) == sorted(2 * [(), (clicks[0],), tuple(clicks)]), (
        "the truth tells of clicks, in one batch"
    )
    assert histories[1:] == [[(), ()], [(wait,), (wait,)], [(wait, wait), (wait, wait)]], "step by step, and no click"
    for folder, memory in (("base", "truth"), ("base-own-memory", "model")):
        metrics = json.loads((out / folder / "metrics.json").read_text())
        assert metrics["memory"] == json.loads((out / folder / "answers.jsonl").open().readline())["key"]["memory"]
        assert (metrics["memory"], metrics["num_tasks"]) == (memory, 2)
        assert {"step_success", "task_success"} <= set(metrics["intervals"])
    html = (out / "report.html").read_text()
    assert "base, the truth&#39;s memory" in html
    assert "base, the model&#39;s own memory" in html
    assert "task_success" in json.loads((out / "comparison.json").read_text())["differences"]
    histories.clear()
    assert main(["evaluate", path, "--both-memories", "--output", str(out)]) == 0
    assert not histories, "all answers are there"
    assert main(["evaluate", path, "evaluate.memory=model", "--output", str(out / "base")]) == 0
    assert len(histories) == 3, "those with the truth's memory are not taken for its own"
    assert main(["evaluate", str(job_file()), "--both-memories"]) == 2
    assert "has no memory" in capsys.readouterr().err


def test_the_parts_of_a_split_share_no_row(sources, job_file) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.data.parts import load_parts

    data = {"train": sources["gui_steps"], "eval": 0.25, "test": 0.25}
    job = load_job(job_file(task="gui_steps", data=data))
    parts = load_parts(job, ["train", "eval", "test"])
    groups = [{record.group for record in index.records} for index in (parts.train, parts.eval, parts.test)]
    assert [len(group) for group in groups] == [4, 2, 2]
    assert len(set.union(*groups)) == 8
    again = load_parts(job, ["test"]).test
    assert [r.id for r in again.records] == [r.id for r in parts.test.records], "evaluation sees the same rows"


def test_sources_are_mixed_by_weight(sources, job_file) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.train.prepare import prepare

    more = sources["classification"] | {"weight": 2.5, "max_rows": 8}
    job = load_job(job_file(task="classification", data={"train": sources["classification"], "mix": [more]}))
    prepared = prepare(job)
    assert len(prepared.train) == 32
    assert prepared.plan.rows_per_epoch == 24 + 20
    assert prepared.plan.repeat_factors.tolist() == [1.0] * 24 + [2.5] * 8


def test_every_turn_of_the_assistant_is_trained(sources, job_file) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.data.samples import load_sample_builder
    from ray_vlm.data.spec import IGNORED
    from ray_vlm.train.prepare import prepare

    prepared = prepare(load_job(job_file(task="chat", data={"train": sources["chat"]})))
    builder = load_sample_builder(prepared.spec)
    row = builder.train_row(prepared.train.records[0])
    trained = builder.tokenizer.decode(row.input_ids[row.labels != IGNORED])
    assert trained == "Thing 0.<|im_end|>\nMore.<|im_end|>\n"
    assert len(row.images) == 2
    stock = builder.processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Thing 0."}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nAnd?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "More."}]},
        ],
        tokenize=False,
    )
    images = [Image.open(path) for path in prepared.train.records[0].images]
    expected = builder.processor(images=images, text=[stock], return_tensors="np")["input_ids"][0]
    assert row.input_ids.tolist() == expected.tolist()


def test_padding_keeps_shapes_and_is_remembered(job_file, scenes: Path, tmp_path: Path) -> None:
    rows = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "test")}
    data = rows | {"resize": "pad", "pad_color": [1, 2, 3], "pad_place": "center"}
    path = job_file(data=data, evaluate={"max_new_tokens": 4})
    assert main(["train", str(path)]) == 0
    final = tmp_path / "runs" / "run" / "final"
    saved = json.loads((final / "preprocessing.json").read_text())["images"]
    assert (saved["pad"], saved["center"]) == ([1, 2, 3], True)
    from ray_vlm.config.load import load_job
    from ray_vlm.data.preprocessing import read_preprocessing
    from ray_vlm.data.spec import sample_spec

    spec = read_preprocessing(
        str(final),
        sample_spec(load_job(path, ["data.resize=stretch", "data.pad_color=null", "data.pad_place=end"]), []),
    )
    assert (spec.resize, spec.pad_color, spec.pad_place) == ("pad", (1, 2, 3), "center")
    assert main(["evaluate", str(path), "--adapter", str(final)]) == 0


def test_the_job_s_codec_is_used_and_remembered(job_file, scenes: Path, tmp_path: Path) -> None:
    rows = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "test")}
    path = job_file(task={"name": "detection", "codec": "qwen2_vl"}, data=rows, evaluate={"max_new_tokens": 4})
    assert main(["train", str(path)]) == 0
    final = tmp_path / "runs" / "run" / "final"
    assert json.loads((final / "preprocessing.json").read_text())["task"]["codec"] == "qwen2_vl"
    assert main(["evaluate", str(path), "task.codec=null", "--adapter", str(final)]) == 0


def test_a_bad_row_does_not_redraw_the_split(sources, job_file, tmp_path: Path) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.data.parts import load_parts

    data = {"train": sources["classification"], "eval": 0.25, "test": 0.25, "on_bad_row": "quarantine"}
    job = load_job(job_file(task="classification", data=data))
    parts = load_parts(job, ["train", "eval", "test"])
    before = {name: {r.id for r in getattr(parts, name).records} for name in ("train", "eval", "test")}
    (tmp_path / "3.png").write_bytes(b"gone")
    shutil.rmtree(Path(job.run.output_dir) / ".index")  # good rows in it are not looked at again
    after = load_parts(job, ["train", "eval", "test"])
    bad = 0
    for name in ("train", "eval", "test"):
        new = getattr(after, name)
        assert {r.id for r in new.records} == before[name] - {"3"}
        bad += len(new.bad)
    assert bad == 1, "told once"


def test_an_adapter_is_never_measured_on_rows_that_it_learned(sources, job_file, tmp_path: Path, capsys) -> None:
    data = {"train": sources["classification"], "eval": 0.25, "test": 0.25}
    path = job_file(task="classification", data=data, evaluate={"max_new_tokens": 4})
    assert main(["train", str(path)]) == 0
    final = str(tmp_path / "runs" / "run" / "final")
    for change in ("seed=1", "data.eval=null", "data.test=0.3", "data.stratify=false"):
        capsys.readouterr()
        assert main(["evaluate", str(path), change, "--adapter", final]) == 2, change
        assert "otherwise than the training of the adapter" in capsys.readouterr().err, change
    assert main(["evaluate", str(path), "data.on_bad_row=quarantine", "--adapter", final]) == 0


def test_ranges_of_tasks_that_meet_are_refused(sources, job_file, capsys) -> None:
    steps = sources["gui_steps"]
    for end, start, code in (("t3", "t4", 0), ("t4", "t4", 2)):
        data = {"train": steps | {"task_end": end}, "test": steps | {"task_start": start}}
        path = job_file(task="gui_steps", data=data)
        assert main(["train", str(path), "--overwrite"]) == code
    assert "share 3 rows" in capsys.readouterr().err


def test_hints_reach_the_base_too_and_are_kept(sources, job_file, tmp_path: Path) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.data.parts import load_parts

    train = sources["classification"]
    rows = tmp_path / "test.csv"
    rows.write_text("".join((tmp_path / "labels.csv").read_text().splitlines(keepends=True)[:9]))
    task = {"name": "classification", "class_regions": True}
    path = job_file(task=task, data={"train": train, "test": {"path": str(rows), "format": "image_csv"}})
    parts = load_parts(load_job(path), ["test"])
    assert parts.spec.hints == "Usual places: a: middle left; b: middle left."
    assert main(["train", str(path)]) == 0
    saved = json.loads((tmp_path / "runs" / "run" / "final" / "preprocessing.json").read_text())
    assert saved["hints"] == parts.spec.hints


def test_an_adapter_of_another_task_is_refused(sources, job_file, scenes: Path, tmp_path: Path, capsys) -> None:
    assert main(["train", str(job_file())]) == 0
    data = {"train": sources["classification"], "test": 0.25}
    path = job_file(task="classification", data=data)
    assert main(["evaluate", str(path), "--adapter", str(tmp_path / "runs" / "run" / "final")]) == 1
    assert "trained for detection" in capsys.readouterr().err


def test_places_in_chat_are_scored_as_they_were_trained(job_file, tmp_path: Path) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.data.parts import load_parts
    from ray_vlm.data.samples import load_sample_builder
    from ray_vlm.evaluate.prediction import build_predictions

    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "At <bbox>."}]
    row = {"messages": turns, "images": ["a.png"], "objects": {"ref": [], "bbox": [[10, 20, 50, 60]]}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    job = load_job(job_file(task="chat", data={"train": {"path": str(tmp_path / "rows.jsonl"), "format": "messages"}}))
    parts = load_parts(job, ["train"])
    predictions = build_predictions(parts.train.records, ["At [100, 200, 500, 600]."], load_sample_builder(parts.spec))
    assert predictions[0].truth["answer"] == "At [100, 200, 500, 600]."
    assert predictions[0].score["exact"]


@pytest.mark.cluster
@pytest.mark.slow
def test_rows_without_images_do_not_stop_two_workers(job_file, tmp_path: Path, ray_cluster) -> None:
    Image.new("RGB", (96, 96)).save(tmp_path / "a.png")
    rows = []
    for i in range(8):
        turns = [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": str(i)}]
        rows.append(json.dumps({"messages": turns, "images": ["a.png"]} if i == 7 else {"messages": turns}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = {"train": {"path": str(tmp_path / "rows.jsonl"), "format": "messages"}}
    path = job_file(task="chat", data=data, cluster={"num_workers": 2}, lora={"target": ["language", "vision"]})
    assert main(["train", str(path)]) == 0
