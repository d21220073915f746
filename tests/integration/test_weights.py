"""Token weights in the loss: the weighted mean over the global batch, bit-equal to TRL's where every weight is 1."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_vlm.cli import main
from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import Model
from ray_vlm.config.task import DetectionTask
from ray_vlm.data.collate import collate
from ray_vlm.data.parts import build_index
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import IGNORED, SampleSpec
from ray_vlm.runs.monitor import read_metrics

LABELS = ("circle", "square", "triangle", "cross", "ring", "diamond")


def _losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


def _train(job_file: Any, tmp_path: Path, name: str, weights: dict | None, **cluster: Any) -> Path:
    path = job_file(cluster=cluster)
    data = json.dumps(weights) if weights else "null"
    assert main(["train", str(path), f"run.name={name}", f"data.class_weights={data}"]) == 0
    return tmp_path / "runs" / name


def test_tokens_of_a_class_carry_its_weight_and_no_others(scenes: Path, tiny_models: dict[str, str]) -> None:
    spec = SampleSpec(
        Model(name=tiny_models["qwen3_vl"]), DetectionTask(), LABELS, token_weights=(("ring", 4.0), ("cross", 0.5))
    )
    index = build_index(Source(path=str(scenes / "train.json")), Data(), load_sample_builder(spec))
    builder = load_sample_builder(spec)
    seen = set()
    for record in index.records:
        row = builder.train_row(record)
        for weight, name in ((4.0, "ring"), (0.5, "cross")):
            text = builder.tokenizer.decode(row.input_ids[row.weights == weight])
            assert text.count(f'"label": "{name}"') == record.truth["labels"].count(name)
            assert text.count("bbox_2d") == record.truth["labels"].count(name), "the box is part of the object"
            seen.add((name, bool(text)))
        assert set(row.weights[row.labels == IGNORED]) == {1.0}
    assert len(seen) == 4, "rows with and without each class"


def test_the_loss_is_the_weighted_mean_over_the_step(job_file, scenes: Path, tmp_path: Path, tiny_models) -> None:
    folder = _train(job_file, tmp_path, "weighted", {"ring": 5.0}, num_workers=0)
    from ray_vlm.config.load import load_job
    from ray_vlm.models.load import load_model
    from ray_vlm.train.prepare import prepare

    prepared = prepare(load_job(tmp_path / "job.yaml", ['data.class_weights={"ring": 5.0}']))
    builder = load_sample_builder(prepared.spec)
    rows = [builder.train_row(prepared.train.records[i]) for i in prepared.plan.step_rows(0)]
    batch = collate(rows, builder)
    weights = batch.pop("loss_weights")[:, 1:]
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = load_model(prepared.job.model, precision="fp32")(**batch).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    expected = float((each * weights).sum() / weights.sum())
    assert float(weights.max()) == 5.0
    assert _losses(folder)[0] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - float(each.sum() / (labels != IGNORED).sum())) > 1e-4, "weights matter here"


def test_weights_of_one_are_bit_equal_to_none(job_file, tmp_path: Path) -> None:
    plain = _train(job_file, tmp_path, "plain", None, num_workers=0)
    ones = _train(job_file, tmp_path, "ones", dict.fromkeys(LABELS, 1.0), num_workers=0)
    assert _losses(plain) == _losses(ones)
    weights = [(run / "final" / "adapter_model.safetensors").read_bytes() for run in (plain, ones)]
    assert weights[0] == weights[1]


@pytest.mark.cluster
@pytest.mark.slow
def test_weighted_losses_do_not_depend_on_the_workers(job_file, tmp_path: Path, ray_cluster) -> None:
    one = _train(job_file, tmp_path, "one", {"ring": 5.0, "circle": 0.2}, num_workers=0)
    two = _train(job_file, tmp_path, "two", {"ring": 5.0, "circle": 0.2}, num_workers=2)
    assert _losses(two) == pytest.approx(_losses(one), rel=1e-4)


def test_the_mix_is_shown_and_kept(job_file, tmp_path: Path, capsys) -> None:
    path = job_file()
    assert main(["train", str(path), "data.oversample={ring: 2.5}", "data.class_weights=inverse_sqrt"]) == 0
    assert "ring" in capsys.readouterr().out
    balance = json.loads((tmp_path / "runs" / "run" / "balance.json").read_text())
    ring = next(entry for entry in balance["mix"] if entry["tag"] == "ring")
    assert ring["times_shown"] == 2.5
    assert balance["rows_per_epoch"] > 50
    assert main(["train", str(path), "data.oversample={zebra: 2.5}", "run.name=b"]) == 2
    assert "no training row has 'zebra'" in capsys.readouterr().err
