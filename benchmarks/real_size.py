"""The work of a step at the size of real models, by counting floating-point operations of rehearsed steps: no clock.

The real modules of an 8B and a 7B model run on fake tensors, with adapters and activation checkpointing, once in the
layout of TRL's batch and once in ours. Prompts of 1,024 image tokens and 64 of text.
"""

from typing import Any

from benchmarks.figures import figure
from ray_vlm.config.load import load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.presets import load_preset
from ray_vlm.models.rehearse import Batch, Rehearsal

REAL = {"Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl", "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl"}
IMAGE, TEXT, GROUP = 1024, 64, 8


def real_job(name: str) -> JobConfig:
    """A 4-bit job of the model. Its method only says what else the head tells of a token, which is next to nothing."""
    data = {"train": {"path": "rows.jsonl", "format": "preference"}}
    return load_resolved({"method": "dpo", "task": "chat", "model": {"name": name}, "data": data})


def work(rehearsal: Rehearsal, batch: Batch) -> float:
    """Floating-point operations of a forward and a backward."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    rehearsal.run(batch, watch=counter)
    return float(counter.get_total_flops())


def computed() -> list[dict[str, Any]]:
    """TRL's work over ours, for both models: GRPO of eight answers, and a pair of DPO."""
    found, prompt = [], IMAGE + TEXT
    for name, family in REAL.items():
        rehearsal = Rehearsal(load_preset(name), real_job(name), FAMILIES[family])
        image = work(rehearsal, Batch(1, 16, (4 * IMAGE,), labelled=16)) - work(rehearsal, Batch(1, 16, labelled=16))
        times = 3 if family == "qwen2_5_vl" else 1  # under TRL its tower is recomputed and gone back through
        for method, rows, length in (("grpo", GROUP, 128), ("grpo", GROUP, 512), ("dpo", 2, 128)):
            scored, layout = rows * length, (rows, prompt + length)
            theirs = work(rehearsal, Batch(*layout, masked=True, labelled=scored))
            ours = work(rehearsal, Batch(1, prompt + scored, masked=True, spread=layout, labelled=scored))
            asks = int(method == "dpo")  # the reference: one more forward, where a checkpointed step takes three
            trl = theirs * (1 + asks / 3) + rows * image * (times + asks)
            told = f"computed, {method}, {name.split('/')[1]}, P={prompt}, C={length}: work, TRL against ours"
            found.append(figure(told, trl / (ours * (1 + asks / 3) + image), "x"))
            if asks:
                found.append(figure(f"{told} with caches", trl / ours, "x"))
    return found
