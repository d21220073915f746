"""The training steps to measure: base, method and rows, as jobs of this package.

The process that trains and the one that plans memory beside it build the same jobs and rows from these cases.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.bench import QWEN2_5, QWEN3, Scale
from benchmarks.gpu.shapes import base_folder, image_side, write_shape
from ray_vlm.config.load import load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.config.train import Recompute

FORMATS = {"sft": "llava", "dpo": "preference", "grpo": "prompt"}
WORDS = ("circle", "square", "triangle", "cross", "ring", "diamond", "star", "object")


@dataclass(frozen=True)
class Case:
    """A micro-batch of `micro` rows (GRPO: answers) of a method. `recompute`: the number of first layers that recompute
    their activations; True: all; selective: all but products. `length`: tokens of each of GRPO's answers, which are
    injected. `ratio`: the least that TRL's time must be of this package's; `mfu`: the least MFU."""

    name: str
    model: str
    method: str
    micro: int
    recompute: Recompute = True
    length: int = 0
    ratio: float | None = None
    mfu: float | None = None


SHIPPED = Case("sft, 2 rows", QWEN3, "sft", 2)
LARGER = Case("sft, 8 rows", QWEN3, "sft", 8)
PAIRS = Case("dpo, 2 pairs", QWEN3, "dpo", 2, ratio=1.7)
OTHER = Case("sft, 2 rows, Qwen2.5-VL", QWEN2_5, "sft", 2)
RATIOS = {(8, 128): 4.0, (8, 512): 2.0, (16, 1024): 1.5}  # of GRPO's training phase
MFU = 0.35


def groups(scale: Scale) -> list[Case]:
    """Return GRPO's cases, one group of answers each."""
    return [
        Case(f"grpo, {n} answers of {length}", QWEN3, "grpo", n, length=length, ratio=RATIOS.get((n, length)))
        for n, length in scale.groups
    ]


def chosen_name(case: Case) -> str:
    """Return the name of the case with what `train.memory: auto` chooses."""
    return f"{case.name}, as train.memory=auto chooses"


def planned(scale: Scale) -> list[Case]:
    """Return the cases whose memory is planned."""
    return [SHIPPED, LARGER, *groups(scale), PAIRS, OTHER]


def write_rows(folder: Path, model: str, method: str, rows: int, scale: Scale) -> Path:
    """Write chats, pairs or prompts about noise and return their file. Equal arguments give equal rows."""
    from PIL import Image

    side, output_dir = image_side(folder, model, scale), folder / f"rows-{base_folder(folder, model).name}"
    output_dir.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for number in range(rows):
        name = f"{number}.png"
        pixels = rng.integers(0, 255, (side, side, 3), np.uint8)
        answers = [" ".join(rng.choice(WORDS, scale.words)) for _ in range(2)]
        if not (output_dir / name).exists():
            Image.fromarray(pixels).save(output_dir / name, compress_level=1)
        turns = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": answers[0]}]
        prompt: dict[str, Any] = {"prompt": "<image>\nWhat is shown?", "images": [name]}
        pair = prompt | {"chosen": answers[0], "rejected": answers[1]}
        line: dict[str, Any] = {"image": name, "conversations": turns}
        lines.append({"sft": line, "dpo": pair, "grpo": prompt}[method])
    path = output_dir / f"{method}-{rows}.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def build_job(folder: Path, case: Case, scale: Scale, prompts: int = 1, **train: Any) -> JobConfig:
    """Build the job of a case, QLoRA like the shipped jobs. `prompts`: number of prompts in a GRPO step, of whose
    answers `case.micro` go through the model at once. `train`: further values of that section."""
    rows = {"sft": max(case.micro, train.get("global_batch_size", 0)), "dpo": case.micro, "grpo": prompts}[case.method]
    path = write_rows(folder, case.model, case.method, rows, scale)
    options: dict[str, Any] = {"name": case.method}
    base: dict[str, Any] = {"name": str(write_shape(folder, case.model, scale)), "load_in_4bit": True}
    size = case.micro * (prompts if case.method == "grpo" else 1)
    if case.method != "sft":
        base["adapter"] = "the one that training starts from"  # so that it is the reference, as TRL has it
    if case.method == "grpo":
        options |= {"num_generations": case.micro, "max_completion_tokens": case.length}
        options |= {"rewards": {"tests.support.stock:token_reward": 1.0}}
    section = {"global_batch_size": size, "micro_batch_size": case.micro, "precision": "bf16", "probe": False}
    section |= {"gradient_checkpointing": case.recompute, "max_steps": 8} | train
    data = {"path": str(path), "format": FORMATS[case.method], "image_root": str(path.parent)}
    return load_resolved(
        {
            "method": options,
            "task": "chat",
            "model": base,
            "lora": {"rank": 16, "alpha": 32},
            "data": {"train": data, "max_pixels": 4096**2},
            "train": section,
            "tune": {"resident": True},
            "cluster": {"num_workers": 0, "gpus_per_worker": int(not scale.rehearse), "gpu_memory_gib": 40.0},
            "run": {"name": "run", "output_dir": str(folder / "runs")},
        }
    )


def injected_answers(case: Case) -> Sequence[Sequence[int]]:
    """Return token ids of GRPO's answers, all of the case's length."""
    rng = np.random.default_rng(case.length)
    return [rng.integers(20, 600, case.length).tolist() for _ in range(case.micro)]
