"""Every family through SFT, DPO and GRPO, and its inputs against those of its own processor."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_vlm.config.load import load_job
from ray_vlm.config.schema import Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data.collate import collate
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import SampleSpec
from ray_vlm.demo.tiny import write_untrained
from ray_vlm.errors import ModelError
from ray_vlm.models.architectures import family_of
from ray_vlm.models.load import load_config, load_model
from ray_vlm.models.lora import count_trainable, lora_config
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.train.driver import train
from tests.support.parity import write_pairs
from tests.support.tiny_families import QWENS, write_tiny
from tests.support.twins import slow_but

STOCK = ("llama4", "gemma3", "internvl")  # all others: tests/families
ALL = (*QWENS, *STOCK)
# Every family through one method, and every method through families of both kinds: ours, and stock ones. Of the two
# families whose code differs most, DPO and GRPO are tests/integration/test_parity.py's and test_alignment.py's.
QUICK = [*(("sft", family) for family in ALL), ("dpo", "qwen2_vl"), ("dpo", "llama4"), ("grpo", "qwen2_vl")]
QUICK += [("grpo", "internvl")]
PARTS = ["language", "connector", "vision"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny checkpoint of each family."""
    root = tmp_path_factory.mktemp("families")
    made = {name: write_tiny if name in STOCK else write_untrained for name in ALL}
    return {name: str(make(root / name, name)) for name, make in made.items()}


def _picture(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)


def _spec(folder: str, **options: Any) -> SampleSpec:
    return SampleSpec(Model(name=folder, load_in_4bit=False), ChatTask(), (), kind="answer", **options)


