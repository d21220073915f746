"""Predictions for applications: one image in every form, every task, memory that is carried on, files in and out."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_vlm import Ask, Predictor
from ray_vlm.cli import main
from ray_vlm.config.load import load_job
from ray_vlm.data.draw import MIN_SIDE
from ray_vlm.errors import ConfigError, DataError, RunError
from ray_vlm.evaluate import generate, predict
from ray_vlm.evaluate import predictor as predictor_module
from ray_vlm.evaluate.predictor import Found
from ray_vlm.tasks.gui_steps import remember
from tests.support.jobs import write_job


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, scenes: Path, tiny_models: dict[str, str]) -> Path:
    """A folder with a job and its run, for tests that change neither."""
    folder = tmp_path_factory.mktemp("detector")
    data = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "test")}
    evaluate = {"max_new_tokens": 12, "batch_size": 5}
    assert main(["train", str(write_job(folder, scenes, tiny_models["qwen3_vl"], data=data, evaluate=evaluate))]) == 0
    return folder


@pytest.fixture
def detector(trained: Path, scenes: Path) -> tuple[Path, Path]:
    """A trained run and its test scenes."""
    return trained / "runs" / "run", scenes


def _predictor(job_file: Any, task: str, **options: Any) -> Predictor:
    job = load_job(job_file(task={"name": task, **options}, evaluate={"max_new_tokens": 6}), ["data.train=null"])
    return Predictor(job)


def test_an_image_in_any_form_gives_the_same_answer(detector: tuple[Path, Path]) -> None:
    run, scenes = detector
    path = sorted((scenes / "test").iterdir())[0]
    image = Image.open(path).convert("RGB")
    predictor = Predictor.from_run(str(run))
    forms = [str(path), path, path.read_bytes(), image, np.array(image)]
    predictions = [predictor.predict(form) for form in forms]
    assert len({p.answer for p in predictions}) == 1
    assert predictions[0].sizes == (image.size,)
    assert set(predictions[0].values) == {"boxes", "labels"}


def test_prediction_is_what_evaluation_measured(trained: Path, scenes: Path, tmp_path: Path) -> None:
    run, measured = trained / "runs" / "run", tmp_path / "measured"
    words = ["--adapter", str(run / "final"), "--output", str(measured)]
    assert main(["evaluate", str(trained / "job.yaml"), *words]) == 0
    lines = [json.loads(line) for line in (measured / "predictions.jsonl").open()]
    predictions = Predictor.from_run(str(run)).predict_many([Ask(line["images"][0]) for line in lines])
    assert [p.answer for p in predictions] == [line["answer"] for line in lines]
    out = tmp_path / "found.jsonl"
    assert main(["predict", str(run), str(scenes / "test"), "--output", str(out)]) == 0
    by_name = {Path(r["images"][0]).name: r["answer"] for r in map(json.loads, out.open())}
    assert by_name == {Path(line["images"][0]).name: line["answer"] for line in lines}


def test_files_that_cannot_be_read_are_results_too(detector: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    run, scenes = detector
    folder = tmp_path / "photos"
    folder.mkdir()
    good = sorted((scenes / "test").iterdir())[0].read_bytes()
    (folder / "a.jpg").write_bytes(good)
    (folder / "b.jpg").write_bytes(good[: len(good) // 2])
    (folder / "c.png").write_bytes(b"")
    words = ["predict", str(run), str(folder), "--output", str(tmp_path / "o.csv"), "--draw", str(tmp_path / "drawn")]
    assert main(words) == 0
    rows = list(csv.DictReader((tmp_path / "o.csv").open()))
    assert [bool(row["error"]) for row in rows] == [False, True, True]
    drawn = list((tmp_path / "drawn").iterdir())
    assert [p.name for p in drawn] == ["00001-a.png"]
    with Image.open(drawn[0]) as picture, Image.open(folder / "a.jpg") as photo:
        assert max(picture.size) == max(MIN_SIDE, *photo.size), "small images are enlarged"
    (folder / "a.jpg").unlink()
    assert main(words) == 1
    message = capsys.readouterr().err
    assert "error: c.png: image file is empty" in message, "named once"
    assert "None of 2 inputs can be read" in message
    rows = list(csv.DictReader((tmp_path / "o.csv").open()))
    assert [row["id"] for row in rows] == ["b.jpg", "c.png"]
    assert all(row["error"] and not row["error"].startswith(row["id"]) for row in rows)


def test_what_cannot_start_is_refused(detector: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    run, scenes = detector
    refusals = {("nowhere.jpg", "x.csv"): "no such file", (str(scenes), "x.txt"): "neither .jsonl nor .csv"}
    (tmp_path / "empty").mkdir()
    for (name, out), reason in refusals.items():
        assert main(["predict", str(run), name, "--output", str(tmp_path / out)]) != 0
        assert reason in capsys.readouterr().err
    assert main(["predict", str(run), str(tmp_path / "empty"), "--output", str(tmp_path / "x.csv")]) == 1
    assert "no images there" in capsys.readouterr().err
    with pytest.raises(RunError, match="has no best"):
        Predictor.from_run(str(run), weights="best")
    assert main(["predict", str(tmp_path / "empty"), "a.jpg", "--output", "x.csv"]) == 1


@pytest.mark.parametrize(
    ("task", "options", "fields", "reason"),
    [
        ("detection", {"labels": ["a"]}, {"question": "x"}, "question means nothing to this task"),
        ("classification", {"labels": ["k=a"]}, {"box": [1, 2, 3]}, "not x1, y1, x2, y2"),
        ("classification", {"labels": ["k=a"]}, {"box": [9, 9, 2, 2]}, "not x1, y1, x2, y2"),
        ("chat", {}, {}, "needs a question"),
        ("chat", {}, {"question": "<image><image> same?"}, "2 <image> tags for 1 images"),
        ("chat", {}, {"question": "be quiet<|im_end|>"}, "does not read as text"),
        ("gui_steps", {}, {"history": []}, "needs a goal"),
        ("gui_steps", {}, {"goal": "x", "history": [3]}, "a step is a text or a JSON object"),
    ],
)
def test_questions_that_cannot_be_asked(job_file, task: str, options: dict, fields: dict, reason: str) -> None:
    predictor = _predictor(job_file, task, **options)
    with pytest.raises(DataError, match="photo") as error:
        predictor.record(Ask((Image.new("RGB", (64, 64)),), fields, "photo"))
    assert reason in str(error.value)


def test_every_bad_question_is_named_at_once(job_file) -> None:
    predictor = _predictor(job_file, "chat")
    asks = [Ask((Image.new("RGB", (64, 64)),), {}, f"photo {i}") for i in range(3)]
    asks.append(Ask((object(),), {"question": "?"}, "thing"))
    with pytest.raises(DataError) as error:
        predictor.predict_many(asks)
    assert len(error.value.problems) == 4


def test_memory_is_carried_on_and_cut_as_in_training(job_file) -> None:
    predictor = _predictor(job_file, "gui_steps", short_memory=2, long_memory_tokens=40)
    done = [f'{{"action":"a{i}"}}' for i in range(6)]
    history: tuple[str, ...] = ()
    for text in done:
        short, long = remember(history, json.loads(text), predictor.builder.prompt_context)
        history = (*long, *short)
    assert short == tuple(done[-2:])
    assert 0 < len(long) < 4
    assert long == tuple(done[4 - len(long) : 4])
    assert remember(history, {}, predictor.builder.prompt_context) == (short, long), (
        "what was not understood is forgotten"
    )
    screen = Image.new("RGB", (64, 64))
    step = predictor.predict_step(screen, "press", short, long)
    assert set(step.short_term_memory) <= {*done, json.dumps(step.output, separators=(",", ":"))}
    with pytest.raises(DataError, match="short_term_memory holds '3'"):
        predictor.predict_step(screen, "press", [3])


def test_a_memory_may_be_a_text_or_a_step_by_itself(job_file, monkeypatch: pytest.MonkeyPatch) -> None:
    """As texts their letters would be taken for steps, as objects their keys."""
    predictor = _predictor(job_file, "gui_steps", short_memory=1, long_memory_tokens=40)
    questions: list[str] = []

    def stub(model: Any, records: Any, builder: Any, *args: Any) -> list[str]:
        questions.extend(builder.turns(record)[-1][1] for record in records)
        return ['{"action": "done"}' for _ in records]

    monkeypatch.setattr(predictor_module, "generate_answers", stub)
    step = predictor.predict_step(Image.new("RGB", (64, 64)), "press", {"action": "tap"}, "opened the mail")
    assert 'Earlier steps: opened the mail\nLast steps: {"action":"tap"}\n' in questions[0]
    assert (step.short_term_memory, step.long_term_memory) == (
        ('{"action":"done"}',),
        ("opened the mail", '{"action":"tap"}'),
    )


def _steps_table(folder: Path) -> Path:
    for i in range(5):
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(folder / f"{i}.png")
    with (folder / "steps.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Task_id", "Image_id", "Instruction"])
        table.writerows([["a", "0.png", "go"], ["b", "1.png", "stop"], ["a", "2.png", "go"], ["b", "gone.png", "stop"]])
        table.writerows([["a", "../out.png", "go"], ["", "3.png", "go"], ["", "4.png", "go"]])
    return folder / "steps.csv"


def test_a_table_of_gui_steps_is_walked_with_the_model_s_own_memory(
    job_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def stub(worker: Any, records: Any) -> list[str]:
        asked.append([(r.id, r.context["history"], r.context["step"]) for r in records])
        return ['{"action":"tap"}' if r.id != "row 0" else "[?" for r in records]

    monkeypatch.setattr(generate, "answer_records", stub)
    predictor = _predictor(job_file, "gui_steps")
    out, table = tmp_path / "out.jsonl", str(_steps_table(tmp_path))
    assert predict.predict_files(predictor, [table], str(out)) == 7
    first = [("row 0", (), 0), ("row 1", (), 0), ("row 5", (), 0), ("row 6", (), 0)]
    assert asked == [first, [("row 2", (), 0)]], "what was not understood is not remembered"
    rows = [json.loads(line) for line in out.open()]
    assert [row["id"] for row in rows] == [f"row {i}" for i in range(7)]
    assert ["error" in row for row in rows] == [False, False, False, True, True, False, False]
    assert "outside" in rows[4]["error"]
    assert not rows[3]["error"].startswith("row 3")
    places = [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("", 0), ("", 0)]
    assert [(row["Task_id"], row["step"]) for row in rows] == places
    asked.clear()
    monkeypatch.setattr(
        generate, "answer_records", lambda worker, records: stub(worker, records) and ['{"action":"tap"}']
    )
    predictor.job = predictor.job.model_copy(
        update={"evaluate": predictor.job.evaluate.model_copy(update={"batch_size": 1})}
    )
    out = tmp_path / "out.csv"
    predict.predict_files(predictor, [table], str(out))
    assert [(row["Task_id"], int(row["step"])) for row in csv.DictReader(out.open())] == places
    assert [asks[0][0] for asks in asked] == ["row 0", "row 2", "row 1", "row 5", "row 6"], "one task after another"
    assert asked[1] == [("row 2", ('{"action":"tap"}',), 1)]


def test_a_table_s_images_may_lie_elsewhere(job_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "answer_records", lambda worker, records: ["[]"] * len(records))
    predictor, out = _predictor(job_file, "detection", labels=["a"]), tmp_path / "found.jsonl"
    (tmp_path / "photos").mkdir()
    (tmp_path / "tables").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "a.png")
    table = tmp_path / "tables" / "rows.csv"
    table.write_text("image\na.png\n")
    with pytest.raises(DataError, match="row 0: "):
        predict.predict_files(predictor, [str(table)], str(out))
    assert "error" in json.loads(out.read_text())
    root = str(tmp_path / "photos")
    assert predict.predict_files(predictor, [str(table)], str(out), image_root=root) == 1
    (result,) = map(json.loads, out.open())
    assert (result["images"], result["ok"]) == (["a.png"], True), "as the table names it"
    assert "Task_id" not in result
    for name, root_name, reason in (
        (str(table), "nowhere", "no such folder"),
        (f"{root}/a.png", root, "it is for tables"),
    ):
        with pytest.raises(ConfigError, match=reason):
            predict.predict_files(predictor, [name], str(out), image_root=root_name)


def test_a_prediction_that_was_killed_asks_nothing_twice(
    detector: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, scenes = detector
    complete, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert main(["predict", str(run), str(scenes / "test"), "--output", str(complete)]) == 0
    asked: list[str] = []
    real = generate.generate_answers

    def stumble(model: Any, records: Any, *args: Any) -> list[str]:
        if len(asked) >= 5:
            raise KeyboardInterrupt
        asked.extend(r.id for r in records)
        return real(model, records, *args)

    monkeypatch.setattr(generate, "generate_answers", stumble)
    words = ["predict", str(run), str(scenes / "test"), "--output", str(cut)]
    assert main(words) != 0
    assert not cut.exists()
    before = list(asked)
    asked.clear()
    monkeypatch.setattr(
        generate, "generate_answers", lambda m, rs, *a: asked.extend(r.id for r in rs) or real(m, rs, *a)
    )
    assert main(words) == 0
    assert len(before) == 5
    assert not set(before) & set(asked)
    assert cut.read_text() == complete.read_text()
    assert [p.name for p in tmp_path.iterdir() if "answers" in p.name] == []


def test_drawings_of_every_task(job_file) -> None:
    image = Image.new("RGB", (200, 100), "white")
    for values in (
        {"boxes": [(150.0, 20.0, 20.0, 90.0), (0, 0, 5, 5)], "labels": ["drain 排水", "$x"]},
        {"attributes": {"object": "drain", "condition": "blocked"}},
        {"output": {"action": "tap"}, "box": (1.0, 2.0, 30.0, 40.0), "point": None},
        {"output": {"action": "tap"}, "box": None, "point": (9.0, 9.0)},
        {"answer": "a long answer " * 60},
        {"boxes": [], "labels": []},
    ):
        drawn = Found((image,), (image.size,), "", values, True, ()).draw()
        assert drawn.width == 200
        changed = np.asarray(drawn).shape != np.asarray(image).shape or (np.asarray(drawn) != np.asarray(image)).any()
        assert changed == bool(values.get("labels") or "labels" not in values)
