"""Evaluation from the command line: what it writes, that base and adapter go one way, and what it refuses."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_vlm.cli import main
from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import Evaluate, Model
from ray_vlm.config.task import DetectionTask
from ray_vlm.data.collate import collate
from ray_vlm.data.parts import build_index
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import SampleSpec
from ray_vlm.distributed import DistributedContext
from ray_vlm.engines import own
from ray_vlm.engines.own import OwnEngine
from ray_vlm.evaluate.generate import generate_answers

LABELS = ("circle", "square", "triangle", "cross", "ring", "diamond")


def _sections(scenes: Path, **data: Any) -> dict[str, Any]:
    rows = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "test")} | data
    return {"data": rows, "evaluate": {"max_new_tokens": 8, "batch_size": 5}}


def test_base_and_adapter_side_by_side(job_file, scenes: Path, tmp_path: Path, capsys) -> None:
    path = job_file(**_sections(scenes))
    assert main(["train", str(path)]) == 0
    assert main(["evaluate", str(path), "--output", str(tmp_path / "base"), "evaluate.batch_size=4"]) == 0
    final = str(tmp_path / "runs" / "run" / "final")
    assert main(["evaluate", str(path), "--adapter", final, "--against", str(tmp_path / "base")]) == 0
    folder = tmp_path / "runs" / "run" / "evaluate" / "final"
    tables = {"answers.jsonl", "predictions.jsonl", "predictions.csv", "metrics.json", "details.json"}
    assert {p.name for p in folder.iterdir()} == tables | {"comparison.json", "report.html"}
    assert len(json.loads((folder / "details.json").read_text())["rows"]) == 12
    compared = json.loads((folder / "comparison.json").read_text())["differences"]
    assert compared["f1_50"].keys() == {"difference", "low", "high"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["num_rows"], metrics["num_bad_rows"]) == (12, 0)
    ids = [[json.loads(line)["id"] for line in (f / "predictions.jsonl").open()] for f in (folder, tmp_path / "base")]
    assert ids[0] == ids[1] == [str(i) for i in range(12)]
    assert ">run/final<" in (folder / "report.html").read_text()


def test_batch_size_changes_no_answer(scenes: Path, tiny_models: dict[str, str]) -> None:
    from ray_vlm.models.load import load_model

    for folder in tiny_models.values():
        spec = SampleSpec(Model(name=folder, load_in_4bit=False), DetectionTask(), LABELS)
        index = build_index(Source(path=str(scenes / "test.json")), Data(), load_sample_builder(spec))
        model = load_model(spec.model, precision="fp32")
        engine = OwnEngine(model, load_sample_builder(spec), "cpu")
        one, many = (generate_answers(engine, index.records, engine.builder, size, 6) for size in (1, 5))
        assert one == many


@pytest.mark.parametrize("name", ["tiny", "qwen3_vl", "qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_answers_are_those_of_generate(
    name: str, load_in_4bit: bool, scenes: Path, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token for token; the trained model's answers end at different lengths, and so leave the batch."""
    from ray_vlm.models.load import load_model

    spec = SampleSpec(Model(name=tiny_models.get(name, name), load_in_4bit=load_in_4bit), DetectionTask(), LABELS)
    index = build_index(Source(path=str(scenes / "test.json")), Data(), load_sample_builder(spec))
    model, builder = load_model(spec.model, precision="fp32"), load_sample_builder(spec)
    calls = _count_calls(model.get_decoder(), monkeypatch)
    engine = OwnEngine(model, builder, "cpu")
    answers = generate_answers(engine, index.records, builder, len(index.records), 80)
    rows_at_once, calls[:] = calls[:], []
    monkeypatch.setattr(own, "needs_generate", lambda builder: True)
    assert generate_answers(engine, index.records, builder, len(index.records), 80) == answers
    assert set(calls) == {12}
    assert (rows_at_once[-1] < 12) == (name == "tiny")
    assert name != "tiny" or len({len(text) for text in answers}) > 3


