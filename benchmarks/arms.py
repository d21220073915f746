"""The two arms of a training step on the same rows, for `shared_prefix`: tiny models, jobs, and one arm per trainer."""

import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_vlm.config.load import load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.models.rehearse import LiveBytes
from tests.support.stock import checkpointed

GROUP = 8  # answers to a prompt
SIDE = {"qwen3_vl": 256, "qwen2_5_vl": 448}  # of an image of 16 x 16 visual tokens


def write_model(folder: Path, family: str) -> str:
    """Write a model with random weights, twice as wide as the demo's; images of `SIDE` pixels keep their size."""
    import torch
    from transformers import AutoModelForImageTextToText

    from ray_vlm.demo.tiny import build_config, build_processor

    processor = build_processor(family)
    processor.image_processor.size = {"shortest_edge": 64**2, "longest_edge": SIDE[family] ** 2}
    torch.manual_seed(0)
    config = build_config(processor.tokenizer, family, hidden=256)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def make_job(
    folder: Path,
    model: str,
    family: str,
    method: str,
    lengths: Sequence[int],
    group: int = GROUP,
    **options: Any,
) -> JobConfig:
    """Build a job of the method on noise images. `lengths`: words of each row's answer; `group`: GRPO's answers to a
    prompt; `options`: settings of the method."""
    rng, words = np.random.default_rng(0), ["circle", "square", "ring", "star", "cross", "object"]
    rows = []
    for number, length in enumerate(lengths):
        name = _draw(folder / "images", number, SIDE[family], rng)
        answers = [" ".join(rng.choice(words, length)) for _ in range(2)]
        turns = [{"from": "human", "value": "<image>What is shown?"}, {"from": "gpt", "value": answers[0]}]
        prompt = {"prompt": "<image>What is shown?", "images": [name]}
        rows_by_method = {"sft": {"image": name, "conversations": turns}, "grpo": prompt}
        rows.append(rows_by_method.get(method) or prompt | {"chosen": answers[0], "rejected": answers[1]})
    path = folder / f"{method}-{len(rows)}-{sum(lengths)}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = {"path": str(path), "format": {"sft": "llava", "dpo": "preference", "grpo": "prompt"}[method]}
    size = group * len(lengths) if method == "grpo" else len(lengths)
    if method == "grpo":
        options |= {"num_generations": group, "rewards": {"tests.support.stock:token_reward": 1.0}}
    return load_resolved(
        {
            "method": {"name": method, **options},
            "task": "chat",
            "model": {"name": model, "load_in_4bit": False} | ({} if method == "sft" else {"adapter": "the one here"}),
            "lora": {"rank": 8, "alpha": 16},
            "data": {"train": data | {"image_root": str(folder / "images")}},
            "train": {"global_batch_size": size, "micro_batch_size": size, "precision": "fp32"},
            "cluster": {"num_workers": 0},
        }
    )


def _draw(folder: Path, number: int, side: int, rng: np.random.Generator) -> str:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    pixels = rng.integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.png")
    return f"{number}.png"


class Arm:
    """One arm: its trainer, ready to step, and the inputs of a step of one or more micro-batches."""

    def __init__(self, build: Callable[..., tuple[Any, list]], job: JobConfig, batches: Any, answers: Any = ()):
        import torch

        trainer, made = build(job, batches, answers)
        self.trainer = checkpointed(trainer)
        trainer.current_gradient_accumulation_steps = len(made)
        self.made = made
        self.tokens = self.patches = 0
        self.logps: list[Any] = []
        self.optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-3)
        base = trainer.model.get_base_model()
        base.get_decoder().register_forward_pre_hook(self._count_tokens, with_kwargs=True)
        base.get_encoder(modality="image").patch_embed.register_forward_pre_hook(self._count_patches)
        trainer.model.register_forward_hook(self._keep_logps)
        self.draw()

    def draw(self) -> None:
        """Build the step's batches as the loss takes them; GRPO's are sampled and scored, which takes time."""
        trainer = self.trainer
        samples, self.num_items = trainer.get_batch_samples(iter(self.made), len(self.made), trainer.args.device)
        self.inputs = [trainer._prepare_inputs(sample) for sample in samples]

    def _count_tokens(self, module: Any, args: Any, kwargs: Any) -> None:
        self.tokens += kwargs["inputs_embeds"].shape[:2].numel()

    def _count_patches(self, module: Any, args: Any) -> None:
        self.patches += args[0].shape[0]

    def _keep_logps(self, module: Any, args: Any, out: Any) -> None:
        log_probs = getattr(out, "log_probs", None)
        if log_probs is not None and log_probs.requires_grad:  # not what a reference says
            self.logps.append(log_probs.detach())

    def step(self, seen: bool = False) -> float:
        """Return the seconds of loss and gradients. `seen`: time a step whose images the rollout has already
        processed."""
        self.trainer.model.zero_grad()
        if not seen and hasattr(self.trainer, "recent"):
            self.trainer.recent.start(self.trainer.recent.room)
        self.tokens = self.patches = 0
        self.logps.clear()
        self.loss, started = 0.0, time.perf_counter()
        for inputs in self.inputs:
            step_inputs = dict(inputs) if isinstance(inputs, dict) else inputs
            loss = self.trainer.compute_loss(self.trainer.model, step_inputs, num_items_in_batch=self.num_items)
            loss.backward()
            self.loss += float(loss.detach())
        return time.perf_counter() - started

    def collate(self) -> float:
        """Return the seconds that stock TRL's collator takes for the step's rows; 0 for GRPO, which collates in the
        rollout."""
        drawn = copy.deepcopy(getattr(self.trainer, "drawn", []))
        started = time.perf_counter()
        for rows in drawn:
            self.trainer.data_collator(rows)
        return time.perf_counter() - started

    def learn(self) -> None:
        """Take one step of AdamW."""
        self.optimizer.step()

    def gradients(self) -> dict[str, Any]:
        """Return the gradients of the last step."""
        named = self.trainer.model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    def peak(self) -> int:
        """Return the peak of live bytes above the model in a step."""
        model = self.trainer.model
        model.zero_grad()
        self.logps.clear()
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            self.step()
        return live.peak


def logps_apart(one: Arm, other: Arm) -> float:
    """Return the largest difference of a trained token's log-probability in the last step; 0 where the arms group their
    rows into different micro-batches, because tokens cannot be paired then."""
    worst = 0.0
    if [logps.shape for logps in one.logps] != [logps.shape for logps in other.logps]:
        return worst
    for own_logps, other_logps in zip(one.logps, other.logps, strict=True):
        trained = own_logps != 0  # this package returns 0 for tokens that are not trained
        assert trained.any()
        apart = (own_logps[:, None] - other_logps[None]) * trained[:, None]  # TRL shuffles the answers of a group
        worst = max(worst, float(apart.abs().amax(dim=2).amin(dim=1).max()))
    return worst