@pytest.mark.parametrize("family", ALL)
def test_inputs_equal_those_of_the_stock_processor(family: str, folders: dict[str, str], tmp_path: Path) -> None:
    from ray_vlm.data.records import SftRecord

    builder = load_sample_builder(_spec(folders[family]))
    sizes = ((120, 70), (64, 150))
    paths = []
    for size in sizes:
        paths.append(str(tmp_path / f"{size[0]}.png"))
        Image.fromarray(_picture(*size)).save(paths[-1])
    turns = (("user", "<image>\nWhat is it, and <image>?"),)
    record = SftRecord("a", 0, tuple(paths), sizes, {"answer": "A ring."}, {"turns": turns})
    rows = [builder.prompt_row(record)]
    own = collate(rows, builder)
    content = [
        {"type": "image"},
        {"type": "text", "text": "\nWhat is it, and "},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    stock = builder.processor
    text = stock.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    images = [Image.fromarray(_picture(*size)) for size in sizes]
    expected = stock(text=[text], images=[images], return_tensors="pt", add_special_tokens=False)
    assert own.keys() - {"labels"} == expected.keys() - {"video_metadata"}
    for name, value in expected.items():
        assert torch.equal(own[name].to(value.dtype), value), name
    assert builder.token_counts(record)[0] == int((own["input_ids"] == builder.image_token_id).sum())


@pytest.mark.parametrize(("method", "family"), slow_but(QUICK, itertools.product(["sft", "dpo", "grpo"], ALL)))
def test_each_method_trains_each_family(
    family: str, method: str, folders: dict[str, str], job_file: Any, scenes: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    sections: dict[str, Any] = {"model": {"name": folders[family]}, "method": {"name": method}}
    sections["lora"] = {"rank": 4, "alpha": 8, "target": ["language", "vision"]}
    sections["data"] = {"eval": {"path": str(scenes / "eval.json"), "max_rows": 4}}
    sections["evaluate"] = {"every_steps": 2, "max_new_tokens": 8, "batch_size": 4}
    if method == "dpo":
        pairs = write_pairs(tmp_path, folders[family])
        sections["data"] = {"train": {"path": str(pairs), "format": "preference"}, "eval": {"ratio": 0.2}}
    if method == "grpo":
        sections["method"] |= {"num_generations": 4, "max_completion_tokens": 8}
        sections["method"] |= {"rewards": {"tests.integration.test_alignment:even_tokens": 1.0}}
    elif method == "sft":
        sections["evaluate"]["metric"] = "f1_50"
    path = job_file(**sections)
    paths = train(load_job(path, ["train.max_steps=2"]), path.read_text())
    lines = [line for line in read_metrics(paths.metrics) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    if method == "grpo":  # sampled with a cache, scored without one
        assert all(line["rollout_gap"] < 1e-5 for line in lines)
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folders[family]), paths.final)
    learned = [float(p.abs().sum()) for n, p in model.named_parameters() if "lora_B" in n]
    assert learned
    assert sum(value > 0 for value in learned) > len(learned) / 2
    assert json.loads((paths.final / "preprocessing.json").read_text())["task"]["codec"]


@pytest.mark.parametrize("family", ALL)
def test_parts_are_told_apart(family: str, folders: dict[str, str]) -> None:
    from peft import get_peft_model

    from ray_vlm.config.schema import Lora

    spec = Model(name=folders[family], load_in_4bit=False)
    known = family_of(load_config(spec))
    parts = [part for part in PARTS if part in known.linear]
    for part in parts:
        model = get_peft_model(load_model(spec, precision="fp32"), lora_config(Lora(rank=2, target=[part]), known))
        counts = count_trainable(model, known)
        assert [name for name, count in counts.items() if count["trainable"]] == [part]
        assert all(count["total"] for count in counts.values())


@pytest.mark.parametrize("family", ALL)
def test_four_bits_are_in_the_language_model_alone(family: str, folders: dict[str, str]) -> None:
    spec = Model(name=folders[family], load_in_4bit=True)
    known = family_of(load_config(spec))
    model = load_model(spec, precision="fp32")
    import re

    small = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    wanted = {n for n, m in model.named_modules() if re.fullmatch(known.linear["language"], n)}
    assert small == wanted


@pytest.mark.parametrize("family", slow_but(["llama4"], STOCK))
def test_weights_of_a_family_are_evaluated_asked_and_exported(
    family: str, folders: dict[str, str], job_file: Any, scenes: Path, tmp_path: Path
) -> None:
    from ray_vlm.cli import main

    data = {"test": {"path": str(scenes / "test.json"), "max_rows": 3}}
    path = job_file(model={"name": folders[family]}, data=data, evaluate={"max_new_tokens": 8})
    run = train(load_job(path), path.read_text())
    assert main(["evaluate", str(path), "--adapter", str(run.final)]) == 0
    assert main(["predict", str(run.root), str(scenes / "test"), "--output", str(tmp_path / "found.jsonl")]) == 0
    assert (tmp_path / "found.jsonl").read_text().count("\n") == 12
    assert main(["export", str(run.root), "--merged", "--weights", "final"]) == 0
    assert main(["data", "stats", str(path)]) == 0
    assert main(["data", "preview", str(path), "--output", str(tmp_path / "preview.png")]) == 0


def test_what_is_no_vision_language_model_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig

    BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'bert' does not read images"):
        family_of(load_config(Model(name=str(tmp_path))))


def test_a_family_that_cannot_share_beginnings_says_why(folders: dict[str, str], job_file: Any, tmp_path: Path) -> None:
    from ray_vlm.train.prepare import prepare

    pairs = write_pairs(tmp_path, folders["llama4"])
    data = {"train": {"path": str(pairs), "format": "preference"}}
    path = job_file(model={"name": folders["llama4"]}, method={"name": "dpo"}, data=data)
    assert any("attend within chunks" in note for note in prepare(load_job(path)).notes)
    assert prepare(load_job(path, ["method.share_prefixes=false", "train.packing=false"])).notes == ()
    path = job_file(method={"name": "dpo"}, data=data, lora={"dropout": 0.1})
    assert any("lora.dropout" in note for note in prepare(load_job(path)).notes)
