"""Time to the first token of 8 completions of one image: prefill shared by the group against `generate` on 8 copies.

Untrained tiny models of both families, float32; a prompt of about 280 tokens, 256 of them one image. One torch thread;
runs alternate, and the figure is the median of the ratios of each pair. `generate` gets its batch ready-made and this
package builds its own, so the time in which a peer decodes and cuts 8 copies of the image is left out. The greedy
tokens must be equal.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.figures import figure, report
from ray_vlm.config.schema import Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data.collate import collate
from ray_vlm.data.records import PromptRecord
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import Sample, SampleSpec
from ray_vlm.demo.tiny import write_untrained
from ray_vlm.engines.interface import Sampling
from ray_vlm.engines.sampling import sample_groups
from ray_vlm.models.load import load_model

FAMILIES = ("qwen3_vl", "qwen2_5_vl")
GROUP = 8
IMAGE_TOKENS_A_SIDE = 16
GREEDY_TOKENS = 16
WARM_UP = 2


def make_prompt(model: Model) -> tuple[SampleBuilder, Sample]:
    """Build a question about a picture of noise that gives 16 x 16 tokens."""
    side = load_sample_builder(SampleSpec(model, ChatTask(), ())).image_spec.factor * IMAGE_TOKENS_A_SIDE
    builder = load_sample_builder(SampleSpec(model, ChatTask(), (), max_pixels=side * side, kind="prompt"))
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    turns = (("user", "<image>What is shown? Which class and condition?"),)
    return builder, builder.prompt_row(PromptRecord("noise", 0, (file.getvalue(),), ((side, side),), turns))


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def compare(folder: Path, family: str, pairs: int) -> list[dict[str, Any]]:
    """Return the figures of one family."""
    import torch

    spec = Model(name=str(write_untrained(folder / family, family)), load_in_4bit=False)
    model = load_model(spec, precision="fp32").eval()
    builder, row = make_prompt(spec)
    pad = builder.tokenizer.pad_token_id
    copies = collate([row] * GROUP, builder)

    def shared(num_tokens: int) -> list[list[int]]:
        sampling = Sampling(GROUP, num_tokens, temperature=0)
        return [completion.ids for completion in sample_groups(model, [row], builder, sampling, [(0,)], "cpu")[0]]

    def stock(num_tokens: int) -> list[list[int]]:
        with torch.inference_mode():
            tokens = model.generate(
                **copies,
                max_new_tokens=num_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=pad,
            )
        return tokens[:, len(row.input_ids) :].tolist()

    differing = _differing(shared(GREEDY_TOKENS), stock(GREEDY_TOKENS), pad)
    for _ in range(WARM_UP):
        shared(1)
        stock(1)
    shared_s, copies_s = [], []
    for _ in range(pairs):
        shared_s.append(_seconds(lambda: shared(1)))
        copies_s.append(_seconds(lambda: stock(1)))
    ratios = [b / a for a, b in zip(shared_s, copies_s, strict=True)]
    return [
        figure(f"prefill.{family}.prompt", len(row.input_ids), "tokens"),
        figure(f"prefill.{family}.differing", differing, "tokens", 0),
        figure(f"prefill.{family}.shared", statistics.median(shared_s), "s"),
        figure(f"prefill.{family}.copies", statistics.median(copies_s), "s"),
        figure(f"prefill.{family}.ratio", statistics.median(ratios), "x", 3.0, most=False),
        figure(f"prefill.{family}.ratio_min", min(ratios), "x"),
        figure(f"prefill.{family}.ratio_max", max(ratios), "x"),
    ]


def _differing(shared: list[list[int]], copies: list[list[int]], pad: int) -> int:
    """Places at which two lists of sequences differ; `generate` pads what has ended, and ours stops there."""
    pairs = [zip_longest(left, right, fillvalue=pad) for left, right in zip(shared, copies, strict=True)]
    return sum(a != b for pair in pairs for a, b in pair)


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return all figures."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return [line for family in FAMILIES for line in compare(Path(folder), family, 5 if quick else 15)]


if __name__ == "__main__":
    report(measure)
