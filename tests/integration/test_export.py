"""Exports load without this package and say what the run's own weights say; what cannot be exported is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ray_vlm.cli import main
from ray_vlm.config.train import Precision
from ray_vlm.evaluate.export import TOLERANCE, compare, merge
from ray_vlm.models.precision import DTYPES
from tests.conftest import FAMILIES
from tests.support.jobs import write_job
from tests.support.twins import slow_but


def _train(folder: Path, scenes: Path, model: str, /, **sections: Any) -> Path:
    data = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "test")}
    lora = {"target": ["language", "connector", "vision"]}
    train = {"learning_rate": 1e-2} | sections.pop("train", {})
    assert main(["train", str(write_job(folder, scenes, model, data=data, lora=lora, train=train, **sections))]) == 0
    return folder / "runs" / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, scenes: Path, tiny_models: dict[str, str]) -> Path:
    """A run in full precision."""
    return _train(tmp_path_factory.mktemp("trained"), scenes, tiny_models["qwen3_vl"])


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "runs" / "run")


def _batch(run: Path) -> dict[str, Any]:
    from ray_vlm.config.load import load_resolved
    from ray_vlm.evaluate.export import check_batches

    job = load_resolved(json.loads((run / "resolved.json").read_text()))
    return check_batches(job, str(run / "final"), "cpu")[0]


@pytest.mark.parametrize("family", slow_but(["qwen3_vl"], FAMILIES))
def test_a_merged_model_says_what_base_and_adapter_say(
    family: str, tiny_models: dict[str, str], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    run = _train(tmp_path, scenes, tiny_models[family], model={"load_in_4bit": True})
    assert main(["export", str(run), "--merged"]) == 0
    assert "no logit differs" in capsys.readouterr().out
    folder, batch = run / "export" / "merged", _batch(run)
    base = AutoModelForImageTextToText.from_pretrained(json.loads((run / "resolved.json").read_text())["model"]["name"])
    with torch.inference_mode():
        bare = base.float()(**batch).logits
        apart = PeftModel.from_pretrained(base.float(), str(run / "final"))(**batch).logits
        merged = AutoModelForImageTextToText.from_pretrained(folder).float()(**batch).logits
    assert compare([apart], [merged])["largest"] < TOLERANCE["float32"] * float(apart.abs().max())
    assert compare([bare], [merged])["largest"] > 0.01, "the adapter does something"
    assert AutoProcessor.from_pretrained(folder).chat_template
    assert json.loads((folder / "preprocessing.json").read_text())["task"]["name"] == "detection"
    assert main(["export", str(run), "--merged", "--precision", "bf16", "--output", str(tmp_path / "half")]) == 0
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_goes_with_a_card_that_tells_what_it_is(trained: Path, run: Path, scenes: Path) -> None:
    words = ["--adapter", str(run / "final"), "evaluate.max_new_tokens=6"]
    assert main(["evaluate", str(trained.parents[1] / "job.yaml"), *words]) == 0
    assert main(["export", str(run)]) == 0
    folder = run / "export" / "adapter"
    assert (folder / "adapter_model.safetensors").read_bytes() == (run / "final/adapter_model.safetensors").read_bytes()
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "peft"
    assert head["base_model"].endswith("qwen3_vl")
    for text in ("rank 4", "| f1_50 |", "95 %", "CPU-hours", "PeftModel.from_pretrained", "train.json"):
        assert text in card
    assert str(scenes) not in card, "folders of the machine are nobody's business"


def _code_of(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("model", ["tiny", "qwen3_vl"])
def test_the_code_of_a_card_loads_what_lies_beside_it(
    model: str, scenes: Path, tmp_path: Path, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _train(tmp_path, scenes, tiny_models.get(model, model), train={"max_steps": 2})
    kinds = [[]] if model == "tiny" else [[], ["--merged"]]
    for words in kinds:
        assert main(["export", str(run), *words]) == 0
        folder = run / "export" / ("merged" if words else "adapter")
        monkeypatch.chdir(folder)
        namespace: dict[str, Any] = {}
        exec(_code_of((folder / "README.md").read_text()), namespace)
        learned = [p for name, p in namespace["model"].named_parameters() if "lora_B" in name]
        assert bool(learned) != bool(words)
        assert all(float(p.abs().sum()) > 0 for p in learned)


@pytest.mark.parametrize("precision", slow_but(["bf16"], ["bf16", "fp16"]))
def test_a_narrow_precision_is_within_its_own_rounding(
    precision: Precision, scenes: Path, tmp_path: Path, tiny_models: dict[str, str]
) -> None:
    run = _train(tmp_path, scenes, tiny_models["qwen3_vl"], train={"precision": precision})
    from ray_vlm.config.load import load_resolved

    job = load_resolved(json.loads((run / "resolved.json").read_text()))
    _, comparison = merge(job.model, str(run / "final"), [_batch(run)], precision)
    assert 0 < comparison["largest"] <= TOLERANCE[DTYPES[precision]] * comparison["scale"]


def test_what_cannot_be_exported_is_refused(
    run: Path, scenes: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals: list[tuple[list[str], str]] = [
        (["--weights", "best"], "has no best"),
        (["--output", str(scenes)], "something is there already"),
        (["--precision", "fp32"], "--precision fp32 is for --merged"),
    ]
    for words, reason in refusals:
        assert main(["export", str(run), *words]) != 0
        assert reason in capsys.readouterr().err
    from ray_vlm.evaluate import export

    monkeypatch.setitem(export.TOLERANCE, "float32", 0.0)
    assert main(["export", str(run), "--merged"]) == 1
    assert "merge with --precision fp32" in capsys.readouterr().err
    assert not (run / "export" / "merged").exists()
    config = type("Config", (), {"quantization_config": {"quant_method": "awq"}})()
    monkeypatch.setattr(export, "load_config", lambda spec: config)
    assert main(["export", str(run), "--merged"]) == 1
    assert "itself quantised (awq)" in capsys.readouterr().err


def test_a_logit_that_is_no_number_is_never_close() -> None:
    one = torch.zeros(1, 2, 3)
    comparison = compare([one, one], [one + float("nan"), one])
    assert comparison["largest"] != comparison["largest"]
