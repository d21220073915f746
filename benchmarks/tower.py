"""A LoRA step on the language model, its frozen image encoder under autograd (as TRL and PEFT leave it) and without.

Tiny Qwen2.5-VL and Qwen3-VL in float32 with gradient checkpointing, one torch thread, rows with an image of 192x192
pixels. Arms alternate; the figure is the ratio of medians. Gradients are compared bit for bit.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import figure, report
from ray_vlm.config.schema import Lora, Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data.collate import collate
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import Sample, SampleSpec
from ray_vlm.demo.tiny import write_untrained
from ray_vlm.models.backbone import recompute
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.frozen_encoder import run_without_autograd
from ray_vlm.models.load import load_model
from ray_vlm.models.lora import lora_config

SIDE, ROWS, WORDS = 196, 4, 64


def build(folder: Path, family: str, plainly: bool) -> Any:
    """Build the tiny model with an adapter whose B is not zero, ready to train."""
    import torch
    from peft import get_peft_model

    base = load_model(Model(name=str(folder), load_in_4bit=False), precision="fp32")
    config = lora_config(Lora(rank=8), FAMILIES[family])
    config.init_lora_weights = False
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    recompute(model, {"use_reentrant": False})
    model.enable_input_require_grads()
    if plainly:
        assert run_without_autograd(model)
    return model.train()


def step(model: Any, batch: dict[str, Any]) -> float:
    """Return the seconds of one forward and backward."""
    model.zero_grad()
    started = time.perf_counter()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return time.perf_counter() - started


def compare(folder: Path, family: str, rounds: int) -> list[dict[str, Any]]:
    """Run both arms of one family."""
    import torch

    write_untrained(folder, family)
    builder = load_sample_builder(SampleSpec(Model(name=str(folder), load_in_4bit=False), ChatTask(), ()))
    rng = np.random.default_rng(0)
    side = builder.image_spec.place((SIDE, SIDE)).resized[0]
    image = rng.integers(0, 255, (side, side, 3), np.uint8)
    count = builder.num_image_tokens((side, side))
    ids = np.array([builder.image_token_id] * count + list(range(300, 300 + WORDS)), np.int32)
    batch = collate([Sample(ids, np.zeros(0, np.int32), (image,))] * ROWS, builder)
    arms = {plainly: build(folder, family, plainly) for plainly in (False, True)}
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for plainly, model in arms.items():
            times[plainly].append(step(model, batch))
    grads = [[p.grad for p in model.parameters() if p.grad is not None] for model in arms.values()]
    same = all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    ratio = statistics.median(times[False]) / statistics.median(times[True])
    bar = 1.2 if family == "qwen2_5_vl" else None
    return [
        figure(f"tower.speedup.{family}", ratio, "x", bar, most=False),
        figure(f"tower.same_gradients.{family}", float(same), "", 1.0, most=False),
    ]


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return all figures."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        families = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
        return [line for name in families for line in compare(Path(folder) / name, name, 3 if quick else 15)]


if __name__ == "__main__":
    report(measure)
