"""Pairs from a model's own answers: the shipped tiny model, in this process and by Ray Data actors."""

import json
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.cli import main
from ray_vlm.config.data import Data, Source
from ray_vlm.config.load import load_job
from ray_vlm.data.parts import build_index
from ray_vlm.data.preprocessing import changed_since
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import sample_spec

LABELS = ["circle", "square", "triangle", "cross", "ring", "diamond"]


def _job(job_file: Any, scenes: Path, **sections: Any) -> Path:
    return job_file(
        model={"name": "tiny"},
        data={"train": {"path": str(scenes / "test.json"), "max_rows": 8}},
        evaluate={"max_new_tokens": 120, "batch_size": 16},
        pairs={"num_samples": 4, "temperature": 1.3, "min_margin": 0.2},
        **sections,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_are_ordinary_preference_rows(job_file, scenes: Path, tmp_path: Path, capsys) -> None:
    path, made = _job(job_file, scenes), tmp_path / "pairs.jsonl"
    assert main(["pairs", str(path), "--output", str(made)]) == 0
    out = capsys.readouterr().out
    about = json.loads(Path(f"{made}.about.json").read_text())
    rows = _lines(made)
    assert 2 <= len(rows) == about["num_pairs"]
    assert about["num_pairs"] + sum(about["without_pair"].values()) == about["num_records"] == 8
    assert all(row["chosen_reward"] - row["rejected_reward"] >= 0.2 - 1e-9 for row in rows)
    assert about["mean_chosen_reward"] == pytest.approx(sum(row["chosen_reward"] for row in rows) / len(rows))
    assert about["rewards"] == {"format": 1.0, "bbox": 1.0, "category": 1.0, "completeness": 1.0}
    assert f"path: {made}, format: preference, image_root: {about['image_root']}" in out
    job = load_job(path)
    builder = load_sample_builder(sample_spec(job, LABELS))
    read = build_index(Source(path=str(made), format="preference", image_root=about["image_root"]), Data(), builder)
    prompts = build_index(job.data.train, Data(), builder)
    records = {record.id: record for record in prompts.records}
    for record, row in zip(read.records, rows, strict=True):
        assert (record.id, record.chosen, record.rejected) == (row["id"], row["chosen"], row["rejected"])
        assert record.images == records[record.id].images
        assert (
            builder.prompt_row(record).input_ids.tolist() == builder.prompt_row(records[record.id]).input_ids.tolist()
        )
    assert changed_since(str(made), builder) == []
    assert not list(made.parent.glob(".*pairs*"))


def test_nothing_is_overwritten_by_chance(job_file, scenes: Path, tmp_path: Path, capsys) -> None:
    path, output = _job(job_file, scenes), tmp_path / "pairs.jsonl"
    output.write_text("mine")
    assert main(["pairs", str(path), "--output", str(output)]) == 1
    assert "is there already" in capsys.readouterr().err
    few = ["data.train.max_rows=2", "pairs.min_margin=100"]
    assert main(["pairs", str(path), *few, "--output", str(output), "--overwrite"]) == 1
    assert "no pair: of 2 rows 2 with too small a margin" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert not list(tmp_path.glob(".*pairs*"))


def test_an_adapter_is_sampled_with_its_own_wording(job_file, scenes: Path, tmp_path: Path) -> None:
    path = _job(job_file, scenes, train={"max_steps": 1, "global_batch_size": 4}, lora={"rank": 4, "alpha": 8})
    worded = [f"task.labels=[{', '.join(reversed(LABELS))}]", "data.max_pixels=9216"]
    assert main(["train", str(path), *worded]) == 0
    output, adapter = tmp_path / "pairs.jsonl", str(tmp_path / "runs" / "run" / "final")
    few = ["data.train.max_rows=3", "pairs.min_margin=0.01"]
    assert main(["pairs", str(path), *few, "--adapter", adapter, "--output", str(output)]) == 0
    assert ", ".join(reversed(LABELS)) in _lines(output)[0]["prompt"][0]["content"]
    about = json.loads(Path(f"{output}.about.json").read_text())
    assert about["adapter"] == adapter
    assert about["preprocessing"]["images"]["max_pixels"] == 9216
    changed = changed_since(str(output), load_sample_builder(sample_spec(load_job(path), LABELS)))
    assert len(changed) == 1
    assert "max_pixels 9216, now 36864" in changed[0]
    assert main(["pairs", str(path), *few, f"model.adapter={adapter}", "--output", str(tmp_path / "same.jsonl")]) == 0
    assert (tmp_path / "same.jsonl").read_bytes() == output.read_bytes(), "the job's own adapter is the default"


@pytest.mark.cluster
def test_two_workers_write_the_same_file(ray_cluster, job_file, scenes: Path, tmp_path: Path) -> None:
    path, alone, shared = _job(job_file, scenes), tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    assert main(["pairs", str(path), "--output", str(alone)]) == 0
    assert main(["pairs", str(path), "cluster.num_workers=2", "--output", str(shared)]) == 0
    assert shared.read_bytes() == alone.read_bytes()


@pytest.mark.cluster
def test_what_an_actor_refuses_is_told_as_it_stands(
    ray_cluster, job_file, scenes: Path, tmp_path: Path, capsys
) -> None:
    path, other = _job(job_file, scenes), tmp_path / "other"  # an adapter of another base, which only the actor reads
    other.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "another/base"}
    (other / "adapter_config.json").write_text(json.dumps(config))
    (other / "adapter_model.safetensors").write_bytes(b"")
    words = ["cluster.num_workers=1", "--adapter", str(other), "--output", str(tmp_path / "pairs.jsonl")]
    assert main(["pairs", str(path), *words]) == 1
    assert capsys.readouterr().err.startswith(f"error: {other}: trained on 'another/base', but model.name is")
    assert not (tmp_path / "pairs.jsonl").exists()
