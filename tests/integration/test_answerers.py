"""Whatever holds a run's weights answers as the run does: its folders, exports elsewhere, the hub, and whole models."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ray_vlm import Predictor
from ray_vlm.cli import main
from ray_vlm.errors import ConfigError, ModelError, RunError
from ray_vlm.evaluate.weights import find_answerer
from tests.support.jobs import write_job


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, scenes: Path, tiny_models: dict[str, str]) -> Path:
    """A job's folder with its run and both exports, for tests that change nothing in it."""
    folder = tmp_path_factory.mktemp("trained")
    data = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "test")}
    evaluate, train = {"max_new_tokens": 12}, {"learning_rate": 1e-2}
    job = write_job(folder, scenes, tiny_models["qwen3_vl"], data=data, evaluate=evaluate, train=train)
    assert main(["train", str(job)]) == 0
    for more in ([], ["--merged"]):
        assert main(["export", str(folder / "runs" / "run"), *more]) == 0
    return folder


@pytest.fixture
def run(trained: Path) -> Path:
    """The run's folder."""
    return trained / "runs" / "run"


def _photo(scenes: Path) -> str:
    return str(sorted((scenes / "test").iterdir())[0])


def _elsewhere(folder: Path, tmp_path: Path, name: str) -> str:
    """A copy of an export, away from its run."""
    return str(shutil.copytree(folder, tmp_path / name))


def test_all_that_holds_the_weights_answers_alike(run: Path, scenes: Path, tmp_path: Path, trained: Path) -> None:
    photo = _photo(scenes)
    expected = Predictor.from_run(str(run)).predict(photo)
    names = [str(run / "final"), _elsewhere(run / "export" / "adapter", tmp_path, "adapter")]
    names.append(_elsewhere(run / "export" / "merged", tmp_path, "merged"))
    for name in names:
        predictor = Predictor.from_run(name)
        assert predictor.builder.spec.labels, name
        assert predictor.job.evaluate.max_new_tokens == 12, "as long as in training"
        assert predictor.predict(photo).answer == expected.answer, name
    base = Predictor.from_run(str(run), weights="base")
    assert base.weights is None
    assert base.builder.spec.labels == predictor.builder.spec.labels, "asked as the run asks"
    assert base.predict(photo).answer != expected.answer, "the adapter does something"
    job = Predictor.from_run(str(trained / "job.yaml"))
    assert (job.weights, job.job.model.name) == (None, base.job.model.name)


