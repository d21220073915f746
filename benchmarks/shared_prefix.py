"""A training step of ours against stock TRL's on the same rows: images encoded once, beginnings read once, rows packed.

Tiny Qwen3-VL and Qwen2.5-VL (text 256 wide, 4 layers; tower 128 wide, 3 layers), float32, LoRA on the language model,
activation checkpointing in both arms as TRL has it, one torch thread; prompts of about 280 tokens, 256 of them of an
image; completions injected. Arms alternate; a ratio is the median of the pairs. Each ratio counts only if losses and
gradients agree in the same run. Tokens through the language model and patches through the tower are counted by hooks.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import figure, report
from benchmarks.stock import checkpointed, our_trainer, stock_trainer
from ray_vlm.config.load import load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.models.live import LiveBytes

GROUP, PAIRS, EXACT = 8, 5, 1e-5
SIDE = {"qwen3_vl": 256, "qwen2_5_vl": 448}  # of an image of 16 x 16 visual tokens
BARS: dict[tuple[str, str], float] = {
    ("grpo, C=16", "qwen3_vl"): 5.0,
    ("grpo, C=16", "qwen2_5_vl"): 6.0,
    ("grpo, C=64", "qwen3_vl"): 3.0,
    ("grpo, C=64", "qwen2_5_vl"): 3.5,
    ("dpo, C=32", "qwen3_vl"): 1.9,
    ("dpo, C=32", "qwen2_5_vl"): 2.5,
    ("sft, 40 % padding efficiency", "qwen3_vl"): 1.5,
    ("sft, 40 % padding efficiency", "qwen2_5_vl"): 2.0,
}


def write_model(folder: Path, family: str) -> str:
    """Random weights, twice as wide as the demo's; images of `SIDE` pixels stay as they are."""
    import torch
    from transformers import AutoModelForImageTextToText

    from ray_vlm.demo.tiny import build_config, build_processor

    processor = build_processor(family)
    processor.image_processor.size = {"shortest_edge": 64**2, "longest_edge": 512**2}
    torch.manual_seed(0)
    config = build_config(processor.tokenizer, family, hidden=256)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def make_job(folder: Path, model: str, family: str, method: str, lengths: tuple[int, ...]) -> JobConfig:
    """A job of the method on noise; `lengths`: words of the answers, row by row."""
    from PIL import Image

    rng, words = np.random.default_rng(0), ["circle", "square", "ring", "star", "cross", "object"]
    (folder / method).mkdir(exist_ok=True)
    rows = []
    for number, length in enumerate(lengths):
        name = f"{number}.png"
        pixels = rng.integers(0, 255, (SIDE[family], SIDE[family], 3), np.uint8)
        Image.fromarray(pixels).save(folder / method / name)
        said = [" ".join(rng.choice(words, length)) for _ in range(2)]
        turns = [{"from": "human", "value": "<image>What is shown?"}, {"from": "gpt", "value": said[0]}]
        asked = {"prompt": "<image>What is shown?", "images": [name]}
        of_method = {"sft": {"image": name, "conversations": turns}, "grpo": asked}
        rows.append(of_method.get(method) or asked | {"chosen": said[0], "rejected": said[1]})
    path = folder / method / f"{'-'.join(map(str, lengths))}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = {"path": str(path), "format": {"sft": "llava", "dpo": "preference", "grpo": "prompt"}[method]}
    size = GROUP if method == "grpo" else len(lengths)
    options: dict[str, Any] = {"name": method}
    if method == "grpo":
        options |= {"num_generations": GROUP, "rewards": {"benchmarks.stock:token_reward": 1.0}}
    return load_resolved(
        {
            "method": options,
            "task": "chat",
            "model": {"name": model, "load_in_4bit": False} | ({} if method == "sft" else {"adapter": "the one here"}),
            "lora": {"rank": 8, "alpha": 16},
            "data": {"train": data | {"image_root": str(folder / method)}},
            "train": {"global_batch_size": size, "micro_batch_size": size, "bf16": False},
            "cluster": {"num_workers": 0},
        }
    )


