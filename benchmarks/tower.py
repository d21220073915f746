"""A LoRA step on the language model, its frozen image encoder under autograd (as TRL and PEFT leave it) and without;
and the encoder with attention in one call a layer against transformers' call for each window or image.

The step: tiny Qwen2.5-VL and Qwen3-VL in float32 with gradient checkpointing, one torch thread, rows with an image of
192x192 pixels. Arms alternate; the figure is the ratio of medians. Gradients are compared bit for bit. Attention:
heads of 80 channels in float32; the figures are medians over pairs of arms that alternate. The calls alone are those of
28 layers of Qwen2.5-VL's width with windows; whole encoders have half of that width and four layers.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import figure, report
from ray_vlm.config.schema import Lora, Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data.collate import collate
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import Sample, SampleSpec
from ray_vlm.demo.tiny import build_config, build_processor, write_untrained
from ray_vlm.models.attention import attend_at_once, attend_segments
from ray_vlm.models.backbone import recompute
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.frozen_encoder import run_without_autograd
from ray_vlm.models.load import load_model, share_weights
from ray_vlm.models.lora import lora_config

SIDE, ROWS, WORDS = 196, 4, 64
WIDTH, HEAD, WINDOW_LAYERS, DEPTH = 1280, 80, 28, 4
# Rows and columns of visual tokens of each image. Windows of Qwen2.5-VL have four of them on a side.
IMAGES = {
    "256 tokens": [(16, 16)],
    "1,024 tokens": [(32, 32)],
    "8 images of 64": [(8, 8)] * 8,
    "uneven sizes": [(5, 7), (12, 9), (16, 16), (10, 20)],
}


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


def build_encoders(family: str) -> tuple[Any, Any]:
    """Build an image encoder with random weights as transformers runs it, and one with the same weights whose layers
    attend in one call."""
    import torch
    from transformers import AutoModelForImageTextToText

    config = build_config(build_processor(family).tokenizer, family)
    vision = config.vision_config
    vision.depth, vision.num_heads = DEPTH, WIDTH // 2 // HEAD
    if family == "qwen2_vl":
        vision.embed_dim = WIDTH // 2
    else:
        vision.hidden_size, vision.intermediate_size = WIDTH // 2, 1712
    if family == "qwen2_5_vl":
        vision.fullatt_block_indexes = [DEPTH - 1]
    torch.manual_seed(0)
    stock = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    at_once = share_weights(stock)
    assert attend_at_once(at_once)
    return stock.get_encoder(modality="image"), at_once.get_encoder(modality="image")


def time_pairs(arms: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the time of the second arm over that of the first in each round; every other round begins with the second
    arm. A round before them does not count. With one thread it is CPU time, which other processes do not lengthen."""
    import torch

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    ratios = []
    for turn in range(rounds + 1):
        seconds = [0.0, 0.0]
        for number in (0, 1) if turn % 2 else (1, 0):
            started = clock()
            with torch.no_grad():
                arms[number]()
            seconds[number] = clock() - started
        ratios.append(seconds[1] / seconds[0])
    return ratios[1:]


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """Count the calls of torch's attention, in the one value of the list."""
    from torch.nn import functional

    plain, count = functional.scaled_dot_product_attention, [0]

    def attend(*args: Any, **options: Any) -> Any:
        count[0] += 1
        return plain(*args, **options)

    functional.scaled_dot_product_attention = attend
    try:
        yield count
    finally:
        functional.scaled_dot_product_attention = plain


def encode(encoder: Any, pixels: Any, grid: Any) -> Any:
    """Return the features of the images."""
    return encoder(pixels, grid_thw=grid).pooler_output


def compare_encoders(family: str, quick: bool) -> list[dict[str, Any]]:
    """Run whole forwards of the image encoder with images of several sizes."""
    import torch

    stock, at_once = build_encoders(family)
    lines = []
    for name, sizes in IMAGES.items():
        grid = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in sizes])
        shape = int(grid.prod(dim=1).sum()), stock.patch_embed.proj.weight[0].numel()
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        arms = [partial(encode, encoder, pixels, grid) for encoder in (stock, at_once)]
        calls, outputs = [], []
        for arm in arms:
            with torch.no_grad(), counted_calls() as count:
                outputs.append(arm())
            calls.append(count[0] / DEPTH)
        difference = float((outputs[1] - outputs[0]).abs().max() / outputs[0].abs().max())
        ratios = time_pairs(arms, 2 if quick else 11 if name == "1,024 tokens" else 15)
        title = f"tower.attention.{family}, {name}"
        lines += [
            figure(f"{title}: calls a layer, transformers", calls[0], ""),
            figure(f"{title}: calls a layer", calls[1], "", 1.0 if len(set(sizes)) == 1 else None),
            figure(f"{title}: largest relative difference", difference, "", 1e-6),
            figure(f"{title}: speed", statistics.median(1 / ratio for ratio in ratios), "x", 0.97, most=False),
        ]
    return lines


def compare_calls(threads: int, bar: float | None, rounds: int) -> list[dict[str, Any]]:
    """Time the calls alone, for an image of 1,024 visual tokens in windows of 64 patches."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    torch.set_num_threads(threads)
    patches, window = 4096, 64
    ends = torch.arange(0, patches + 1, window, dtype=torch.int32)
    joint = torch.randn(patches, 3, WIDTH // HEAD, HEAD)
    query, key, value = (part.transpose(0, 1)[None] for part in joint.unbind(1))
    query, key = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (query, key))  # as rotation leaves them
    module, scale = torch.nn.Identity(), HEAD**-0.5

    def stock() -> None:  # as `Qwen2_5_VLVisionAttention` of transformers 5.23
        for _ in range(WINDOW_LAYERS):
            lengths = ends[1:] - ends[:-1]
            splits = [torch.split(part, lengths.tolist(), dim=2) for part in (query, key, value)]
            torch.cat(
                [
                    sdpa_attention_forward(module, *part, attention_mask=None, scaling=scale, is_causal=False)[0]
                    for part in zip(*splits, strict=True)
                ],
                dim=1,
            )

    def at_once() -> None:
        for _ in range(WINDOW_LAYERS):
            attend_segments(module, query, key, value, None, cu_seq_lens_q=ends, scaling=scale)

    ratios = time_pairs([stock, at_once], rounds)
    name = f"tower.attention.calls of {WINDOW_LAYERS} layers, {threads} threads"
    return [
        figure(f"{name}: time", statistics.median(ratios), "x", bar),
        *(figure(f"{name}: {word}", pick(ratios), "x") for word, pick in (("least", min), ("most", max))),
    ]


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return all figures."""
    import torch

    families = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
    lines = compare_calls(len(os.sched_getaffinity(0)), 0.7, 3 if quick else 15)
    lines += compare_calls(1, None, 3 if quick else 15)
    torch.set_num_threads(1)
    lines += [line for name in families for line in compare_encoders(name, quick)]
    with tempfile.TemporaryDirectory() as folder:
        lines += [line for name in families for line in compare(Path(folder) / name, name, 3 if quick else 15)]
    return lines


if __name__ == "__main__":
    report(measure)
