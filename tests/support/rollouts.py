"""Prompts with images, and tiny models to answer them, for tests of the decoding loop."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ray_vlm.config.schema import Lora, Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data.records import PromptRecord
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import Sample, SampleSpec
from ray_vlm.engines.interface import Sampling
from ray_vlm.models.families import FAMILIES as KNOWN
from ray_vlm.models.load import load_model
from ray_vlm.models.lora import lora_config

# Prompts of different lengths, with images of different sizes (width, height): left padding and positions matter.
PROMPTS: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = (
    ("<image>What is shown?", ((96, 64),)),
    ("yes no?", ()),
    ("<image> and <image>: which class and condition is done, which is blocked?", ((128, 160), (64, 64))),
    ("<image>Next step", ((192, 112),)),
)
GREEDY = Sampling(num_generations=3, max_new_tokens=24, temperature=0)
SEEDS = [(7, row) for row in range(len(PROMPTS))]


def prompt_builder(folder: str) -> SampleBuilder:
    spec = SampleSpec(Model(name=folder, load_in_4bit=False), ChatTask(), (), kind="prompt")
    return load_sample_builder(spec)


def prompt_rows(builder: SampleBuilder, prompts: Sequence = PROMPTS) -> list[Sample]:
    rng = np.random.default_rng(0)
    rows = []
    for number, (text, sizes) in enumerate(prompts):
        images = []
        for width, height in sizes:
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
            images.append(file.getvalue())
        record = PromptRecord(str(number), number, tuple(images), sizes, (("user", text),))
        rows.append(builder.prompt_row(record))
    return rows


def fresh_model(folder: str, load_in_4bit: bool = False) -> Any:
    return load_model(Model(name=folder, load_in_4bit=load_in_4bit), precision="fp32")


def adapted_model(folder: str, load_in_4bit: bool = False) -> Any:
    """As GRPO trains it: TRL's patched head under an adapter whose B is not zero, checkpointing, in training mode."""
    from peft import get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    base = fresh_model(folder, load_in_4bit)
    add_fused_lm_head(base)
    torch.manual_seed(0)
    target = ["language", "connector", "vision"]
    model = get_peft_model(base, lora_config(Lora(rank=4, alpha=8, target=target), KNOWN[base.config.model_type]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False  # as trainers set it
    return model.train()
