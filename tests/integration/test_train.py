"""A whole run in this process: what it writes, what it refuses, and that its results load without us."""

import io
import itertools
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ray_vlm.cli import main
from ray_vlm.config.load import load_job
from ray_vlm.errors import RunError
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.train.driver import train
from tests.conftest import FAMILIES
from tests.support.twins import slow_but


def _run(path: Path, *overrides: str, overwrite: bool = False):
    return train(load_job(path, overrides), path.read_text(), overwrite)


def _eval_section(scenes: Path) -> dict[str, Any]:
    rows = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "eval", "test")}
    return {"data": rows, "evaluate": {"every_steps": 2, "num_samples": 6, "max_new_tokens": 12}}


def _check_first_lines(lines: list[str], scenes: Path, address: str) -> None:
    """What is read is said first, then what stands out in it, then what will be done with it."""
    first, note, plan = (
        next((i, line) for i, line in enumerate(lines) if line.startswith(start))
        for start in ("sft of ", "note: ", "run folder ")
    )
    assert first[0] == 0 < note[0] < plan[0]
    assert f"reading {scenes / 'train.json'}, {scenes / 'eval.json'}" in first[1]
    assert re.search(r"50 of 50 rows of data.train and \d+ of 12 rows of data.eval have answers of more than", note[1])
    assert plan[1] == f"run folder {address}: 50 training and 12 eval rows; 4 steps of 8 rows, 7 an epoch"


def test_the_run_folder_explains_itself(job_file, scenes: Path, capsys) -> None:
    path = job_file(checkpoint={"every_steps": 2, "keep_best": 0}, **_eval_section(scenes))
    paths = _run(path, "train.max_steps=4")
    _check_first_lines(capsys.readouterr().out.splitlines(), scenes, paths.address)
    assert paths.job.read_text() == path.read_text()
    resolved = json.loads(paths.resolved.read_text())
    assert resolved["train"]["max_steps"] == 4
    assert resolved["lora"]["dropout"] == 0.0
    run = json.loads(paths.run.read_text())
    assert run["status"] == "finished"
    assert run["attempts"][0]["status"] == "finished"
    assert set(run) >= {"versions", "hardware", "git_commit", "result", "command"}
    lines = read_metrics(paths.metrics)
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert set(steps[0]) >= {"attempt", "loss", "learning_rate", "grad_norm", "tokens_per_s", "epoch", "time"}
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [2, 4]
    log = json.loads(paths.training_log.read_text())
    assert log["configuration"] == resolved
    assert len(log["training_history"]) == 4
    assert len(log["validation_history"]) == 2
    best = min(log["validation_history"], key=lambda line: line["loss"])
    assert log["best_checkpoint"]["step"] == best["step"]
    assert log["best_checkpoint"]["metrics"]["loss"] == best["loss"]
    names = {p.name.split("-a1-")[0] for p in paths.root.iterdir() if p.is_dir()}
    assert names == {"checkpoint-2", "checkpoint-4", "best", "final", "logs"}
    text = (paths.logs / "rank-0.log").read_text()
    assert re.search(r"^\d{4}-\d\d-\d\d [\d:,]{12} INFO ray_vlm\.train\.driver: run folder ", text, re.MULTILINE)
    assert re.search(r" DEBUG ray_vlm\.runs\.checkpoints: checkpoint-4-a1-\w+ is committed", text)
    assert " INFO ray_vlm.runs.console: step 4/4 " in text


def test_v_shows_details_on_stderr_and_changes_nothing_on_stdout(job_file, capsys) -> None:
    path, outputs = job_file(), []
    for options in (["--overwrite"], ["--overwrite", "-v"]):
        assert main(["train", str(path), "train.max_steps=1", *options]) == 0
        outputs.append(capsys.readouterr())
    kinds = [[line.split()[0] for line in output.out.splitlines()] for output in outputs]
    assert kinds[0] == kinds[1]
    assert outputs[0].err == ""
    assert re.search(r"^ray_vlm\.runs\.log_file: ray_vlm \d", outputs[1].err, re.MULTILINE)


def test_a_reader_who_leaves_after_the_first_line_does_not_end_the_run(job_file, monkeypatch) -> None:
    class Left(io.StringIO):
        def write(self, text: str) -> int:
            if "\n" in self.getvalue():
                raise BrokenPipeError
            return super().write(text)

    monkeypatch.setattr("sys.stdout", Left())
    assert _run(job_file(), "train.max_steps=1", "data.oversample=auto").final.is_dir()


