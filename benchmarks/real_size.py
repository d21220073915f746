"""The work of a step at the size of real models, as floating-point operations of rehearsed steps, without a clock.

The real modules of an 8B and a 7B model run on fake tensors, with adapters and activation checkpointing, once in the
layout of TRL's batch and once in this package's: forward, recomputation, backward and head. Attention counts as it is
computed: a causal call takes n (n + 1) / 2 pairs, a masked one n^2, and a backward five products of a pair for the two
of a forward. Image encoders are counted from their weights and windows. Prompts have 1,024 image tokens and 64 of text.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.figures import figure
from ray_vlm.config.load import load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.models.architectures import load_preset
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.layouts import PackedGroup
from ray_vlm.models.memory import Batch
from ray_vlm.models.operations import Work, count_flops, measure_size
from ray_vlm.models.rehearse import Rehearsal
from ray_vlm.train.memory_plan import build_rehearsal

REAL = {"Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl", "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl"}
IMAGE, TEXT, GROUP = 1024, 64, 8


def real_job(name: str) -> JobConfig:
    """Build a 4-bit job of the model. Its method only decides what else the head computes for a token, which is
    negligible."""
    data = {"train": {"path": "rows.jsonl", "format": "preference"}}
    return load_resolved({"method": "dpo", "task": "chat", "model": {"name": name}, "data": data})


def rehearse(name: str, family: str) -> Rehearsal:
    """Return the rehearsal of a job of the model."""
    return build_rehearsal(real_job(name), FAMILIES[family], load_preset(name))


def count_step(rehearsal: Rehearsal, batch: Batch) -> float:
    """Return the floating-point operations of a forward, its recomputation and a backward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {attention: _forward_operations, backward: _backward_operations}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    rehearsal.run(batch, watch=counter)
    seen = counter.get_flop_counts()["Global"]
    assert seen.get(attention), "attention takes another way than the one that is counted"
    assert seen.get(backward)
    return float(counter.get_total_flops())


def _forward_operations(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    dropout: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> int:
    return 2 * _product(query, key, is_causal)


def _backward_operations(
    gradient: Sequence[int],
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    out: Sequence[int],
    logs: Sequence[int],
    dropout: float,
    is_causal: bool,
    **options: Any,
) -> int:
    return 5 * _product(query, key, is_causal)


def _product(query: Sequence[int], key: Sequence[int], is_causal: bool) -> int:
    """Return the operations of one product over all pairs of a call, from the shapes of its queries and keys."""
    rows, heads, queries, size = query
    keys = key[2]
    pairs = queries * (queries + 1) // 2 if is_causal else queries * keys
    return 2 * rows * heads * size * pairs


def encoder_work(rehearsal: Rehearsal, tokens: int) -> float:
    """Return the operations of the image encoder's forward for an image of so many visual tokens."""
    patches = tokens * rehearsal.merge**2
    work = Work(patches=patches, patch_pairs=patches**2)
    return count_flops(measure_size(rehearsal.model), work, backward=False)


def computed() -> list[dict[str, Any]]:
    """Return TRL's work divided by this package's for both models: GRPO with eight answers, and a DPO pair. No row is
    padded, so TRL attends without a mask."""
    figures, prompt = [], IMAGE + TEXT
    for name, family in REAL.items():
        rehearsal = rehearse(name, family)
        image = encoder_work(rehearsal, IMAGE)
        times = 3 if family == "qwen2_5_vl" else 1  # under TRL its tower is recomputed and gone back through
        for method, rows, length in (("grpo", GROUP, 128), ("grpo", GROUP, 512), ("dpo", 2, 128)):
            scored, layout = rows * length, (rows, prompt + length)
            group = PackedGroup(0, prompt, (length,) * rows)
            trl_flops = count_step(rehearsal, Batch(*layout, labelled=scored))
            own_flops = count_step(rehearsal, Batch(1, group.end, groups=(group,), spread=layout, labelled=scored))
            asks = int(method == "dpo")  # the reference: one more forward, where a checkpointed step takes three
            trl = trl_flops * (1 + asks / 3) + rows * image * (times + asks)
            title = f"computed, {method}, {name.split('/')[1]}, P={prompt}, C={length}: work, TRL against ours"
            figures.append(figure(title, trl / (own_flops * (1 + asks / 3) + image), "x"))
            if asks:
                figures.append(figure(f"{title} with caches", trl / own_flops, "x"))
    return figures