class Arm:
    """One side: its trainer, ready, and what goes into a step."""

    def __init__(self, build: Callable[..., tuple[Any, Any]], job: JobConfig, rows: int, answers: Any):
        trainer, batch = build(job, rows, answers)
        self.trainer = checkpointed(trainer)
        trainer.current_gradient_accumulation_steps = 1
        samples, self.num_items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        self.inputs = trainer._prepare_inputs(samples[0])  # for GRPO: sampled and scored
        self.tokens = self.patches = 0
        base = trainer.model.get_base_model()
        base.get_decoder().register_forward_pre_hook(self._count_tokens, with_kwargs=True)
        base.get_encoder(modality="image").register_forward_pre_hook(self._count_patches, with_kwargs=True)

    def _count_tokens(self, module: Any, args: Any, kwargs: Any) -> None:
        self.tokens += kwargs["inputs_embeds"].shape[:2].numel()

    def _count_patches(self, module: Any, args: Any, kwargs: Any) -> None:
        self.patches += (args[0] if args else kwargs.get("hidden_states", kwargs.get("pixel_values"))).shape[0]

    def step(self) -> float:
        """Seconds of loss and gradients."""
        self.trainer.model.zero_grad()
        self.tokens = self.patches = 0
        started = time.perf_counter()
        loss = self.trainer.compute_loss(self.trainer.model, dict(self.inputs), num_items_in_batch=self.num_items)
        loss.backward()
        self.loss = float(loss)
        return time.perf_counter() - started

    def gradients(self) -> dict[str, Any]:
        """Of the last step."""
        named = self.trainer.model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    def peak(self) -> int:
        """Bytes alive above the model at the most, in a step."""
        model = self.trainer.model
        model.zero_grad()
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            self.step()
        return live.peak


def apart(one: Arm, other: Arm) -> float:
    """The larger of the relative differences of the losses and of the gradients."""
    mine, theirs = one.gradients(), other.gradients()
    assert mine.keys() == theirs.keys()
    scale = max(float(g.norm()) for g in theirs.values())
    assert scale > 0
    worst = max(float((mine[n] - g).norm()) / max(float(g.norm()), 1e-2 * scale) for n, g in theirs.items())
    return max(worst, abs(one.loss - other.loss) / max(abs(other.loss), 1e-3))


def compare(job: JobConfig, name: str, family: str, rows: int, answers: Any, pairs: int) -> list[dict[str, Any]]:
    """Figures of one case."""
    ours, stock = Arm(our_trainer, job, rows, answers), Arm(stock_trainer, job, rows, answers)
    times = [(ours.step(), stock.step()) for _ in range(pairs + 1)][1:]
    exact, bar = apart(ours, stock), BARS.get((name, family))
    ratio = statistics.median(theirs / mine for mine, theirs in times)
    found = [figure(f"{name}, {family}: step, TRL against ours", ratio, "x", bar, most=False)]
    found.append(figure(f"{name}, {family}: loss and gradients apart", exact, "relative", EXACT))
    found.append(figure(f"{name}, {family}: tokens, TRL against ours", stock.tokens / ours.tokens, "x"))
    found.append(figure(f"{name}, {family}: patches, TRL against ours", stock.patches / ours.patches, "x"))
    if job.method.name == "grpo":
        bar = 0.4 if name == "grpo, C=64" else None
        found.append(figure(f"{name}, {family}: peak of live bytes", ours.peak() / stock.peak(), "x of TRL's", bar))
    return found


def measure(quick: bool) -> list[dict[str, Any]]:
    """All cases; quick: one family and three pairs."""
    import torch

    torch.set_num_threads(1)
    found, rng = [], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        for family in ("qwen3_vl",) if quick else SIDE:
            folder = Path(temporary) / family
            folder.mkdir()
            model, pairs = write_model(folder / "model", family), 3 if quick else PAIRS
            for length in (16, 64):
                job = make_job(folder, model, family, "grpo", (1,))
                answers = [rng.integers(20, 600, length).tolist() for _ in range(GROUP)]
                found += compare(job, f"grpo, C={length}", family, 1, answers, pairs)
            job = make_job(folder, model, family, "dpo", (28, 28))
            found += compare(job, "dpo, C=32", family, 2, (), pairs)
            job = make_job(folder, model, family, "sft", (900, 60, 60, 60, 60, 60, 60, 60))
            found += compare(job, "sft, 40 % padding efficiency", family, 8, (), pairs)
    return found


if __name__ == "__main__":
    report(measure)
