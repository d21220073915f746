"""The work of a step at the size of real models, as floating-point operations of rehearsed steps, without a clock.

The real modules of an 8B and a 7B model run on fake tensors, with adapters and activation checkpointing, once in the
layout of TRL's batch and once in this package's. Prompts have 1,024 image tokens and 64 of text.
"""

from typing import Any

from benchmarks.figures import figure
from ray_vlm.config.load import load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.models.architectures import load_preset
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.memory import Batch
from ray_vlm.models.rehearse import Rehearsal
from ray_vlm.train.memory_plan import build_rehearsal

REAL = {"Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl", "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl"}
IMAGE, TEXT, GROUP = 1024, 64, 8


def real_job(name: str) -> JobConfig:
    """Build a 4-bit job of the model. Its method only decides what else the head computes for a token, which is
    negligible."""
    data = {"train": {"path": "rows.jsonl", "format": "preference"}}
    return load_resolved({"method": "dpo", "task": "chat", "model": {"name": name}, "data": data})


def work(rehearsal: Rehearsal, batch: Batch) -> float:
    """Return the floating-point operations of a forward and a backward."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    rehearsal.run(batch, watch=counter)
    return float(counter.get_total_flops())


def computed() -> list[dict[str, Any]]:
    """Return TRL's work divided by this package's for both models: GRPO with eight answers, and a DPO pair."""
    figures, prompt = [], IMAGE + TEXT
    for name, family in REAL.items():
        rehearsal = build_rehearsal(real_job(name), FAMILIES[family], load_preset(name))
        image = work(rehearsal, Batch(1, 16, (4 * IMAGE,), labelled=16)) - work(rehearsal, Batch(1, 16, labelled=16))
        times = 3 if family == "qwen2_5_vl" else 1  # under TRL its tower is recomputed and gone back through
        for method, rows, length in (("grpo", GROUP, 128), ("grpo", GROUP, 512), ("dpo", 2, 128)):
            scored, layout = rows * length, (rows, prompt + length)
            trl_flops = work(rehearsal, Batch(*layout, masked=True, labelled=scored))
            own_flops = work(rehearsal, Batch(1, prompt + scored, masked=True, spread=layout, labelled=scored))
            asks = int(method == "dpo")  # the reference: one more forward, where a checkpointed step takes three
            trl = trl_flops * (1 + asks / 3) + rows * image * (times + asks)
            title = f"computed, {method}, {name.split('/')[1]}, P={prompt}, C={length}: work, TRL against ours"
            figures.append(figure(title, trl / (own_flops * (1 + asks / 3) + image), "x"))
            if asks:
                figures.append(figure(f"{title} with caches", trl / own_flops, "x"))
    return figures