def test_an_adapter_whose_base_has_moved_asks_for_it(
    run: Path, scenes: Path, tmp_path: Path, tiny_models: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    adapter = Path(_elsewhere(run / "export" / "adapter", tmp_path, "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/no/such/place/qwen3_vl"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    words = ["predict", str(adapter), _photo(scenes), "--output", str(tmp_path / "o.jsonl")]
    assert main(words) == 1
    assert "/no/such/place/qwen3_vl, which is not on this machine" in capsys.readouterr().err
    assert main([*words, "--base", tiny_models["qwen3_vl"]]) == 0
    with pytest.raises(ModelError, match="trained on '/no/such/place/qwen3_vl'"):
        Predictor.from_run(str(adapter), base=tiny_models["qwen2_5_vl"]).predict(_photo(scenes))


def test_weights_that_do_not_say_how_to_ask_take_a_job_or_a_question(
    run: Path, scenes: Path, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture, tiny_models: dict[str, str]
) -> None:
    adapter = Path(_elsewhere(run / "export" / "adapter", tmp_path, "adapter"))
    (adapter / "preprocessing.json").unlink()
    for name in (str(adapter), tiny_models["qwen3_vl"]):
        words = ["predict", name, _photo(scenes), "--output", str(tmp_path / "o.jsonl")]
        assert main(words) == 2
        assert "does not say how to ask it" in (message := capsys.readouterr().err)
        assert "--job JOB" in message
        assert main([*words, "--job", str(trained / "job.yaml")]) == 0
        assert main([*words, "--question", "What is it?"]) == 0
    result = json.loads((tmp_path / "o.jsonl").read_text())
    assert set(result["found"]) == {"answer"}


def test_names_on_the_hub_are_adapters_and_models(
    run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a cache such as a download leaves, with no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    shared = tmp_path / "models--someone--shapes"
    shutil.copytree(run / "export" / "adapter", shared / "snapshots" / "abc")
    (shared / "refs").mkdir()
    (shared / "refs" / "main").write_text("abc")
    photo = _photo(scenes)
    prediction = Predictor.from_run("someone/shapes").predict(photo)
    assert prediction.answer == Predictor.from_run(str(run)).predict(photo).answer
    with pytest.raises(ModelError, match="no folder here, and cannot be loaded from the hub"):
        find_answerer("someone/else")


def test_what_does_not_fit_is_refused(run: Path, tmp_path: Path, scenes: Path) -> None:
    merged = _elsewhere(run / "export" / "merged", tmp_path, "merged")
    with pytest.raises(ConfigError, match="is a whole model and needs no base"):
        find_answerer(merged, base="tiny")
    with pytest.raises(ConfigError, match="is no run, so there is nothing to choose"):
        find_answerer(merged, weights="best")
    with pytest.raises(RunError, match="no adapter"):
        find_answerer(str(scenes))
    with pytest.raises(RunError, match="no run, folder or job file of that name"):
        find_answerer("nothing")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, scenes: Path, tiny_models: dict[str, str]) -> Path:
    """The folder of a sweep with one trial, which trained all weights, and the job beside it."""
    folder = tmp_path_factory.mktemp("whole")
    data = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "eval", "test")}
    sections: dict[str, Any] = {"data": data, "evaluate": {"max_new_tokens": 12, "num_samples": 2}, "lora": None}
    job = write_job(folder, scenes, tiny_models["qwen3_vl"], **sections)
    assert main(["train", str(job), f"run.output_dir={folder / 'sweep' / 'trials'}", 'run.name="000"']) == 0
    return folder


def test_a_run_that_trained_all_weights_is_asked_and_measured(whole: Path, scenes: Path, tmp_path: Path) -> None:
    run, measured = whole / "sweep" / "trials" / "000", tmp_path / "measured"
    words = ["--adapter", str(run), "--output", str(measured)]
    assert main(["evaluate", str(whole / "job.yaml"), *words]) == 0
    lines = [json.loads(line) for line in (measured / "predictions.jsonl").open()]
    for name in (str(run), str(run / "best")):
        predictor = Predictor.from_run(name)
        assert predictor.predict(lines[0]["images"][0]).answer == lines[0]["answer"]
    assert main(["evaluate", str(whole / "job.yaml"), "--output", str(tmp_path / "base")]) == 0
    base = [json.loads(line) for line in (tmp_path / "base" / "predictions.jsonl").open()]
    assert [line["answer"] for line in base] != [line["answer"] for line in lines], "it learned"


@pytest.mark.parametrize("export", ["adapter", "merged"])
def test_a_sweep_of_runs_that_train_all_weights_ends(whole: Path, export: str, lines: list[str]) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.tune.space import Setting, Space
    from ray_vlm.tune.sweep import finish_sweep
    from ray_vlm.tune.trials import read_trials

    job = load_job(whole / "job.yaml", [f"tune.export={export}"])
    space = Space((Setting("train.learning_rate", "choice", (1e-3, 1e-4)),))
    sweep = whole / "sweep"
    finish_sweep(str(sweep), job, space, read_trials(str(sweep), space))
    assert any("test rows, which chose nothing" in text for text in lines)
    assert (sweep / "export" / "model" / "config.json").is_file()
    card = (sweep / "export" / "model" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "peft" not in card.split("---")[1]
    assert (sweep / "report.html").is_file()
