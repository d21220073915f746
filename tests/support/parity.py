"""Equality with TRL: one job of each method, a step of it through both trainers, and loss curves by number of workers.

Dropout 0, CPU, every comparison in float64 and in float32. All bars are relative.

Float64 (`tests/support/precision.py`) is where the claim is tested: 1e-9 on loss and gradients. The largest difference
of the two trainers was 3.1e-14, and a weight with a relative error of 1e-7 is detected
(`tests/integration/test_parity.py`).

Float32 is how a job without bfloat16 trains: 3e-5 on loss and gradients. This package's trainer adds the same numbers
in another order (shared prefixes, packed rows), so the difference is rounding and depends on the machine's kernels. It
is largest for DPO at beta 0.5, whose loss is a small difference of large sums: gradients differed by 6.8e-6 on an Intel
Xeon and by 1.25e-5 on an AMD EPYC. The bar is 2.4 times the larger of the two.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ray_vlm.config.load import dump_job, load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.demo.shapes import draw
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.train.driver import train
from ray_vlm.train.prepare import prepare
from tests.support.stock import gradients_apart, our_step, stock_step

BARS = {torch.float64: 1e-9, torch.float32: 3e-5}  # of loss and LoRA gradients
Answers = Sequence[Sequence[int]]


def make_job(folder: Path, model: str, steps: int, num_workers: int = 0, rows: int = 20) -> JobConfig:
    """Build a small float32 job on drawn scenes in `folder`, with LoRA on every part of the model."""
    if not (folder / "train.json").exists():
        draw(folder, "studio", "train", rows)
    train_options = {"global_batch_size": 6, "micro_batch_size": 2, "max_steps": steps, "learning_rate": 1e-3}
    return load_resolved(
        {
            "model": {"name": model, "load_in_4bit": False},
            "lora": {"rank": 4, "alpha": 8, "target": ["language", "connector", "vision"]},
            "data": {"train": {"path": str(folder / "train.json")}},
            "train": train_options | {"precision": "fp32", "gradient_checkpointing": False},
            "cluster": {"num_workers": num_workers},
            "run": {"name": f"workers_{num_workers}", "output_dir": str(folder / "runs")},
        }
    )


def compare_with_stock(
    job: JobConfig, num_rows: int, answers: Answers = (), dtype: torch.dtype = torch.float64
) -> tuple[float, float]:
    """Return relative differences of (loss, LoRA gradients) between this package's trainer and stock TRL on the job's
    first rows.

    A gradient's difference is relative to its norm, or to a thousandth of the largest norm if that is more.
    """
    own, stock = (step(job, num_rows, answers, dtype) for step in (our_step, stock_step))
    loss = abs(own["loss"] - stock["loss"]) / max(abs(stock["loss"]), 1e-3)
    assert {g.dtype for step in (own, stock) for g in step["grads"].values()} == {dtype}
    return loss, gradients_apart(own["grads"], stock["grads"], 1e-3)


def make_method_job(folder: Path, model: str, method: str, beta: float) -> tuple[JobConfig, Answers]:
    """Build a job of one of `METHODS`, and the answers that are injected for GRPO."""
    if method == "sft":
        return make_job(folder, model, 1), ()
    return make_alignment_job(folder, model, method, beta)


def make_alignment_job(folder: Path, model: str, method: str, beta: float) -> tuple[JobConfig, Answers]:
    """Build a DPO or GRPO job, and for GRPO the injected answers: two prompts with four each, of different lengths."""
    base = dump_job(make_job(folder, model, 1))
    base["method"] = {"name": method, "beta": beta}
    base["model"]["adapter"] = "the one in hand"  # so that it is the reference, as TRL has it
    if method == "dpo":
        base["data"]["train"] = {"path": str(write_pairs(folder, model)), "format": "preference"}
        return load_resolved(base | {"evaluate": {}}), ()
    base["train"] |= {"global_batch_size": 8, "micro_batch_size": 8}
    base["evaluate"] = {"metric": "reward"}
    base["method"] |= {"num_generations": 4, "rewards": {"tests.support.stock:token_reward": 1.0}}
    rng = np.random.default_rng(0)
    return load_resolved(base), [rng.integers(20, 600, size).tolist() for size in (5, 9, 12, 7, 3, 8, 8, 11)]


def write_pairs(folder: Path, model: str) -> Path:
    """Write pairs from drawn scenes: the right answer, and the same with its last object left out and the rest
    moved."""
    prepared = prepare(make_job(folder, model, 1))
    builder = load_sample_builder(prepared.spec)
    path = folder / "pairs.jsonl"
    with path.open("w") as file:
        for record in prepared.train.records:
            boxes = [[v * 0.9 for v in box] for box in record.truth["boxes"]][:-1] or [[1.0, 1.0, 9.0, 9.0]]
            labels = list(record.truth["labels"])[:-1] or list(record.truth["labels"])
            worse = replace(record, truth={"boxes": boxes, "labels": labels})
            prompt = [{"role": role, "content": text} for role, text in builder.turns(record)]
            row = {"id": record.id, "prompt": prompt, "images": list(record.images)}
            row |= {"chosen": builder.answer(record).text, "rejected": builder.answer(worse).text}
            file.write(json.dumps(row) + "\n")
    return path


def curves(folder: Path, model: str, steps: int, workers: Sequence[int]) -> dict[int, list[float]]:
    """Return the training loss of every step by number of workers; 0 trains in this process."""
    losses = {}
    for number in workers:
        paths = train(make_job(folder, model, steps, number), "", overwrite=True)
        losses[number] = [line["loss"] for line in read_metrics(paths.metrics) if line["kind"] == "train"]
        assert len(losses[number]) == steps
    return losses