def test_a_log_that_cannot_be_written_is_one_note(job_file, tmp_path: Path, capsys) -> None:
    path = job_file()
    paths = _run(path, "train.max_steps=1", "checkpoint.every_steps=1")
    shutil.rmtree(paths.logs)
    paths.logs.write_text("a file where the folder should be")
    capsys.readouterr()
    assert main(["train", str(path), "train.max_steps=2", "--resume"]) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "goes on without this file" in line]
    assert note.startswith(f"note: {paths.logs}/rank-0.log cannot be written (")


def test_a_validation_before_the_first_step_changes_nothing_and_may_be_the_best(job_file, scenes: Path) -> None:
    path = job_file(**_eval_section(scenes))
    train_lines = []
    for name, at_start in (("without", "false"), ("with", "true")):
        paths = _run(path, f"run.name={name}", f"evaluate.at_start={at_start}", "train.max_steps=2")
        lines = read_metrics(paths.metrics)
        train_lines.append([(line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"])
    assert train_lines[0] == train_lines[1]
    validations = [(line["step"], line["loss"]) for line in lines if line["kind"] == "eval"]
    assert [step for step, _ in validations] == [0, 2]
    best = json.loads(paths.training_log.read_text())["best_checkpoint"]
    assert best["step"] == min(validations, key=lambda line: line[1])[0]


@pytest.mark.parametrize(
    ("family", "load_in_4bit"),
    slow_but([("qwen3_vl", True), ("qwen2_5_vl", False)], itertools.product(FAMILIES, [False, True])),
)
def test_adapters_load_with_plain_peft_and_transformers(
    job_file, scenes: Path, family: str, load_in_4bit: bool
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    path = job_file(family, **_eval_section(scenes))
    paths = _run(path, f"model.load_in_4bit={str(load_in_4bit).lower()}", "checkpoint.every_steps=3")
    base_folder = yaml.safe_load(path.read_text())["model"]["name"]
    weights = []
    for folder in (paths.final, paths.best, next(paths.root.glob("checkpoint-3-*"))):
        model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base_folder), folder)
        weights.append({n: p for n, p in model.named_parameters() if "lora_B" in n})
        assert all(p.dtype == torch.float32 and float(p.abs().sum()) > 0 for p in weights[-1].values())
    assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_full_fine_tuning_saves_an_ordinary_model(job_file) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    paths = _run(job_file(lora=None, train={"learning_rate": 1e-3}))
    model = AutoModelForImageTextToText.from_pretrained(paths.final)
    AutoProcessor.from_pretrained(paths.final)
    assert not paths.best.exists()
    base = AutoModelForImageTextToText.from_pretrained(json.loads(paths.resolved.read_text())["model"]["name"])
    changed = [
        n for (n, a), b in zip(model.named_parameters(), base.parameters(), strict=True) if not torch.equal(a, b)
    ]
    assert len(changed) > 50


def test_eval_data_changes_nothing_in_training(job_file, scenes: Path) -> None:
    without = _run(job_file(), "run.name=without", "train.max_steps=4")
    section = _eval_section(scenes)
    section["evaluate"]["metric"] = "f1_50"
    with_eval = _run(job_file(**section), "run.name=with", "train.max_steps=4")
    losses = [
        [(line["loss"], line["grad_norm"]) for line in read_metrics(paths.metrics) if line["kind"] == "train"]
        for paths in (without, with_eval)
    ]
    assert losses[0] == losses[1]
    assert not without.best.exists()
    assert with_eval.best.exists()
    assert {"f1_50", "map", "parse_rate"} <= set(
        json.loads(with_eval.training_log.read_text())["validation_history"][0]
    )


def test_a_folder_in_use_is_refused_and_overwrite_replaces_it(job_file, tmp_path: Path) -> None:
    path = job_file()
    _run(path)
    with pytest.raises(RunError, match="already in use"):
        _run(path)
    paths = _run(path, "train.max_steps=2", overwrite=True)
    assert len(json.loads(paths.training_log.read_text())["training_history"]) == 2
    precious = tmp_path / "runs" / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not a run folder"):
        _run(path, "run.name=precious", overwrite=True)
    assert (precious / "thesis.txt").exists()


def test_a_run_without_a_name_gets_one_with_a_counter(job_file) -> None:
    path = job_file()
    names = [_run(path, "run.name=null", "train.max_steps=1").root.name for _ in range(2)]
    assert names == ["sft-qwen3_vl-detection-001", "sft-qwen3_vl-detection-002"]


def test_quarantined_rows_are_written_down_and_counted(job_file, scenes: Path, tmp_path: Path, capsys) -> None:
    rows = json.loads((scenes / "train.json").read_text())
    rows["images"][3]["file_name"] = "train/nowhere.jpg"
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(rows))
    data = {"train": {"path": str(broken), "image_root": str(scenes)}}
    path = job_file(data=data)
    assert main(["train", str(path)]) == 1
    error = capsys.readouterr().err
    assert "row 3 (id 3): image file is missing" in error
    assert "on_bad_row=quarantine" in error
    assert not (tmp_path / "runs" / "run").exists()
    assert main(["train", str(path), "data.on_bad_row=quarantine", "train.max_steps=1"]) == 0
    lines = (tmp_path / "runs" / "run" / "bad_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [3]


def test_a_bad_job_exits_with_2_and_starts_nothing(job_file, tmp_path: Path, capsys) -> None:
    assert main(["train", str(job_file()), "train.nonsense=1", "lora.rank=0"]) == 2
    error = capsys.readouterr().err
    assert "train.nonsense" in error
    assert "lora.rank" in error
    assert not (tmp_path / "runs").exists()


def test_an_unknown_trl_option_is_named(job_file, capsys) -> None:
    assert main(["train", str(job_file()), "method={name: sft, trl: {no_such_option: 1}}"]) == 2
    assert "method.trl.no_such_option" in capsys.readouterr().err


def test_dry_run_shows_plan_and_trained_tokens(job_file, tmp_path: Path, capsys) -> None:
    assert main(["train", str(job_file()), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "rows 50, left out 0" in out
    assert "steps 3, 7 an epoch" in out
    assert "[[```json" in out
    assert out.index("rows 50") < out.index("# all settings") < out.index("learning_rate:"), "the plan comes first"
    assert not (tmp_path / "runs" / "run").exists()


def test_early_stopping_stops(job_file, scenes: Path) -> None:
    path = job_file(**_eval_section(scenes))
    overrides = ["train.early_stopping_patience=2", "train.learning_rate=1.0e-12", "train.max_steps=40"]
    paths = _run(path, *overrides, "evaluate.every_steps=1", "evaluate.metric=parse_rate")
    assert len(json.loads(paths.training_log.read_text())["training_history"]) == 3


def test_wandb_offline_gets_every_step(job_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, dict]] = []
    axes: dict[str, str | None] = {}

    class Fake:
        offline = True

        def log(self, values: dict, step: int) -> None:
            seen.append((step, values))

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            axes[name] = step_metric

        def finish(self) -> None:
            seen.append((-1, {}))

    import wandb

    options: dict[str, Any] = {}
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where nobody ran `wandb login`
    monkeypatch.setattr(wandb, "init", lambda **kw: options.update(kw) or Fake())
    track = {"wandb": True, "wandb_group": "night", "wandb_tags": ["tiny", "scenes"]}
    paths = _run(job_file(track=track), "train.num_epochs=1", "train.max_steps=7")
    assert options["mode"] == "offline"
    assert (options["group"], options["tags"], options["entity"]) == ("night", ["tiny", "scenes"], None)
    assert any("offline, in wandb/" in line["text"] for line in read_metrics(paths.metrics) if line["kind"] == "note")
    steps = [step for step, values in seen if "train/batch_loss" in values]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert {"train/learning_rate", "train/epoch"} <= set(seen[0][1])
    (epoch,) = [(step, values) for step, values in seen if "train/epoch_avg_loss" in values]
    (line,) = json.loads(paths.training_log.read_text())["epoch_history"]
    assert epoch == (7, {"train/epoch_avg_loss": line["loss"], "train/epoch_learning_rate": line["learning_rate"]})
    last = [values for _, values in seen if "train/batch_loss" in values][-1]
    assert line["learning_rate"] == last["train/learning_rate"] > 0
    assert seen[-1][0] == -1
    assert axes["eval/*"] == "eval/step"


def test_energy_is_estimated_without_calling_home(job_file, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from ray_vlm.runs.compute import measure_compute
    from ray_vlm.runs.read import read_run

    called: list[Any] = []
    monkeypatch.setenv("CODECARBON_OUTPUT_METHODS", "csv,api")
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: called.append(address) or _refuse())
    paths = _run(job_file(track={"energy": True, "country": "DEU"}), "checkpoint.every_steps=2")
    lines = [line for line in read_metrics(paths.metrics) if line["kind"] == "energy"]
    assert [line["step"] for line in lines] == [2, 3, 3]
    assert lines[-1]["energy_kwh"] > lines[0]["energy_kwh"] > 0
    assert lines[-1]["energy_kwh"] == pytest.approx(sum(lines[-1][f"{part}_kwh"] for part in ("gpu", "cpu", "memory")))
    assert 0.2 < lines[-1]["co2_kg"] / lines[-1]["energy_kwh"] < 0.6, "kilograms for a kilowatt-hour in Germany"
    compute = measure_compute(read_run(str(paths.root)))
    assert (compute["energy_kwh"], compute["co2_kg"]) == (lines[-1]["energy_kwh"], lines[-1]["co2_kg"])
    assert not called
    assert not (Path.cwd() / "emissions.csv").exists()


def _refuse() -> None:
    raise OSError("no network in this test")


def test_a_failed_run_says_why_in_its_folder(job_file, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray_vlm.train.launch as launch

    def broken(spec: Any, should_stop: Any) -> None:
        raise RuntimeError("the device caught fire")

    monkeypatch.setattr(launch, "start_worker", broken)
    path = job_file()
    with pytest.raises(RuntimeError):
        _run(path)
    run = json.loads((Path(yaml.safe_load(path.read_text())["run"]["output_dir"]) / "run" / "run.json").read_text())
    assert run["status"] == "failed"
    assert "caught fire" in run["attempts"][0]["error"]


def test_an_image_that_is_gone_is_counted(
    job_file: Any, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Deleted between the check of the rows and their step: the run ends with as many steps, and says so."""
    import shutil

    from ray_vlm.data import rows as data_rows
    from ray_vlm.train import driver

    monkeypatch.setattr(data_rows, "WAITS_S", (0.0, 0.0))
    copy = tmp_path / "scenes"
    shutil.copytree(scenes, copy)
    launch = driver.launch
    gone = json.loads((copy / "train.json").read_text())["images"][0]["file_name"]

    def lose(*args: Any, **kwargs: Any) -> Any:
        (copy / gone).unlink()
        return launch(*args, **kwargs)

    monkeypatch.setattr(driver, "launch", lose)
    data = {"train": {"path": str(copy / "train.json")}, "eval": None, "on_bad_row": "quarantine"}
    path = job_file(data=data, train={"max_steps": None, "global_batch_size": 8, "micro_batch_size": 4})
    paths = driver.train(load_job(path), "")
    result = json.loads(paths.run.read_text())["result"]
    assert len(result["lost_rows"]) == 1
    assert result["steps"] == result["num_steps"]
    assert "1 rows could not be read any more" in capsys.readouterr().out


@pytest.mark.parametrize(("delay", "hangs"), [(0.6, False), (9.0, True)])
def test_a_long_validation_is_no_hang(
    job_file, scenes: Path, monkeypatch: pytest.MonkeyPatch, capsys, delay: float, hangs: bool
) -> None:
    """What goes into the model counts as moving; one that stands still inside it does not."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel as Model

    real, slow = Model.forward, []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training and (not hangs or not slow):
            slow.append(time.sleep(delay))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Model, "forward", forward)
    path = job_file(**_eval_section(scenes))
    _run(path, "train.max_steps=2", "evaluate.metric=f1_50", "cluster.stall_minutes=0.1")
    assert len(slow) * delay > 6.0, "longer than the limit"
    assert ("hangs for 0.1 minutes: validation" in capsys.readouterr().err) == hangs


def test_without_eval_rows_nothing_is_validated_and_nothing_is_the_best(job_file: Any) -> None:
    """`evaluate.at_start` would call untrained weights the best ones."""
    paths = _run(job_file(data={"eval": None}, evaluate={"at_start": True}, train={"max_steps": 1}))
    assert not paths.best.exists()
    assert json.loads(paths.run.read_text())["result"]["best"] is None