def _count_calls(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the language model has, as they come."""
    calls: list[int] = []
    forward = decoder.forward

    def counted(*args: Any, **inputs: Any) -> Any:
        calls.append(len(inputs["inputs_embeds"]))
        return forward(*args, **inputs)

    monkeypatch.setattr(decoder, "forward", counted)
    return calls


def test_generation_ignores_the_habits_of_a_hub_model(scenes: Path, tiny_models: dict[str, str]) -> None:
    from ray_vlm.models.load import load_model

    spec = SampleSpec(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), DetectionTask(), LABELS)
    index = build_index(Source(path=str(scenes / "test.json"), max_rows=4), Data(), load_sample_builder(spec))
    model = load_model(spec.model, precision="fp32")
    engine = OwnEngine(model, load_sample_builder(spec), "cpu")
    plain = generate_answers(engine, index.records, engine.builder, 4, 12)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.temperature = 9.0
    assert generate_answers(engine, index.records, engine.builder, 4, 12) == plain


def test_validation_loss_is_the_plain_forward_s(scenes: Path, tiny_models: dict[str, str]) -> None:
    from trl.trainer.utils import add_fused_lm_head

    from ray_vlm.evaluate.validate import AnswerValidation
    from ray_vlm.models.load import load_model

    spec = SampleSpec(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), DetectionTask(), LABELS)
    index = build_index(Source(path=str(scenes / "test.json")), Data(), load_sample_builder(spec))
    builder, model = load_sample_builder(spec), load_model(spec.model, precision="fp32")
    batch = collate([builder.train_row(record) for record in index.records], builder)
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    add_fused_lm_head(model)
    model.train()
    trainer: Any = SimpleNamespace(model=model)
    validation = AnswerValidation(index.records, builder, Evaluate(batch_size=5), "detection", DistributedContext())
    metrics, _ = validation.measure(trainer)
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert model.training


def test_quarantined_test_rows_are_counted_and_written(job_file, scenes: Path, tmp_path: Path) -> None:
    rows = json.loads((scenes / "test.json").read_text())
    rows["images"][2]["file_name"] = "test/nowhere.jpg"
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(rows))
    path = job_file(**_sections(scenes, test={"path": str(broken), "image_root": str(scenes)}))
    out = tmp_path / "out"
    assert main(["evaluate", str(path), "--output", str(out)]) == 1
    assert not out.exists()
    assert main(["evaluate", str(path), "data.on_bad_row=quarantine", "--output", str(out)]) == 0
    assert json.loads((out / "metrics.json").read_text())["num_bad_rows"] == 1
    assert json.loads((out / "bad_rows.jsonl").read_text())["source"] == "test"


def test_evaluations_of_different_rows_are_not_compared(job_file, scenes: Path, tmp_path: Path, capsys) -> None:
    path = job_file(**_sections(scenes))
    assert main(["evaluate", str(path), "--output", str(tmp_path / "a"), "data.test.max_rows=5"]) == 0
    assert main(["evaluate", str(path), "--output", str(tmp_path / "b"), "--against", str(tmp_path / "a")]) == 1
    assert "different test rows" in capsys.readouterr().err
    assert main(["evaluate", str(path), "--against", str(tmp_path / "none")]) == 1
    assert "no evaluation here" in capsys.readouterr().err


def test_labels_of_the_job_are_asked_for_and_saved(job_file, scenes: Path, tmp_path: Path) -> None:
    labels = list(reversed(LABELS))
    path = job_file(task={"name": "detection", "labels": labels}, **_sections(scenes))
    assert main(["train", str(path)]) == 0
    final = tmp_path / "runs" / "run" / "final"
    assert json.loads((final / "preprocessing.json").read_text())["labels"] == labels
    assert main(["evaluate", str(path), "--adapter", str(final)]) == 0


def test_a_whole_model_of_another_kind_is_refused(
    job_file, scenes: Path, tiny_models: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    other = tiny_models["qwen2_5_vl"]
    assert main(["evaluate", str(job_file(**_sections(scenes))), "--adapter", other]) == 1
    assert f"{other} is a qwen2_5_vl, and model.name=" in capsys.readouterr().err


@pytest.mark.parametrize("share", [False, True])
def test_the_validation_rows_are_a_test_where_that_is_said(
    job_file, scenes: Path, tmp_path: Path, share: bool, capsys
) -> None:
    """The zero-shot test on the validation images: everything that shows its numbers tells what the rows chose."""
    from ray_vlm.runs.card import ADAPTER, write_card
    from ray_vlm.runs.compare import compare_runs
    from ray_vlm.runs.read import read_run
    from ray_vlm.runs.show import describe_run

    data = {"train": {"path": str(scenes / "train.json")}, "test_on_eval": True}
    data |= {"eval": 0.2 if share else {"path": str(scenes / "eval.json")}}
    path = job_file(data=data, evaluate={"max_new_tokens": 4, "num_samples": 3}, train={"max_steps": 1})
    assert main(["train", str(path)]) == 0
    run = tmp_path / "runs" / "run"
    assert main(["evaluate", str(path), "--adapter", str(run / "final")]) == 0
    output = capsys.readouterr().out
    assert f"{10 if share else 12} rows that also chose best/" in output, "all of them, not the samples of training"
    metrics = json.loads((run / "evaluate" / "final" / "metrics.json").read_text())
    assert metrics["rows_chose_best"] is True
    page = (run / "evaluate" / "final" / "report.html").read_text()
    assert "validation rows that also chose best/" in page
    read = read_run(str(run))
    assert "that also chose best/" in write_card(read, ADAPTER, "final")
    assert "rows also chose best/" in describe_run(read)
    assert "also chose its best/" in " ".join(compare_runs([read, read]).notes)


def test_test_numbers_reach_the_tracker_at_the_step_of_their_weights(
    job_file, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    calls: list[dict[str, Any]] = []
    logged: list[dict[str, Any]] = []

    class Fake:
        offline = True
        log = staticmethod(lambda values, step=None: logged.append(values))
        define_metric = staticmethod(lambda name, step_metric=None: None)
        finish = staticmethod(lambda: None)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(wandb, "init", lambda **options: calls.append(options) or Fake())
    path = job_file(track={"wandb": True}, checkpoint={"every_steps": 2}, **_sections(scenes))
    assert main(["train", str(path)]) == 0
    run = tmp_path / "runs" / "run"
    (checkpoint,) = run.glob("checkpoint-2-*")
    words = [word for folder in (checkpoint, run / "final") for word in ("--adapter", str(folder))]
    assert main(["evaluate", str(path), *words, "--base", "--output", str(tmp_path / "found")]) == 0
    tested = [values for values in logged if "test/step" in values]
    assert [values["test/step"] for values in tested] == [2, 3]
    assert all({"test/f1_50", "test/map"} <= set(values) for values in tested)
    assert {call["id"] for call in calls} == {json.loads((run / "run.json").read_text())["id"]}


def test_no_test_rows_no_headline_numbers(job_file, capsys) -> None:
    assert main(["evaluate", str(job_file())]) == 2
    assert "data.test_on_eval=true" in capsys.readouterr().err
