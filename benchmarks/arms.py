"""Two sides of a training step on the same rows, for `shared_prefix`: tiny models, jobs, and an arm a side."""

import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stock import checkpointed
from ray_vlm.config.load import load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.models.live import LiveBytes

GROUP = 8  # answers to a prompt
SIDE = {"qwen3_vl": 256, "qwen2_5_vl": 448}  # of an image of 16 x 16 visual tokens


def write_model(folder: Path, family: str) -> str:
    """Random weights, twice as wide as the demo's; images of `SIDE` pixels stay as they are."""
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


def make_job(folder: Path, model: str, family: str, method: str, lengths: Sequence[int], **options: Any) -> JobConfig:
    """A job of the method on noise; `lengths`: words of the answers, row by row; `options` of the method."""
    rng, words = np.random.default_rng(0), ["circle", "square", "ring", "star", "cross", "object"]
    rows = []
    for number, length in enumerate(lengths):
        name = _draw(folder / "images", number, SIDE[family], rng)
        said = [" ".join(rng.choice(words, length)) for _ in range(2)]
        turns = [{"from": "human", "value": "<image>What is shown?"}, {"from": "gpt", "value": said[0]}]
        asked = {"prompt": "<image>What is shown?", "images": [name]}
        of_method = {"sft": {"image": name, "conversations": turns}, "grpo": asked}
        rows.append(of_method.get(method) or asked | {"chosen": said[0], "rejected": said[1]})
    path = folder / f"{method}-{len(rows)}-{sum(lengths)}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = {"path": str(path), "format": {"sft": "llava", "dpo": "preference", "grpo": "prompt"}[method]}
    size = GROUP * len(lengths) if method == "grpo" else len(lengths)
    if method == "grpo":
        options |= {"num_generations": GROUP, "rewards": {"benchmarks.stock:token_reward": 1.0}}
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
    """One side: its trainer, ready, and what goes into a step of one micro-batch or more."""

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
        """The step's batches as the loss takes them; of GRPO sampled and scored, which takes its time."""
        trainer = self.trainer
        samples, self.num_items = trainer.get_batch_samples(iter(self.made), len(self.made), trainer.args.device)
        self.inputs = [trainer._prepare_inputs(sample) for sample in samples]

    def _count_tokens(self, module: Any, args: Any, kwargs: Any) -> None:
        self.tokens += kwargs["inputs_embeds"].shape[:2].numel()

    def _count_patches(self, module: Any, args: Any) -> None:
        self.patches += args[0].shape[0]

    def _keep_logps(self, module: Any, args: Any, out: Any) -> None:
        told = getattr(out, "log_probs", None)
        if told is not None and told.requires_grad:  # not what a reference says
            self.logps.append(told.detach())

    def step(self, seen: bool = False) -> float:
        """Seconds of loss and gradients. `seen`: of a step whose images the rollout has seen."""
        self.trainer.model.zero_grad()
        if not seen and hasattr(self.trainer, "recent"):
            self.trainer.recent.start(self.trainer.recent.room)
        self.tokens = self.patches = 0
        self.logps.clear()
        self.loss, started = 0.0, time.perf_counter()
        for inputs in self.inputs:
            given = dict(inputs) if isinstance(inputs, dict) else inputs
            loss = self.trainer.compute_loss(self.trainer.model, given, num_items_in_batch=self.num_items)
            loss.backward()
            self.loss += float(loss.detach())
        return time.perf_counter() - started

    def collate(self) -> float:
        """Seconds that stock TRL's collator takes for the step's rows; GRPO's are collated in the rollout: 0."""
        drawn = copy.deepcopy(getattr(self.trainer, "drawn", []))
        started = time.perf_counter()
        for rows in drawn:
            self.trainer.data_collator(rows)
        return time.perf_counter() - started

    def learn(self) -> None:
        """One step of AdamW."""
        self.optimizer.step()

    def gradients(self) -> dict[str, Any]:
        """Of the last step."""
        named = self.trainer.model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    def peak(self) -> int:
        """Bytes alive above the model at the most, in a step."""
        model = self.trainer.model
        model.zero_grad()
        self.logps.clear()
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            self.step()
        return live.peak


def logps_apart(one: Arm, other: Arm) -> float:
    """The largest difference of a trained token's log-probability in the last step; 0 where the arms have their rows
    in other micro-batches, so that tokens cannot be paired."""
    worst = 0.0
    if [of_batch.shape for of_batch in one.logps] != [of_batch.shape for of_batch in other.logps]:
        return worst
    for mine, theirs in zip(one.logps, other.logps, strict=True):
        trained = mine != 0  # where nothing is trained, ours has nothing
        assert trained.any()
        apart = (mine[:, None] - theirs[None]) * trained[:, None]  # TRL shuffles the answers of a group
        worst = max(worst, float(apart.abs().amax(dim=2).amin(dim=1).max()))
    return worst
